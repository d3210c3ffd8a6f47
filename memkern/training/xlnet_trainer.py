"""Training of the XLNet models on documents of many segments: stages, phases, BPTT, resume, several processes."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from memkern.analysis.squad import squad_evaluate
from memkern.data import TimeStepMajorDataLoader, join_articles, load_squad, squad_features
from memkern.data.features import SquadFeature
from memkern.data.squad import SquadExample, SquadSource
from memkern.training.building import build_model, build_tokenizer, memory_tokens
from memkern.training.checkpoints import (
    checkpoints,
    load_weights,
    random_state,
    set_random_state,
    write_checkpoint,
)
from memkern.training.config import TrainingConfig
from memkern.training.groups import param_groups
from memkern.training.losses import DocumentLoss, stack_steps
from memkern.training.predictor import Predictions, QAPredictor
from memkern.training.recorder import Recorder, TrainerState, progress_bar


class XLNetRecurrentTrainer:
    """Trains and evaluates one of our XLNet models.

    Stages (``progressive_segments`` or ``progressive_stages``) follow one another, each with its own number of
    segments, heads, slots or experts, optimiser and schedule. Where a stage changes the memory's sizes, a new model
    takes over the backbone and the overlap of the memory; what is new keeps its initial value. The weights of the last
    step go into the next stage. Epochs and the phases that count in epochs start anew in every stage, steps go on.

    Under ``torchrun`` or ``accelerate launch`` every process takes its own batches of ``train_batch_size`` documents.

    Args:
        config: every setting.
        model: used as it is, in place of the one that the configuration describes.
        tokenizer: in place of the configuration's.
        train_dataset, eval_dataset: in place of the configuration's files or names; see
            :func:`memkern.data.load_squad`.

    Attributes:
        state: :class:`memkern.training.recorder.TrainerState`, with ``log_history``.

    Raises:
        ValueError: settings that cannot go together here, or data that is not SQuAD's form.
        ImportError: accelerate or transformers is missing (extra ``memkern[models]``).
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: SquadSource | None = None,
        eval_dataset: SquadSource | None = None,
    ) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = self._accelerator()
        self.state = TrainerState()
        _seed(config.seed)
        self._train_source = train_dataset if train_dataset is not None else config.train_file
        self._eval_source = eval_dataset if eval_dataset is not None else config.eval_file
        self._examples: dict[str, list[SquadExample]] = {}
        stage = self._stage_config(0)
        self._model_config = stage
        if model is not None and any(_sizes(later) for later in config.stages):
            raise ValueError("progressive_stages: sizes of a given model cannot be changed; leave model=None")
        self.tokenizer = tokenizer if tokenizer is not None else build_tokenizer(stage, self.examples("train"))
        self.model = model if model is not None else build_model(stage, self.tokenizer)
        self._given_model, self._given_tokenizer = model is not None, tokenizer is not None
        if model is not None:
            self.model.config.bptt_segments = config.bptt_segments
            if config.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
        self.model.to(self.accelerator.device)
        self._features: dict[str, list[SquadFeature]] = {}

    def _accelerator(self) -> Any:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import DistributedDataParallelKwargs
        except ImportError as error:
            raise ImportError("training needs accelerate: install the extra memkern[models]") from error
        cpu = torch.device(self.config.device).type == "cpu"
        if cpu and self.config.fp16:
            raise ValueError("fp16: expected a GPU, got device 'cpu'; bf16 works there")
        precision = "fp16" if self.config.fp16 else "bf16" if self.config.bf16 else "no"
        if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
            AcceleratorState._reset_state()  # an earlier trainer of this process had another precision
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            # Which parameters a batch reaches depends on its documents: without a second segment no write is read.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )

    def examples(self, split: str) -> list[SquadExample]:
        """The questions of "train" or "eval"."""
        if split not in self._examples:
            train = split == "train"
            source = self._train_source if train else self._eval_source
            name = self.config.train_split if train else self.config.eval_split
            found = load_squad(self.config.dataset_name if source is None else source, name)
            limit = self.config.max_train_samples if train else self.config.max_eval_samples
            if self.config.join_articles:
                found = join_articles(found)
            self._examples[split] = found[:limit]
        return self._examples[split]

    def features(self) -> list[SquadFeature]:
        """The windows of the training questions."""
        if "train" not in self._features:
            self._features["train"] = squad_features(
                self.examples("train"),
                self.tokenizer,
                max_length=self.config.max_seq_length,
                doc_stride=self.config.doc_stride,
                on_bad_answer="skip" if self.config.on_bad_answer == "skip" else "raise",
                memory_tokens=memory_tokens(self.model),
            )
            if not self._features["train"]:
                raise ValueError("train_dataset: expected at least one question, got none")
        return self._features["train"]

    @property
    def can_evaluate(self) -> bool:
        """Whether there is an evaluation set: one of its own, or a named data set's evaluation split."""
        return self._eval_source is not None or self._train_source is None

    def _stage_config(self, stage: int) -> TrainingConfig:
        """The settings of a stage: sizes of the memory stay as an earlier stage changed them."""
        changes: dict[str, Any] = {}
        for earlier in self.config.stages[:stage]:
            changes |= _sizes(earlier)
        changes |= {name: value for name, value in self.config.stages[stage].items() if name != "segments"}
        return self.config.replaced(**changes, progressive_stages=None, progressive_segments=None)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainerState:
        """Run all stages.

        Args:
            resume_from_checkpoint: a ``checkpoint-<step>`` folder, or True for the newest in ``output_dir``. What
                follows equals the uninterrupted run bit for bit, on the same machine with the same settings.

        Returns:
            the state, whose ``log_history`` has the losses.

        Raises:
            ValueError: no such checkpoint, or one of other settings.
        """
        config = self.config
        progress: dict[str, Any] = {"stage": 0, "epoch": 0, "batch": 0, "stage_step": 0}
        saved: dict[str, Any] | None = None
        if resume_from_checkpoint:
            folder = self._checkpoint(resume_from_checkpoint)
            saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
            progress = saved["progress"]
            self._load(folder, progress["stage"])
            self.state = TrainerState(**saved["trainer"])
        else:
            _seed(config.seed + self.accelerator.process_index)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        main = self.accelerator.is_main_process
        if main:
            config.to_json(self.output_dir / "training_config.json")
        recorder = Recorder(self.state, self.output_dir / "runs" if main and config.tensorboard else None)
        try:
            for stage in range(progress["stage"], len(config.stages)):
                resumed = saved is not None and stage == progress["stage"]
                if not resumed and stage > 0:
                    self._prepare_model(stage)
                self.state.stage = stage
                where = progress if resumed else {"stage": stage, "epoch": 0, "batch": 0, "stage_step": 0}
                _Stage(self, stage, recorder).run(where, saved if resumed else None)
                if config.max_steps is not None and self.state.global_step >= config.max_steps:
                    break
            self.save_model(self.output_dir / "final_model")
        finally:
            recorder.close()
        return self.state

    def _checkpoint(self, wanted: str | Path | bool) -> Path:
        if wanted is True:
            found = checkpoints(self.output_dir)
            if not found:
                raise ValueError(f"resume_from_checkpoint: no checkpoint in {self.output_dir}")
            return found[-1]
        folder = Path(str(wanted))
        if not (folder / "training_state.pt").is_file():
            raise ValueError(f"resume_from_checkpoint: expected a checkpoint folder, got {folder}")
        return folder

    def _load(self, folder: Path, stage: int) -> None:
        """Tokenizer and model of a checkpoint, the model's weights in memory of their own."""
        if self._given_model:
            load_weights(self.model, folder)
            return
        config = type(self.model).config_class.from_pretrained(folder)
        if config.memory_type != self.model.memory_type:
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds {config.memory_type!r} memory, expected "
                f"{self.model.memory_type!r}"
            )
        if not self._given_tokenizer:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self._features.clear()
        self.model = type(self.model)(config)
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        load_weights(self.model, folder)
        self.model.to(self.accelerator.device)
        self._model_config = self._stage_config(stage)

    def _prepare_model(self, stage: int) -> None:
        """Make ``self.model`` the stage's; it takes over what the present one has learned where both have it."""
        old, config = self.model, self._stage_config(stage)
        if config.replaced(num_epochs=1) == self._model_config.replaced(num_epochs=1):
            return
        fresh = build_model(config.replaced(base_config=_backbone(old.config)), self.tokenizer)
        fresh.transformer.load_state_dict(old.transformer.state_dict())
        fresh.qa_outputs.load_state_dict(old.qa_outputs.state_dict())
        fresh.load_overlapping(old)
        self.model, self._model_config = fresh.to(self.accelerator.device), config

    def predictor(self, use_any_positive_logic: bool | None = None) -> QAPredictor:
        """A predictor with this trainer's model and settings."""
        config = self.config
        return QAPredictor(
            self.model,
            self.tokenizer,
            max_length=config.max_seq_length,
            doc_stride=config.doc_stride,
            batch_size=config.eval_batch_size,
            max_answer_length=config.max_answer_length,
            no_answer_threshold=config.no_answer_threshold,
            use_any_positive_logic=(
                config.use_any_positive_logic if use_any_positive_logic is None else use_any_positive_logic
            ),
            max_segments=config.max_n_segs,
            memory_tokens=memory_tokens(self.model),
            autocast=self.accelerator.autocast,
        )

    def evaluate(self, use_any_positive_logic: bool | None = None) -> dict[str, float]:
        """Official scores on the evaluation set: "exact", "f1", "total", their HasAns and NoAns parts, best thresholds.

        Under several processes each predicts its share; all return the same.
        """
        examples = self.examples("eval")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        predictor = self.predictor(use_any_positive_logic)
        predictions = predictor.predict(examples[rank::world]) if examples[rank::world] else Predictions()
        shares = [(dict(predictions), predictions.na_probs)]
        if world > 1:
            from accelerate.utils import gather_object

            shares = gather_object(shares)
        texts = {id: text for share, _ in shares for id, text in share.items()}
        na_probs = {id: value for _, share in shares for id, value in share.items()}
        # Ties between equal probabilities are broken by the data set's order, whatever the number of processes.
        ordered = {example.id: na_probs[example.id] for example in examples}
        return squad_evaluate(examples, texts, ordered)

    def save_model(self, folder: str | Path) -> None:
        """Write model, tokenizer and settings, on the main process."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.config.to_json(Path(folder) / "training_config.json")
        self.accelerator.wait_for_everyone()


class _Stage:
    """One stage: its loader, optimiser and schedule, and the loop over epochs and batches."""

    def __init__(self, trainer: XLNetRecurrentTrainer, stage: int, recorder: Recorder) -> None:
        self.trainer, self.stage, self.recorder = trainer, stage, recorder
        self.config = config = trainer._stage_config(stage)
        self.state, self.accelerator = trainer.state, trainer.accelerator
        self.segments = trainer.config.stages[stage].get("segments", config.max_n_segs)
        self.loader = TimeStepMajorDataLoader(
            trainer.features(),
            config.train_batch_size,
            shuffle=True,
            max_segments=self.segments,
            segment_selection_strategy=config.segment_selection_strategy,
            epoch_seed=config.segment_selection_seed,
            training=True,
        )
        world = self.accelerator.num_processes
        self.batches = math.ceil(len(self.loader) / world)
        an_epoch = math.ceil(self.batches / config.gradient_accumulation_steps)
        steps = an_epoch * config.num_epochs
        if config.max_steps is not None:
            left = config.max_steps - self.state.global_step
            steps = left if stage == len(trainer.config.stages) - 1 else min(steps, left)
        self.total, self.epochs = steps, math.ceil(steps / an_epoch)
        model = trainer.model
        model.train()
        optimizer = torch.optim.AdamW(
            param_groups(model, config.learning_rate, config.memory_learning_rate, config.weight_decay)
        )
        self.base = [p for name, p in model.named_parameters() if name.startswith("transformer.")]
        self.module, self.optimizer = self.accelerator.prepare(DocumentLoss(model, config.memory_backend), optimizer)

    def _rate(self, step: int) -> float:
        """Linear rise over the first ``warmup_ratio`` of the steps, linear fall to 0 at the end."""
        warmup = round(self.config.warmup_ratio * self.total)
        if step < warmup:
            return step / warmup
        return max(0.0, (self.total - step) / max(1, self.total - warmup))

    def run(self, where: dict[str, Any], saved: dict[str, Any] | None) -> None:
        config = self.config
        self.step = where["stage_step"]
        if saved is not None:
            self.total, self.epochs = where["total"], where["epochs"]
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.accelerator.scaler is not None and saved.get("scaler"):
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            ranks = saved["random"]
            set_random_state(ranks[self.accelerator.process_index % len(ranks)])
        self.window = where.get("window", {"loss": 0.0, "count": 0})
        title = f"stage {self.stage + 1}/{len(self.trainer.config.stages)}"
        shown = config.progress_bar and self.accelerator.is_main_process
        with progress_bar(shown, title, self.total, self.step) as bar:
            for epoch in range(where["epoch"], self.epochs):
                first = where["batch"] if epoch == where["epoch"] else 0
                self._epoch(epoch, first, bar, title)
                if self.step >= self.total:
                    break
        if len(self.trainer.config.stages) > 1:
            self.trainer.save_model(self.trainer.output_dir / f"stage_{self.stage}_segs_{self.segments or 'all'}")
        self.accelerator.free_memory()

    def _epoch(self, epoch: int, first: int, bar: Any, title: str) -> None:
        config, state = self.config, self.state
        self.loader.set_epoch(epoch + 1000 * self.stage)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Every process takes as many batches; where they run out it starts again at the first.
        own = [(batch * world + rank) % len(self.loader) for batch in range(self.batches)]
        whole = config.use_global_softmax and epoch >= config.warmup_disable_global_softmax_epochs
        accumulate = config.gradient_accumulation_steps
        pending: list[torch.Tensor] = []
        for batch, steps in enumerate(self.loader.batches(own[first:]), first):
            group_start = batch - batch % accumulate
            size = min(accumulate, self.batches - group_start)
            last = batch - group_start == size - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss = self.module(stack_steps(steps, self.accelerator.device), whole)
                self.accelerator.backward(loss / size)
            pending.append(loss.detach() / size)
            if not last:
                continue
            state.epoch = epoch + (batch + 1) / self.batches
            self._update(epoch, sum(pending), whole)
            pending = []
            bar.advance(f"{title}, epoch {epoch + 1}, step {state.global_step}")
            self._after_step(epoch, batch + 1)
            if self.step >= self.total:
                return

    def _update(self, epoch: int, loss: Any, whole: bool) -> None:
        """One optimiser step; keeps the losses on the device until they are logged."""
        config, state = self.config, self.state
        if epoch < config.warmup_freeze_base_epochs and self.trainer.model.memory_type != "standard":
            for parameter in self.base:
                parameter.grad = None
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), config.max_grad_norm)
        rate = self._rate(self.step)
        initial = {True: config.memory_learning_rate or config.learning_rate, False: config.learning_rate}
        for group in self.optimizer.param_groups:
            group["lr"] = initial[group["name"].startswith("memory")] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        state.global_step += 1
        self.window = {"loss": self.window["loss"] + loss, "count": self.window["count"] + 1}
        if state.global_step % config.logging_steps == 0 or self.step >= self.total:
            module = self.accelerator.unwrap_model(self.module)
            total = torch.as_tensor(self.window["loss"], device=self.accelerator.device)
            mean = self.accelerator.reduce(total / self.window["count"], reduction="mean")
            self.recorder.log(
                {
                    "loss": float(mean),
                    **{name: float(value) for name, value in module.parts.items()},
                    "grad_norm": float(norm),
                    "learning_rate": config.learning_rate * rate,
                    "stage": self.stage,
                    "whole_documents": whole,
                }
            )
            self.window = {"loss": 0.0, "count": 0}

    def _after_step(self, epoch: int, batch: int) -> None:
        """Evaluate and save where it is time."""
        config, state, trainer = self.config, self.state, self.trainer
        if state.global_step % config.eval_steps == 0 and trainer.can_evaluate:
            any_positive = config.use_any_positive_logic and epoch >= config.warmup_disable_any_positive_epochs
            scores = trainer.evaluate(any_positive)
            trainer.model.train()
            self.recorder.log({f"eval_{name}": value for name, value in scores.items()}, "eval")
            if state.best_metric is None or scores["f1"] > state.best_metric:
                state.best_metric = scores["f1"]
                trainer.save_model(trainer.output_dir / "best_model")
        if state.global_step % config.save_steps == 0:
            self._save(epoch, batch)

    def _save(self, epoch: int, batch: int) -> None:
        trainer, accelerator = self.trainer, self.accelerator
        # A finished epoch goes on with the next one's first batch.
        at = (epoch + 1, 0) if batch >= self.batches else (epoch, batch)
        ranks = [random_state()]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            ranks = gather_object(ranks)
        if accelerator.is_main_process:
            window = {"loss": float(self.window["loss"]), "count": self.window["count"]}
            content = {
                "trainer": dict(vars(self.state)),
                "progress": {
                    "stage": self.stage,
                    "epoch": at[0],
                    "batch": at[1],
                    "stage_step": self.step,
                    "total": self.total,
                    "epochs": self.epochs,
                    "window": window,
                },
                "optimizer": self.optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "random": ranks,
            }

            def write(folder: Path) -> None:
                trainer.model.save_pretrained(folder)
                trainer.tokenizer.save_pretrained(folder)
                trainer.config.to_json(folder / "training_config.json")
                torch.save(content, folder / "training_state.pt")
                (folder / "trainer_state.json").write_text(json.dumps(content["trainer"], indent=1) + "\n")

            folder = trainer.output_dir / f"checkpoint-{self.state.global_step}"
            write_checkpoint(folder, write, trainer.config.save_total_limit)
        accelerator.wait_for_everyone()


def _sizes(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage changes about the memory."""
    return {name: value for name, value in stage.items() if name not in ("segments", "num_epochs")}


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _backbone(config: Any) -> dict[str, Any]:
    """The XLNet fields of one of our configurations."""
    from transformers import XLNetConfig

    plain = XLNetConfig().to_dict()
    own = config.to_dict()
    left = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
    return {name: own[name] for name in plain if name in own and name not in left}
