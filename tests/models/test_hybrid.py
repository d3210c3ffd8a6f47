"""The hybrid memory transformer over three backbones: exact when fresh, causal, persistent, saved, generating."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel, InternalMemoryModule
from memkern.models.hybrid import update_internal_memory as update

VOCABULARY, WIDTH, LAYERS = 60, 32, 3


def text_config(kind):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    make = LlamaConfig if kind == "llama" else Qwen2Config
    return make(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **sizes)


def built(kind="llama", **changes):
    torch.manual_seed(0)
    settings = {"memory_slots": 4, "external_memory_size": 64, "num_retrieval_layers": 2}
    return HybridTransformerModel(HybridTransformerConfig(text_config(kind), **{**settings, **changes})).eval()


def shaken(kind="llama", **changes):
    """A model whose memories have left their neutral start."""
    model = built(kind, **changes)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "memory_layers" in name and "g_retrieve" not in name and "initial_memory" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def tokens(rows, length, seed=0):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "qwen", "gpt2"])
def kind(request):
    return request.param


class TestConfig:
    def test_defaults_are_those_of_the_contract(self):
        config = HybridTransformerConfig(LlamaConfig(hidden_size=1024, num_hidden_layers=12, num_attention_heads=8))
        assert (config.memory_slots, config.num_mem_heads) == (8, 2)
        assert (config.external_memory_size, config.retrieval_k, config.chunk_size) == (1048576, 8, 4)
        assert not config.use_gated_retrieval
        assert config.retrieval_threshold == 0.5
        assert config.get_retrieval_layers() == [0, 6]
        config.num_retrieval_layers = 5
        assert config.get_retrieval_layers() == [0, 2, 4, 7, 9]
        assert HybridTransformerConfig(text_config("llama")).get_retrieval_layers() == [0]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"retrieval_threshold": 1.5}, "retrieval_threshold"),
            ({"gate_input": "vector"}, "gate_input"),
            ({"chunk_size": 0}, "chunk_size"),
            ({"external_memory_size": 2, "chunk_size": 4}, "external_memory_size"),
            ({"memory_format_version": 9}, "memory_format_version"),
        ],
    )
    def test_bad_values_are_named(self, change, named):
        with pytest.raises(ValueError, match=named):
            HybridTransformerConfig(text_config("llama"), **change)


class TestInternalMemory:
    def test_golden_update(self):
        memory = torch.eye(2, dtype=torch.float64)[None]
        projected = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
        proposal = torch.tensor([[[0.5, 0.0], [0.0, 1.0]]], dtype=torch.float64)
        expected = torch.tensor([[[1.0, 0.0], [0.052559, 0.998618]]], dtype=torch.float64)
        torch.testing.assert_close(update(memory, projected, proposal), expected, rtol=0, atol=1e-6)

    def test_padding_counts_nowhere_and_an_empty_row_keeps_its_memory(self):
        memory = torch.nn.functional.normalize(torch.rand(2, 3, 3), dim=-1)
        projected, proposal = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
        mask = torch.tensor([[True, True, False, True, False], [False] * 5])
        projected[~mask], proposal[~mask] = torch.nan, torch.nan
        found = update(memory, projected, proposal, mask)
        alone = update(memory[:1], projected[:1, mask[0]], proposal[:1, mask[0]])
        torch.testing.assert_close(found[:1], alone)
        assert torch.equal(found[1], memory[1])
        zero = update(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
        assert torch.equal(zero, torch.zeros(1, 2, 2))

    def test_module_computes_the_formulas(self):
        torch.manual_seed(0)
        module = InternalMemoryModule(4, 8, 16, 2)
        hiddens, memory = torch.randn(2, 5, 16), torch.randn(2, 4, 4)
        context, fresh = module(hiddens, memory)
        projected = hiddens @ module.input_proj.weight.t()
        read = projected @ memory @ module.read_proj.weight.t()
        gate = torch.sigmoid(torch.cat((hiddens, read), -1) @ module.gate_proj.weight.t() + module.gate_proj.bias)
        torch.testing.assert_close(context, gate * read)
        torch.testing.assert_close(fresh, update(memory, projected, hiddens @ module.update_proj.weight.t()))


class TestForward:
    def test_a_fresh_model_is_its_backbone(self, kind):
        model = built(kind)
        model.write_external_memory(tokens(2, 9, seed=1))
        ids = tokens(2, 7)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        expected = model.backbone(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)

    def test_a_later_token_changes_no_earlier_logit(self, kind):
        model = shaken(kind)
        model.write_external_memory(tokens(1, 20, seed=1))
        ids = tokens(2, 9)
        changed = ids.clone()
        changed[:, 6] = (changed[:, 6] + 7) % VOCABULARY
        before, after = model(ids).logits, model(changed).logits
        assert torch.equal(before[:, :6], after[:, :6])
        assert not torch.equal(before[:, 6:], after[:, 6:])

    def test_the_state_persists_between_calls_and_changes_logits(self, kind):
        model = shaken(kind)
        ids = tokens(2, 7)
        first = model(ids)
        assert first.new_memory_state["internal_memory"].shape == (2, LAYERS, 4, 4)
        second = model(ids, memory_state=first.new_memory_state)
        assert not torch.equal(second.logits, first.logits)
        model.set_memory_state(first.new_memory_state)
        assert torch.equal(model(ids).logits, second.logits)
        assert torch.equal(model(ids).logits, second.logits)  # a forward never changes what was set
        model.reset_memory()
        assert torch.equal(model(ids).logits, first.logits)
        unbatched = {"internal_memory": first.new_memory_state["internal_memory"][0]}
        both = model(ids, memory_state=unbatched)
        torch.testing.assert_close(both.logits[0], second.logits[0])
        assert not torch.equal(both.logits[1], second.logits[1])
        assert model.get_memory_state()["internal_memory"].shape == (LAYERS, 4, 4)
        assert not model.detach(first.new_memory_state)["internal_memory"].requires_grad
        with pytest.raises(ValueError, match="memory_state"):
            model(tokens(3, 4), memory_state=first.new_memory_state)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_has_no_influence(self, side):
        model = shaken()
        model.write_external_memory(tokens(1, 12, seed=1))
        ids = tokens(1, 6)
        alone = model(ids)
        pad = (4, 0) if side == "left" else (0, 4)
        padded = torch.nn.functional.pad(ids, pad, value=9)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
        found = model(padded, attention_mask=mask)
        torch.testing.assert_close(found.logits[mask.bool()], alone.logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.new_memory_state["internal_memory"], alone.new_memory_state["internal_memory"], rtol=1e-5, atol=1e-6
        )

    def test_masked_documents_keep_their_state_and_count_in_no_loss(self):
        model = shaken()
        ids = tokens(2, 6)
        state = model(ids).new_memory_state
        found = model(ids, labels=ids, memory_state=state, document_mask=torch.tensor([True, False]))
        new, old = found.new_memory_state["internal_memory"], state["internal_memory"]
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])
        alone = model(ids[:1], labels=ids[:1], memory_state={"internal_memory": old[:1]})
        torch.testing.assert_close(found.loss, alone.loss)

    def test_labels_are_shifted_targets_are_not(self):
        model = shaken()
        ids = tokens(2, 6)
        shifted = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
        torch.testing.assert_close(model(ids, labels=ids).loss, model(ids, targets=shifted).loss)
        assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
        assert model(ids)["loss"] is None
        logits, loss, info = model(ids, labels=ids, return_dict=False)
        assert logits.shape == (2, 6, VOCABULARY)
        assert loss.dim() == 0
        assert set(info) >= {"internal_memory", "external_memory_size"}
        assert not info["internal_memory"].requires_grad

    def test_without_memories_it_is_the_backbone_and_says_so(self):
        model = built(use_internal_memory=False, use_external_memory=False)
        ids = tokens(1, 5)
        assert torch.equal(model(ids).logits, model.backbone(input_ids=ids).logits)
        assert model.config.memory_type == "standard"
        assert model(ids).new_memory_state is None
        assert not any("memory_layers" in name for name, _ in model.named_parameters())


class TestAbsolutePositions:
    def test_padding_does_not_move_what_is_written_and_a_long_input_is_named(self):
        text = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
        model = HybridTransformerModel(HybridTransformerConfig(text, memory_slots=2, chunk_size=2)).eval()
        ids = torch.randint(1, 30, (1, 6), generator=torch.Generator().manual_seed(0))
        padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.tensor([[0] * 4 + [1] * 6])
        first = model.write_external_memory(ids)[0]
        second = model.write_external_memory(padded, mask)[0]
        index = model.external_memory._index
        torch.testing.assert_close(index[:, :, first], index[:, :, second])
        with pytest.raises(ValueError, match="input_ids: expected at most 12 tokens"):
            model(torch.ones(1, 13, dtype=torch.int64))
        with pytest.raises(ValueError, match="input_ids: expected at most 12 tokens"):
            model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


class TestTraining:
    def test_after_one_step_every_memory_parameter_gets_gradient(self, kind):
        model = built(kind, use_gated_retrieval=True, gate_input="token").train()
        model.write_external_memory(tokens(2, 12, seed=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            first = model(tokens(2, 8))
            model(
                tokens(2, 8, seed=2), labels=tokens(2, 8, seed=2), memory_state=first.new_memory_state
            ).loss.backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            if "memory_layers" in name:
                assert parameter.grad.abs().sum() > 0, name

    def test_checkpointing_changes_nothing(self):
        model = shaken(use_gated_retrieval=True).train()
        model.write_external_memory(tokens(2, 12, seed=1))
        ids = tokens(2, 8)
        gradients = []
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            state = model(ids).new_memory_state
            model(ids, labels=ids, memory_state=state).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name in gradients[0]:
            torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-5, atol=1e-6)

    def test_skipped_branches_leave_zero_gradients_not_none(self):
        model = built(use_gated_retrieval=True).train()
        model(tokens(1, 5), labels=tokens(1, 5), use_external_memory=False).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


class TestGeneration:
    @pytest.mark.parametrize("gate", [None, "scalar", "token"])
    def test_with_and_without_cache(self, kind, gate):
        model = shaken(kind, use_gated_retrieval=gate is not None, gate_input=gate or "scalar")
        documents = torch.tensor([3, 4])
        model.write_external_memory(tokens(2, 15, seed=1), document_ids=documents)
        ids = tokens(2, 6)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        state = model(ids).new_memory_state
        for threshold in (0.5, 0.0, 1.0):
            model.external_memory.set_threshold(threshold)
            runs = [
                model.generate(
                    ids,
                    attention_mask=mask,
                    memory_state=state,
                    document_ids=documents,
                    max_new_tokens=6,
                    do_sample=False,
                    use_cache=cache,
                    pad_token_id=0,
                )
                for cache in (True, False)
            ]
            assert torch.equal(*runs)

    def test_memory_decides_what_is_generated(self):
        model = shaken()
        ids = tokens(1, 6)
        model.set_memory_state({"internal_memory": 10 * torch.randn(1, LAYERS, 4, 4)})
        with_state = model.generate(ids, max_new_tokens=8, do_sample=False)
        stepped = ids
        for _ in range(8):
            stepped = torch.cat((stepped, model(stepped).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(with_state, stepped)
        beams = model.generate(ids, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
        assert beams.shape == (2, 9)


class TestSaving:
    def test_round_trip(self, kind, tmp_path):
        model = shaken(kind, use_gated_retrieval=True)
        model.write_external_memory(tokens(2, 10, seed=1))
        model.external_memory.set_threshold(0.25)
        expected = model(tokens(2, 6)).logits
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["memory_type"] == "hybrid"
        assert saved["memory_format_version"] == 1
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again) is HybridTransformerModel
        assert torch.equal(again(tokens(2, 6)).logits, expected)
        assert again.external_memory.get_threshold() == 0.25
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))

    def test_a_bare_backbone_gets_the_same_finite_memory_twice(self, kind, tmp_path):
        backbone = built(kind).backbone
        backbone.save_pretrained(tmp_path)
        models = []
        for _ in range(2):
            torch.manual_seed(5)
            models.append(HybridTransformerModel.from_pretrained(tmp_path, memory_slots=4, use_gated_retrieval=True))
        for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.isfinite().all(), name
        layer = models[0].memory_layers["0"]
        assert torch.equal(layer.internal.initial_memory, torch.eye(4))
        assert layer.g_retrieve == 0.5
        assert torch.equal(models[0].eval()(tokens(1, 5)).logits, backbone(tokens(1, 5)).logits)

    def test_a_given_backbone_keeps_its_weights_and_its_keys(self):
        backbone = AutoModelForCausalLM.from_config(text_config("llama"))
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        model = HybridTransformerModel(HybridTransformerConfig(), base_model=backbone)
        assert model.config.memory_slots == 1  # a 128th of this backbone's width, not of the default's
        assert model.config.text_config.vocab_size == VOCABULARY
        after = backbone.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert model.backbone.model.layers[0].hybrid_attn is model.memory_layers["0"]

    def test_copies_have_memories_of_their_own(self):
        model = shaken()
        model.write_external_memory(tokens(1, 8, seed=1))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
        with torch.no_grad():
            twin.memory_layers["0"].internal_proj.weight.add_(1.0)
        twin.external_memory.clear()
        assert len(model.external_memory) == 2
        assert not torch.equal(twin(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
        assert twin.backbone.model.layers[0].hybrid_attn is twin.memory_layers["0"]
