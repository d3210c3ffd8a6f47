"""Two processes under DDP: closed gates, skipped banks and given states leave no parameter without gradient."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.testing import distributed


def train(rank, folder):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = HybridTransformerModel(HybridTransformerConfig(text, memory_slots=4, use_gated_retrieval=True))
    model.write_external_memory(torch.randint(1, 40, (1, 8)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    torch.manual_seed(rank)
    state = None
    for step in range(3):
        ids = torch.randint(1, 40, (2, 6))
        # The ranks take different branches: one leaves its bank alone.
        found = wrapped(ids, labels=ids, memory_state=state, use_external_memory=bool((rank + step) % 2))
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = model.detach(found.new_memory_state)
    torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), f"{folder}/{rank}.pt")


def test_ranks_take_different_branches_and_stay_equal(tmp_path):
    distributed.spawn(train, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
