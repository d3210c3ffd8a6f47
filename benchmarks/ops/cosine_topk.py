"""Search: databases and queries, least traffic and arithmetic, what users write instead, and the libraries for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memkern.testing.compare import Comparison

from ..registry import Case, Cost, Function, Gemm, OpSpec, Options, Shape, Target, Unsuitable, Work, draw

INF = float("inf")


def make_search(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    count, rows, width, k = (shape[letter] for letter in "QNDK")
    made: dict[str, Any] = {
        "queries": draw(generator, dtype, count, width),
        "database": draw(generator, dtype, rows, width),
        "k": k,
    }
    if options.get("normalized"):
        for name in ("queries", "database"):
            made[name] = F.normalize(made[name].float(), dim=-1).to(dtype)
        made["normalized"] = True
    if options.get("filters"):
        made["valid"] = torch.rand(rows, generator=generator, device=device) > 0.3
        made["query_group"] = torch.randint(0, 3, (count,), generator=generator, device=device)
        made["row_group"] = torch.randint(0, 3, (rows,), generator=generator, device=device)
    if options.get("norms"):
        wide = made["database"].double() if dtype == torch.float64 else made["database"].float()
        made["inverse_norms"] = 1 / wide.norm(dim=-1)
    return made


def work_search(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    """Forward reads everything once; backward reads the rows that were found, and writes a whole gradient."""
    count, rows, width, k = (shape[letter] for letter in "QNDK")
    e, f = dtype.itemsize, 8 if dtype == torch.float64 else 4
    found = count * min(k, rows)
    filters = rows + 8 * (count + rows) if options.get("filters") else 0
    norms = rows * f if options.get("norms") else 0
    forward = Cost(
        read=(rows + count) * width * e + filters + norms,
        written=count * k * (f + 8),
        flops=2 * count * rows * width,
    )
    backward = Cost(
        read=count * k * (f + 8) + (count + found) * width * e,
        written=(rows + count) * width * e,
        flops=8 * found * width,
    )
    return Work(forward, backward)


def gemms_search(shape: Shape, options: Options, mode: str) -> list[Gemm]:
    return [Gemm(shape["Q"], shape["N"], shape["D"])] if mode != "bwd" else []


def judge_indices(outputs: dict[str, Tensor], truth: dict[str, Tensor], arguments: dict[str, Any]) -> Comparison:
    """Rows that were found may differ from the true ones where float32 cannot tell their scores apart.

    The error is the most by which the true score of a place exceeds that of the row found there.
    """
    found, true = outputs["indices"].cpu(), truth["indices"].cpu()
    if found.shape != true.shape or found.dtype != torch.int64:
        return Comparison("indices", INF, 0.0, f"{found.dtype}{list(found.shape)}, expected int64{list(true.shape)}")
    if not torch.equal(found >= 0, true >= 0):
        return Comparison("indices", INF, 0.0, "another number of rows was found")
    queries, database = (arguments[name].detach().cpu().double() for name in ("queries", "database"))
    if found.numel() == 0 or database.shape[0] == 0:
        return Comparison("indices", 0.0, 0.0)
    rows = database[found.clamp(min=0)]
    scores = (queries[:, None] * rows).sum(-1)
    if not arguments.get("normalized"):
        inverse = arguments.get("inverse_norms")
        lengths = rows.norm(dim=-1)
        scale = 1 / torch.where(lengths == 0, 1.0, lengths)
        if inverse is not None:
            scale = inverse.detach().cpu().double()[found.clamp(min=0)]
        norms = queries.norm(dim=-1, keepdim=True)
        scores = scores * scale / torch.where(norms == 0, 1.0, norms)
    width = queries.shape[-1]
    u = 2.0**-53 if arguments["queries"].dtype == torch.float64 else 2.0**-24
    gaps = torch.where(found >= 0, truth["scores"].detach().cpu().double() - scores, 0.0)
    if bool((found.sort(-1).values.diff(dim=-1) == 0).logical_and(found.sort(-1).values[:, 1:] >= 0).any()):
        return Comparison("indices", INF, 0.0, "a row was found twice")
    return Comparison("indices", gaps.abs().max().item(), 2 * (width + 2) * u * max(1.0, scores.abs().max().item()))


def eager_search(
    queries: Tensor,
    database: Tensor,
    k: int,
    *,
    normalized: bool = False,
    valid: Tensor | None = None,
    query_group: Tensor | None = None,
    row_group: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A product of all pairs, then topk."""
    scores = queries.to(database.dtype) @ database.T
    scores = scores.float() if scores.dtype != torch.float64 else scores
    if not normalized:
        wide = database.float() if database.dtype != torch.float64 else database
        inverse = 1 / wide.norm(dim=-1) if inverse_norms is None else inverse_norms
        scores = scores * inverse / queries.to(wide.dtype).norm(dim=-1, keepdim=True)
    if valid is not None:
        scores = scores.masked_fill(~valid, -INF)
    if query_group is not None and row_group is not None:
        scores = scores.masked_fill(query_group[:, None] != row_group, -INF)
    return tuple(scores.topk(k))  # type: ignore[return-value]


def _once(build: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What a library makes of a database before it searches, made at the first call (a warm-up) and kept."""
    made: dict[int, Any] = {}

    def of(database: Tensor) -> Any:
        key = database.data_ptr()
        if key not in made:
            made.clear()
            made[key] = build(database.detach())
        return made[key]

    return of


def _plain(case: Case, *, low: bool = False, device: str = "cpu") -> None:
    if case.device != device:
        raise Unsuitable(f"it searches {device.upper()} tensors")
    if case.options.get("filters") or case.options.get("norms"):
        raise Unsuitable("it has no such filters")
    if not low and case.dtype != "float32":
        raise Unsuitable("it is compared in float32")


def mm(case: Case) -> Function:
    """The product of all pairs and topk, over a database that was normalised before."""
    if case.options.get("filters") or case.options.get("norms"):
        raise Unsuitable("eager stands for it there")
    unit = _once(lambda database: F.normalize(database.float(), dim=-1).to(database.dtype))

    def search(queries: Tensor, database: Tensor, k: int, normalized: bool = False) -> tuple[Tensor, Tensor]:
        q = F.normalize(queries.float(), dim=-1).to(database.dtype)
        return tuple((q @ unit(database).T).float().topk(k))  # type: ignore[return-value]

    return search


def chunked_mm(case: Case) -> Function:
    """The same in chunks of rows, so that no Q x N scores are ever held."""
    if case.options.get("filters") or case.options.get("norms"):
        raise Unsuitable("eager stands for it there")
    unit = _once(lambda database: F.normalize(database.float(), dim=-1).to(database.dtype))
    rows = 1 << 16

    def search(queries: Tensor, database: Tensor, k: int, normalized: bool = False) -> tuple[Tensor, Tensor]:
        q, x = F.normalize(queries.float(), dim=-1).to(database.dtype), unit(database)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, x.shape[0], rows):
            part = (q @ x[start : start + rows].T).float()
            scores, indices = part.topk(min(k, part.shape[1]))
            indices = indices + start
            if best is not None:
                scores, order = torch.cat((best[0], scores), 1).topk(k)
                indices = torch.cat((best[1], indices), 1).gather(1, order)
            best = scores, indices
        assert best is not None
        return best

    return search


def faiss_flat(case: Case) -> Function:
    """faiss-cpu's IndexFlatIP over unit vectors, on as many threads as torch."""
    _plain(case)
    import faiss

    def build(database: Tensor) -> Any:
        index = faiss.IndexFlatIP(database.shape[1])
        index.add(F.normalize(database, dim=-1).numpy())
        return index

    index = _once(build)

    def search(queries: Tensor, database: Tensor, k: int, normalized: bool = False) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        scores, indices = index(database).search(F.normalize(queries, dim=-1).numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return search


def usearch_exact(case: Case) -> Function:
    """usearch's exact search by inner product over unit vectors."""
    _plain(case)
    from usearch.index import MetricKind
    from usearch.index import search as exact

    unit = _once(lambda database: F.normalize(database, dim=-1).numpy())

    def search(queries: Tensor, database: Tensor, k: int, normalized: bool = False) -> tuple[Tensor, Tensor]:
        q = F.normalize(queries, dim=-1).numpy()
        found = exact(unit(database), q, k, MetricKind.IP, exact=True, threads=torch.get_num_threads())
        scores, indices = torch.from_numpy(1 - found.distances), torch.from_numpy(found.keys.astype("int64"))
        return scores.view(queries.shape[0], -1), indices.view(queries.shape[0], -1)

    return search


def flashlib_knn(case: Case) -> Function:
    """flashlib's nearest neighbours by distance, which among unit vectors is the order of the cosines."""
    _plain(case, low=True, device="cuda")
    from flashlib import flash_knn

    unit = _once(lambda database: F.normalize(database.float(), dim=-1).to(database.dtype))

    def search(queries: Tensor, database: Tensor, k: int, normalized: bool = False) -> tuple[Tensor, Tensor]:
        q = F.normalize(queries.float(), dim=-1).to(database.dtype)
        distances, indices = flash_knn(q, unit(database), k)
        return 1 - distances.float() / 2, indices.long()

    return search


def make_norms(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    return {"database": draw(generator, dtype, shape["N"], shape["D"])}


def work_norms(shape: Shape, options: Options, dtype: torch.dtype) -> Work:
    size, e, f = shape["N"] * shape["D"], dtype.itemsize, 8 if dtype == torch.float64 else 4
    forward = Cost(size * e, shape["N"] * f, 2 * size)
    return Work(forward, Cost(size * e + shape["N"] * f, size * e, 3 * size))


def eager_norms(database: Tensor) -> Tensor:
    wide = database.float() if database.dtype != torch.float64 else database
    return 1 / wide.norm(dim=-1)


def _cpu_targets() -> tuple[Target, ...]:
    """Promised at one thread, 100,000 rows of 768, k = 10: shares of the machine's limits, and ratios to peers."""
    return (
        Target("one", "fwd", "read", 0.92),
        Target("one", "fwd", "read", 0.8, dtype="bfloat16"),
        Target("sixteen", "fwd", "peak", 0.6),
        Target("batch", "fwd", "peak", 0.8),
        Target("blocks", "fwd", "peak", 0.85),
        Target("blocks", "fwd", "gemm", 0.75, dtype="bfloat16"),
        *(
            Target(size, "fwd", "faiss", ratio)
            for size, ratio in (("one", 0.95), ("sixteen", 4.0), ("batch", 6.0), ("blocks", 1.15))
        ),
        *(Target(size, "fwd", "mm", 1.0) for size in ("one", "sixteen", "batch", "blocks")),
    )


SPECS = (
    OpSpec(
        name="cosine_topk",
        column="cosine_topk",
        shapes={
            "tiny": {"Q": 3, "N": 40, "D": 24, "K": 5},
            "odd": {"Q": 5, "N": 67, "D": 37, "K": 7},
            "single": {"Q": 1, "N": 1, "D": 3, "K": 1},
            "padded": {"Q": 2, "N": 3, "D": 8, "K": 6},
            "many": {"Q": 18, "N": 50, "D": 20, "K": 3},
            "empty": {"Q": 0, "N": 5, "D": 8, "K": 2},
            "small": {"Q": 8, "N": 2000, "D": 128, "K": 10},
            "one": {"Q": 1, "N": 100_000, "D": 768, "K": 10},
            "sixteen": {"Q": 16, "N": 100_000, "D": 768, "K": 10},
            "batch": {"Q": 128, "N": 100_000, "D": 768, "K": 10},
            "blocks": {"Q": 256, "N": 100_000, "D": 768, "K": 10},
            "medium": {"Q": 256, "N": 1_000_000, "D": 768, "K": 32},
            "large": {"Q": 4096, "N": 4_000_000, "D": 768, "K": 100},
            "narrow": {"Q": 16384, "N": 1_000_000, "D": 128, "K": 32},
        },
        odd=("odd", "single", "padded", "many", "empty"),
        variants={
            "cosine": {},
            "inner": {"normalized": True},
            "filters": {"filters": True},
            "norms": {"norms": True},
        },
        no_grad=frozenset({"inverse_norms"}),
        make=make_search,
        work=work_search,
        gemms=gemms_search,
        eager=eager_search,
        peers={
            "mm": mm,
            "chunked_mm": chunked_mm,
            "faiss": faiss_flat,
            "usearch": usearch_exact,
            "flashlib": flashlib_knn,
        },
        judges={"indices": judge_indices},
        headline=True,
        targets=(
            *_cpu_targets(),
            Target("medium", "fwd", "gemm", 0.7, device="cuda", dtype="bfloat16"),
            Target("large", "fwd", "gemm", 0.7, device="cuda", dtype="bfloat16"),
            Target("large", "fwd", "chunked_mm", 2.0, device="cuda", dtype="bfloat16"),
            Target("narrow", "fwd", "chunked_mm", 5.0, device="cuda", dtype="bfloat16"),
            Target("narrow", "fwd", "flashlib", 2.5, device="cuda", dtype="bfloat16"),
            Target("sixteen", "fwd", "copy", 0.85, device="cuda", dtype="bfloat16"),
        ),
    ),
    OpSpec(
        name="inverse_norms",
        column="cosine_topk",
        shapes={
            "tiny": {"N": 7, "D": 24},
            "odd": {"N": 5, "D": 37},
            "single": {"N": 1, "D": 1},
            "empty": {"N": 0, "D": 8},
            "small": {"N": 1000, "D": 128},
            "large-cpu": {"N": 50_000, "D": 768},
            "large": {"N": 1_000_000, "D": 768},
        },
        odd=("odd", "single", "empty"),
        make=make_norms,
        work=work_norms,
        eager=eager_norms,
        targets=(
            Target("large-cpu", "fwd", "read", 0.8),
            Target("large", "fwd", "copy", 0.8, device="cuda", dtype="bfloat16"),
        ),
    ),
)
