"""The external bank and the retrieval gate: what is found, for whom, and that a closed gate does no work."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, PreTrainedTokenizerFast

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel

VOCABULARY = 60


def built(**changes):
    torch.manual_seed(0)
    settings = {
        "memory_slots": 4,
        "external_memory_size": 64,
        "use_internal_memory": False,
        "use_gated_retrieval": True,
    }
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = HybridTransformerModel(HybridTransformerConfig(text, **{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "external_proj" in name or "token_gate" in name:
                parameter.normal_(std=0.5)
    return model


def tokens(rows, length, seed=0):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def names_of(model, *args, **kwargs):
    with profile(activities=[ProfilerActivity.CPU]) as trace, torch.no_grad():
        model(*args, **kwargs)
    return {event.key for event in trace.key_averages()}


def gate(model):
    return model.memory_layers["0"]


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(50))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


class TestBank:
    def test_a_position_finds_its_own_states(self):
        model = built(retrieval_k=1, chunk_size=1)
        ids = tokens(1, 9)
        slots = model.write_external_memory(ids)
        assert slots == [list(range(9))]
        bank = model.external_memory
        states = bank._states[0, :, :9].transpose(0, 1).reshape(9, -1)
        assert bank.search(0, states, None).tolist() == [[[i] for i in range(9)]] * 4

    def test_chunks_are_means_and_the_last_is_short(self):
        bank = (model := built()).external_memory
        slots = model.write_external_memory(tokens(2, 6), torch.tensor([[1] * 6, [0] + [1] * 5]))
        assert slots == [[0, 1], [2, 3]]
        assert bank._sizes == [4, 2, 4, 1]
        torch.testing.assert_close(bank._index[0, :, 1], bank._states[0, :, 1, :2].mean(1))
        assert bank.tokens(torch.tensor([1, -1, 3])).tolist() == [4, 5, -1, -1, -1, -1, -1, -1, 12, -1, -1, -1]
        assert (len(bank), bank.get_size()) == (4, 11)
        dropped = built(seq_adapt_method="truncate")
        assert dropped.write_external_memory(tokens(1, 7)) == [[0]]

    def test_the_ring_keeps_the_newest(self):
        bank = (model := built(external_memory_size=16)).external_memory
        model.write_external_memory(tokens(1, 12))
        kept = bank._states[:, :, 2].clone()
        assert model.write_external_memory(tokens(1, 11, seed=1)) == [[3, 0, 1]]
        assert torch.equal(bank._states[:, :, 2], kept)
        assert (len(bank), bank.get_size()) == (4, 15)
        assert model.write_external_memory(tokens(1, 40, seed=2)) == [[2, 3, 0, 1]]
        assert bank.get_size() == 16

    def test_documents_are_kept_apart(self):
        model = built()
        ids = tokens(2, 8, seed=3)
        model.write_external_memory(tokens(1, 8, seed=1), document_ids=torch.tensor([1]))
        alone = model(ids[:1], document_ids=torch.tensor([1])).logits
        model.write_external_memory(ids, document_ids=torch.tensor([2, 3]))
        model.reset_memory()
        assert torch.equal(model(ids[:1], document_ids=torch.tensor([1])).logits, alone)
        nothing = model(ids, document_ids=torch.tensor([8, 9])).logits
        torch.testing.assert_close(nothing, model(ids, use_external_memory=False).logits)

    def test_entries(self, tokenizer, tmp_path):
        model = built()
        bank = model.external_memory
        with pytest.raises(ValueError, match="tokenizer"):
            bank.add(["w1 w2"])
        bank.tokenizer = tokenizer
        first, second = bank.add(["w1 w2 w3 w4 w5", {"id": "mine", "inp_txt": "w6 w7", "type": "fact"}])
        assert second == "mine"
        assert bank.get("mine")["type"] == "fact"
        assert bank.get_stats()["entries"] == 2
        assert bank.get_size() == 7
        ids = tokens(1, 5)
        before = model(ids).logits
        bank.update("mine", "w9 w10 w11")
        assert bank.get("mine")["inp_txt"] == "w9 w10 w11"
        assert not torch.equal(model(ids).logits, before)
        bank.delete(first)
        assert bank.get_size() == 3
        with pytest.raises(KeyError, match="deleted"):
            bank.get(first)
        bank.delete("mine", soft=False)
        assert len(bank) == 0
        torch.testing.assert_close(model(ids).logits, model(ids, use_external_memory=False).logits)
        with pytest.raises(KeyError):
            bank.delete("mine")
        with pytest.raises(ValueError, match="id"):
            bank.add([{"id": "x", "inp_txt": "w1"}, {"id": "x", "inp_txt": "w2"}])
        with pytest.raises(ValueError, match="inp_txt"):
            bank.add(["w1", {"text": "w2"}])
        assert len(bank) == bank.get_stats()["entries"] == 0
        model.save_pretrained(tmp_path)
        bank = HybridTransformerModel.from_pretrained(tmp_path).external_memory
        assert bank.get(bank.add("")[0])["inp_txt"] == ""
        bank.clear()
        assert not bank.is_ready()

    @pytest.mark.parametrize("index", ["faiss-flat", "faiss-hnsw", "faiss-ivf"])
    def test_faiss_finds_what_the_exact_search_does(self, index, tmp_path):
        pytest.importorskip("faiss")
        models = [built(external_index=name, use_gated_retrieval=False) for name in ("exact", index)]
        models[1].load_state_dict(models[0].state_dict())
        models.append(copy.deepcopy(models[1]))
        ids, documents = tokens(3, 6, seed=9), torch.tensor([2, 1, 5])

        def agree():
            logits = [model(ids, document_ids=owner).logits for owner in (None, documents) for model in models]
            assert torch.equal(logits[0], logits[1])
            assert torch.equal(logits[3], logits[4])
            return logits

        for step in range(6):  # grows, then overwrites
            for model in models[:2]:
                model.write_external_memory(tokens(3, 7, seed=step), document_ids=torch.tensor([0, 1, 2]))
            agree()
        for model in models[:2]:
            model.external_memory._hide([1, 3])
        before = agree()
        assert len(models[2].external_memory) == 0
        models[1].save_pretrained(tmp_path)
        again = HybridTransformerModel.from_pretrained(tmp_path).eval()
        assert again.external_memory.index == index
        assert torch.equal(again(ids).logits, before[1])

    def test_names_that_faiss_does_not_know_and_a_missing_faiss(self, monkeypatch):
        pytest.importorskip("faiss")
        with pytest.raises(ValueError, match="external_index: FAISS does not understand 'Nonsense'"):
            built(external_index="Nonsense")
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ImportError, match=r"memkern\[faiss\]"):
            built(external_index="faiss-flat")

    def test_saving(self, tmp_path):
        model = built()
        model.write_external_memory(tokens(2, 9), document_ids=torch.tensor([4, 5]))
        model.external_memory.save(tmp_path)
        again = built()
        again.external_memory.load(tmp_path)
        documents = torch.tensor([5])
        assert torch.equal(
            again(tokens(1, 6), document_ids=documents).logits, model(tokens(1, 6), document_ids=documents).logits
        )
        with pytest.raises(ValueError, match="chunk_size"):
            built(chunk_size=2).external_memory.load(tmp_path)
        for name in ("external_memory.json", "external_memory.safetensors"):
            kept = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(kept[: len(kept) // 2])
            with pytest.raises(ValueError, match=f"{name}: damaged"):
                again.external_memory.load(tmp_path)
            (tmp_path / name).write_bytes(kept)
        assert len(again.external_memory) == len(model.external_memory)


class TestGate:
    def test_it_is_a_parameter_of_the_layers_that_retrieve(self):
        names = [name for name, _ in built().named_parameters() if name.endswith("g_retrieve")]
        assert names == ["memory_layers.0.g_retrieve"]
        assert gate(built()).g_retrieve.requires_grad
        assert not any("g_retrieve" in name for name, _ in built(use_gated_retrieval=False).named_parameters())

    def test_threshold_is_clamped_and_takes_effect(self):
        model = built()
        bank = model.external_memory
        model.write_external_memory(tokens(1, 12, seed=1))
        ids = tokens(1, 5)
        plain = model(ids, use_external_memory=False).logits
        for given, kept, retrieves in ((-1.0, 0.0, True), (0.6, 0.6, True), (0.63, 0.63, False), (2.0, 1.0, False)):
            bank.set_threshold(given)
            assert bank.get_threshold() == kept
            model.reset_memory()
            assert torch.equal(model(ids).logits, plain) is not retrieves
        with pytest.raises(ValueError, match="threshold"):
            bank.set_threshold("high")

    def test_training_always_retrieves_and_scales_by_the_gate(self):
        model = built()
        model.write_external_memory(tokens(1, 12, seed=1))
        model.external_memory.set_threshold(1.0)
        seen = []
        gate(model).external_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
        ids = tokens(1, 5)
        model.train()
        model(ids)
        model.eval()
        model.external_memory.set_threshold(0.0)
        model(ids)
        gate(model).scales_inference = False
        model(ids)
        value = torch.sigmoid(gate(model).g_retrieve.detach())
        assert torch.equal(seen[0], seen[1])
        torch.testing.assert_close(seen[0], value * seen[2])
        assert value == pytest.approx(0.62246, abs=1e-5)

    def test_a_closed_gate_serves_what_its_document_found_and_nothing_else(self):
        model = built()
        documents = torch.tensor([1, 2])
        model.write_external_memory(tokens(2, 12, seed=1), document_ids=documents)
        ids = tokens(2, 5)
        plain = model(ids, use_external_memory=False).logits
        model(ids, document_ids=documents)
        model.external_memory.set_threshold(1.0)
        cached = model(ids, document_ids=documents).logits
        assert not torch.equal(cached, plain)
        swapped = model(ids.flip(0), document_ids=documents.flip(0)).logits.flip(0)
        torch.testing.assert_close(swapped, cached)
        one = model(ids[:1, :3], document_ids=documents[:1]).logits  # fewer rows and positions
        torch.testing.assert_close(one[0], cached[0, :3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids, document_ids=torch.tensor([7, 8])).logits, plain)
        model.reset_memory()
        assert torch.equal(model(ids, document_ids=documents).logits, plain)

    def test_a_checkpoint_keeps_the_threshold_and_no_bank_that_was_cleared(self, tmp_path):
        model = built()
        model.external_memory.set_threshold(0.9)
        for written in (0, 1, 0):
            model.external_memory.clear()
            if written:
                model.write_external_memory(tokens(1, 12))
            model.save_pretrained(tmp_path)
            loaded = HybridTransformerModel.from_pretrained(tmp_path).external_memory
            assert loaded.get_threshold() == 0.9
            assert loaded.is_ready() == bool(written)

    @pytest.mark.parametrize("gate_input", ["scalar", "token"])
    def test_a_document_without_chunks_is_a_call_without_the_bank(self, gate_input):
        model = built(use_internal_memory=True, gate_input=gate_input)
        with torch.no_grad():
            gate(model).internal_proj.weight.normal_(std=0.5)
        ids = tokens(2, 5)
        model.write_external_memory(ids[:1], document_ids=torch.tensor([1]))
        plain = model(ids, use_external_memory=False).logits
        found = model(ids, document_ids=torch.tensor([1, 2], dtype=torch.int32)).logits
        torch.testing.assert_close(found[1], plain[1])
        assert not torch.allclose(found[0], plain[0])
        with pytest.raises(ValueError, match="document_ids: expected integers"):
            model(ids, document_ids=torch.tensor([1.0, 2.0]))

    def test_rows_without_ids_are_other_documents_in_a_batch_of_another_size(self):
        model = built()
        model.write_external_memory(tokens(2, 12, seed=1))
        ids = tokens(2, 5)
        plain = model(ids, use_external_memory=False).logits
        model(ids)
        model.external_memory.set_threshold(1.0)
        assert not torch.equal(model(ids).logits, plain)
        torch.testing.assert_close(model(ids[:1]).logits, plain[:1])

    @pytest.mark.parametrize("gate_input", ["scalar", "token"])
    def test_a_threshold_of_zero_opens_every_gate(self, gate_input):
        model = built(gate_input=gate_input)
        model.write_external_memory(tokens(1, 12, seed=1))
        ids, seen = tokens(1, 5), []
        with torch.no_grad():
            gate(model).g_retrieve.fill_(-2000.0)
        model.external_memory.set_threshold(0.0)
        gate(model).external_proj.register_forward_hook(lambda *args: seen.append(args))
        model(ids)
        assert len(seen) == 1
        kept = gate(model).cache.get(model._anonymous(1, ids.device), model.external_memory.epoch)
        assert (kept >= 0).all()

    def test_slots_that_changed_hands_are_not_served(self):
        model = built(external_memory_size=16)
        model.write_external_memory(tokens(1, 16, seed=1), document_ids=torch.tensor([1]))
        ids, document = tokens(1, 4), torch.tensor([1])
        model(ids, document_ids=document)
        model.write_external_memory(tokens(1, 16, seed=2), document_ids=torch.tensor([2]))
        model.external_memory.set_threshold(1.0)
        plain = model(ids, use_external_memory=False).logits
        assert torch.equal(model(ids, document_ids=document).logits, plain)

    @pytest.mark.parametrize("write", ["data", "no_grad", "load"])
    def test_the_decision_follows_the_parameter(self, write):
        model = built()
        model.write_external_memory(tokens(1, 12, seed=1))
        ids = tokens(1, 4)
        plain = model(ids, use_external_memory=False).logits
        assert not torch.equal(model(ids).logits, plain)
        if write == "data":
            gate(model).g_retrieve.data.fill_(-5.0)
        elif write == "no_grad":
            with torch.no_grad():
                gate(model).g_retrieve.fill_(-5.0)
        else:
            state = model.state_dict()
            state["memory_layers.0.g_retrieve"] = torch.tensor(-5.0)
            model.load_state_dict(state)
        model.reset_memory()
        assert torch.equal(model(ids).logits, plain)

    def test_a_closed_gate_runs_no_search_no_retrieval_attention_and_no_host_read(self):
        model = built()
        model.write_external_memory(tokens(1, 12, seed=1))
        ids = tokens(1, 5)
        opened = names_of(model, ids)
        assert any("cosine_topk" in name for name in opened)
        assert any("retrieved_attention" in name for name in opened)
        model.external_memory.set_threshold(1.0)
        model.reset_memory()
        model(ids)  # the one look at the parameter
        closed = names_of(model, ids)
        assert not any("cosine_topk" in name or "retrieved_attention" in name for name in closed)
        assert closed == names_of(model, ids, use_external_memory=False)
        # What the gate may not add: reads of a value by the host.
        base = names_of(model.backbone, input_ids=ids)
        reads = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"}
        assert closed & reads <= base & reads

    def test_token_gates_depend_on_the_input(self):
        model = built(gate_input="token")
        with torch.no_grad():
            gate(model).g_retrieve.zero_()
            gate(model).token_gate.weight.normal_(std=2.0)
        model.write_external_memory(tokens(1, 12, seed=1))
        ids = tokens(1, 8)
        seen = []
        gate(model).external_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
        gates = []
        gate(model).token_gate.register_forward_hook(lambda m, args, out: gates.append(torch.sigmoid(out).detach()))
        model.reset_memory()
        model(ids)
        is_open = gates[0][0, :, 0] > 0.5
        assert is_open.any()
        assert not is_open.all()
        first = int(is_open.int().argmax())
        assert torch.equal(seen[0][0, :first], torch.zeros_like(seen[0][0, :first]))
        assert (seen[0][0, first:].abs().sum(-1) > 0).all()

    def test_logging(self, caplog):
        model = built(log_freq=10)
        with caplog.at_level("INFO"):
            assert gate(model).log_gate_value(10) == pytest.approx(0.62246, abs=1e-5)
            assert gate(model).log_gate_value(11) == pytest.approx(0.62246, abs=1e-5)
        assert len(caplog.records) == 1
        assert built(use_gated_retrieval=False).memory_layers["0"].log_gate_value(0) is None
        assert model(tokens(1, 3)).memory_info["retrieval_gates"] == {0: pytest.approx(0.62246, abs=1e-5)}
