"""Matrix products on the CPU: BLAS, oneDNN or our own, as ``configs/cpu_gemm.json`` says for this CPU model."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TABLES: dict[str, list[dict[str, Any]]] = {
    name: entries
    for name, entries in json.loads((Path(__file__).parents[1] / "configs" / "cpu_gemm.json").read_text()).items()
    if name != "about"
}


@functools.cache
def cpu_model() -> tuple[str, int, int]:
    """Vendor, family and model of the first processor; empty and zeros where /proc/cpuinfo does not say."""
    found: dict[str, str] = {}
    try:
        with Path("/proc/cpuinfo").open() as file:
            # To the first blank line: the system writes the rest, long where there are many processors, as it is read.
            for line in itertools.takewhile(str.strip, file):
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    except OSError:
        pass
    family, model = (int(found[key]) if found.get(key, "").isdigit() else 0 for key in ("cpu family", "model"))
    return found.get("vendor_id", ""), family, model


def _entry(table: str, cpu: tuple[str, int, int]) -> dict[str, Any]:
    """The first entry that matches."""
    for entry in _TABLES[table]:
        wanted = (entry["vendor"], entry["family"], entry["model"])
        if all(want is None or want == have for want, have in zip(wanted, cpu, strict=True)):
            return entry
    raise LookupError(f"cpu_gemm.json: {table} has no entry for {cpu}")


def from_rows(library: str, cpu: tuple[str, int, int], dtype: str = "float32") -> int | None:
    """From how many rows on ``library`` ("onednn" or "own") multiplies ``dtype`` on this CPU model, None for never."""
    return _entry(dtype, cpu)[f"{library}_from_rows"]  # type: ignore[no-any-return]


def search_library_from() -> int | None:
    """From how many queries on the search multiplies by a library, None for never.

    Raises:
        ValueError: ``MEMKERN_SEARCH_LIBRARY_FROM`` is no positive number.
    """
    told = os.environ.get("MEMKERN_SEARCH_LIBRARY_FROM", "")
    if not told:
        return _entry("search", cpu_model())["library_from_queries"]  # type: ignore[no-any-return]
    if not told.isdigit() or int(told) < 1:
        raise ValueError(f"MEMKERN_SEARCH_LIBRARY_FROM: expected a number of queries, got {told!r}")
    return int(told)


@functools.cache
def _rows_here() -> int | None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    return from_rows("onednn", cpu_model())


@functools.cache
def _own_here(dtype: torch.dtype) -> int | None:
    # Measured with the widest vectors alone.
    if torch.ops.memkern.cpu_isa() != "avx512":
        return None
    if dtype == torch.bfloat16:
        return from_rows("own", cpu_model(), "bfloat16") if torch.ops.memkern.matmul_takes_bf16() else None
    return from_rows("own", cpu_model()) if dtype == torch.float32 else None


def own_product(x: Tensor, rows: int) -> bool:
    """Whether :func:`multiply` makes a product of ``x`` with so many rows itself, if oneDNN does not."""
    least = _own_here(x.dtype)
    return least is not None and rows >= least


def multiply(out: Tensor, a: Tensor, b: Tensor, own: bool, *, add: bool = False) -> None:
    """``out`` = a b, or ``out`` += a b, by our own kernel or by BLAS.

    Args:
        out: (M, N), stride 1 along N; apart from a and b. Our own kernel makes float32, or from bfloat16 either.
        a: (M, K); b: (K, N), any strides.
        own: what :func:`own_product` says.
    """
    if own:
        torch.ops.memkern.matmul_rows(out, a, b, add)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def by_onednn(x: Tensor, rows: int) -> bool:
    """Whether oneDNN takes products of ``x`` (float32) with so many rows."""
    least = _rows_here()
    return least is not None and x.dtype == torch.float32 and rows >= least and torch._C._get_mkldnn_enabled()


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN.

    Args:
        x: (n, k) float32, stride 1 along k.
        weight: (m, k) float32, contiguous or the transpose of a contiguous one: oneDNN is hundreds of times slower on
            a slice of columns.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]
