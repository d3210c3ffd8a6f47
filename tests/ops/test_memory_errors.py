"""Bad arguments of the memory operators: the message names the argument, what was expected and what came."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from memkern import backends, ops
from memkern.benchmarks import registry
from memkern.ops import MemoryInterface, MemoryState


def arguments(op: str = "memory_step", size: str = "tiny") -> dict[str, Any]:
    return registry.spec(op).case(size).arguments(grad=False)


def replaced(name: str, value: Any, op: str = "memory_step") -> dict[str, Any]:
    """Good arguments with one field or option replaced."""
    made = arguments(op)
    owner, _, field = name.partition(".")
    if not field:
        return made | {name: value}
    made[owner] = made[owner]._replace(**{field: value(getattr(made[owner], field)) if callable(value) else value})
    return made


@pytest.mark.parametrize("field", [f"state.{name}" for name in MemoryState._fields])
@pytest.mark.parametrize(
    "change", [lambda x: x[0], lambda x: x[..., 1:], lambda x: x[:1], lambda x: x.int(), lambda x: x.tolist()]
)
def test_state_fields_are_named(field: str, change: Any) -> None:
    # Another memory shows at the next field, which no longer fits it.
    with pytest.raises((ValueError, TypeError), match=r"(state|interface)\.\w+: expected"):
        ops.memory_step(**replaced(field, change))


@pytest.mark.parametrize("field", [f"interface.{name}" for name in MemoryInterface._fields])
@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x[:1], lambda x: x.int(), lambda x: x[:, :0]])
def test_interface_fields_are_named(field: str, change: Any) -> None:
    with pytest.raises(ValueError, match=field.replace(".", r"\.") + ": expected"):
        ops.memory_step(**replaced(field, change))


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("state", (1, 2), TypeError, "state: expected a MemoryState"),
        ("interface", None, TypeError, "interface: expected a MemoryInterface"),
        ("sharpness", 0.0, ValueError, "sharpness: expected a finite number > 0"),
        ("sharpness", float("inf"), ValueError, "sharpness: expected a finite number"),
        ("sharpness", "2", TypeError, "sharpness: expected a float or a tensor"),
        ("sharpness", torch.ones(5), ValueError, "sharpness: expected a number or a shape"),
        ("step_mask", torch.ones(3), TypeError, "step_mask: expected a bool mask"),
        ("step_mask", torch.ones(2, dtype=torch.bool), ValueError, r"step_mask: expected shape \(3\)"),
        ("track_usage", 1, TypeError, "track_usage: expected a bool"),
        ("deallocate", None, TypeError, "deallocate: expected a bool"),
        ("backend", "fast", ValueError, "unknown backend 'fast'"),
    ],
)
def test_options(name: str, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.memory_step(**replaced(name, value))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_checkpoint_every(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="checkpoint_every: expected an int"):
        ops.memory_scan(**arguments("memory_scan"), checkpoint_every=value)


def test_a_scan_wants_its_time_axis_everywhere() -> None:
    made = arguments("memory_scan")
    made["interface"] = made["interface"]._replace(write_gates=made["interface"].write_gates[:, 1:])
    with pytest.raises(ValueError, match=r"interface\.write_gates: expected shape \(3, 5, 1\)"):
        ops.memory_scan(**made)
    with pytest.raises(ValueError, match=r"interface\.read_keys: expected shape"):
        ops.memory_scan(**arguments("memory_step"))


def test_float64_stands_alone() -> None:
    made = arguments()
    made["interface"] = made["interface"]._replace(read_keys=made["interface"].read_keys.double())
    with pytest.raises(ValueError, match=r"interface\.read_keys: expected float64 together with float64 only"):
        ops.memory_step(**made)


def test_parts_name_their_arguments() -> None:
    rows = torch.rand(2, 3, 5)
    with pytest.raises(ValueError, match="keys: expected"):
        ops.content_weights(torch.rand(2, 5, 4), torch.rand(2, 3, 5), torch.rand(2, 3))
    with pytest.raises(TypeError, match="slot_mask: expected a bool mask"):
        ops.content_weights(torch.rand(2, 5, 4), torch.rand(2, 3, 4), torch.rand(2, 3), slot_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="gamma: expected"):
        ops.sharpen(rows, -1.0)
    with pytest.raises(ValueError, match="gamma: expected"):
        ops.sharpen(rows, torch.ones(2))
    with pytest.raises(ValueError, match="usage: expected"):
        ops.allocation_weights(torch.rand(5))
    with pytest.raises(ValueError, match="write_weights: expected at least one head"):
        ops.update_usage(torch.rand(2, 5), torch.rand(2, 0, 5), torch.rand(2, 3, 5), torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"links: expected shape \(B, H, N, N\)"):
        ops.update_links(torch.rand(2, 3, 5, 4), rows, rows)
    with pytest.raises(ValueError, match="read_weights: expected"):
        ops.directional_weights(torch.rand(2, 3, 5, 5), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="weights: expected"):
        ops.read_memory(torch.rand(2, 5, 4), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="erase_vectors: expected"):
        ops.write_memory(torch.rand(2, 5, 4), rows, torch.rand(2, 3, 5), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="slots: expected an int >= 1"):
        ops.initial_memory_state(2, 0, 4, 1)
    with pytest.raises(TypeError, match="read_heads: expected an int"):
        ops.initial_memory_state(2, 3, 4, 1.5)  # type: ignore[arg-type]
    for device, error in (("nowhere", ValueError), (3.5, TypeError)):
        with pytest.raises(error, match=r"device: expected a torch\.device"):
            ops.initial_memory_state(2, 3, 4, 1, device=device)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="detach_write: expected a bool"):
        ops.update_usage(torch.rand(2, 5), rows, rows, torch.rand(2, 3), detach_write=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"memory: expected shape \(3, 4\)"):
        ops.initial_memory_state(2, 3, 4, 1, memory=torch.rand(3, 5))


def test_an_explicit_backend_never_falls_back() -> None:
    if backends._absent("cuda", "cpu") is None:
        pytest.skip("cuda takes CPU tensors here")
    with pytest.raises(backends.BackendUnavailable, match="memory_step"):
        ops.memory_step(**arguments(), backend="cuda")


CHECKED = """
import torch
from memkern.benchmarks import registry
from memkern import ops

def refused(text, change, **options):
    made = registry.spec("memory_step").case("tiny").arguments(grad=False)
    change(made)
    try:
        ops.memory_step(**made, **options)
    except ValueError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(text)

def put(owner, field, index, value):
    return lambda made: getattr(made[owner], field).__setitem__(index, value)

refused("state.usage: expected values in [0, 1.01], got 1.5 at index (1, 2)", put("state", "usage", (1, 2), 1.5))
refused("interface.write_gates: expected values in [0, 1]", put("interface", "write_gates", (0, 0), -0.5))
refused("interface.read_modes: expected", put("interface", "read_modes", (2, 1), 0.9))
refused("interface.read_keys: expected no NaN, got nan at index (1, 0, 3)",
        put("interface", "read_keys", (1, 0, 3), float("nan")))
refused("sharpness: expected values > 0, got 0.0 at index (1,)", lambda made: None, sharpness=torch.tensor([1.0, 0.0]))
made = registry.spec("memory_step").case("tiny").arguments(grad=False)
made["interface"].read_keys[1] = float("nan")
ops.memory_step(**made, step_mask=torch.tensor([True, False, True]))
"""


def test_meta_tensors_give_meta_results() -> None:
    """By the reference, whose products ask for the autocast of a device that has none."""
    made = registry.spec("memory_step").case("tiny").arguments(grad=False)
    on_meta = {name: type(fields)(*(field.to("meta") for field in fields)) for name, fields in made.items()}
    expected, _ = ops.memory_step(**made)
    reads, state = ops.memory_step(**on_meta)
    assert (reads.shape, reads.device.type) == (expected.shape, "meta")
    assert all(field.is_meta for field in state)


def test_values_are_checked_on_request() -> None:
    environment = {**os.environ, "MEMKERN_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
