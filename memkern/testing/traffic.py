"""Counts the memory traffic of Triton kernels: every load and store of an interpreted launch, byte by byte.

What a kernel moves decides how fast a memory-bound one can be, and a GPU's profiler is the usual place to find out. The
interpreter sees every address, so the count needs no GPU, is exact, and a test can hold it to the minimum::

    with count_traffic() as traffic:
        route_experts_fwd(hiddens, weight, ...)
    assert traffic.of(hiddens).loaded == hiddens.nbytes  # each element once
    assert traffic.moved(resident=("weight",)) <= 1.1 * minimum

Only lanes that the mask lets through count. A lane that points outside of the tensors of its launch raises
:class:`OutOfBounds` before the access, where the interpreter alone would read foreign memory or crash. Needs
``TRITON_INTERPRET=1`` from before the first import of Triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import Tensor


class OutOfBounds(AssertionError):
    """A kernel touched memory outside of the tensors that it was given."""


@dataclasses.dataclass
class Traffic:
    """Bytes of one tensor; ``unique_*`` counts each byte once however often it is moved."""

    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0
    atomics: int = 0
    """Lanes of atomic operations, which count neither as loads nor as stores."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class _Storage:
    """The memory behind one or more tensors, with what happened to it."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        self.tensor = tensor  # kept alive, so that no later tensor gets these addresses
        self.name = name
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.loaded = self.stored = self.atomics = 0
        self.seen_loaded = np.zeros(self.size, dtype=bool)
        self.seen_stored = np.zeros(self.size, dtype=bool)

    def traffic(self) -> Traffic:
        unique = int(self.seen_loaded.sum()), int(self.seen_stored.sum())
        return Traffic(self.loaded, self.stored, *unique, self.atomics)


class TrafficCount:
    """What :func:`count_traffic` counted; read it after the region, or between launches inside of it."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        """Name and grid of every kernel launched, in order."""
        self._storages: dict[int, _Storage] = {}
        self._kernel = ""

    @property
    def by_tensor(self) -> dict[str, Traffic]:
        """Traffic by the kernels' parameter names; memory that has several goes by the first it was passed as."""
        found: dict[str, Traffic] = {}
        for storage in self._storages.values():
            found[storage.name] = found.get(storage.name, Traffic()) + storage.traffic()
        return found

    def of(self, tensor: Tensor) -> Traffic:
        """Traffic of the memory behind ``tensor``, all zero when no kernel was given it."""
        storage = self._storages.get(tensor.untyped_storage().data_ptr())
        return Traffic() if storage is None else storage.traffic()

    @property
    def total(self) -> Traffic:
        return sum(self.by_tensor.values(), Traffic())

    @property
    def bytes_loaded(self) -> int:
        return self.total.loaded

    @property
    def bytes_stored(self) -> int:
        return self.total.stored

    @property
    def programs(self) -> int:
        return sum(int(np.prod(grid)) for _, grid in self.launches)

    def moved(self, resident: Collection[str] = ()) -> int:
        """Bytes loaded and stored.

        Args:
            resident: parameter names of tensors small enough to stay in cache; their bytes count once each way.
        """
        unknown = set(resident) - self.by_tensor.keys()
        if unknown:
            raise ValueError(f"resident: no kernel has {sorted(unknown)}; it has {sorted(self.by_tensor)}")
        return sum(
            t.unique_loaded + t.unique_stored if name in resident else t.loaded + t.stored
            for name, t in self.by_tensor.items()
        )

    def __str__(self) -> str:
        rows = [("bytes", "loaded", "unique", "stored", "unique", "atomics")]
        for name, t in self.by_tensor.items():
            numbers = (t.loaded, t.unique_loaded, t.stored, t.unique_stored, t.atomics)
            rows.append((name, *map(str, numbers)))  # type: ignore[arg-type]
        return "\n".join(" ".join(f"{cell:>14}" for cell in row) for row in rows)

    def _launch(self, kernel: str, grid: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        self._kernel = kernel
        self.launches.append((kernel, grid))
        for name, tensor in tensors.items():
            address = tensor.untyped_storage().data_ptr()
            if tensor.untyped_storage().nbytes() and address not in self._storages:
                self._storages[address] = _Storage(tensor, name)

    def _touch(self, kind: str, addresses: Any, size: int) -> None:
        """Note an access of ``size`` bytes at each address."""
        left = np.asarray(addresses).reshape(-1).astype(np.int64)
        for storage in self._storages.values():
            if left.size == 0:
                return
            offsets = left - storage.start
            inside = (offsets >= 0) & (offsets + size <= storage.size)
            if not inside.any():
                continue
            offsets, left = offsets[inside], left[~inside]
            if kind == "atomic":
                storage.atomics += offsets.size
                continue
            seen = storage.seen_loaded if kind == "load" else storage.seen_stored
            for byte in range(size):
                seen[offsets + byte] = True
            if kind == "load":
                storage.loaded += offsets.size * size
            else:
                storage.stored += offsets.size * size
        if left.size:
            raise OutOfBounds(
                f"{self._kernel}: {kind} of {left.size} lanes outside of {[s.name for s in self._storages.values()]}"
            )


@contextlib.contextmanager
def count_traffic() -> Iterator[TrafficCount]:
    """Count the loads, stores and atomics of every kernel that is launched inside the region.

    Raises:
        RuntimeError: Triton's interpreter is off.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("count_traffic needs TRITON_INTERPRET=1 from before the first import of Triton")
    count = TrafficCount()
    builder = interpreter.interpreter_builder
    real_launch = interpreter.GridExecutor.__call__
    originals = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | options
        grid = self.grid(given) if callable(self.grid) else self.grid
        count._launch(self.fn.__name__, tuple(grid), _tensors(given))
        try:
            return real_launch(self, *args, **options)
        except Exception as error:
            if isinstance(error.__cause__, OutOfBounds):  # the interpreter wraps what a kernel raises
                raise error.__cause__ from None
            raise

    def width(pointers: Any) -> int:
        return max(8, int(pointers.get_element_ty().primitive_bitwidth)) // 8

    def load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        count._touch("load", pointers.data[_lanes(pointers, mask)], width(pointers))
        return originals["create_masked_load"](pointers, mask, *rest, **named)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        count._touch("store", pointers.data[_lanes(pointers, mask)], width(pointers))
        return originals["create_masked_store"](pointers, value, mask, *rest, **named)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        count._touch("atomic", pointers.data[_lanes(pointers, mask)], width(pointers))
        return originals["create_atomic_rmw"](operation, pointers, value, mask, *rest, **named)

    def atomic_cas(pointers: Any, *rest: Any, **named: Any) -> Any:
        count._touch("atomic", pointers.data, width(pointers))
        return originals["create_atomic_cas"](pointers, *rest, **named)

    interpreter.GridExecutor.__call__ = launch
    # On the instance: a load without a mask, and those of descriptors, come through the masked one.
    for name, counting in zip(originals, (load, store, atomic_rmw, atomic_cas), strict=True):
        setattr(builder, name, counting)
    try:
        yield count
    finally:
        interpreter.GridExecutor.__call__ = real_launch
        for name in originals:
            delattr(builder, name)


def _lanes(pointers: Any, mask: Any) -> Any:
    return np.broadcast_to(mask.data.astype(bool), pointers.data.shape)


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a kernel's arguments, those of descriptors and in tuples among them."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            found.update(_tensors({f"{name}[{i}]": item for i, item in enumerate(value)}))
            continue
        base = getattr(value, "base", value) if not isinstance(value, Tensor) else value
        if isinstance(base, Tensor):
            found[name] = base
    return found
