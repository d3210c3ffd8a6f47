"""Bad input to the routing operators: the error names the argument, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import load_balance_loss, route_experts, routing_entropy, temperature_softmax

X, W, B = torch.randn(4, 3, 8), torch.randn(5, 8), torch.randn(5)

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hiddens": X[0]}, ValueError, r"hiddens: expected shape \(B, S, D\).*float32\[3, 8\]"),
    ({"hiddens": X.long()}, ValueError, r"hiddens: expected a floating dtype.*int64"),
    ({"hiddens": [1.0]}, TypeError, "hiddens: expected a tensor, got list"),
    ({"weight": torch.randn(5, 7)}, ValueError, r"weight: expected shape \(K, 8\).*\[5, 7\]"),
    ({"weight": torch.randn(257, 8), "bias": None}, ValueError, r"weight: expected 1 <= K <= 256.*\[257, 8\]"),
    ({"weight": torch.randn(0, 8), "bias": None}, ValueError, "weight: expected 1 <= K <= 256"),
    ({"weight": W.double()}, ValueError, "weight: expected float64 together with float64 only"),
    ({"weight": W.to("meta")}, ValueError, "weight: expected the device of hiddens"),
    ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \(5\).*\[4\]"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got float 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a finite number > 0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number > 0"),
    ({"temperature": "hot"}, TypeError, "temperature: expected a float or a 0-d tensor, got str 'hot'"),
    ({"temperature": torch.ones(2)}, ValueError, "temperature: expected shape"),
    ({"pooling": "sum"}, ValueError, "pooling: expected one of 'mean', 'max', 'attention', got str 'sum'"),
    ({"pooling": "attention"}, ValueError, r"pool_query: expected a \(8,\) tensor"),
    ({"pool_query": torch.randn(8)}, ValueError, "pool_query: expected None for pooling='mean'"),
    ({"pooling": "attention", "pool_query": torch.randn(7)}, ValueError, r"pool_query: expected shape \(8\)"),
    ({"slot_mask": torch.ones(4, 3)}, TypeError, "slot_mask: expected a bool mask"),
    ({"slot_mask": torch.ones(4, 2, dtype=torch.bool)}, ValueError, r"slot_mask: expected shape \(4, 3\)"),
    ({"row_mask": torch.ones(4, dtype=torch.int64)}, TypeError, "row_mask: expected a bool mask"),
    ({"row_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"row_mask: expected shape \(4\)"),
    ({"clamp": 0.0}, ValueError, "clamp: expected a number > 0"),
    ({"clamp": "no"}, TypeError, "clamp: expected a float or None"),
    ({"straight_through": "no"}, TypeError, "straight_through: expected a bool"),
    ({"process_group": "world"}, TypeError, "process_group: expected"),
    (
        {"backend": "cudnn"},
        ValueError,
        "backend: unknown backend 'cudnn'; the known ones are reference, cpp, triton, cuda",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), CASES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_route_experts(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hiddens": X, "weight": W, "bias": B} | change
    with pytest.raises(error, match=message):
        route_experts(**arguments)


def test_row_functions() -> None:
    with pytest.raises(ValueError, match=r"logits: expected shape \(..., K\)"):
        temperature_softmax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="temperature"):
        temperature_softmax(torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match="probs: expected a floating dtype"):
        routing_entropy(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"probs: expected shape \(B, K\)"):
        load_balance_loss(torch.rand(3))
    with pytest.raises(ValueError, match="at least one expert"):
        load_balance_loss(torch.rand(3, 0))


def test_dtensor_is_refused_by_name(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"weight: got a DTensor.*to_local"):
            route_experts(X, distribute_tensor(W, mesh))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_a_0d_temperature_follows_the_dtype_of_what_it_scales(name: str) -> None:
    if memkern.backends._absent(name, "cpu"):
        pytest.skip(f"backend {name} is not here")
    for scaled, given in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        temperature = torch.tensor(0.5, dtype=given, requires_grad=True)
        logits = torch.randn(2, 3, dtype=scaled)
        found = temperature_softmax(logits, temperature, backend=name)
        torch.testing.assert_close(found, temperature_softmax(logits, 0.5, backend=name))
        found[:, 0].sum().backward()
        assert temperature.grad.dtype == given
        assert temperature.grad != 0
        hiddens, weight = torch.randn(2, 3, 4, dtype=scaled), torch.randn(5, 4, dtype=scaled)
        routed = route_experts(hiddens, weight, temperature=temperature, backend=name).probs
        torch.testing.assert_close(routed, route_experts(hiddens, weight, temperature=0.5, backend=name).probs)


def test_explicit_backend_that_cannot_lists_every_reason() -> None:
    with pytest.raises(memkern.BackendUnavailable) as caught:
        route_experts(X.to("meta"), W.to("meta"), backend="triton")
    message = str(caught.value)
    assert "backend 'triton' cannot run route_experts on (float32[4, 3, 8] on meta" in message
    for name in memkern.backends.NAMES:
        assert f"\n  {name}: " in message
    with pytest.raises(memkern.BackendUnavailable, match="not float64"):
        route_experts(X.double().cuda() if torch.cuda.is_available() else X.double(), W.double(), backend="triton")


VALUE_CHECKS = """
import torch
from memkern.ops import route_experts, load_balance_loss
x, w = torch.randn(4, 3, 8), torch.randn(5, 8)
def message(**change):
    try:
        route_experts(**({"hiddens": x, "weight": w} | change))
    except ValueError as error:
        return str(error)
bad = x.clone(); bad[2, 1, 3] = float("nan")
assert message() is None
assert message(hiddens=bad) == "hiddens: expected no NaN, got nan at index (2, 1, 3)", message(hiddens=bad)
mask = torch.ones(4, 3, dtype=torch.bool); mask[2, 1] = False
assert message(hiddens=bad, slot_mask=mask) is None
assert "temperature: expected values > 0, got 0.0 at index ()" in message(temperature=torch.tensor(0.0))
try:
    load_balance_loss(torch.ones(2, 3))
except ValueError as error:
    assert "probs: expected rows that sum to 1, got 3.0 at index (0,)" in str(error), error
else:
    raise AssertionError
"""


def test_value_checks_name_the_first_bad_index() -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-c", VALUE_CHECKS], env={**os.environ, "MEMKERN_CHECK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
