"""Compares every provider of a case with the truth, then times it; `memkern bench` and `pytest benchmarks` call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from memkern.backends import BackendUnavailable
from memkern.testing.compare import flatten

from . import limits, machine
from .providers import Judge, Provider, default_names, make_call, provider
from .registry import Case, OpSpec, Target, Unsuitable
from .timing import Call, Times, cpu_times, cuda_times, peak_memory, rotations
from .validate import first_line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One provider in one mode of one case. Seconds for one call; ``share`` is that of the roof."""

    op: str
    variant: str
    size: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    provider: str
    p20: float
    p50: float
    p80: float
    least: float
    calls: int
    how: str
    gbps: float
    tflops: float
    share: float | None
    peak_bytes: int | None
    checked: str

    @property
    def time(self) -> float:
        """What ratios are made of: the least CPU time, the median time of a device."""
        return self.least if self.how == "cpu" else self.p50

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.variant, self.size, self.dtype, self.device, self.mode, self.provider


@dataclass(frozen=True)
class Promise:
    """A target beside what was measured; ``measured`` None: one of the two was not timed, ``note`` says which."""

    op: str
    target: Target
    measured: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.target.at_least

    def as_dict(self) -> dict[str, Any]:
        return {"op": self.op, **dataclasses.asdict(self.target), "measured": self.measured, "met": self.met,
                "note": self.note}  # fmt: skip


@dataclass
class Results:
    """What one run measured on one machine.

    Attributes:
        limits: measured at the start.
        beside: by case and mode, limits that took turns with the case; they stand before those of the start.
        gemms: by case and mode, seconds of the matrix products alone.
    """

    machine: dict[str, Any]
    limits: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    gemms: dict[str, float] = field(default_factory=dict)
    beside: dict[str, dict[str, float]] = field(default_factory=dict)
    overheads: dict[str, float] = field(default_factory=dict)

    def find(self, *key: str) -> Row | None:
        for row in self.rows:
            if row.key == key:
                return row
        return None

    def limits_of(self, case: Case, mode: str) -> dict[str, float]:
        """The limits to hold a mode of a case against."""
        return self.limits | self.beside.get(_label(case, mode), {})

    def as_dict(self, promises: Sequence[Promise] = ()) -> dict[str, Any]:
        return {
            "schema": 1,
            "machine": self.machine,
            "limits": self.limits,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "gemms": self.gemms,
            "beside": self.beside,
            "overheads": self.overheads,
            "skipped": self.skipped,
            "targets": [promise.as_dict() for promise in promises],
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Results:
        rows = [Row(**row) for row in content["rows"]]
        return Results(
            content["machine"],
            content["limits"],
            rows,
            content.get("skipped", []),
            content["gemms"],
            content.get("beside", {}),
            content.get("overheads", {}),
        )


def start(device: str) -> Results:
    """An empty result with this machine's facts and limits."""
    return Results(machine.machine(device), limits.measure(device))


def run(
    results: Results,
    case: Case,
    providers: Sequence[str],
    modes: Sequence[str],
    *,
    seconds: float = 0.4,
    say: Say = lambda text: None,
) -> Iterator[Row]:
    """Compare, then time the providers of a case; rows are added to ``results`` and yielded.

    A provider that is missing, cannot take the case or disagrees with the truth is listed in ``results.skipped`` with
    the reason and is not timed.

    Args:
        providers: names as :func:`memkern.benchmarks.providers.provider` takes them; those that are already in
            ``results`` for a mode are not timed again.
        seconds: about how long each provider runs in a mode.
    """
    open_modes = [m for m in modes if any(results.find(*_key(case, m, name)) is None for name in providers)]
    if not open_modes:
        return
    judge: Judge | None = None
    agreed: dict[str, tuple[Provider, str]] = {}
    for name in providers:
        say(f"{case.label}: comparing {name}")
        try:
            candidate = provider(name)
            judge = judge or Judge(case)
            passed, words = judge.verdict(candidate, open_modes)
            reason = "" if passed else f"not timed, it disagrees with the truth: {words}"
        except (Unsuitable, BackendUnavailable) as error:
            reason = first_line(error)
        except Exception as error:  # a peer may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason:
            results.skipped.append({"case": case.label, "provider": name, "reason": reason})
        else:
            agreed[name] = candidate, words
    for mode in open_modes:
        wanted = [name for name in agreed if results.find(*_key(case, mode, name)) is None]
        say(f"{case.label} {mode}: timing {', '.join(wanted)}")
        for name, (times, memory) in _times(results, case, mode, {n: agreed[n][0] for n in wanted}, seconds).items():
            row = _row(results, case, mode, name, times, memory, agreed[name][1])
            results.rows.append(row)
            yield row


def _key(case: Case, mode: str, name: str) -> tuple[str, ...]:
    return case.spec.name, case.variant, case.size, case.dtype, case.device, mode, name


def _times(
    results: Results, case: Case, mode: str, providers: dict[str, Provider], seconds: float
) -> dict[str, tuple[Times, int | None]]:
    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # out of memory, or a mode that a peer does not have
            reason = f"{mode}: {type(error).__name__}: {first_line(error)}"
            results.skipped.append({"case": case.label, "provider": name, "reason": reason})
            return None

    grad = mode != "fwd"
    if case.device != "cuda":
        # All of them read the same tensors: the pages that an allocation gets make a tenth of its bandwidth.
        arguments = case.arguments(grad=grad)
        calls: dict[str, Call] = {}
        for name, candidate in providers.items():
            made = attempt(name, partial(_warm_calls, case, candidate, mode, [arguments]))
            if made is not None:
                calls[name] = made[0]
        beside = _beside(case, mode, arguments if calls else {})
        taken = cpu_times(calls | beside.calls, seconds=seconds)
        rates, products = beside.take(taken)
        if rates:
            results.beside[_label(case, mode)] = rates
        if products is not None:
            results.gemms[_label(case, mode)] = products
        return {name: (times, None) for name, times in taken.items()}
    count = rotations(case.work.forward.bytes, torch.device("cuda"))
    sets = [case.arguments(grad=grad, seed=seed) for seed in range(count)]
    found: dict[str, tuple[Times, int | None]] = {}
    variants: dict[str, list[Call]] = {}
    memory: dict[str, int] = {}
    for name, candidate in providers.items():
        made = attempt(name, partial(_warm_calls, case, candidate, mode, sets))
        if made is not None:
            variants[name] = made
            memory[name] = peak_memory(made[0])
    for name, times in cuda_times(variants, seconds=seconds).items():
        found[name] = times, memory[name]
    return found


def _label(case: Case, mode: str) -> str:
    return f"{case.label} {mode}"


def _beside(case: Case, mode: str, arguments: dict[str, Any]) -> limits.Beside:
    """The limits that the targets of this mode name, on the inputs that the providers have; none without inputs."""
    if not arguments:
        return limits.Beside((), ())
    spec = case.spec
    first = next(iter(spec.variants))
    named = {t.over for t in spec.targets if (t.size, t.variant or first, t.dtype, t.mode, t.device)
             == (case.size, case.variant, case.dtype, mode, case.device)}  # fmt: skip
    gemms = spec.gemms(case.shape, case.options, mode) if "gemm" in named and spec.gemms is not None else []
    inputs = list(flatten(arguments).values())
    return limits.Beside(named & {"read", "write", "copy", "peak"}, inputs, gemms, case.dtype)


def _warm_calls(case: Case, candidate: Provider, mode: str, sets: Sequence[dict[str, Any]]) -> list[Call]:
    """The call on each set of inputs, each run once."""
    function = candidate.function(case)
    calls = [make_call(case, function, mode, arguments) for arguments in sets]
    for call in calls:
        call()
    return calls


def _row(results: Results, case: Case, mode: str, name: str, times: Times, memory: int | None, checked: str) -> Row:
    cost = case.work.of(mode)
    time = times.least if times.how == "cpu" else times.p50
    roof = roof_seconds(results.limits_of(case, mode), case, mode)
    return Row(
        case.spec.name, case.variant, case.size, case.shape, case.dtype, case.device, mode, name,
        times.p20, times.p50, times.p80, times.least, times.calls, times.how,
        cost.bytes / time / 1e9, cost.flops / time / 1e12, None if roof is None else roof / time, memory, checked,
    )  # fmt: skip


def roof_seconds(found: dict[str, float], case: Case, mode: str) -> float | None:
    """The least time that this machine's bandwidth and arithmetic allow; None without a rate for the dtype."""
    cost = case.work.of(mode)
    if case.device == "cuda":
        memory = cost.bytes / found["copy"]
        rate = found.get(f"gemm-{case.dtype}", found.get("gemm-bfloat16"))
    else:
        memory = cost.read / found["read"] + cost.written / found["write"]
        rate = found.get("peak")
        if rate is not None and case.dtype == "float64":
            rate /= 2
    return max(memory, cost.flops / rate) if rate else None


def target_cases(spec: OpSpec, device: str) -> dict[tuple[str, str, str], set[str]]:
    """What has to be timed for the targets of an operator: (size, variant, dtype) -> modes."""
    wanted: dict[tuple[str, str, str], set[str]] = {}
    for target in spec.targets:
        if target.device == device:
            variant = target.variant or next(iter(spec.variants))
            wanted.setdefault((target.size, variant, target.dtype), set()).add(target.mode)
    return wanted


def target_providers(spec: OpSpec, case: Case) -> list[str]:
    """The providers that the targets of a case name, and our own."""
    over = [t.over for t in spec.targets if t.size == case.size and t.dtype == case.dtype and t.device == case.device]
    known = {"eager", "compile", *spec.peers}
    ours = [name for name in default_names(case) if name not in known]
    return ours + [name for name in dict.fromkeys(over) if name in known]


def judge_targets(results: Results, specs: Sequence[OpSpec], device: str) -> list[Promise]:
    """Every target of the device beside what was measured."""
    gemms = limits.GemmTimes(device)
    return [_promise(results, spec, t, gemms) for spec in specs for t in spec.targets if t.device == device]


def _promise(results: Results, spec: OpSpec, target: Target, gemms: limits.GemmTimes) -> Promise:
    variant = target.variant or next(iter(spec.variants))
    case = spec.case(target.size, variant=variant, dtype=target.dtype, device=target.device)
    key = spec.name, variant, target.size, target.dtype, target.device, target.mode
    own = [row for row in results.rows if row.key[:-1] == key and row.provider in ("cpp", "triton", "cuda")]
    if not own:
        return Promise(spec.name, target, None, "no compiled backend was timed")
    best = min(own, key=lambda row: row.time)
    if target.over in ("read", "write", "copy", "peak"):
        found = results.limits_of(case, target.mode)
        if target.over not in found:
            return Promise(spec.name, target, None, f"the limit {target.over!r} was not measured")
        return Promise(spec.name, target, _limit_seconds(found, case, target) / best.time)
    if target.over == "gemm":
        if spec.gemms is None:
            return Promise(spec.name, target, None, "the operator names no matrix products")
        label = _label(case, target.mode)
        if label not in results.gemms:
            products = spec.gemms(case.shape, case.options, target.mode)
            results.gemms[label] = gemms.seconds(products, target.dtype)
        return Promise(spec.name, target, results.gemms[label] / best.time)
    other = results.find(*key, target.over)
    if other is None:
        return Promise(spec.name, target, None, f"{target.over} was not timed")
    return Promise(spec.name, target, other.time / best.time)


def _limit_seconds(found: dict[str, float], case: Case, target: Target) -> float:
    cost = case.work.of(target.mode)
    if target.over == "peak":
        return cost.flops / found["peak"]
    if target.over == "copy":
        return cost.bytes / found["copy"]
    return (cost.read if target.over == "read" else cost.written) / found[target.over]
