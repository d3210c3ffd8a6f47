"""The XLNet models under what trains them: checkpointing, compile, Trainer, accelerate, DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from memkern.models import GMMXLNetConfig, GMMXLNetForQA
from memkern.nn import ExpertUpdater, MemoryController
from memkern.testing import distributed


def gradients(model: Any, segments: list[dict[str, Any]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of the loss over several segments, and that loss."""
    model.zero_grad()
    torch.manual_seed(7)
    state, loss = None, torch.zeros(())
    for inputs in segments:
        out = model(**inputs, memory_state=state)
        state, loss = out.new_memory_state, loss + out.loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], loss.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    base: Any, segment: Any, awake: Any, main_kind: Any, reentrant: bool
) -> None:
    model = awake(main_kind(base)).train()  # with dropout, whose masks are drawn again as they were
    segments = [segment(index, padding=2) for index in range(2)]
    plain, loss = gradients(model, segments)
    with pytest.warns() if hasattr(model, "activation_checkpointing_enable") else _nothing():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.transformer.layer)
    again, same = gradients(model, segments)
    assert torch.equal(loss, same)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_the_memory_part_compiles_without_breaks() -> None:
    updater, controller = ExpertUpdater(16, 2), MemoryController(16, 6, 8, 2, use_temporal_links=True)
    states, written, probs = torch.randn(3, 2, 4, 16), torch.randn(3, 4, 16), torch.full((3, 2), 0.5)
    compiled = torch.compile(updater.update, fullgraph=True, backend="aot_eager")
    out = compiled(states, written, probs)
    out.sum().backward()
    grads = [p.grad.clone() for p in updater.parameters()]
    updater.zero_grad()
    expected = updater.update(states, written, probs)
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    for a, p in zip(grads, updater.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    x = torch.randn(3, 16)
    state = controller.initial_state(3)
    step = torch.compile(controller, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(x, state)[0], controller(x, state)[0])


def test_the_whole_model_compiles(base: Any, segment: Any) -> None:
    model = GMMXLNetForQA(base, 2, 3)
    inputs = segment()
    state = model(**inputs).new_memory_state
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(
        compiled(**inputs, memory_state=state).start_logits, model(**inputs, memory_state=state).start_logits
    )


class Documents(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Documents of two segments each."""

    def __init__(self, segment: Any) -> None:
        parts = [segment(index, batch=8) for index in range(2)]
        self.columns = {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}
        self.columns["document_mask"] = torch.ones(8, 2, dtype=torch.bool)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.columns.items()}


def test_trainer(base: Any, segment: Any, main_kind: Any, tmp_path: Path) -> None:
    model = main_kind(base)
    data = Documents(segment)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        save_steps=2,
        logging_steps=1,
        label_names=["start_positions", "end_positions"],
        use_cpu=True,
        report_to=[],
        gradient_accumulation_steps=2,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    predictions = trainer.predict(data).predictions
    assert [p.shape for p in predictions[:2]] == [(8, 2, 12), (8, 2, 12)]
    assert len(predictions) == 2, "memory was gathered as a prediction"
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.memory_type == model.memory_type


def test_accelerate(base: Any, segment: Any, main_kind: Any) -> None:
    accelerator = Accelerator(cpu=True)
    model = main_kind(base)
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=5e-3))
    losses = []
    for _ in range(4):
        state, loss = None, torch.zeros(())
        for index in range(2):
            out = model(**segment(index), memory_state=state)
            state, loss = out.new_memory_state, loss + out.loss
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_autocast_keeps_states_in_the_dtype_of_the_memory(base: Any, segment: Any, kind: Any) -> None:
    model = kind(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model(**segment(0)).new_memory_state
        out = model(**segment(1), memory_state=state)
    found = [
        tensor.dtype
        for tensor in (state.values() if isinstance(state, dict) else [state] if torch.is_tensor(state) else state)
    ]
    assert set(found) == {torch.float32}
    out.loss.backward()
    assert out.loss.isfinite()


def halves(rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 60, (4, 2, 10), generator=generator)
    spans = torch.randint(0, 10, (2, 4, 2), generator=generator)
    return {"input_ids": ids[rows], "start_positions": spans[0][rows], "end_positions": spans[1][rows]}


def equal_one(rank: int) -> None:
    def make() -> GMMXLNetForQA:
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "dropout": 0.0}
        # No load balance: the mean of the halves' losses is the whole's.
        return GMMXLNetForQA(GMMXLNetConfig(num_experts=2, memory_slots=3, load_balance_weight=0.0, **sizes)).train()

    mine = halves(slice(2 * rank, 2 * rank + 2))
    single = make()
    single(**halves(slice(0, 4))).loss.backward()
    expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
    ddp = DistributedDataParallel(make())
    for _ in range(2):  # a parameter without gradient would stop the second step
        ddp.zero_grad()
        ddp(**mine).loss.backward()
    for name, p in ddp.module.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(name, torch.zeros_like(p)), atol=1e-5, rtol=1e-4)
    for _ in range(2):  # a single segment uses least
        ddp(**{name: value[:, 0] for name, value in mine.items()}).loss.backward()
    sharded = make()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.transformer.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(**mine).loss.backward()
    for name, p in sharded.named_parameters():
        if name in expected and p.grad is not None:
            torch.testing.assert_close(p.grad.full_tensor(), expected[name], atol=1e-5, rtol=1e-4)


def test_two_processes_equal_one_under_ddp_and_fsdp2() -> None:
    distributed.spawn(equal_one)
