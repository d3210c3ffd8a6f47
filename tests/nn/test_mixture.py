"""The modules of the gated memory mixture: names, checks, values against the formulas, state that is never aliased."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memkern.nn import AggregatedMemoryReader, ExpertUpdater, GatedMemoryMixture, MemoryGatingNetwork
from memkern.nn._stacked import _block

D, S, B = 12, 5, 3


def states(count: int, batch: int = B) -> list[torch.Tensor]:
    return [torch.randn(batch, S, D, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 9, 2.0, True, "4"])
@pytest.mark.parametrize(
    "make",
    [
        lambda k, **more: GatedMemoryMixture(k, S, D, **more),
        lambda k, **more: MemoryGatingNetwork(D, k, **more),
        lambda k, **more: ExpertUpdater(D, k, **more),
        lambda k, **more: AggregatedMemoryReader(D, k, **more),
    ],
)
def test_number_of_experts(make: Any, count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_experts must be in \[2, 8\]"):
        make(count)
    assert make(16, max_experts=16).num_experts == 16
    with pytest.raises(ValueError, match=r"num_experts must be in \[2, 16\], got 17"):
        make(17, max_experts=16)


@pytest.mark.parametrize("count", range(2, 9))
def test_every_count_works_together(count: int) -> None:
    mixture, router = GatedMemoryMixture(count, S, D), MemoryGatingNetwork(D, count)
    updater, reader = ExpertUpdater(D, count), AggregatedMemoryReader(D, count)
    written = torch.randn(B, S, D)
    probs, logits, entropy = router(written)
    assert probs.shape == logits.shape == (B, count)
    assert entropy.shape == (B,)
    old = [expert.expand(B, -1, -1) for expert in mixture.get_all_experts()]
    new = updater(old, written, probs)
    assert reader(new, routing_probs=probs).shape == (B, S, D)


class TestMixture:
    def test_strategies(self) -> None:
        mixture = GatedMemoryMixture(4, S, D, ["learned", "zeros", "uniform", "orthogonal"])
        learned, zeros, uniform, orthogonal = mixture.get_all_experts()
        assert 0 < learned.std() < 0.05
        assert not zeros.any()
        assert uniform.min() >= 0
        assert uniform.max() < 0.1
        torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(S), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="init_strategies must have length 4, got 2"):
            GatedMemoryMixture(4, S, D, ["learned", "zeros"])
        with pytest.raises(ValueError, match="Invalid init_strategy 'other'"):
            GatedMemoryMixture(4, S, D, "other")

    def test_set_and_reset_leave_the_learned_values_alone(self) -> None:
        mixture = GatedMemoryMixture(2, S, D)
        learned = [p.detach().clone() for p in mixture.parameters()]
        given = torch.randn(S, D)
        mixture.set_expert_state(1, given)
        assert torch.equal(mixture.get_expert_state(1), given)
        given.zero_()
        assert mixture.get_expert_state(1).any(), "a caller's tensor is aliased"
        assert mixture.get_expert_state(0) is mixture._expert_params[0]
        mixture.reset_experts()
        assert mixture.get_expert_state(1) is mixture._expert_params[1]
        for before, after in zip(learned, mixture.parameters(), strict=True):
            assert torch.equal(before, after)

    def test_checks(self) -> None:
        mixture = GatedMemoryMixture(2, S, D)
        for call in (mixture.get_expert_state, lambda i: mixture.set_expert_state(i, torch.zeros(S, D))):
            for index in (-1, 2):
                with pytest.raises(IndexError, match="expert_idx must be in"):
                    call(index)
        with pytest.raises(ValueError, match="Expert state must have shape"):
            mixture.set_expert_state(0, torch.zeros(S + 1, D))
        with pytest.raises(ValueError, match="expert_states must contain 2 experts, got 1"):
            mixture([torch.zeros(S, D)])
        with pytest.raises(ValueError, match="Expert 0 state has shape mismatch"):
            mixture([torch.zeros(S, D + 1)] * 2)
        with pytest.raises(ValueError, match="must be 2D"):
            mixture([torch.zeros(D)] * 2)
        with pytest.raises(ValueError, match="memory_slots must be an integer >= 1"):
            GatedMemoryMixture(2, 0, D)
        batched = [torch.zeros(B, S, D)] * 2
        assert mixture(batched) is batched
        assert mixture()[0] is mixture._expert_params[0]

    def test_keys_and_repr(self) -> None:
        mixture = GatedMemoryMixture(3, S, D)
        assert list(mixture.state_dict()) == [f"_expert_params.{j}" for j in range(3)]
        assert "num_experts=3" in repr(mixture)


class TestRouter:
    def test_values(self) -> None:
        router = MemoryGatingNetwork(D, 4, temperature=0.5)
        x = torch.randn(B, S, D) * 3
        z = (x.mean(1) @ router.routing_projection.weight.T + router.routing_projection.bias).clamp(-10, 10)
        probs, logits, entropy = router(x)
        torch.testing.assert_close(logits, z)
        torch.testing.assert_close(probs, torch.softmax(z / 0.5, -1))
        torch.testing.assert_close(entropy, -(probs * torch.log(probs + 1e-10)).sum(-1))
        torch.testing.assert_close(router.compute_routing_entropy(probs), entropy)

    def test_attention_pooling(self) -> None:
        router = MemoryGatingNetwork(D, 2, pooling_method="attention")
        x = torch.randn(B, S, D)
        weights = torch.softmax(x @ router.pool_query / math.sqrt(D), 1)
        pooled = (weights[..., None] * x).sum(1)
        torch.testing.assert_close(router(x)[1], router.routing_projection(pooled))
        router(x)[0][:, 0].sum().backward()
        assert router.pool_query.grad.any()
        assert "pool_query" in router.state_dict()
        assert router.pool_query.shape == (D,)

    def test_zero_rows_masks_and_extremes(self) -> None:
        router = MemoryGatingNetwork(D, 4)
        x = torch.randn(B, S, D)
        x[1] = 0
        probs = router(x)[0]
        assert torch.equal(probs[1], torch.full((4,), 0.25))
        mask = torch.ones(B, S, dtype=torch.bool)
        mask[:, 2:] = False
        torch.testing.assert_close(router(x, mask)[0], router(x[:, :2])[0])
        hot, cold = MemoryGatingNetwork(D, 4, temperature=100.0), MemoryGatingNetwork(D, 4, temperature=1e-3)
        for other in (hot, cold):
            other.load_state_dict(router.state_dict())
        assert hot(x)[2][0] > router(x)[2][0] > cold(x)[2][0]
        assert cold(x)[0].isfinite().all()

    def test_losses_and_distribution(self) -> None:
        router = MemoryGatingNetwork(D, 2)
        probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.4, 0.6]])
        assert router.compute_load_balance_loss(probs).item() == pytest.approx(1.0444444, abs=1e-6)
        row_mask = torch.tensor([True, True, False])
        assert router.compute_load_balance_loss(probs, row_mask).item() == pytest.approx(1.3, abs=1e-6)
        shown = router.get_routing_distribution(probs)
        torch.testing.assert_close(shown["mean_probs"], probs.mean(0))
        torch.testing.assert_close(shown["max_probs"], torch.tensor([0.7, 0.6]))
        torch.testing.assert_close(shown["min_probs"], torch.tensor([0.4, 0.3]))
        assert shown["entropy_std"] > 0
        assert router.get_routing_distribution(probs[:1])["entropy_std"] == 0
        assert router.get_routing_weights().shape == (2, D)
        assert not router.get_routing_weights().requires_grad
        routing = router.route(torch.randn(B, S, D), row_mask=row_mask)
        assert routing.load_balance_loss.shape == ()

    @pytest.mark.parametrize("temperature", [0, -1.0, True, "1"])
    def test_temperature(self, temperature: Any) -> None:
        with pytest.raises(ValueError, match="Temperature must be > 0"):
            MemoryGatingNetwork(D, 2, temperature)

    def test_checks(self) -> None:
        with pytest.raises(ValueError, match="pooling_method must be"):
            MemoryGatingNetwork(D, 2, pooling_method="median")
        router = MemoryGatingNetwork(D, 2)
        with pytest.raises(ValueError, match=f"Expected hidden_dim={D}, got {D + 1}"):
            router(torch.zeros(B, S, D + 1))
        with pytest.raises(ValueError, match="must be 3D"):
            router(torch.zeros(B, D))
        assert sum(p.numel() for p in MemoryGatingNetwork(768, 4).parameters()) == 3076
        assert "pooling_method='mean'" in repr(router)


class TestUpdater:
    def test_values_and_gradients(self) -> None:
        updater = ExpertUpdater(D, 3)
        old, written = states(3), torch.randn(B, S, D, requires_grad=True)
        probs = torch.softmax(torch.randn(B, 3), -1)
        new = updater(old, written, probs)
        for j in range(3):
            gate, candidate = updater.compute_expert_gates(old[j], written, j)
            a = updater.apply_routing_modulation(gate, probs[:, j, None, None])
            torch.testing.assert_close(new[j], a * candidate + (1 - a) * old[j])
        sum(expert.square().sum() for expert in new).backward()
        assert all(p.grad is not None and p.grad.any() for p in updater.parameters())
        assert written.grad.any()
        assert all(expert.grad.any() for expert in old)

    def test_probability_zero_and_masked_rows_keep_the_state(self) -> None:
        updater = ExpertUpdater(D, 2)
        old, written = states(2), torch.randn(B, S, D)
        probs = torch.tensor([[0.0, 1.0]]).expand(B, 2)
        assert torch.equal(updater(old, written, probs)[0], old[0])
        stacked = torch.stack(old, 1)
        kept = updater.update(stacked, written, probs, torch.tensor([True, False, True]))
        assert torch.equal(kept[1], stacked[1])
        assert not torch.equal(kept[0], stacked[0])

    def test_checks(self) -> None:
        updater = ExpertUpdater(D, 2)
        old, written, probs = states(2), torch.randn(B, S, D), torch.full((B, 2), 0.5)
        for arguments, text in (
            ((torch.stack(old), written, probs), "expert_states must be a list"),
            ((tuple(old), written, probs), "expert_states must be a list, got tuple"),
            ((old[:1], written, probs), "expert_states must contain 2 experts"),
            ((old, written[0], probs), "write_hiddens must be 3D"),
            ((old, torch.zeros(B, S, D + 1), probs), f"write_hiddens hidden_dim must be {D}"),
            ((old, written, probs[0]), "routing_probs must be 2D"),
            ((old, written, probs[:1]), "routing_probs must have shape"),
            (([old[0], old[1][0]], written, probs), "Expert 1 state must be 3D"),
            (([old[0], old[1][:, :2]], written, probs), "All experts must maintain identical shape"),
        ):
            with pytest.raises(ValueError, match=text):
                updater(*arguments)
        with pytest.raises(IndexError, match="expert_idx must be in"):
            updater.compute_expert_gates(old[0], written, 2)
        assert "num_experts=2" in repr(updater)

    def test_keys_and_shapes_of_the_layers(self) -> None:
        updater = ExpertUpdater(D, 2)
        expected = {
            f"{kind}_networks.{j}.{part}" for kind in ("gate", "update") for j in (0, 1) for part in ("weight", "bias")
        }
        assert set(updater.state_dict()) == expected
        assert updater.gate_networks[0].weight.shape == (D, 2 * D)

    def test_the_weights_lie_side_by_side_through_moves_and_copies(self, tmp_path: Any) -> None:
        updater = ExpertUpdater(D, 4)

        def packed(module: ExpertUpdater) -> bool:
            return all(
                _block([layer.weight for layer in networks]) is not None
                for networks in (module.gate_networks, module.update_networks)
            )

        assert packed(updater)
        assert packed(copy.deepcopy(updater))
        assert packed(ExpertUpdater(D, 4).double())
        save_file(updater.state_dict(), tmp_path / "weights.safetensors")
        other = ExpertUpdater(D, 4)
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert packed(other)
        other.load_state_dict({name: x.clone() for name, x in updater.state_dict().items()}, assign=True)
        assert packed(other)
        old, written, probs = states(4), torch.randn(B, S, D), torch.softmax(torch.randn(B, 4), -1)
        expected = updater(old, written, probs)
        for layer in other.gate_networks:  # torn apart, the weights are stacked as they are
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        assert not packed(other)
        for a, b in zip(expected, other(old, written, probs), strict=True):
            assert torch.equal(a, b)
        other.pack()
        assert packed(other)

    def test_an_optimiser_step_reaches_the_block(self) -> None:
        updater = ExpertUpdater(D, 2)
        old, written, probs = states(2), torch.randn(B, S, D), torch.full((B, 2), 0.5)
        before = updater(old, written, probs)[0]
        before.sum().backward()
        torch.optim.SGD(updater.parameters(), lr=1.0).step()
        assert not torch.equal(updater(old, written, probs)[0], before)

    def test_functional_call_and_transforms(self) -> None:
        updater = ExpertUpdater(D, 2)
        old, written, probs = [x.detach() for x in states(2)], torch.randn(B, S, D), torch.full((B, 2), 0.5)
        parameters = {name: p.detach() for name, p in updater.named_parameters()}

        def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(updater, values, (old, written, probs))[0].sum()

        gradients = torch.func.grad(loss)(parameters)
        sum(x.sum() for x in updater(old, written, probs)[:1]).backward()
        torch.testing.assert_close(gradients["gate_networks.0.weight"], updater.gate_networks[0].weight.grad)


class TestReader:
    def test_write_based(self) -> None:
        reader = AggregatedMemoryReader(D, 3)
        memory, probs = states(3), torch.softmax(torch.randn(B, 3), -1)
        expected = sum(probs[:, j, None, None] * memory[j] for j in range(3))
        torch.testing.assert_close(reader(memory, routing_probs=probs), expected)
        assert reader.read_gating_network is None
        with pytest.raises(ValueError, match="routing_probs required"):
            reader(memory)
        with pytest.raises(RuntimeError, match="only available in read-based mode"):
            reader.compute_read_routing(memory[0])

    def test_read_based(self) -> None:
        reader = AggregatedMemoryReader(D, 3, "read-based", temperature=0.5, pooling_method="max")
        assert reader.read_gating_network.temperature == 0.5
        memory, query = states(3), torch.randn(B, S, D)
        probs = reader.compute_read_routing(query)
        torch.testing.assert_close(reader(memory, read_hiddens=query), reader.aggregate(torch.stack(memory, 1), probs))
        assert "read_gating_network.routing_projection.weight" in reader.state_dict()
        with pytest.raises(ValueError, match="read_hiddens required"):
            reader(memory, routing_probs=probs)

    def test_checks(self) -> None:
        with pytest.raises(ValueError, match="routing_mode must be 'write-based' or 'read-based'"):
            AggregatedMemoryReader(D, 2, "both")
        reader = AggregatedMemoryReader(D, 2)
        memory, probs = states(2), torch.full((B, 2), 0.5)
        for arguments, text in (
            ((torch.stack(memory), probs), "expert_states must be a list"),
            ((memory[:1], probs), "expert_states must contain 2 experts"),
            (([memory[0], memory[1][:, :2]], probs), "All experts must maintain identical shape"),
            (([memory[0][0]] * 2, probs), "state must be 3D"),
            ((memory, probs[:1]), "routing_probs must have shape"),
        ):
            with pytest.raises(ValueError, match=text):
                reader(*arguments)
        with pytest.raises(ValueError, match="read_hiddens must be 3D"):
            AggregatedMemoryReader(D, 2, "read-based")(memory, read_hiddens=memory[0][0])
        assert "routing_mode='write-based'" in repr(reader)

    def test_replace_read_embeddings(self) -> None:
        reader = AggregatedMemoryReader(D, 2)
        sequence, memory = torch.randn(B, 9, D), torch.randn(B, 3, D)
        positions = torch.tensor([[0, 4, 8], [2, 2, 1], [5, 3, 5]])
        replaced = reader.replace_read_embeddings(sequence, memory, positions)
        expected = sequence.clone()
        for row in range(B):
            for slot in range(3):  # of equal positions the last one holds
                expected[row, positions[row, slot]] = memory[row, slot]
        assert torch.equal(replaced, expected)
        single = reader.replace_read_embeddings(sequence, memory[:, :1], positions[:, 0])
        assert torch.equal(single[0, 0], memory[0, 0])
        for arguments, text in (
            ((sequence, memory[:2], positions), "Batch size mismatch"),
            ((sequence, memory[..., :3], positions), "Hidden dimension mismatch"),
            ((sequence, memory, positions[:, :2]), "must match number of read positions"),
            ((sequence, memory, positions[None]), "must be 1D"),
            ((sequence, memory, positions + 1), r"must be in \[0, 9\)"),
        ):
            with pytest.raises(ValueError, match=text):
                reader.replace_read_embeddings(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_meet_float32_weights(dtype: torch.dtype) -> None:
    router, updater = MemoryGatingNetwork(D, 2), ExpertUpdater(D, 2)
    written = torch.randn(B, S, D).to(dtype)
    probs, logits, _ = router(written)
    assert probs.dtype == dtype
    assert logits.dtype == torch.float32
    new = updater([x.detach() for x in states(2)], written, probs)
    assert new[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(updater([x.detach() for x in states(2)], written, probs)[1]).all()
