"""Teach a Differentiable Neural Computer to copy and to recall by association, and plot how it learns.

    python examples/dnc_copy_and_recall.py --output out/dnc.png

Minutes on two CPU cores. The memory's steps run as one scan on the fastest backend; then the same model takes the same
first training steps in plain PyTorch, and both times are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from memkern.cli.demo.memory import TASKS, Training, train


def plot(runs: Sequence[Training], path: Path) -> None:
    """The share of wrong bits over the training steps, one line for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in runs:
        axes.plot(run.steps, run.errors, label=f"{run.task} ({run.seconds:.0f} s)")
    axes.axhline(0.5, color="grey", linewidth=0.5, linestyle="--")
    axes.set(
        xlabel="training step", ylabel="wrong bits (moving mean)", title="A DNC learns two algorithms", ylim=(0, None)
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[tuple[Training, Training]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/dnc_copy_and_recall.png"))
    parser.add_argument("--task", choices=sorted(TASKS), action="append", help="may be given again; both by default")
    parser.add_argument("--seconds", type=float, default=180.0, help="of training at most, for each task")
    parser.add_argument("--compare", type=int, default=20, help="training steps of the plain model")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    pairs = []
    for task in options.task or sorted(TASKS):
        report = lambda step, error: step % 100 or print(f"  step {step}: {error:.1%} wrong", flush=True)  # noqa: E731
        print(f"{task}:")
        run = train(task, seconds=options.seconds, slots=options.slots, progress=report)
        plain = train(task, seconds=options.seconds, most_steps=options.compare, plain=True, slots=options.slots)
        count = len(plain.losses)
        same = torch.allclose(torch.tensor(run.losses[:count]), torch.tensor(plain.losses[:count]), rtol=1e-2)
        print(
            f"  learned to {run.errors[-1] if run.errors else 0.5:.1%} wrong bits in {len(run.losses)} steps, "
            f"{run.seconds:.1f} s ({1e3 * run.seconds_per_step:.1f} ms a step)\n"
            f"  plain PyTorch: {1e3 * plain.seconds_per_step:.1f} ms a step, "
            f"{plain.seconds_per_step / run.seconds_per_step:.1f} times as long, or "
            f"{plain.seconds_per_step * len(run.losses):.0f} s for the same run; "
            f"the losses of the first {count} steps {'agree' if same else 'DIFFER'}"
        )
        pairs.append((run, plain))
    plot([run for run, _ in pairs], options.output)
    print(f"wrote {options.output}")
    return pairs


if __name__ == "__main__":
    main()
