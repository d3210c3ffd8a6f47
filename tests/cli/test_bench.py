"""``memkern bench``: what it times, what it refuses to time, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from memkern.benchmarks import bench, limits, overheads, registry, report
from memkern.benchmarks.bench import Promise, Results, Row
from memkern.benchmarks.registry import Gemm, Target
from memkern.benchmarks.timing import Times, cpu_times
from memkern.cli import main
from memkern.ops import routing_entropy

LIMITS = {"read": 1e10, "write": 1e10, "copy": 2e10, "peak": 1e11}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of this machine cost seconds to measure, and no test reads them."""
    monkeypatch.setattr("memkern.benchmarks.limits.measure", lambda device: dict(LIMITS))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["bench", "--device", "cpu", "--seconds", "0.01", *arguments])
    return result.exit_code, result.output


def wrong_entropy(probs: torch.Tensor) -> torch.Tensor:
    return 1.01 * routing_entropy(probs, backend="reference")


def right_entropy(probs: torch.Tensor) -> torch.Tensor:
    return -(probs * (probs + 1e-10).log()).sum(-1)


def test_times_ours_and_a_users_function_and_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    own = "test_bench:right_entropy"
    target = tmp_path / "new" / "results.json"
    code, output = run(
        "--op", "routing_entropy", "--shape", "B=4,8,K=3", "--provider", "reference", "--provider", "eager",
        "--provider", own, "--json", str(target), "--plot", str(tmp_path / "plot.png"),
    )  # fmt: skip
    assert code == 0, output
    results = report.load(target)
    assert {(row.size, row.mode, row.provider) for row in results.rows} == {
        (size, mode, name)
        for size in ("B=4,K=3", "B=8,K=3")
        for mode in ("fwd", "fwd+bwd")
        for name in ("reference", "eager", own)
    }
    row = results.rows[0]
    assert row.gbps == pytest.approx(
        registry.spec("routing_entropy").case(row.shape).work.forward.bytes / row.time / 1e9
    )
    assert 0 < row.least <= row.p20 <= row.p50 <= row.p80
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(target.read_text())["machine"]["kernels"] == results.machine["kernels"]


def test_a_provider_that_disagrees_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    target = tmp_path / "results.json"
    code, output = run(
        "--op", "routing_entropy", "--shape", "B=4,K=3", "--provider", "test_bench:wrong_entropy", "--json", str(target)
    )
    assert code == 1
    assert "disagrees with the truth" in output
    assert report.load(target).rows == []


def test_a_missing_peer_is_named() -> None:
    code, output = run(
        "--op", "routing_entropy", "--shape", "B=4,K=3", "--provider", "reference", "--provider", "nobody"
    )
    assert code == 0
    assert "no provider 'nobody'" in output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--op", "route_expert"], "did you mean 'route_experts'"),
        (["--mode", "forward"], "--mode"),
        (["--op", "routing_entropy", "--shape", "Q=3"], "unknown dimension"),
        (["--op", "routing_entropy", "--size", "huge"], "unknown size"),
        (["--op", "routing_entropy"], "nothing to time"),
        (["--device", "tpu"], "--device"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input(arguments: list[str], part: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert part in output


def test_once_times_nothing() -> None:
    code, output = run("--op", "routing_entropy", "--shape", "B=4,K=3", "--provider", "reference", "--once")
    assert code == 0
    assert "ran routing_entropy" in output
    assert "times" not in output


def test_resume_keeps_the_rows_of_the_same_kernels(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = ["--op", "routing_entropy", "--shape", "B=4,K=3", "--provider", "reference", "--json", str(target)]
    assert run(*arguments)[0] == 0
    before = report.load(target)
    assert run(*arguments, "--resume")[0] == 0
    assert report.load(target).rows == before.rows
    stale = json.loads(target.read_text())
    stale["machine"]["kernels"] = "other"
    target.write_text(json.dumps(stale))
    assert run(*arguments, "--resume")[0] == 0
    assert report.load(target).machine["kernels"] == before.machine["kernels"]


def test_compare_stands_beside_the_earlier_run(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    arguments = ["--op", "routing_entropy", "--shape", "B=4,K=3", "--provider", "reference"]
    assert run(*arguments, "--json", str(target))[0] == 0
    code, output = run(*arguments, "--compare", str(target))
    assert code == 0
    assert "vs earlier" in output
    (tmp_path / "other.json").write_text("{}")
    code, output = run(*arguments, "--compare", str(tmp_path / "other.json"))
    assert code == 2
    assert "not a file of benchmark results" in output


def row(provider: str, seconds: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "op": "route_experts", "variant": "mean", "size": "small", "shape": {}, "dtype": "float32", "device": "cpu",
        "mode": "fwd", "provider": provider, "p20": seconds, "p50": seconds, "p80": seconds, "least": seconds,
        "calls": 1, "how": "cpu", "gbps": 0.0, "tflops": 0.0, "share": None, "peak_bytes": None, "checked": "",
    }  # fmt: skip
    return Row(**(values | changes))  # type: ignore[arg-type]


def promise(rows: list[Row], target: Target) -> Promise:
    import dataclasses

    spec = dataclasses.replace(
        registry.spec("route_experts"), targets=(target,), gemms=lambda shape, options, mode: [Gemm(8, 8, 8)]
    )
    results = Results({"device": "cpu"}, LIMITS, rows, gemms={"route_experts mean small float32 fwd": 3.0})
    return bench.judge_targets(results, [spec], "cpu")[0]


def test_targets_are_ratios_of_the_fastest_of_ours() -> None:
    found = promise([row("cpp", 2.0), row("eager", 9.0)], Target("small", "fwd", "eager", 4.0))
    assert (found.measured, found.met) == (4.5, True)
    found = promise([row("cpp", 2.0), row("eager", 7.0)], Target("small", "fwd", "eager", 4.0))
    assert (found.measured, found.met) == (3.5, False)
    found = promise([row("cpp", 4.0)], Target("small", "fwd", "gemm", 0.7))
    assert (found.measured, found.met) == (0.75, True)
    read = registry.spec("route_experts").case("small").work.forward.read
    found = promise([row("cpp", 2 * read / LIMITS["read"])], Target("small", "fwd", "read", 0.8))
    assert found.measured == pytest.approx(0.5)
    assert promise([row("eager", 7.0)], Target("small", "fwd", "eager", 4.0)).met is None


def test_limits_that_took_turns_stand_before_those_of_the_start() -> None:
    case = registry.spec("route_experts").case("small")
    results = Results({"device": "cpu"}, LIMITS, [], beside={"route_experts mean small float32 fwd": {"read": 3e10}})
    assert results.limits_of(case, "fwd") == LIMITS | {"read": 3e10}
    assert results.limits_of(case, "bwd") == LIMITS
    assert Results.from_dict(results.as_dict()).beside == results.beside


def test_limits_beside_an_operator_read_its_inputs_if_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_CPU_BYTES", 4 << 20)
    large, small = torch.zeros(1 << 20), torch.zeros(16)
    beside = limits.Beside(("read",), [large, small], [Gemm(8, 8, 8), Gemm(4, 4, 4)])
    times = cpu_times({"operator": lambda: None} | beside.calls, seconds=0.01, rounds=5)
    read = min(times[name].least for name in ("limit sum", "limit read") if name in times)
    gemms = [[t.least for name, t in times.items() if name.startswith(f"limit gemm {i} ")] for i in range(2)]
    rates, seconds = beside.take(times)
    assert set(times) == {"operator"}
    assert rates == {"read": large.nbytes / read}
    assert seconds == min(gemms[0]) + min(gemms[1])
    # Small inputs say nothing about main memory: a buffer of its own.
    alone = limits.Beside(("write",), [small])
    rates, seconds = alone.take(cpu_times(alone.calls, seconds=0.01, rounds=5))
    assert 1e8 < rates["write"] < 1e13
    assert seconds is None


def test_quantiles() -> None:
    times = Times.of([5.0, 1.0, 3.0, 2.0, 4.0], "cpu")
    assert (times.least, times.p20, times.p50, times.p80) == (1.0, 2.0, 3.0, 5.0)


def test_cpu_times_restore_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        cpu_times({"call": lambda: seen.append(torch.get_num_threads())}, seconds=0.001, rounds=5)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.5 us"), (5e-8, "0.05 us")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_overheads_are_kept_and_described() -> None:
    results = Results({}, {}, overheads={"import memkern above torch": 0.047})
    content = results.as_dict()
    assert Results.from_dict(content).overheads == results.overheads
    assert report.overheads(content["overheads"]) == "import memkern above torch 47 ms"


def test_importing_memkern_imports_nothing_heavy() -> None:
    assert 0 < overheads.import_seconds(tries=1) < 10
