"""The controller and the stateful interface of the differentiable memory, the fusion, and states as files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from memkern.nn import DifferentiableMemory, MemoryController, MemoryFusion, load_state, save_state
from memkern.nn.state import copy_state, detach_state, map_state, select_rows
from memkern.ops.memory import MemoryState

D, N, W, H, B = 10, 6, 8, 2, 3


def controller(**options: Any) -> MemoryController:
    torch.manual_seed(3)
    return MemoryController(D, N, W, H, **{"use_temporal_links": True, **options})


def run(module: MemoryController, steps: int, batch: int = B, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    out, state, info = None, None, {}
    for _ in range(steps):
        out, info = module(torch.randn(batch, D, generator=generator), state)
        state = info["state"]
    return out, info


class TestController:
    def test_what_a_call_returns(self) -> None:
        out, info = run(controller(), 3)
        assert out.shape == (B, D)
        shapes = {name: tuple(value.shape) for name, value in info.items() if name != "state"}
        assert shapes == {
            "read_weights": (B, H, N),
            "write_weights": (B, H, N),
            "read_vectors": (B, H, W),
            "write_vectors": (B, H, W),
            "memory_state": (B, N, W),
            "usage": (B, N),
            "temporal_links": (B, N, N),
        }
        assert isinstance(info["state"], MemoryState)
        assert ((info["usage"] >= 0) & (info["usage"] <= 1)).all()
        assert ((info["temporal_links"] >= 0) & (info["temporal_links"] <= 1)).all()
        without = run(controller(use_temporal_links=False, use_usage_tracking=False), 2)[1]
        assert "usage" not in without
        assert "temporal_links" not in without

    def test_parameters_that_a_mode_does_not_use_are_not_created(self) -> None:
        names = {name.split(".")[0] for name, _ in controller(use_temporal_links=False).named_parameters()}
        assert "read_modes" not in names
        assert "free_gates" in names
        assert "free_gates" not in dict(controller(use_usage_tracking=False).named_parameters())
        bare = controller(use_output=False)
        assert bare.output_proj is None
        assert run(bare, 1)[0] is None

    @pytest.mark.parametrize("links", [False, True])
    @pytest.mark.parametrize("usage", [False, True])
    def test_slots_differ_and_every_parameter_learns(self, links: bool, usage: bool) -> None:
        module = controller(use_temporal_links=links, use_usage_tracking=usage)
        out, info = run(module, 4)
        memory = info["memory_state"][0]
        assert (memory - memory[:1]).abs().max() > 1e-2, "all slots hold the same vector"
        out.square().sum().backward()
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_rows_do_not_meet_and_the_batch_may_differ(self) -> None:
        module = controller()
        x = torch.randn(2, 4, D)
        whole, state = module(x[0])[0], None
        for t in range(2):
            whole, info = module(x[t], state)
            state = info["state"]
        alone = None
        for t in range(2):
            single, info = module(x[t][1:2], alone)
            alone = info["state"]
        torch.testing.assert_close(single[0], whole[1])

    def test_sharpness_focuses(self) -> None:
        def entropy(sharpness: float) -> float:
            weights = run(controller(sharpness=sharpness, use_temporal_links=False), 3)[1]["read_weights"]
            return -(weights * (weights + 1e-12).log()).sum(-1).mean().item()

        assert entropy(4.0) < entropy(2.0) < entropy(1.0) < entropy(0.5)

    def test_a_masked_row_keeps_its_state(self) -> None:
        module = controller()
        state = run(module, 2)[1]["state"]
        out, info = module(torch.randn(B, D), state, torch.tensor([True, False, True]))
        for before, after in zip(state, info["state"], strict=True):
            assert torch.equal(before[1], after[1])
        assert not torch.equal(info["state"].memory[0], state.memory[0])
        torch.testing.assert_close(out[1], module.output_proj.bias)

    def test_set_get_reset(self) -> None:
        module = controller()
        assert torch.equal(module.get_memory_state(), torch.zeros(N, W))
        given = torch.randn(N, W)
        module.set_memory_state(given)
        kept = given.clone()
        given.zero_()
        assert torch.equal(module.get_memory_state(), kept)
        x = torch.randn(B, D)
        _, info = module(x)
        assert torch.equal(module.get_memory_state(), kept), "a call changed what was set"
        assert torch.equal(module.initial_state(B).memory[2], kept)
        module.set_memory_state(torch.randn(B, N, W))
        assert module.get_memory_state().shape == (B, N, W)
        with pytest.raises(ValueError, match="expected batch 2, got 3"):
            module.initial_state(2)
        module.set_memory_state(info["state"])
        continued = module(x)[0]
        torch.testing.assert_close(continued, module(x, info["state"])[0])
        with pytest.raises(ValueError, match="expected batch 1, got 3"):
            module.initial_state(1)
        assert not module.initial_state(B).memory.requires_grad
        module.reset_memory()
        assert not module.get_memory_state().any()
        with pytest.raises(ValueError, match="memory state: expected shape"):
            module.set_memory_state(torch.zeros(N, W + 1))

    def test_visualize(self) -> None:
        module = controller()
        shown = module.visualize_memory()
        assert {name: value.shape for name, value in shown.items()} == {
            "memory": (N, W),
            "usage": (N,),
            "temporal_links": (N, N),
        }
        assert module.visualize_memory(run(module, 2)[1]["state"])["memory"].shape == (B, N, W)
        module.set_memory_state(torch.randn(B, N, W))
        assert module.visualize_memory()["usage"].shape == (B, N)
        assert set(controller(use_temporal_links=False, use_usage_tracking=False).visualize_memory()) == {"memory"}

    def test_checks(self) -> None:
        with pytest.raises(ValueError, match="sharpness must be > 0"):
            controller(sharpness=0)
        with pytest.raises(ValueError, match="num_heads must be an integer >= 1"):
            MemoryController(D, N, W, 0)
        with pytest.raises(ValueError, match=r"x: expected shape \(B, 10\)"):
            controller()(torch.zeros(B, D + 1))
        assert "memory_slots=6" in repr(controller())

    def test_second_step_deepcopy_and_float64(self) -> None:
        module = controller()
        for _ in range(2):
            module(torch.randn(B, D))[0].sum().backward()
        module.set_memory_state(run(module, 1)[1]["state"])
        copy.deepcopy(module)
        double = controller().double()
        assert double(torch.randn(B, D, dtype=torch.float64))[1]["memory_state"].dtype == torch.float64


class TestStateful:
    def test_links_point_from_the_earlier_slot(self) -> None:
        memory = DifferentiableMemory(8, 4, enable_temporal_links=True)
        for slot in (2, 5):
            memory.write(torch.eye(8)[slot].view(1, 1, 8), torch.randn(1, 1, 4))
        assert memory.temporal_links[2, 5] > 0
        assert memory.temporal_links[5, 2] == 0
        assert not memory.temporal_links.diagonal().any()

    def test_write_read_and_the_module_without_graph(self) -> None:
        memory = DifferentiableMemory(N, W, H)
        weights = torch.softmax(torch.randn(B, H, N), -1).requires_grad_()
        value = torch.randn(B, H, W, requires_grad=True)
        erase = torch.rand(B, H, W)
        first = memory.write(weights, value, erase)
        torch.testing.assert_close(first, torch.einsum("bhn,bhw->bnw", weights, value))
        second = memory.write(weights, value, erase)
        kept = (
            first * (1 - weights[:, 0, :, None] * erase[:, 0, None]) * (1 - weights[:, 1, :, None] * erase[:, 1, None])
        )
        torch.testing.assert_close(second, kept + first)
        memory.read(weights, bank=second).sum().backward()
        assert value.grad.any()
        assert not memory.memory.requires_grad
        torch.testing.assert_close(memory.read(weights), weights @ second)
        copy.deepcopy(memory)
        assert memory.memory.shape == (B, N, W)
        with pytest.raises(ValueError, match="the memory holds 3 rows, got 1"):
            memory.read(weights[:1])
        memory.reset()
        assert memory.memory.shape == (N, W)
        assert not memory.memory.any()

    def test_addressing(self) -> None:
        memory = DifferentiableMemory(N, W, H, sharpness=3.0)
        key = torch.randn(B, H, W)
        torch.testing.assert_close(memory.content_addressing(key), torch.full((B, H, N), 1 / N))
        memory.write(torch.softmax(torch.randn(B, H, N), -1), torch.randn(B, H, W))
        cosine = torch.cosine_similarity(key[:, :, None], memory.memory[:, None], dim=-1)
        torch.testing.assert_close(
            memory.content_addressing(key), torch.softmax(3.0 * cosine, -1), atol=1e-5, rtol=1e-4
        )
        beta = torch.rand(B, H, 1)
        torch.testing.assert_close(
            memory.content_addressing(key, beta), torch.softmax(beta * cosine, -1), atol=1e-5, rtol=1e-4
        )

    def test_new_content_goes_to_the_least_used_slots(self) -> None:
        memory = DifferentiableMemory(4, W)
        memory.write(torch.tensor([[[0.9, 0.0, 0.05, 0.0]]]), torch.randn(1, 1, W))
        weights = memory.get_usage_weights()
        assert weights.shape == (4,)
        assert weights[1] > 0.9
        assert weights.min() >= 0
        assert memory.usage.max() <= 1
        off = DifferentiableMemory(4, W, enable_usage_tracking=False)
        off.write(torch.ones(2, 1, 4) / 4, torch.randn(2, 1, W))
        torch.testing.assert_close(off.get_usage_weights(), torch.full((2, 4), 0.25))
        assert not off.usage.any()

    def test_checks(self) -> None:
        memory = DifferentiableMemory(N, W, H)
        with pytest.raises(ValueError, match=r"weights: expected shape \(B, 2, 6\)"):
            memory.read(torch.zeros(B, 1, N))
        with pytest.raises(ValueError, match="value: expected shape"):
            memory.write(torch.zeros(B, H, N), torch.zeros(B, H, W + 1))
        with pytest.raises(ValueError, match="sharpness must be > 0"):
            DifferentiableMemory(N, W, sharpness=-1)
        assert "num_slots=6" in repr(memory)


class TestFusion:
    def test_starts_as_the_identity_and_learns(self) -> None:
        fusion = MemoryFusion(D, 2)
        hiddens, memory = torch.randn(B, 7, D), torch.randn(B, 1, D, requires_grad=True)
        assert torch.equal(fusion(hiddens, memory), hiddens)
        torch.nn.init.normal_(fusion.output.weight)
        fusion(hiddens, memory).square().sum().backward()
        assert [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert memory.grad.any()
        assert "num_heads=2" in repr(fusion)
        with pytest.raises(ValueError, match="must be a multiple of num_heads"):
            MemoryFusion(D, 3)

    def test_order_of_slots_does_not_matter(self) -> None:
        fusion = MemoryFusion(D, 2)
        torch.nn.init.normal_(fusion.output.weight)
        hiddens, memory = torch.randn(B, 7, D), torch.randn(B, 5, D)
        torch.testing.assert_close(fusion(hiddens, memory), fusion(hiddens, memory.flip(1)))


STATES = {
    "tensor": lambda: torch.randn(B, N, W),
    "dict": lambda: {f"expert_{j}": torch.randn(B, N, W) for j in range(12)} | {"routing_probs": torch.rand(B, 12)},
    "differentiable": lambda: run(controller(), 2)[1]["state"],
}


@pytest.mark.parametrize("kind", STATES)
def test_states_as_files_and_values(kind: str, tmp_path: Path) -> None:
    state = STATES[kind]()
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert type(loaded) is type(state)
    if isinstance(state, dict):
        assert list(loaded) == list(state)

    def tensors(value: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        map_state(lambda t: found.append(t) or t, value)
        return found

    for before, after in zip(tensors(state), tensors(loaded), strict=True):
        assert torch.equal(before, after)
    assert not any(t.requires_grad for t in tensors(detach_state(state)))
    assert all(a is not b for a, b in zip(tensors(state), tensors(copy_state(state)), strict=True))
    assert all(t.shape[0] == 2 for t in tensors(select_rows(state, torch.tensor([2, 0]))))


def test_bad_state_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no memory state"):
        load_state(tmp_path / "none")
    (tmp_path / "damaged").write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "damaged")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no memory state"):
        load_state(tmp_path / "other")
    save_file({"memory": torch.zeros(1)}, tmp_path / "new", {"format": "memkern-memory-state", "version": "99"})
    with pytest.raises(ValueError, match="newer than 1"):
        load_state(tmp_path / "new")
    with pytest.raises(TypeError, match="expected a tensor"):
        save_state([1], tmp_path / "x")
    with pytest.raises(TypeError, match="memory_state: expected a tensor"):
        map_state(lambda t: t, 3)
    assert map_state(lambda t: t, None) is None
