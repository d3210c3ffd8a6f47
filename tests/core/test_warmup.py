"""memkern.warmup() runs what it says, leaves the random state alone, and names what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkern
from memkern.ops.routing import _schemas


def test_it_stays_a_function_after_its_first_use() -> None:
    assert memkern.warmup(["routing_entropy"], dtypes=["float32"], device="cpu")
    assert memkern.warmup(["routing_entropy"], dtypes=["float32"], device="cpu") == ["routing_entropy small float32"]


def test_forward_and_backward_of_every_variant_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, torch.Size, torch.dtype]] = []

    def watching(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            hiddens = next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3)
            seen.append((name, hiddens.shape, hiddens.dtype))
            return real(*args)

        return call

    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    for name in ("ROUTE_FWD", "ROUTE_BWD"):
        table = getattr(_schemas, name)
        monkeypatch.setitem(table, "cpp", watching(name, table["cpp"]))
    done = memkern.warmup(
        ["route_experts"], dtypes=["float32", "bfloat16"], device="cpu", shapes={"route_experts": {"D": 40}}
    )
    assert len(done) == 10
    assert len(seen) == 20
    assert {name for name, _, _ in seen} == {"ROUTE_FWD", "ROUTE_BWD"}
    assert {shape[2] for _, shape, _ in seen} == {40}
    assert {dtype for _, _, dtype in seen} == {torch.float32, torch.bfloat16}
    seen.clear()
    memkern.warmup(["route_experts"], dtypes=["float32"], device="cpu", backward=False)
    assert {name for name, _, _ in seen} == {"ROUTE_FWD"}


def test_the_random_state_stays() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    memkern.warmup(["load_balance_loss"], dtypes=["float32"], device="cpu")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["route_expert"]}, "route_experts"),
        ({"ops": ["route_experts"], "dtypes": ["float31"]}, "float31"),
        ({"ops": ["route_experts"], "shapes": {"route_experts": {"Z": 3}}}, "Z"),
        ({"ops": ["route_experts"], "shapes": {"nothing": {}}}, "nothing"),
        ({"ops": ["route_experts"], "backend": "fortran"}, "fortran"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memkern.warmup(**{"dtypes": ["float32"], "device": "cpu", **arguments})
