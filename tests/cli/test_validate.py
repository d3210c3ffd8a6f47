"""``memkern validate``: passes what is right, fails what is wrong, and saves what it failed on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from memkern.benchmarks import golden, inputs, registry
from memkern.benchmarks.checking import Truth, named_outputs
from memkern.cli import main
from memkern.reference import routing as reference

runner = CliRunner()
FEW = ["--backend", "reference", "--dtype", "float32"]


def run(*arguments: str) -> Result:
    return runner.invoke(main, ["validate", *arguments])


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A module of the user's, and a working directory to write into."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    monkeypatch.chdir(tmp_path)
    return module


def test_passes_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    result = run(*FEW, "--json", str(path))
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["schema"] == 1
    assert {entry["op"] for entry in written["results"]} >= set(registry.specs())
    names = {tensor["name"] for e in written["results"] if e["op"] == "route_experts" for tensor in e["tensors"]}
    assert names >= {"probs", "logits", "entropy", "load_balance_loss", "d_hiddens", "d_weight", "d_pool_query"}
    assert all(entry["verdict"] == "pass" for entry in written["results"])
    assert any(entry["variant"] == "golden" for entry in written["results"])


def test_every_tensor_when_verbose() -> None:
    result = run(*FEW, "--op", "route_experts", "--verbose")
    assert result.exit_code == 0, result.output
    assert "d_hiddens (tiny)" in result.output
    assert "probs (empty)" in result.output


def test_own_shape() -> None:
    result = run(*FEW, "--op", "route_experts", "--shape", "B=2,3,K=7", "-v")
    assert result.exit_code == 0, result.output
    assert "probs (B=2,S=5,D=32,K=7)" in result.output
    assert "probs (B=3,S=5,D=32,K=7)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "route_expert"], "did you mean 'route_experts'"),
        (["--dtype", "float8"], "--dtype: unknown value 'float8'; the known ones are float32"),
        (["--backend", "rocm"], "unknown backend 'rocm'; the known ones are reference, cpp, triton, cuda"),
        (["--shape", "B=x"], "expected something like B=8,S=16"),
        (["--shape", "Z=1"], "no operator has all the dimensions"),
        (["--against", "mine:f"], "which operator does it compute? Give one --op NAME"),
        (["--op", "routing_entropy", "--against", "mine"], "expected package.module:function"),
        (["--op", "routing_entropy", "--against", "no_such_module:f"], "no module named 'no_such_module'"),
        (["--op", "routing_entropy", "--against", "math:nothing"], "module math has no 'nothing'"),
        (["--op", "routing_entropy", "--against", "math:pi"], "is not a function but a float"),
        (["--inputs", "nowhere.safetensors"], "not a file of saved inputs"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_absent_backend_is_refused_with_every_reason() -> None:
    result = run("--backend", "cuda")
    assert result.exit_code == 2
    assert "backend 'cuda' is not available here" in result.stderr
    assert "reference: available" in result.stderr


def test_a_right_implementation_passes(mine: ModuleType) -> None:
    mine.routing_entropy = lambda probs: (
        -(probs.double() * (probs.double() + 1e-10).log())
        .sum(-1)
        .to(  # type: ignore[attr-defined]
            torch.float64 if probs.dtype == torch.float64 else torch.float32
        )
    )
    result = run("--against", "mine:routing_entropy")
    assert result.exit_code == 0, result.output
    assert "mine:routing_entropy" in result.output


def wrong_value(**arguments: Any) -> Any:
    routing = reference.route_experts(**arguments)
    return routing._replace(entropy=routing.entropy * 1.001)


def wrong_gradient(**arguments: Any) -> Any:
    weight = arguments["weight"]
    arguments["weight"] = weight * 0.5 + weight.detach() * 0.5
    return reference.route_experts(**arguments)


def lost_gradient(**arguments: Any) -> Any:
    routing = reference.route_experts(**arguments)
    return routing._replace(load_balance_loss=routing.load_balance_loss.detach())


def wrong_shape(**arguments: Any) -> Any:
    routing = reference.route_experts(**arguments)
    return routing._replace(entropy=routing.entropy[:, None])


def raises(**arguments: Any) -> Any:
    raise RuntimeError("kernel on fire\nsecond line")


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (wrong_value, r"entropy \(B=4,.*FAIL"),
        (wrong_gradient, r"d_weight \(B=4,.*FAIL"),
        (lost_gradient, r"d\(load_balance_loss\).*FAIL this output carries no"),
        (wrong_shape, r"entropy \(B=4,.*FAIL shape \(4, 1\), expected \(4,\)"),
        (raises, r"FAIL RuntimeError: kernel on fire"),
    ],
)
def test_a_wrong_implementation_fails_and_can_run_again(mine: ModuleType, function: Any, shown: str) -> None:
    mine.route = function  # type: ignore[attr-defined]
    result = run("--op", "route_experts", "--against", "mine:route", "--dtype", "float32", "--shape", "B=4")
    assert result.exit_code == 1, result.output
    assert re.search(shown, result.output), result.output
    line = next(line for line in result.output.splitlines() if line.startswith("rerun: memkern validate"))
    again = runner.invoke(main, line.removeprefix("rerun: memkern ").split())
    assert again.exit_code == 1, again.output
    mine.route = reference.route_experts  # type: ignore[attr-defined]
    assert runner.invoke(main, line.removeprefix("rerun: memkern ").split()).exit_code == 0


def test_gradients_of_an_own_implementation_can_be_left_out(mine: ModuleType) -> None:
    mine.route = wrong_gradient  # type: ignore[attr-defined]
    assert run("--op", "route_experts", "--against", "mine:route", "--dtype", "float32", "--no-grad").exit_code == 0


def test_half_the_digits_when_loose(mine: ModuleType) -> None:
    def rounded(probs: Tensor) -> Tensor:
        return reference.routing_entropy(probs) * (1 + 1e-5)

    mine.rounded = rounded  # type: ignore[attr-defined]
    arguments = ["--op", "routing_entropy", "--against", "mine:rounded", "--dtype", "float32"]
    assert run(*arguments).exit_code == 1
    assert run(*arguments, "--loose").exit_code == 0


def test_golden_numbers_of_another_implementation(mine: ModuleType) -> None:
    mine.good = reference.load_balance_loss  # type: ignore[attr-defined]
    mine.bad = lambda probs: reference.load_balance_loss(probs) / probs.shape[1]  # type: ignore[attr-defined]
    arguments = ["--golden", "--op", "load_balance_loss", "--against"]
    assert run(*arguments, "mine:good").exit_code == 0
    assert run(*arguments, "mine:bad").exit_code == 1


def test_golden_arguments_become_tensors() -> None:
    made = golden.tensors([[1.0, 0], [0.5, 2]], torch.float32, "cpu")
    assert made.dtype == torch.float32
    assert golden.tensors([1, 2], torch.float32, "cpu").dtype == torch.int64
    assert golden.tensors([True], torch.float32, "cpu").dtype == torch.bool
    routing = {"probs": [[1.0]], "logits": [[0.0]], "entropy": [0.0], "load_balance_loss": [1.0]}
    assert isinstance(golden.tensors(routing, torch.float32, "cpu"), reference.Routing)


def test_saved_inputs_come_back(tmp_path: Path) -> None:
    case = registry.spec("route_experts").case("odd", variant="masked-attention", dtype="bfloat16")
    arguments = case.arguments() | {
        "temperature": torch.tensor(0.5, requires_grad=True),
        "nested": reference.Routing(*(torch.ones(2) for _ in range(4))),
        "sequence": [torch.zeros(1), None],
    }
    inputs.save(tmp_path / "x.safetensors", case, arguments)
    about, loaded = inputs.load(tmp_path / "x.safetensors", "cpu")
    assert about == {"op": "route_experts", "variant": "masked-attention", "dtype": "bfloat16", "shape": case.shape}
    assert loaded["pooling"] == "attention"
    assert loaded["sequence"][1] is None
    assert isinstance(loaded["nested"], reference.Routing)
    for name in ("hiddens", "slot_mask", "temperature"):
        assert torch.equal(loaded[name], arguments[name])
        assert loaded[name].requires_grad == arguments[name].requires_grad


def test_a_part_of_the_outputs_is_compared_on_its_own() -> None:
    case = registry.spec("route_experts").case("tiny")
    truth = Truth(case.spec, case.arguments())
    first = truth.check(lambda **arguments: reference.route_experts(**arguments).probs)
    assert [c.name for c in first][:1] == ["probs"]
    assert all(c.passed for c in first)
    named = truth.check(lambda **arguments: {"entropy": reference.route_experts(**arguments).entropy})
    assert all(c.passed for c in named)
    unknown = truth.check(lambda **arguments: {"speed": arguments["hiddens"]})
    assert not unknown[0].passed
    with pytest.raises(TypeError, match="expected tensors as result, got int"):
        named_outputs(3)
