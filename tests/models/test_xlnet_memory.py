"""What memory does to the XLNet models: it matters, it learns, it passes from segment to segment, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from memkern import BackendUnavailable
from memkern.models import GMMXLNetForQA, MemXLNetForQA
from memkern.nn.state import map_state


def tensors(state: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)
    return found


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def close(a: Any, b: Any, **tolerances: float) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, **tolerances)


def test_wrapping_changes_no_weight_of_the_base_model(base: Any, kind: Any) -> None:
    weights = copy.deepcopy(base.state_dict())
    model = kind(base)
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())
    encoder = base.transformer
    assert all(a is b for a, b in zip(encoder.parameters(), model.transformer.parameters(), strict=True))
    from_encoder = type(model)(encoder)
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())
    assert from_encoder.qa_outputs is not base.qa_outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda b: GMMXLNetForQA(b, use_gmm_memory=False), MemXLNetForQA])
def test_off_is_the_base_model_bit_for_bit(base: Any, segment: Any, make: Any, training: bool) -> None:
    base.train(training)
    weights = copy.deepcopy(base.state_dict())
    model = make(base)
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items()), "wrapping changed it"
    assert model.transformer.word_embedding.weight is base.transformer.word_embedding.weight
    assert model.training == training
    assert model.memory_type == "standard"
    assert list(model.memory_named_parameters()) == []
    inputs = segment(padding=2)
    torch.manual_seed(5)
    expected = base(**inputs)
    torch.manual_seed(5)
    actual = model(**inputs)
    for name in ("start_logits", "end_logits", "loss"):
        assert torch.equal(expected[name], actual[name]), name
    if not training:
        again = model(**segment(1), mems=actual.mems)
        assert torch.equal(again.start_logits, base(**segment(1), mems=expected.mems).start_logits)
    assert actual.load_balance_loss is None
    assert actual["routing_info"] is None
    assert model(**segment(labels=False))["loss"] is None


@pytest.mark.parametrize("injection", ["input", "head", "both"])
def test_every_memory_parameter_learns_from_the_answer_alone(
    base: Any, segment: Any, kind: Any, injection: str
) -> None:
    model = kind(base, read_injection=injection)
    if model.memory_type == "gmm":
        model.config.load_balance_weight = 0.0
    first_write_meets_an_empty_bank = model.memory_type == "differentiable" and injection == "input"

    def loss() -> torch.Tensor:
        state, total = None, torch.zeros(())
        for index in range(3 if first_write_meets_an_empty_bank else 2):
            out = model(**segment(index), memory_state=state)
            state, total = out.new_memory_state, total + out.loss
        return total

    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    optimiser.step()
    optimiser.zero_grad()
    loss().backward()
    dead = [name for name, p in model.memory_named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("injection", ["input", "head", "both"])
def test_state_changes_the_logits_and_passes_on(base: Any, segment: Any, awake: Any, kind: Any, injection: str) -> None:
    model = awake(kind(base, read_injection=injection))
    inputs = segment(9, labels=False)
    outputs = []
    for seed in (0, 1):
        out = model(**segment(seed, labels=False))
        assert out.start_logits.shape == inputs["input_ids"].shape
        if seed == 0 and model.config.to_dict().get("memory_update") != "none":
            assert not same(out.new_memory_state, model.get_initial_memory(3))
        outputs.append(model(**inputs, memory_state=out.new_memory_state).start_logits)
    if model.config.to_dict().get("memory_update") == "none":
        shifted = model.get_initial_memory(3) + 1.0
        outputs[1] = model(**inputs, memory_state=shifted).start_logits
    if model.config.to_dict().get("memory_update") == "replace" and injection == "head":
        return  # a state that is replaced before it is ever read can change nothing
    assert not torch.equal(outputs[0], outputs[1])


def test_a_fresh_head_injection_is_the_encoder_alone(base: Any, segment: Any) -> None:
    model = GMMXLNetForQA(base, 2, 3, read_injection="head")
    expected = model(**segment()).start_logits
    torch.nn.init.normal_(model.memory_fusion.value.weight)
    assert torch.equal(model(**segment()).start_logits, expected)
    torch.nn.init.normal_(model.memory_fusion.output.weight)
    assert not torch.equal(model(**segment()).start_logits, expected)


def test_rows_do_not_influence_each_other(base: Any, segment: Any, awake: Any, kind: Any) -> None:
    model = awake(kind(base))
    state, alone = None, None
    for index in range(2):
        inputs = segment(index, labels=False)
        out = model(**inputs, memory_state=state)
        single = model(**{name: value[1:2] for name, value in inputs.items()}, memory_state=alone)
        torch.testing.assert_close(single.start_logits, out.start_logits[1:2], atol=1e-5, rtol=1e-4)
        state, alone = out.new_memory_state, single.new_memory_state
    close(alone, map_state(lambda tensor: tensor[1:2], state), atol=1e-5, rtol=1e-4)


def test_document_mask(base: Any, segment: Any, awake: Any, kind: Any) -> None:
    model = awake(kind(base))
    state = model(**segment(0)).new_memory_state
    inputs = segment(1)
    mask = torch.tensor([True, False, True])
    out = model(**inputs, memory_state=state, document_mask=mask)
    full = model(**inputs, memory_state=state)
    for before, masked, whole in zip(
        *(tensors(s) for s in (state, out.new_memory_state, full.new_memory_state)), strict=True
    ):
        assert torch.equal(before[1], masked[1])
        torch.testing.assert_close(masked[0], whole[0])
    rows = {name: value[mask] for name, value in inputs.items()}
    kept = model(**rows, memory_state=map_state(lambda tensor: tensor[mask], state))
    torch.testing.assert_close(out.loss, kept.loss, atol=1e-5, rtol=1e-5)
    if model.memory_type == "gmm":
        torch.testing.assert_close(out.load_balance_loss, kept.load_balance_loss)
        torch.testing.assert_close(out.entropy_loss, kept.entropy_loss, atol=1e-5, rtol=1e-5)
    # NaN in a row that is masked stays there, and no gradient comes from it.
    embeddings = model.transformer.word_embedding(inputs.pop("input_ids")).detach()
    embeddings[1] = float("nan")
    lost = model(inputs_embeds=embeddings, **inputs, memory_state=state, document_mask=mask)
    torch.testing.assert_close(lost.loss, out.loss)
    nothing = model(**segment(1), memory_state=state, document_mask=torch.zeros(3, dtype=torch.bool))
    assert nothing.loss.item() == 0
    assert same(nothing.new_memory_state, state)


def test_left_padding_changes_no_answer(base: Any, segment: Any, awake: Any, kind: Any) -> None:
    model = awake(kind(base))
    plain, padded = model(**segment(labels=False)), model(**segment(labels=False, padding=5))
    assert padded.start_logits.shape[1] == 17
    torch.testing.assert_close(padded.start_logits[:, 5:], plain.start_logits, atol=1e-5, rtol=1e-4)
    close(padded.new_memory_state, plain.new_memory_state, atol=1e-5, rtol=1e-4)


def test_memory_tokens_in_the_text_compute_the_same(base: Any, segment: Any, awake: Any, kind: Any) -> None:
    model = awake(kind(base))
    inputs = segment(labels=False, padding=2)
    state = model(**segment(1, labels=False)).new_memory_state
    reads = torch.arange(60, 60 + model._token_count("mem_read_ids"))
    writes = torch.arange(80, 80 + model._token_count("mem_write_ids"))
    rows = torch.cat([reads, writes]).expand(3, -1)
    text = dict(inputs)
    text["input_ids"] = torch.cat([inputs["input_ids"], rows], 1)
    text["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(rows)], 1)
    text["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(rows)], 1)
    ids = {"mem_read_ids": reads.tolist(), "mem_write_ids": writes.tolist() or None}
    for given in (None, state):
        appended = model(**inputs, memory_state=given)
        inserted = model(**text, **ids, memory_state=given)
        torch.testing.assert_close(
            inserted.start_logits[:, : appended.start_logits.shape[1]], appended.start_logits, atol=1e-6, rtol=1e-5
        )
        close(inserted.new_memory_state, appended.new_memory_state, atol=1e-6, rtol=1e-5)
    by_config = copy.deepcopy(model)
    by_config.config.mem_read_ids, by_config.config.mem_write_ids = ids["mem_read_ids"], ids["mem_write_ids"]
    assert torch.equal(by_config(**text).start_logits, model(**text, **ids).start_logits)


def test_absent_and_wrong_memory_tokens(base: Any, segment: Any) -> None:
    inputs = segment(labels=False)
    model = GMMXLNetForQA(base, 2, 2, strict_memory_tokens=True)
    assert model(**inputs).start_logits.isfinite().all()  # nothing is named, nothing is missed
    with pytest.raises(
        ValueError, match="mem_read_ids: strict_memory_tokens is on, and memory token 60 is absent from row 0"
    ):
        model(**inputs, mem_read_ids=[60, 61], mem_write_ids=[62, 63])
    lenient = GMMXLNetForQA(base, 2, 2)
    assert lenient(**inputs, mem_read_ids=[60, 61], mem_write_ids=[62, 63]).start_logits.isfinite().all()
    with pytest.raises(ValueError, match="mem_read_ids: expected 2 ids"):
        lenient(**inputs, mem_read_ids=[60], mem_write_ids=[62, 63])
    with pytest.raises(ValueError, match="mem_write_ids: expected beside"):
        lenient(**inputs, mem_read_ids=[60, 61])
    with pytest.raises(ValueError, match="name tokens of input_ids"):
        lenient(inputs_embeds=torch.randn(1, 4, 32), mem_read_ids=[60, 61], mem_write_ids=[62, 63])


def test_set_get_reset(base: Any, segment: Any, awake: Any, kind: Any) -> None:
    model = awake(kind(base))
    inputs = segment(labels=False)
    fresh = model(**inputs)
    initial = model.get_memory_state()
    model.set_memory_state(initial)  # without a batch axis: for every row
    torch.testing.assert_close(model(**inputs).start_logits, fresh.start_logits)
    state = model(**segment(1)).new_memory_state
    before = [tensor.detach().clone() for tensor in tensors(state)]
    model.set_memory_state(state)
    assert len(tensors(model.get_memory_state())) == len(before)
    expected = model(**inputs, memory_state=state)
    for _ in range(2):  # a forward changes neither what was set nor the state it was given
        assert torch.equal(model(**inputs).start_logits, expected.start_logits)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))
    assert not any(tensor.requires_grad for tensor in tensors(model.get_memory_state()))
    with pytest.raises(ValueError, match="expected"):
        model(**segment(batch=2))
    copy.deepcopy(model)
    learned = [p.detach().clone() for _, p in model.memory_named_parameters()]
    model.reset_memory()
    assert torch.equal(model(**inputs).start_logits, fresh.start_logits)
    assert all(torch.equal(a, p) for a, (_, p) in zip(learned, model.memory_named_parameters(), strict=True))
    assert not any(tensor.requires_grad for tensor in tensors(model.detach(state)))
    assert tensors(model.select_rows(state, torch.tensor([0])))[0].shape[0] == 1


def test_in_place_changes_of_a_state_never_reach_the_learned_memory(base: Any, kind: Any) -> None:
    model = kind(base)
    learned = [p.detach().clone() for _, p in model.memory_named_parameters()]
    for state in (model.get_initial_memory(2), model.get_memory_state()):
        for tensor in tensors(state):
            with torch.no_grad():
                tensor.add_(1.0)
    assert all(torch.equal(a, p) for a, (_, p) in zip(learned, model.memory_named_parameters(), strict=True))


def test_state_as_a_file_carries_on_another_document(
    base: Any, segment: Any, awake: Any, kind: Any, tmp_path: Any
) -> None:
    model = awake(kind(base))
    state = model(**segment(0)).new_memory_state
    model.save_memory_state(tmp_path / "state.safetensors", state)
    loaded = model.load_memory_state(tmp_path / "state.safetensors")
    assert same(loaded, state)
    assert torch.equal(
        model(**segment(1), memory_state=loaded).start_logits, model(**segment(1), memory_state=state).start_logits
    )


def test_bad_states(base: Any, segment: Any) -> None:
    gmm, token = GMMXLNetForQA(base, 2, 3), MemXLNetForQA(base, 3)
    differentiable = MemXLNetForQA(base, use_differentiable_memory=True, memory_slots=5, num_memory_heads=2)
    good = gmm.get_initial_memory(3)
    renamed = {("expert_9" if name == "expert_1" else name): value for name, value in good.items()}
    for model, state, text in (
        (gmm, torch.zeros(3, 3, 32), "expected a dict of experts"),
        (gmm, {"expert_0": good["expert_0"]}, "memory_state must contain 2 experts, got 1"),
        (gmm, renamed, "missing expert_1"),
        (gmm, gmm.get_initial_memory(2), r"memory_state\['expert_0'\]: expected shape \(3, 3, 32\)"),
        (gmm, good | {"routing_probs": torch.zeros(3, 4)}, r"routing_probs'\]: expected shape \(3, 2\)"),
        (token, good, "expected a tensor"),
        (token, torch.zeros(2, 3, 32), r"memory_state: expected shape \(3, 3, 32\)"),
        (differentiable, good, "expected a MemoryState"),
        (differentiable, torch.zeros(3, 4, 32), "memory_state: expected shape"),
        (differentiable, differentiable.get_initial_memory(2), r"memory_state.memory: expected shape \(3, 5, 32\)"),
    ):
        with pytest.raises(ValueError, match=text):
            model(**segment(), memory_state=state)
    assert differentiable(**segment(), memory_state=torch.randn(5, 32)).loss.isfinite()
    with pytest.raises(TypeError, match="document_mask: expected a bool mask"):
        token(**segment(), document_mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"document_mask: expected shape \(3,\)"):
        token(**segment(), document_mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        token()
    with pytest.raises(ValueError, match="perm_mask is for pretraining"):
        token(**segment(), perm_mask=torch.zeros(3, 12, 12))


class TestDocuments:
    def documents(self, segment: Any, count: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
        parts = [segment(index) for index in range(count)]
        mask = torch.tensor([[True] * count, [True] + [False] * (count - 1), [True] * (count - 1) + [False]])
        return {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}, mask

    def test_whole_documents_equal_their_segments(self, base: Any, segment: Any, awake: Any, kind: Any) -> None:
        model = awake(kind(base))
        inputs, mask = self.documents(segment)
        out = model(**inputs, document_mask=mask, return_routing_info=model.memory_type == "gmm")
        state, start, total = None, [], torch.zeros(())
        for index in range(3):
            part = model(**segment(index), memory_state=state, document_mask=mask[:, index])
            state = part.new_memory_state
            start.append(part.start_logits)
            total = total + (part.loss - model.auxiliary_loss(part)) * mask[:, index].sum()
        torch.testing.assert_close(out.start_logits, torch.stack(start, 1))
        close(out.new_memory_state, state)
        torch.testing.assert_close(out.loss - model.auxiliary_loss(out), total / mask.sum())
        if model.memory_type == "gmm":
            assert out.routing_info["routing_probs"].shape == (3, 3, model.num_experts)

    def test_truncated_back_propagation(self, base: Any, segment: Any) -> None:
        inputs, _ = self.documents(segment)
        grads = []
        for bound in (None, 3, 1):
            model = MemXLNetForQA(base, 3, read_injection="input", bptt_segments=bound)
            torch.manual_seed(0)
            for _, parameter in model.memory_named_parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model(**inputs).loss.backward()
            grads.append(model.memory_gate.weight.grad)
        assert grads[0].any()
        assert torch.equal(grads[0], grads[1])
        # Cut after every segment, no loss reaches a write of the segment before.
        assert grads[2] is None or not grads[2].any()

    def test_off(self, base: Any, segment: Any) -> None:
        inputs, mask = self.documents(segment)
        out = GMMXLNetForQA(base, use_gmm_memory=False)(**inputs, document_mask=mask)
        torch.testing.assert_close(out.start_logits[:, 1], base(**segment(1)).start_logits)
        assert out.new_memory_state == {}
        off = GMMXLNetForQA(base, use_gmm_memory=False)
        assert off(**inputs, return_routing_info=True)["routing_info"] == {}
        assert off(**segment(), return_routing_info=True)["routing_info"] == {}


class TestGmm:
    def test_what_it_returns(self, base: Any, segment: Any) -> None:
        model = GMMXLNetForQA(base, 4, 5)
        inputs = segment()
        out = model(**inputs)
        assert set(out.new_memory_state) == {f"expert_{j}" for j in range(4)} | {"routing_probs"}
        assert out.new_memory_state["expert_3"].shape == (3, 5, 32)
        assert "routing_info" not in out
        info = model(**inputs, return_routing_info=True)["routing_info"]
        shapes = {name: tuple(value.shape) for name, value in info.items()}
        assert shapes == {
            "routing_probs": (3, 4),
            "routing_logits": (3, 4),
            "routing_entropy": (3,),
            "expert_activations": (4,),
        }
        torch.testing.assert_close(info["expert_activations"], info["routing_probs"].sum(0))
        start = model.get_initial_memory(2)
        assert torch.equal(start["routing_probs"], torch.full((2, 4), 0.25))
        assert set(model.get_memory_state()) == {f"expert_{j}" for j in range(4)}
        as_tuple = model(**inputs, return_dict=False)
        assert torch.equal(as_tuple[0], out.loss)
        assert torch.equal(as_tuple[1], out.start_logits)

    def test_losses(self, base: Any, segment: Any) -> None:
        model = GMMXLNetForQA(base, 4, 5, load_balance_weight=0.5, entropy_regularization_weight=0.25)
        out = model(**segment(), return_routing_info=True)
        torch.testing.assert_close(out.entropy_loss, -out.routing_info["routing_entropy"].mean())
        plain = GMMXLNetForQA(base, 4, 5, load_balance_weight=0.0)
        plain.load_state_dict(model.state_dict())
        expected = plain(**segment()).loss + 0.5 * out.load_balance_loss + 0.25 * out.entropy_loss
        torch.testing.assert_close(out.loss, expected)
        assert plain.auxiliary_loss(out) == 0.0

    def test_reads_follow_the_routing_that_the_state_carries(self, base: Any, segment: Any) -> None:
        model = GMMXLNetForQA(base, 2, 3, read_injection="input")
        state = model.get_initial_memory(3)
        first, second = torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([[0.0, 1.0]]).expand(3, 2)
        a = model(**segment(), memory_state=state | {"routing_probs": first}).start_logits
        b = model(**segment(), memory_state=state | {"routing_probs": second}).start_logits
        assert not torch.equal(a, b)
        swapped = {"expert_0": state["expert_1"], "expert_1": state["expert_0"], "routing_probs": second}
        torch.testing.assert_close(model(**segment(), memory_state=swapped).start_logits, a)
        reader = GMMXLNetForQA(base, 2, 3, "read-based", read_injection="input")
        c = reader(**segment(), memory_state=state | {"routing_probs": first}).start_logits
        assert torch.equal(c, reader(**segment(), memory_state=state | {"routing_probs": second}).start_logits)

    def test_states_set_on_the_mixture_start_documents(self, base: Any, segment: Any) -> None:
        model = GMMXLNetForQA(base, 2, 3)
        fresh = model(**segment()).start_logits
        model.memory_mixture.set_expert_state(0, torch.randn(3, 32))
        assert not torch.equal(model(**segment()).start_logits, fresh)
        model.reset_memory()
        assert torch.equal(model(**segment()).start_logits, fresh)

    def test_sixteen_experts_and_aliases(self, base: Any, segment: Any) -> None:
        model = GMMXLNetForQA(
            base, num_memory_experts=16, gmm_routing_mode="read-based", max_experts=16, memory_slots=2
        )
        assert model.num_experts == 16
        assert model.config.routing_mode == "read-based"
        assert model(**segment()).loss.isfinite()
        with pytest.raises(ValueError, match=r"num_experts must be in \[2, 8\]"):
            GMMXLNetForQA(base, 16)


class TestDifferentiable:
    def test_memory_info(self, base: Any, segment: Any) -> None:
        model = MemXLNetForQA(
            base,
            use_differentiable_memory=True,
            num_memory_heads=2,
            memory_slots=6,
            enable_usage_tracking=True,
            enable_temporal_links=True,
        )
        state = None
        for index in range(3):
            out = model(**segment(index), memory_state=state)
            state = out.new_memory_state
        shapes = {name: value.numpy().shape for name, value in out["memory_info"].items()}
        assert shapes == {
            "read_weights": (3, 2, 6),
            "write_weights": (3, 2, 6),
            "usage": (3, 6),
            "temporal_links": (3, 6, 6),
            "memory_state": (3, 6, 32),
        }
        usage = out.memory_info["usage"]
        assert 0 <= usage.min() <= usage.max() <= 1
        bridge = (out.memory_info["read_weights"] * out.memory_info["write_weights"]).sum(dim=1)
        assert bridge.shape == (3, 6)
        links = out.new_memory_state.links
        torch.testing.assert_close(out.memory_info["temporal_links"], links.mean(1).transpose(1, 2).detach())
        assert out.new_memory_state.memory.requires_grad
        assert model.memory_controller.visualize_memory(state)["memory"].shape == (3, 6, 32)

    def test_slots_and_heads(self, base: Any) -> None:
        for count, slots, expected in ((0, None, 16), (20, None, 20), (4, 7, 7)):
            model = MemXLNetForQA(base, count, use_differentiable_memory=True, memory_slots=slots)
            assert model.get_initial_memory(1).memory.shape == (1, expected, 32)

    @pytest.mark.parametrize("count", [0, 1, 3, 5])
    def test_any_number_of_read_tokens(self, base: Any, segment: Any, count: int) -> None:
        model = MemXLNetForQA(base, count, use_differentiable_memory=True, num_memory_heads=3, memory_slots=6)
        state = model(**segment(0)).new_memory_state
        other = model(**segment(1), memory_state=state)
        assert not torch.equal(other.start_logits, model(**segment(1)).start_logits)

    def test_the_controller_is_driven_by_the_cls_token(self, base: Any, segment: Any) -> None:
        inputs = segment(labels=False)
        inputs["input_ids"][:, -1] = 3
        model = MemXLNetForQA(base, use_differentiable_memory=True, memory_slots=6)
        last = model(**inputs).new_memory_state
        by_index = model(**inputs, cls_index=torch.full((3,), 11)).new_memory_state
        assert same(last, by_index)
        assert not same(last, model(**inputs, cls_index=torch.full((3,), 4)).new_memory_state)
        inputs["input_ids"][:, 4] = 7
        marked = MemXLNetForQA(base, use_differentiable_memory=True, memory_slots=6, cls_token_id=3)
        marked.load_state_dict(model.state_dict())
        assert same(model(**inputs).new_memory_state, marked(**inputs).new_memory_state)

    def test_set_on_the_controller(self, base: Any, segment: Any) -> None:
        model = MemXLNetForQA(base, use_differentiable_memory=True, memory_slots=6)
        fresh = model(**segment()).new_memory_state.memory
        model.memory_controller.set_memory_state(torch.randn(6, 32))
        changed = model(**segment()).new_memory_state.memory
        assert not torch.equal(changed, fresh)
        model.memory_controller.set_memory_state(torch.randn(3, 6, 32))
        assert model.get_memory_state().memory.shape == (3, 6, 32)
        assert model(**segment()).loss.isfinite()
        model.reset_memory()
        assert torch.equal(model(**segment()).new_memory_state.memory, fresh)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"memory_update": "other"}, "memory_update must be one of 'gated', 'none', 'replace'"),
        ({"memory_init": "other"}, "memory_init must be 'learned' or 'zeros'"),
        ({"mem_token_count": -1}, "mem_token_count must be an integer >= 0"),
        ({"memory_dim": 16}, r"memory_dim must be None or d_model \(32\)"),
        ({"num_memory_heads": 0}, "num_memory_heads must be an integer >= 1"),
        ({"memory_sharpness": 0.0}, "memory_sharpness must be > 0"),
        ({"memory_slots": 0}, "memory_slots must be an integer >= 1 or None"),
        ({"read_injection": "both ends"}, "read_injection must be one of"),
        ({"memory_backend": "mlx"}, "memory_backend must be one of reference, cpp, triton, cuda"),
        ({"bptt_segments": 0}, "bptt_segments must be an integer >= 1 or None"),
    ],
)
def test_bad_options_of_memxlnet(base: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MemXLNetForQA(base, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_experts": 1}, r"num_experts must be in \[2, 8\]"),
        ({"memory_slots": 0}, "memory_slots must be an integer >= 1"),
        ({"routing_mode": "other"}, "routing_mode must be 'write-based' or 'read-based'"),
        ({"routing_temperature": 0.0}, "Temperature must be > 0"),
        ({"pooling_method": "other"}, "pooling_method must be"),
        ({"init_strategies": ["zeros"]}, "init_strategies must have length 4"),
        ({"init_strategies": "other"}, "Invalid init_strategy"),
        ({"mem_token_count": 3}, r"mem_token_count must be memory_slots \(16\)"),
        ({"load_balance_weight": -1.0}, "load_balance_weight must be >= 0"),
        ({"entropy_regularization_weight": -1.0}, "entropy_regularization_weight must be >= 0"),
        ({"read_injection": None}, "read_injection must be one of"),
    ],
)
def test_bad_options_of_gmm_xlnet(base: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GMMXLNetForQA(base, **options)


def test_bad_base_models(base: Any) -> None:
    with pytest.raises(TypeError, match="expected an XLNetForQuestionAnsweringSimple"):
        GMMXLNetForQA(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="unknown arguments num_expert"):
        GMMXLNetForQA(base, num_expert=3)


def test_the_vocabulary_can_grow(base: Any, segment: Any) -> None:
    model = GMMXLNetForQA(base, 2, 3)
    expected = model(**segment()).start_logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.transformer.word_embedding.num_embeddings == 70
    torch.testing.assert_close(model(**segment()).start_logits, expected)


def test_backends_agree(base: Any, segment: Any, awake: Any, main_kind: Any, backend: Any) -> None:
    results = []
    for name in ("reference", backend.name):
        torch.manual_seed(3)
        model = awake(main_kind(base, memory_backend=name)).to(backend.device)
        inputs = {key: value.to(backend.device) for key, value in segment(labels=False).items()}
        try:
            first = model(**inputs)
            out = model(**inputs, memory_state=first.new_memory_state)
        except BackendUnavailable as error:
            pytest.skip(str(error))
        out.start_logits.square().sum().backward()
        results.append((out, {name: p.grad for name, p in model.memory_named_parameters()}))
        base.zero_grad()
    (expected, grads), (actual, others) = results
    torch.testing.assert_close(actual.start_logits, expected.start_logits, atol=1e-4, rtol=1e-4)
    close(actual.new_memory_state, expected.new_memory_state, atol=1e-5, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, atol=1e-4, rtol=1e-3)


def test_names_for_the_optimiser(base: Any) -> None:
    gmm, token = GMMXLNetForQA(base, 2, 3), MemXLNetForQA(base, 3)
    assert {name for name, _ in gmm.named_parameters() if gmm.is_initial_memory(name)} == {
        "memory_mixture._expert_params.0",
        "memory_mixture._expert_params.1",
    }
    assert {name for name, _ in token.named_parameters() if token.is_initial_memory(name)} == {"learned_memory"}
    assert not any(name.startswith("transformer") for name, _ in token.memory_named_parameters())
    assert not MemXLNetForQA(base, use_differentiable_memory=True).is_initial_memory("memory_controller.x")
