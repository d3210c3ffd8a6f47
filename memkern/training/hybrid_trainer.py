"""Train a hybrid memory transformer: long rows in segments, the state carried on, the context in the external bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkern.models.hybrid import HybridTransformerModel
from memkern.models.hybrid.modeling_hybrid import MEMORY_FOLDER
from memkern.training.rag_config import RAGTrainingConfig
from memkern.training.rag_data import Item, RAGBatch, collate, leak_test
from memkern.training.rag_trainer import RAGTrainer


@dataclass
class HybridTrainingConfig(RAGTrainingConfig):
    """:class:`RAGTrainingConfig` with segments; contrast and position recall do not apply.

    Args:
        segment_length: tokens of a segment; a row is predicted segment by segment, each with the memory that the ones
            before it left. None takes rows whole.
        bptt_segments: after how many segments the graph of the state is cut; None takes the model's, which by default
            never cuts.
    """

    segment_length: int | None = None
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segment_length", "bptt_segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected None or at least 1, got {value}")
        if self.position_recall_steps:
            raise ValueError(f"position_recall_steps: expected 0 for a hybrid model, got {self.position_recall_steps}")


@dataclass
class SegmentedOutput:
    """Mean loss over all labelled tokens of all segments, under the names that the trainer logs."""

    loss: Tensor
    lm_loss: Tensor


class HybridTrainer(RAGTrainer):
    """Trains a :class:`memkern.models.hybrid.HybridTransformerModel` on the items of :class:`RAGTrainer`.

    From phase two on every micro-batch clears the bank and writes each row's context chunks under that row's document,
    never a text that is being predicted; retrieval gates are logged as ``gate/layer_<i>``.
    """

    config: HybridTrainingConfig

    def __init__(
        self,
        model: HybridTransformerModel,
        config: HybridTrainingConfig,
        train_dataset: Sequence[Item],
        eval_dataset: Sequence[Item] | None = None,
    ) -> None:
        super().__init__(model, config, train_dataset, eval_dataset)

    def forward(self, batch: RAGBatch, phase: int) -> Any:
        """The loss over the segments of a batch; phase one leaves the external memory alone."""
        documents = torch.arange(len(batch.chunks), device=self.device)
        external = phase > 1 and bool(self.model.config.use_external_memory)
        if external and self.config.memory_populate_batch:
            self._write(batch)
        total, labels = None, _predicted(batch)
        state = None
        length = self.config.segment_length or batch.input_ids.shape[1]
        every = self.config.bptt_segments or self.model.config.bptt_segments
        for index, start in enumerate(range(0, batch.input_ids.shape[1], length)):
            part = slice(start, start + length)
            ids, mask = batch.input_ids[:, part].to(self.device), batch.attention_mask[:, part].to(self.device)
            # The token after the segment is predicted by its last one.
            targets = torch.nn.functional.pad(batch.labels, (0, 1), value=-100)[:, start + 1 : start + 1 + ids.shape[1]]
            if state is not None and every is not None and index % every == 0:
                state = self.model.detach(state)
            found = self.model(
                ids,
                targets=targets.to(self.device),
                attention_mask=mask,
                memory_state=state,
                document_ids=documents,
                document_mask=mask.bool().any(1),
                use_external_memory=external,
                num_items_in_batch=max(labels, 1),
                use_cache=False,
            )
            total = found.loss if total is None else total + found.loss
            state = found.new_memory_state
        assert total is not None
        return SegmentedOutput(total, total.detach())

    def _write(self, batch: RAGBatch) -> None:
        """Every row's context into the bank, under the row's number."""
        model, gives_away = self.model, leak_test(batch)
        model.external_memory.clear()
        model.reset_gates()
        rows, chunks = [], []
        for row, context in enumerate(batch.chunks):
            for chunk in context:
                if gives_away(chunk):
                    self.state.dropped_chunks += 1
                else:
                    rows.append(row)
                    chunks.append(torch.tensor(chunk, dtype=torch.int64))
        if not chunks:
            return
        ids = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(chunk) for chunk in chunks], batch_first=True)
        model.write_external_memory(ids.to(self.device), mask.to(self.device), torch.tensor(rows, device=self.device))

    def collate(self, items: Sequence[Item]) -> RAGBatch:
        return collate(items, self.model.config.pad_token_id or 0, self.model.external_memory.tokenizer)

    def curves(self) -> dict[str, float]:
        """The retrieval gates."""
        return {f"gate/layer_{layer}": value for layer, value in self.model.gate_values().items()}

    def _load(self, folder: Path) -> None:
        super()._load(folder)
        bank = folder / MEMORY_FOLDER
        if bank.is_dir():
            self.model.external_memory.load(bank, self.device)
            self.model.reset_gates()

    @torch.no_grad()
    def evaluate(self, dataset: Sequence[Item] | None = None) -> dict[str, float]:
        """Loss and perplexity with both memories, and without the external one; the bank is put back afterwards."""
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("dataset: expected one, or an eval_dataset at construction, got None")
        model, kept, dropped = self.model, self.model.external_memory, self.state.dropped_chunks
        training = model.training
        model.eval()
        totals, labels = {1: 0.0, 2: 0.0}, 0
        model.use_bank(type(kept)(model.config, model, kept.tokenizer))
        model.external_memory.set_threshold(kept.get_threshold())
        try:
            for start in range(0, len(dataset), self.config.batch_size):
                stop = min(start + self.config.batch_size, len(dataset))
                batch = self.collate([dataset[i] for i in range(start, stop)])
                count = _predicted(batch)
                labels += count
                for phase in totals:
                    totals[phase] += float(self.forward(batch, phase).loss) * count
        finally:
            model.use_bank(kept)
            model.train(training)
            self.state.dropped_chunks = dropped
        metrics = {
            "eval_loss": totals[2] / max(labels, 1),
            "eval_loss_without_memory": totals[1] / max(labels, 1),
        }
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        metrics["eval_perplexity_without_memory"] = math.exp(min(metrics["eval_loss_without_memory"], 700.0))
        return metrics


def _predicted(batch: RAGBatch) -> int:
    """Labels that have a token before them."""
    return int((batch.labels[:, 1:] != -100).sum())
