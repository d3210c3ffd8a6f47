"""All arms and seeds of the protocol: run, collected, saved after each, so that an interrupted protocol goes on."""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from memkern.data.generators import SegmentedQuestions, cross_segment_pointer
from memkern.data.generators.pointer import pointer_vocabulary
from memkern.training.gmm_recall.arms import ARMS, Sizes, build
from memkern.training.gmm_recall.evaluate import evaluate, routing_use
from memkern.training.gmm_recall.train import Curriculum, Draw, train

SEGMENT_LENGTH = 18
# Test documents are drawn far from every seed that training uses.
TEST_SEED = 10**12


@dataclass(frozen=True)
class Protocol:
    """What is run. The task is the cross-segment pointer, or with ``babi`` a folder of bAbI files and a task number."""

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    curriculum: Curriculum = field(default_factory=Curriculum)
    sizes: Sizes = field(default_factory=Sizes)
    test_segments: int = 5
    test_documents: int = 300
    """At each distance."""
    babi: str | None = None
    babi_task: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"arms: unknown {', '.join(unknown)}; the known ones are {', '.join(ARMS)}")

    def replaced(self, **changes: Any) -> Protocol:
        """A copy with other fields."""
        return replace(self, **changes)

    @property
    def file_name(self) -> str:
        """Of its results, without an ending."""
        return "gmm-pointer" if self.babi is None else f"gmm-babi-{self.babi_task}"

    @property
    def trained(self) -> list[str]:
        """The arms that are trained; others evaluate one of these."""
        return list(dict.fromkeys(ARMS[name].trained_as or name for name in self.arms))


def pointer_protocol(steps: int | None = None) -> Protocol:
    """The cross-segment pointer: trained on distances 0 to 2, tested to 4."""
    return Protocol() if steps is None else Protocol(curriculum=Curriculum(steps=steps))


def quick_protocol(steps: int | None = None, seconds: float | None = None) -> Protocol:
    """Its one-minute form: memory against none, reset and swapped; one seed, half the steps."""
    return Protocol(
        arms=("none", "gmm", "gmm-reset", "gmm-swapped"),
        seeds=(0,),
        curriculum=Curriculum(steps=steps or 300),
        test_documents=200,
        seconds=seconds,
    )


def babi_protocol(folder: str | Path, task: int = 1, steps: int | None = None, *, long: bool = False) -> Protocol:
    """The harder rung: stories of two sentences a segment, official test set.

    ``long``: six times the steps at half the rate, which is what a memory needs to learn who went where.
    """
    arms: tuple[str, ...]
    if long:
        curriculum = Curriculum(
            steps=steps or 6000, first_segments=2, last_segments=6, promote_at=0.9, learning_rate=1e-3
        )
        # That overwritten tokens forget is shown in a minute; what the load-balance loss holds back, in ten.
        arms = ("none", "mems", "token-gated", "differentiable", "gmm", "gmm-reset", "gmm-swapped", "gmm-no-balance")
    else:
        curriculum = Curriculum(steps=steps or 1000, first_segments=2, last_segments=6, promote_at=0.8)
        arms = ("none", "mems", "token", "token-gated", "differentiable", "gmm", "gmm-reset", "gmm-swapped")
    return Protocol(arms=arms, curriculum=curriculum, babi=str(folder), babi_task=task)


@dataclass(frozen=True)
class Task:
    """Where documents come from."""

    name: str
    chance: float
    vocabulary: int
    segment_length: int
    draw: Draw
    test: Callable[[int], SegmentedQuestions]


def pointer_task(protocol: Protocol) -> Task:
    """The cross-segment pointer of 8 values."""

    def draw(documents: int, segments: int, lead: int, seed: int) -> SegmentedQuestions:
        generator = torch.Generator().manual_seed(seed)
        distances = torch.randint(segments, (documents,), generator=generator)
        longest = torch.rand(documents, generator=generator) < protocol.curriculum.longest_share
        distances[longest] = segments - 1
        return cross_segment_pointer(documents, segments + lead, distance=distances, seed=seed)

    def test(seed: int) -> SegmentedQuestions:
        distances = torch.arange(protocol.test_segments).repeat_interleave(protocol.test_documents)
        return cross_segment_pointer(len(distances), protocol.test_segments, distance=distances, seed=TEST_SEED + seed)

    return Task(
        name="cross-segment pointer",
        chance=1 / 8,
        vocabulary=pointer_vocabulary(),
        segment_length=SEGMENT_LENGTH,
        draw=draw,
        test=test,
    )


def task_of(protocol: Protocol) -> Task:
    """The protocol's task."""
    if protocol.babi is None:
        return pointer_task(protocol)
    from memkern.training.gmm_recall.babi import babi_task

    return babi_task(protocol.babi, protocol.babi_task, protocol.curriculum.last_segments)


def run_one(protocol: Protocol, name: str, seed: int) -> list[dict[str, Any]]:
    """Train one arm from one seed and evaluate it in every way that the protocol asks for.

    Returns:
        a dictionary for each evaluated arm; a run that raised has ``error`` in place of numbers and is counted.
    """
    evaluated = [arm for arm in protocol.arms if (ARMS[arm].trained_as or arm) == name]
    try:
        task = task_of(protocol)
        torch.manual_seed(seed)
        model = build(name, task.vocabulary, task.segment_length, protocol.sizes)
        run = train(name, model, task.draw, seed, protocol.curriculum, seconds=protocol.seconds)
        questions = task.test(seed)
        if ARMS[name].model == "gmm":
            run.utilisation_entropy, run.routing_entropy = routing_use(model, questions)
        return [
            {
                **asdict(run),
                "arm": arm,
                "trained_as": name,
                "state": ARMS[arm].state,
                "accuracy": {
                    str(found.distance): [found.right, found.trials]
                    for found in evaluate(model, questions, ARMS[arm].state)
                },
            }
            for arm in evaluated
        ]
    except Exception as error:  # a run that fails is a result too
        text = "".join(traceback.format_exception(error)[-3:])
        return [{"arm": arm, "trained_as": name, "seed": seed, "error": text} for arm in evaluated]


def run_protocol(
    protocol: Protocol,
    path: str | Path,
    jobs: int = 1,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run what ``path`` does not hold yet, saving after every run.

    Args:
        protocol: arms, seeds, sizes.
        path: JSON file of results; runs in it with the same settings are kept.
        jobs: processes side by side, one thread each.
        done: called with every result as it comes.

    Returns:
        the content of the file.

    Raises:
        ValueError: the file holds results of other settings.
    """
    path = Path(path)
    task = task_of(protocol)
    settings = {
        "task": task.name,
        "chance": task.chance,
        "curriculum": asdict(protocol.curriculum),
        "sizes": asdict(protocol.sizes),
        "test_segments": protocol.test_segments,
        "test_documents": protocol.test_documents,
        "seconds": protocol.seconds,
    }
    content: dict[str, Any] = {"schema": 1, "settings": settings, "machine": machine(), "runs": []}
    if path.exists():
        content = json.loads(path.read_text())
        if content["settings"] != settings:
            raise ValueError(f"{path}: holds results of other settings; give another file or remove it")
    there = {(run["arm"], run["seed"]) for run in content["runs"]}
    waiting = [
        (name, seed)
        for seed in protocol.seeds
        for name in protocol.trained
        if any((arm, seed) not in there for arm in protocol.arms if (ARMS[arm].trained_as or arm) == name)
    ]

    def keep(results: Sequence[dict[str, Any]]) -> None:
        for result in results:
            if (result["arm"], result["seed"]) not in there:
                content["runs"].append(result)
                if done is not None:
                    done(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)

    if jobs <= 1 or len(waiting) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tensors this small run no faster on more
        try:
            for name, seed in waiting:
                keep(run_one(protocol, name, seed))
        finally:
            torch.set_num_threads(threads)
        return content
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run_one, protocol, name, seed) for name, seed in waiting]
        for future in as_completed(futures):
            keep(future.result())
    return content


def machine() -> dict[str, str]:
    """Where and with what it ran."""
    import transformers

    from memkern import __version__

    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memkern": __version__,
        "backend": os.environ.get("MEMKERN_BACKEND") or "automatic",
        "date": time.strftime("%Y-%m-%d"),
    }
