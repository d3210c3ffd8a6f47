"""Train a reader on position recall, then its retriever: a contrastive loss from the start prevents the reader."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memkern.models.self_rag import SelfRAGModel, SelfRAGTransformer
from memkern.training.rag_recall.task import Documents, RecallSettings, draw, with_distractors

TRAINING_SEED, TEST_SEED = 1_000_000, 2_000_000
AVERAGED = 20  # steps in a running accuracy

Progress = Callable[[str, int, float], None]


def silent(phase: str, step: int, accuracy: float) -> None:
    """No progress."""


@dataclass
class TrainingLog:
    """How a run went: steps and seconds of each phase, the last running accuracy, and its course."""

    reader_steps: int = 0
    reader_seconds: float = 0.0
    retriever_steps: int = 0
    retriever_seconds: float = 0.0
    lookup_accuracy: float = 0.0
    curve: list[tuple[int, int, float]] = field(default_factory=list)  # step, keys, accuracy

    def note(self, step: int, keys: int) -> None:
        if step % AVERAGED == 0:
            self.curve.append((step, keys, round(self.lookup_accuracy, 4)))


def optimiser(model: torch.nn.Module, settings: RecallSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def remember(model: SelfRAGModel, documents: Documents) -> Tensor:
    """Clear the store and write every fact with its document as the group; (D, N) ids."""
    count, facts, _ = documents.facts.shape
    model.memory.clear()
    tokens = documents.facts.flatten(0, 1).tolist()
    ids = model.write_to_memory(
        [f"{key} = {value}" for key, value in tokens],
        tokens,
        [{"group": d} for d in range(count) for _ in range(facts)],
    )
    return torch.tensor(ids).view(count, facts)


def train_reader(
    settings: RecallSettings, seed: int, *, progress: Progress = silent
) -> tuple[SelfRAGModel, TrainingLog]:
    """Phase one: read the right one of a few facts, with 4 keys, then 8, and so on to all of them."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    config = settings.config()
    model = SelfRAGModel(SelfRAGTransformer(config), config=config).train()
    generator = torch.Generator().manual_seed(seed + TRAINING_SEED)
    optimizer, log = optimiser(model, settings), TrainingLog()
    keys, recent = min(4, settings.keys), _Running()
    for step in range(1, settings.reader_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps)
        # Half the keys at first, so that a document does not always hold the same facts.
        k = min(settings.chunks, max(2, keys // 2))
        documents = draw(settings, settings.reader_documents, _seed(generator), facts=k, keys=keys)
        asked = torch.randint(k, (settings.reader_documents, settings.reader_questions), generator=generator)
        rows = torch.arange(settings.reader_documents)[:, None]
        answers = documents.answers[rows, asked]
        inputs = torch.cat((documents.questions[rows, asked], answers[..., None]), -1).flatten(1)
        labels = torch.full_like(inputs, -100)
        labels[:, 2::3] = answers
        found = model(inputs, labels=labels, retrieved=documents.facts.tolist())
        _update(model, optimizer, found.loss)
        first = found.logits[:, -inputs.shape[1] + 1]
        log.lookup_accuracy = recent.add((first.argmax(-1) == answers[:, 0]).float().mean().item())
        log.note(step, keys)
        progress(f"reader, {keys} keys", step, log.lookup_accuracy)
        if recent.full and log.lookup_accuracy >= settings.lookup:
            if keys == settings.keys:
                break
            keys, recent = min(2 * keys, settings.keys), _Running()
    log.reader_steps, log.reader_seconds = step, time.perf_counter() - start
    return model, log


def train_retriever(
    model: SelfRAGModel,
    log: TrainingLog,
    settings: RecallSettings,
    seed: int,
    *,
    steps: int | None = None,
    progress: Progress = silent,
) -> SelfRAGModel:
    """Phase two: the contrastive loss beside reading 2, 4 or 8 facts in random order.

    Args:
        steps: how many in all, those of the falling learning rate included; None ends by the running accuracy.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 2 * TRAINING_SEED)
    optimizer, recent = optimiser(model, settings), _Running(3 * AVERAGED)
    model.train()
    count, questions = settings.batch_documents, settings.batch_questions
    rows = torch.arange(count)[:, None]
    groups = torch.arange(count).repeat_interleave(questions).tolist()
    end, step = steps, 0
    while end is None or step < end:
        for group in optimizer.param_groups:
            left = 1.0 if end is None else (end - step) / settings.anneal_steps
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps, left)
        documents = draw(settings, count, _seed(generator))
        wanted = torch.rand(count, settings.facts, generator=generator).argsort(1)[:, :questions]
        k = min(settings.facts, (settings.chunks // 2, settings.chunks, 2 * settings.chunks)[step % 3])
        read: list[Any] = [
            documents.facts[d, row].tolist()
            for d in range(count)
            for row in with_distractors(settings.facts, wanted[d], k, generator)
        ]
        answers = documents.answers[rows, wanted].flatten()
        inputs = torch.cat((documents.questions[rows, wanted].flatten(0, 1), answers[:, None]), 1)
        labels = torch.full_like(inputs, -100)
        labels[:, -1] = answers
        positives = remember(model, documents)[rows, wanted].flatten()
        if step % 2:
            # Every other step reads what the model itself finds: the hardest of the wrong facts. In random order, or
            # the reader would learn to take the first.
            read = shuffle(
                model.retrieve(model.embed(inputs[:, :2], differentiable=False), k, groups=groups), generator
            )
        found = model(inputs, labels=labels, retrieved=read, positive_ids=positives, memory_groups=groups)
        _update(model, optimizer, found.loss)
        log.lookup_accuracy = recent.add((found.logits[:, -2].argmax(-1) == answers).float().mean().item())
        log.note(log.reader_steps + step + 1, settings.keys)
        step += 1
        progress("retriever", step, log.lookup_accuracy)
        if end is None and ((recent.full and log.lookup_accuracy >= settings.sure) or step >= settings.retriever_steps):
            end = step + settings.anneal_steps
    log.retriever_steps, log.retriever_seconds = step, time.perf_counter() - start
    model.memory.clear()
    return model.eval()


class _Running:
    """Mean of the last accuracies."""

    def __init__(self, count: int = AVERAGED) -> None:
        self.count = count
        self.values: list[float] = []

    @property
    def full(self) -> bool:
        return len(self.values) == self.count

    def add(self, value: float) -> float:
        self.values = [*self.values, value][-self.count :]
        return sum(self.values) / len(self.values)


def _update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def shuffle(hits: Any, generator: torch.Generator) -> list[list[Any]]:
    """Each row's hits in random order."""
    return [[row[i] for i in torch.randperm(len(row), generator=generator).tolist()] for row in hits]


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 40, (), generator=generator))
