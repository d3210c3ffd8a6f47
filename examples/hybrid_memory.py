"""Wrap a decoder with memory: fast weights that persist between calls, an external bank, and a gate that can close.

The backbone is a random Llama here; ``AutoModelForCausalLM.from_pretrained(...)`` gives a real one. A fresh wrapper
computes exactly what its backbone does; training moves the memories away from there.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.training import param_groups


def main() -> None:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    )
    config = HybridTransformerConfig(memory_slots=8, external_memory_size=4096, use_gated_retrieval=True)
    model = HybridTransformerModel(config, base_model=backbone).eval()
    segments = torch.randint(1, 100, (2, 3, 16))  # two documents of three segments
    same = torch.equal(model(segments[:, 0]).logits, backbone(segments[:, 0]).logits)
    print(f"a fresh model equals its backbone: {same}")

    documents = torch.tensor([7, 8])
    model.write_external_memory(torch.randint(1, 100, (2, 40)), document_ids=documents)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, memory_lr=1e-2))
    model.train()
    for step in range(5):
        state, loss = None, torch.zeros(())
        for segment in segments.unbind(1):
            found = model(segment, labels=segment, memory_state=state, document_ids=documents)
            state, loss = found.new_memory_state, loss + found.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item() / 3:.3f}, gates {model.gate_values()}")

    model.eval()
    with_memory = model(segments[:, 0], document_ids=documents).logits
    model.external_memory.set_threshold(1.0)  # closed: no search, no retrieval attention
    model.reset_memory()
    closed = model(segments[:, 0], document_ids=documents).logits
    print(f"retrieval moves the logits by up to {(with_memory - closed).abs().max():.4f}")
    model.external_memory.set_threshold(0.5)
    print(model.generate(segments[:, 0], document_ids=documents, max_new_tokens=5, do_sample=False)[:, -5:])


if __name__ == "__main__":
    main()
