"""What ``train``, ``evaluate`` and ``predict`` do for the XLNet family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memkern.cli._common import write_json


def train(fields: Mapping[str, Any], resume: Path | bool | None, out: Console) -> None:
    """Train from the fields of a configuration; with evaluation data the official scores follow."""
    from memkern.training import GMMTrainingConfig, TrainingConfig, XLNetRecurrentTrainer

    gmm = fields.get("use_gmm_memory") or fields.get("memory_type") == "gmm"
    config: TrainingConfig = (GMMTrainingConfig if gmm else TrainingConfig).from_dict(fields)
    trainer = XLNetRecurrentTrainer(config)
    main = trainer.accelerator.is_main_process
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    if main:
        out.print(
            f"{trainer.model.memory_type} memory, {count:,} parameters, {len(trainer.examples('train'))} questions, "
            f"{len(trainer.features())} windows, {len(config.stages)} stages"
        )
    state = trainer.train(resume_from_checkpoint=resume)
    losses = [entry for entry in state.log_history if "loss" in entry]
    if main and losses:
        out.print(f"loss {losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f} in {state.global_step} steps")
    if trainer.can_evaluate:
        scores = trainer.evaluate()
        if main:
            show_scores(out, scores)
            write_json(Path(config.output_dir) / "scores.json", scores)
    if main:
        out.print(f"model: {Path(config.output_dir) / 'final_model'}")


def evaluate(model: Path, dataset: str, options: Mapping[str, Any], out: Console) -> dict[str, float]:
    """Official scores; writes the answers where ``predictions`` says."""
    from memkern.analysis import squad_evaluate
    from memkern.data import load_squad
    from memkern.training import QAPredictor

    own = dict(options)
    split, limit, path = own.pop("split", "validation"), own.pop("limit", None), own.pop("predictions", None)
    examples = load_squad(dataset, split)[:limit]
    answers = QAPredictor.from_folder(model, **own).predict(examples)
    scores = squad_evaluate(examples, answers, answers.na_probs)
    show_scores(out, scores)
    if path is not None:
        write_json(Path(path), answers)
    return scores


def predict(model: Path, dataset: Any, options: Mapping[str, Any], out: Console) -> dict[str, str]:
    """Answers, printed with the probability that there is none."""
    from memkern.training import QAPredictor

    answers = QAPredictor.from_folder(model, **options).predict(dataset)
    table = Table(box=None, header_style="bold")
    for name in ("id", "answer", "no answer"):
        table.add_column(name)
    for id, text in answers.items():
        table.add_row(id, text or "-", f"{answers.na_probs[id]:.2f}")
    out.print(table)
    return dict(answers)


def show_scores(out: Console, scores: Mapping[str, float]) -> None:
    """Official names, one line each."""
    table = Table(box=None, show_header=False)
    for name, value in scores.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(table)
