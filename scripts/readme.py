"""Rewrite the result tables of README.md from the files under benchmarks/results: readme.py [--check].

A section of the README between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` belongs to the function of that name
below. ``--check`` changes nothing and fails when the README is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))


Show = Callable[[dict[str, Any], Path], str]


def measured(pattern: str) -> Callable[[Show], Callable[[], str]]:
    """Turns what shows one results file into what shows all of them that match."""

    def decorate(show: Show) -> Callable[[], str]:
        def section() -> str:
            parts = [show(json.loads(path.read_text()), path) for path in sorted(RESULTS.glob(pattern))]
            return "\n\n".join(parts) or "Nothing measured yet."

        return section

    return decorate


@measured("*/ops.json")
def targets(content: dict[str, Any], path: Path) -> str:
    """Every target that was measured."""
    from memkern.benchmarks.bench import Promise
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.registry import Target
    from memkern.benchmarks.report import PROMISE_HEADER, markdown, overheads, promise_cells

    rows = []
    for entry in content["targets"]:
        fields = {name: entry[name] for name in Target.__dataclass_fields__}
        promise = Promise(entry["op"], Target(**fields), entry["measured"], entry["note"])
        if promise.measured is not None:
            rows.append(promise_cells(promise))
    facts = content["machine"]
    how = "device time" if facts["device"] == "cuda" else "process CPU time, one thread"
    beside = f" Beside the kernels: {overheads(content['overheads'])}." if content.get("overheads") else ""
    missed = [row for row in rows if row[-1] != "met"]
    told = f"{len(rows) - len(missed)} of {len(rows)} targets are met"
    if missed:
        told += f"; missed:\n\n{markdown(PROMISE_HEADER, missed)}"
    plot = f"![Times as fast as plain PyTorch]({path.with_suffix('.png').relative_to(ROOT)})"
    every = folded("Every target", markdown(PROMISE_HEADER, rows))
    return f"{line(facts)}; {how}.{beside}\n\n{plot}\n\n{told}\n\n{every}"


def recall() -> str:
    """Every table of a recall protocol, as the protocol's own report wrote it; the harder rungs last."""
    paths = sorted((RESULTS / "recall").glob("*.md"), key=lambda path: ("babi" in path.stem, path.stem))
    parts = []
    for path in paths:
        report = path.read_text().strip()
        if path.name == "self-rag-recall.md":
            plot = f"![Position recall]({path.with_suffix('.png').relative_to(ROOT)})"
            report = f"### Facts retrieved from every position\n\n{report}\n\n{plot}"
        parts.append(
            re.sub(r"(\| seed \|.*?)(?=\n\n|\Z)", lambda m: folded("Every seed", m[1]), report, flags=re.DOTALL)
        )
    return "\n\n".join(parts) or "Nothing measured yet."


def folded(title: str, text: str) -> str:
    """Shown on a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


@measured("recall/hybrid-retrieval-gate.json")
def gate(content: dict[str, Any], path: Path) -> str:
    """What a closed retrieval gate saves."""
    from memkern.benchmarks.report import markdown

    rows = [
        [name, f"{value:.1f} ms", f"{content['ratio'][name]:.3f}", ", ".join(content["profile"][name]) or "neither"]
        for name, value in content["milliseconds"].items()
    ]
    shape = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in content["shape"].items())
    header = [
        "forward",
        "least process time",
        "of the model without",
        "of search and retrieval attention in its profile",
    ]
    return f"{shape}; {content['machine']}; {content['repeats']} repeats in turn.\n\n{markdown(header, rows)}"


@measured("recall/self-rag-text.json")
def text(content: dict[str, Any], path: Path) -> str:
    """Self-RAG on real text: perplexity of held-out passages, and retrieval beside BM25."""
    from memkern.benchmarks.report import markdown

    names = {
        "none": "nothing",
        "random": "random passages",
        "retrieved": "what it retrieved",
        "neighbour": "its neighbours",
    }
    reads = [[shown, f"{content['perplexity'][f'perplexity, {name}']:.1f}"] for name, shown in names.items()]
    finds = [
        [name, *(f"{content['retrieval'][name].get(key, float('nan')):.3f}" for key in ("recall@1", "recall@5"))]
        for name in ("model's embeddings", "BM25", "chance")
    ]
    held = content["perplexity"]["held-out passages"]
    return (
        f"{content['parameters']:,} parameters, {content['training_cpu_seconds']:.0f} s of processor time; "
        f"{held:.0f} held-out passages, {content['retrieval']['questions']} questions, one seed.\n\n"
        f"{markdown(['the model reads before a passage', 'perplexity of its rest'], reads)}\n\n"
        f"{markdown(['a passage is found by', 'recall@1', 'recall@5'], finds)}"
    )


@measured("*/gmm_step.json")
def step(content: dict[str, Any], path: Path) -> str:
    """A training step of GMM-XLNet: its memory part against plain modules, and the whole against XLNet."""
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.report import markdown

    memory, whole = [], []
    for row in content["results"]:
        if row["part"] == "step":
            whole.append([row["model"], f"{row['seconds']:.1f} s", f"{row['ratio_to_base']:.3f}"])
            continue
        plain, ours, limit = row["seconds"]["plain"], row["seconds"]["memkern"], row["limit"]
        times = [f"{1e3 * plain:.0f} ms", f"{1e3 * ours:.0f} ms"]
        shares = (
            ["-"] * 3 if limit is None else [f"{plain / limit:.2f}x", f"{limit / plain:.2f}", f"{limit / ours:.2f}"]
        )
        memory.append([str(row["experts"]), *times, f"{row['speedup']:.2f}x", *shares])
    sizes = content["settings"]
    what = f"batch {sizes['batch']}, {sizes['slots']} slots, width {sizes['width']}, float32, forward and backward"
    parts = [f"{what}; {line(content['machine'])}; process CPU time, one thread."]
    if memory:
        times = ["experts", "plain modules", "memkern", "speedup"]
        parts.append(markdown([*times, "at most", "plain: share of FMA peak", "memkern: share"], memory))
    if whole:
        named = f"whole step, {sizes['layers']} layers, {sizes['length']} tokens"
        parts.append(markdown([named, "time", "of XLNet's"], whole))
    return "\n\n".join(parts)


@measured("*/store.json")
def store(content: dict[str, Any], path: Path) -> str:
    """Times and sizes of a store with a million chunks."""
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.report import markdown

    rows = []
    for name, value in content["results"].items():
        words, _, unit = name.rpartition("_")
        shown = f"{value / 2**30:.2f} GiB" if unit == "bytes" else f"{value:.2f} s"
        rows.append([words.replace("_", " "), shown])
    what = f"{content['chunks']:,} chunks of width {content['width']}, {content['dtype']}"
    how = f"wall time on a shared machine, threads: {content['threads']}"
    return f"{what}; {line(content['machine'])}; {how}.\n\n{markdown(['step', 'measured'], rows)}"


@measured("*/search_sizes.json")
def sizes(content: dict[str, Any], path: Path) -> str:
    """The search over widths, rows, queries and k."""
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.report import markdown
    from memkern.benchmarks.systems.search_sizes import HEADER, cells

    table = markdown(HEADER, [cells(row) for row in content["results"]])
    return f"float32; {line(content['machine'])}; process CPU time, one thread.\n\n{table}"


@measured("*/scan_length.json")
def length(content: dict[str, Any], path: Path) -> str:
    """The memory scan over the length of its sequence."""
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.report import markdown
    from memkern.benchmarks.systems.scan_length import HEADER, cells

    shape = ", ".join(f"{letter} = {size}" for letter, size in content["shape"].items())
    table = markdown(HEADER, [cells(row) for row in content["results"]])
    return f"{shape}, float32; {line(content['machine'])}; process CPU time, one thread.\n\n{table}"


@measured("*/search_exactness.json")
def exactness(content: dict[str, Any], path: Path) -> str:
    """The search against a float64 brute force."""
    from memkern.benchmarks.machine import line
    from memkern.benchmarks.report import markdown

    header = ["database", "neighbours found", "wrong", "that change with the batching"]
    rows = []
    for name in dict.fromkeys(entry["database"] for entry in content["results"]):
        own = [entry for entry in content["results"] if entry["database"] == name]
        found = content["k"] * sum(entry["queries"] for entry in own)
        rows.append([name, f"{found:,}", *(str(sum(entry[key] for entry in own)) for key in ("wrong", "other_bits"))])
    what = f"{content['rows']:,} rows of {content['width']}, float32 and bfloat16, k = {content['k']}"
    return f"{what}; {line(content['machine'])}.\n\n{markdown(header, rows)}"


SECTIONS: dict[str, Callable[[], str]] = {
    "targets": targets,
    "recall": recall,
    "gate": gate,
    "text": text,
    "step": step,
    "length": length,
    "sizes": sizes,
    "store": store,
    "exactness": exactness,
}


def rewritten(text: str) -> str:
    for name, section in SECTIONS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            body = section()
            text = pattern.sub(lambda match, b=begin, e=end, t=body: f"{b}\n{t}\n{e}", text)
    return text


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = rewritten(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md is out of date: run scripts/readme.py")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
