"""Both models as transformers models: dtype loading, Trainer, losses that Trainer counts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer


def self_rag():
    torch.manual_seed(0)
    config = SelfRAGConfig(
        d_model=16, n_heads=2, n_layers=1, d_ff=16, vocab_size=40, max_seq_len=48, top_k=2, retrieval_method="learned"
    )
    model = SelfRAGModel(SelfRAGTransformer(config), config=config)
    model.write_to_memory(["a", "b", "c"], [[1, 2, 3], [4, 5], [6, 7, 8]])
    return model


def hybrid():
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = HybridTransformerModel(HybridTransformerConfig(text, memory_slots=4, use_gated_retrieval=True))
    model.write_external_memory(torch.randint(1, 40, (1, 8)))
    return model


@pytest.fixture(params=[self_rag, hybrid])
def model(request):
    return request.param()


def test_loading_in_bfloat16(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    ids = torch.randint(1, 40, (2, 6))
    logits = again(ids, labels=ids).logits.float()
    assert logits.isfinite().all()
    full = model.eval()(ids).logits
    torch.testing.assert_close(logits, full, rtol=0.1, atol=0.1)
    assert again.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 8)


def test_autocast(model):
    ids = torch.randint(1, 40, (2, 6))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_trainer(model, tmp_path):
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 40, (8, 6), generator=draw)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_steps=3,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
    before = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    ids = torch.randint(1, 40, (1, 6))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_accumulated_losses_are_those_of_the_whole_batch(model):
    model.eval()
    ids = torch.randint(1, 40, (4, 6))
    whole = model(ids, labels=ids, use_cache=False).loss
    count = 4 * (5 if isinstance(model, HybridTransformerModel) else 6)
    parts = [model(part, labels=part, num_items_in_batch=count).loss for part in ids.split(2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
