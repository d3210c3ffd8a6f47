"""Arguments on another device than the model: an error that names them, before any layer runs.

The meta device stands for the other one here; where there is a GPU, a store on the CPU serves a model on it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel

BATCH, LENGTH = 2, 6
IDS = torch.arange(1, 1 + BATCH * LENGTH).reshape(BATCH, LENGTH)


def self_rag() -> SelfRAGModel:
    torch.manual_seed(0)
    model = SelfRAGModel(SelfRAGConfig(d_model=16, n_heads=2, n_layers=1, d_ff=16, vocab_size=40, top_k=1)).eval()
    model.write_to_memory(["a", "b"], [[1, 2, 3], [4, 5]])
    return model


def hybrid() -> HybridTransformerModel:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return HybridTransformerModel(HybridTransformerConfig(text, memory_slots=4)).eval()


MODELS = {"self-rag": self_rag, "hybrid": hybrid}


def arguments(name: str) -> dict[str, torch.Tensor]:
    own = {"positive_ids": torch.zeros(BATCH, dtype=torch.int64)}
    if name == "hybrid":
        own = {"document_ids": torch.zeros(BATCH, dtype=torch.int64)}
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    return {**given, "document_mask": torch.ones(BATCH, dtype=torch.bool), **own}


@pytest.mark.parametrize("name", MODELS)
def test_each_argument_is_named(name):
    model = MODELS[name]()
    whole = arguments(name)
    assert model(**whole).loss.isfinite()
    for moved in set(whole) - {"input_ids"}:
        elsewhere = whole | {moved: whole[moved].to("meta")}
        with pytest.raises(ValueError, match=f"^{moved}: expected device cpu, as input_ids has, got meta"):
            model(**elsewhere)
    with pytest.raises(ValueError, match=r"^input_ids: expected device cpu, as the model.s weights have, got meta"):
        model(input_ids=IDS.to("meta"))


def test_generate_embed_and_write():
    ids, mask = IDS.to("meta"), torch.ones_like(IDS).to("meta")
    model, other = self_rag(), hybrid()
    before = other.external_memory.get_size()
    for call in (model.generate, model.embed, other.write_external_memory):
        with pytest.raises(ValueError, match=r"^input_ids: expected device cpu"):
            call(ids)
        with pytest.raises(ValueError, match=r"^attention_mask: expected device cpu"):
            call(IDS, mask)
    assert other.external_memory.get_size() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_store_on_the_cpu_serves_a_model_on_the_gpu():
    model = self_rag()
    expected = model(IDS, labels=IDS, positive_ids=torch.zeros(BATCH, dtype=torch.int64))
    model.to("cuda")
    given = IDS.cuda()
    found = model(given, labels=given, positive_ids=torch.zeros(BATCH, dtype=torch.int64, device="cuda"))
    assert model.memory.device.type == "cpu"
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-3, atol=1e-3)
    assert model.generate(given, max_new_tokens=2).device.type == "cuda"
