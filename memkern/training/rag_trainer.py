"""Train Self-RAG in three phases: plain language model, memory of the batch's context, recall at every position."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkern.analysis.retrieval_metrics import retrieval_report
from memkern.store import MemoryStore
from memkern.training.groups import param_groups
from memkern.training.rag_config import RAGTrainingConfig
from memkern.training.rag_data import Item, RAGBatch, collate, indices, leak_test, recall_items

STATE_FILE, OPTIMISER_FILE, CONFIG_FILE = "trainer_state.json", "optimizer.pt", "training_config.json"


@dataclass
class RAGTrainerState:
    """Where a run stands."""

    global_step: int = 0
    micro_step: int = 0
    dropped_chunks: int = 0  # context chunks that were part of a text being predicted
    log_history: list[dict[str, float]] = field(default_factory=list)


class RAGTrainer:
    """Trains a :class:`memkern.models.self_rag.SelfRAGModel`, or any causal LM of ours as a plain language model.

    Phase one predicts without memory. In phase two every micro-batch clears the store, writes its rows' context chunks,
    never a text that is being predicted, and trains with retrieval, memory dropout and the contrastive loss. Phase
    three asks for facts at every position of a stream, each position equally often.

    Args:
        model: on the device to train on.
        config: see :class:`RAGTrainingConfig`.
        train_dataset: a sequence of ``{"input_ids", "context_chunks", "positive"?, "labels"?}``; see
            :func:`memkern.training.rag_data.collate`.
        eval_dataset: the same, for :meth:`evaluate`.
    """

    def __init__(
        self,
        model: Any,
        config: RAGTrainingConfig,
        train_dataset: Sequence[Item],
        eval_dataset: Sequence[Item] | None = None,
    ) -> None:
        if len(train_dataset) == 0:
            raise ValueError("train_dataset: expected at least one item, got none")
        self.model, self.config = model, config
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        for name in ("contrastive_weight", "memory_dropout"):
            if getattr(config, name) is not None:
                setattr(model.config, name, getattr(config, name))
        self.optimizer = torch.optim.AdamW(
            param_groups(model, config.learning_rate, weight_decay=config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
        )
        self.state = RAGTrainerState()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._writer: Any = None

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    # Training

    def train(self, resume_from_checkpoint: str | Path | None = None) -> RAGTrainerState:
        """Train up to ``max_steps``; a resumed run goes on exactly where the checkpoint left it.

        Args:
            resume_from_checkpoint: a ``checkpoint-<step>`` folder.

        Returns:
            The state, with ``log_history``.
        """
        torch.manual_seed(self.config.seed)
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        draw = indices(len(self.train_dataset), self.config.seed, self.state.micro_step * self.config.batch_size)
        self.model.train()
        with self._bar() as bar:
            while self.state.global_step < self.config.max_steps:
                self._step(draw)
                bar.update(1)
                self._report(bar)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        return self.state

    def _step(self, draw: Iterator[int]) -> None:
        """One optimiser step."""
        step, config = self.state.global_step, self.config
        phase = config.phase(step)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(config.gradient_accumulation_steps):
            # Drawn in phase three too, so that where a run stands in its data follows from its step alone.
            items = [self.train_dataset[next(draw)] for _ in range(config.batch_size)]
            if phase == 3:
                items = self._recall(self.state.micro_step)  # type: ignore[assignment]
            batch = self.collate(items)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                found = self.forward(batch, phase)
            (found.loss / config.gradient_accumulation_steps).backward()
            self._note(phase, found)
            self.state.micro_step += 1
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf)
        self.optimizer.step()
        self.state.global_step += 1
        self._add("grad_norm", float(norm))
        self._add("learning_rate", rate)
        self._add("phase", float(phase))

    def forward(self, batch: RAGBatch, phase: int) -> Any:
        """The model's output on a batch in this phase, its store cleared and filled when the phase uses memory."""
        arguments: dict[str, Tensor | list[int] | bool] = {
            "input_ids": batch.input_ids.to(self.device),
            "attention_mask": batch.attention_mask.to(self.device),
            "labels": batch.labels.to(self.device),
        }
        if getattr(self.model, "memory", None) is None:
            return self.model(**arguments)
        if phase == 1:
            return self.model(**arguments, use_memory=False)
        own = phase == 3 or not self.config.share_batch_memory
        if phase == 3 or self.config.memory_populate_batch:
            positives = self.populate(batch, isolated=own)
            arguments["positive_ids"] = torch.tensor(positives, device=self.device)
            if own:
                arguments["memory_groups"] = list(range(len(batch.chunks)))
        return self.model(**arguments)

    def populate(self, batch: RAGBatch, *, isolated: bool) -> list[int]:
        """Clear the store, write the batch's context, and return each row's positive id (-1 for none).

        Rows with one and the same chunk share it, unless they are ``isolated``: then each row's chunks carry its number
        as their group. A chunk that shares more than half of itself with a text that this batch predicts, in one run,
        stays out, and so does one that holds more than half of such a text; not one that holds the answer to a row
        which is mostly question.
        """
        model = self.model
        model.memory.clear()
        gives_away = leak_test(batch)
        place: dict[tuple[int, tuple[int, ...]], int] = {}
        for row, chunks in enumerate(batch.chunks):
            for chunk in chunks:
                key = (row if isolated else -1, tuple(chunk))
                if key in place:
                    continue
                if gives_away(chunk):
                    self.state.dropped_chunks += 1
                    continue
                place[key] = len(place)
        # The store keeps the last max_chunks of a batch: no more are written.
        kept = list(place)[: model.memory.max_chunks]
        sequences = [list(chunk) for _, chunk in kept]
        ids = model.write_to_memory([self._text(s) for s in sequences], sequences, [{"group": r} for r, _ in kept])
        stored = dict(zip(kept, ids, strict=True))
        return [
            -1 if at < 0 else stored.get((row if isolated else -1, tuple(batch.chunks[row][at])), -1)
            for row, at in enumerate(batch.positives)
        ]

    def collate(self, items: Sequence[Item]) -> RAGBatch:
        return collate(items, getattr(self.model, "pad_token_id", 0) or 0, getattr(self.model, "tokenizer", None))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine from the learning rate to its minimum."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        share = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        low = config.min_learning_rate
        return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _recall(self, micro_step: int) -> list[dict[str, Any]]:
        """A stream of facts of its own for each micro-batch, its positions asked in turn over the batches."""
        size, facts = self.config.batch_size, self.config.position_recall_facts
        seed = self.config.seed + 1_000_003 * (micro_step + 1)
        tokenizer = getattr(self.model, "tokenizer", None)
        return recall_items(size, facts, seed, tokenizer)

    def _text(self, tokens: list[int]) -> str:
        tokenizer = getattr(self.model, "tokenizer", None)
        return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)

    # Evaluation

    @torch.no_grad()
    def evaluate(self, dataset: Sequence[Item] | None = None) -> dict[str, float]:
        """Loss and perplexity with and without memory, and how well the positives are retrieved.

        Each item's memory is its batch's context in a store of its own; the model's store is not touched.

        Returns:
            ``eval_loss``, ``eval_perplexity``, the same with ``_without_memory``, and for items with a positive
            ``recall@1``, ``recall@5``, ``mrr`` and ``ndcg@5``.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("dataset: expected one, or an eval_dataset at construction, got None")
        model, kept = self.model, self.model.memory
        training = model.training
        model.eval()
        totals = {"with": 0.0, "without": 0.0}
        labels = 0
        ranked: list[list[int]] = []
        wanted: list[list[int]] = []
        dropped = self.state.dropped_chunks
        model.memory = MemoryStore(kept.d_model, kept.max_chunks, retrieval_method=kept.retrieval_method)
        model._score_state = None
        try:
            for start in range(0, len(dataset), self.config.batch_size):
                items = [dataset[i] for i in range(start, min(start + self.config.batch_size, len(dataset)))]
                batch = self.collate(items)
                count = int((batch.labels != -100).sum())
                totals["without"] += float(self.forward(batch, 1).lm_loss) * count
                isolated = not self.config.share_batch_memory
                positives = self.populate(batch, isolated=isolated)
                arguments = {
                    "input_ids": batch.input_ids.to(self.device),
                    "attention_mask": batch.attention_mask.to(self.device),
                }
                groups = list(range(len(items))) if isolated else None
                found = model(
                    **arguments, labels=batch.labels.to(self.device), memory_groups=groups, return_retrieved=True
                )
                totals["with"] += float(found.lm_loss) * count
                labels += count
                for hits, positive in zip(found.retrieved, positives, strict=True):
                    if positive >= 0:
                        ranked.append([hit.id for hit in hits])
                        wanted.append([positive])
        finally:
            model.memory = kept
            model._score_state = None
            model.train(training)
            self.state.dropped_chunks = dropped
        metrics = {
            "eval_loss": totals["with"] / max(labels, 1),
            "eval_loss_without_memory": totals["without"] / max(labels, 1),
        }
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        metrics["eval_perplexity_without_memory"] = math.exp(min(metrics["eval_loss_without_memory"], 700.0))
        if ranked:
            report = retrieval_report(ranked, wanted, (1, 5))
            metrics |= {name: report[name] for name in ("recall@1", "recall@5", "mrr", "ndcg@5")}
        return metrics

    # Logging

    def _note(self, phase: int, found: Any) -> None:
        self._add("loss", float(found.loss.detach()))
        for name in ("lm_loss", "contrastive_loss"):
            value = getattr(found, name, None)
            if value is not None:
                self._add(name, float(value.detach()))
        for name, value in self.curves().items():
            self._add(name, value)

    def curves(self) -> dict[str, float]:
        """Further values to log at each step, by name."""
        return {}

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _report(self, bar: Any) -> None:
        """Log, evaluate and save where the step asks for it."""
        step, config = self.state.global_step, self.config
        last = step == config.max_steps
        if config.logging_steps and (step % config.logging_steps == 0 or last):
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            self._sums, self._counts = {}, {}
            self._log(means)
            bar.set_postfix(loss=f"{means['loss']:.3f}")
        if config.eval_steps and self.eval_dataset is not None and (step % config.eval_steps == 0 or last):
            self._log(self.evaluate())
        if config.save_steps and (step % config.save_steps == 0 or last):
            self.save_checkpoint()

    def _log(self, values: dict[str, float]) -> None:
        step = self.state.global_step
        self.state.log_history.append({"step": step, **values})
        if not self.config.tensorboard:
            return
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=True needs: pip install 'memkern[train]'") from error
            self._writer = SummaryWriter(str(self.output_dir / "runs"))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(
            total=self.config.max_steps, initial=self.state.global_step, disable=not self.config.progress_bar
        ) as bar:
            yield bar

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """Write ``checkpoint-<step>``: model with its store, optimiser, random state, settings and history."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        self.model.save_pretrained(folder)
        self.config.to_json(folder / CONFIG_FILE)
        (folder / STATE_FILE).write_text(json.dumps(asdict(self.state), indent=1) + "\n")
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "random": random, "sums": self._sums, "counts": self._counts},
            folder / OPTIMISER_FILE,
        )
        limit = self.config.save_total_limit
        if limit is not None:
            found = sorted(self.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in found[: max(0, len(found) - max(limit, 1))]:
                shutil.rmtree(old)
        return folder

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint: weights into the parameters as they stand, store, optimiser, random state."""
        if not (folder / STATE_FILE).exists():
            raise FileNotFoundError(f"resume_from_checkpoint: {folder} holds no {STATE_FILE}")
        loaded = type(self.model).from_pretrained(folder)
        self.model.load_state_dict(loaded.state_dict())
        if hasattr(loaded, "memory"):
            self.model.memory = loaded.memory
            self.model._score_state = None
        self.state = RAGTrainerState(**json.loads((folder / STATE_FILE).read_text()))
        saved = torch.load(folder / OPTIMISER_FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._sums, self._counts = saved["sums"], saved["counts"]
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
