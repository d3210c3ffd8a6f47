"""Search under what surrounds an operator: gradcheck, higher orders, functorch, autocast, opcheck, process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import memkern
from memkern.ops import cosine_topk, inverse_norms
from memkern.testing import distributed


@pytest.fixture(autouse=True)
def _declared(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, on a backend that does not implement the search."""
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if reason := memkern.backends.explain("cosine_topk")[backend.name]:
            pytest.skip(f"backend {backend.id}: {reason}")


def inputs(backend: Any, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(4, 5), torch.randn(7, 5)
    queries, database = (x.to(backend.device, dtype).requires_grad_() for x in made)
    return queries, database


def scores(backend: Any, **extra: Any) -> Any:
    return lambda q, x: cosine_topk(q, x, 3, **extra, backend=backend.name).scores


@pytest.mark.parametrize("normalized", [False, True], ids=["cosine", "inner product"])
def test_gradcheck(backend: Any, normalized: bool) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    function = scores(backend, normalized=normalized)
    assert torch.autograd.gradcheck(function, inputs(backend))
    assert torch.autograd.gradgradcheck(function, inputs(backend))


def test_inverse_norms_gradcheck(backend: Any) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    database = inputs(backend)[1]
    function = lambda x: inverse_norms(x, backend=backend.name)  # noqa: E731
    assert torch.autograd.gradcheck(function, database)
    assert torch.autograd.gradgradcheck(function, database)


def test_double_backward_in_float32(backend: Any) -> None:
    def second(name: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = inputs(backend, torch.float32)
        found = cosine_topk(*leaves, 3, backend=name).scores
        first = torch.autograd.grad((found * found).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

    for actual, expected in zip(second(backend.name), second("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_functorch_and_forward_mode(backend: Any) -> None:
    queries, database = (x.detach() for x in inputs(backend, torch.float32))

    def loss(q: torch.Tensor) -> torch.Tensor:
        return cosine_topk(q, database, 3, backend=backend.name).scores.square().sum()

    plain = queries.clone().requires_grad_()
    expected = torch.autograd.grad(loss(plain), plain)[0]
    torch.testing.assert_close(torch.func.grad(loss)(queries), expected)
    tangent = torch.randn_like(queries)
    _, derivative = torch.func.jvp(loss, (queries,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)


def test_opcheck(backend: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    q, x = (v.detach().float()[None] for v in inputs(backend))
    namespace = torch.ops.memkern
    # Schema and fake are what opcheck adds; autograd sits above the raw operators.
    utils = ("test_schema", "test_faketensor")
    fwd = getattr(namespace, f"cosine_topk_fwd_{backend.name}").default
    valid = torch.rand(1, 4, 7, device=backend.device) > 0.3
    groups = torch.zeros(1, 4, dtype=torch.int64, device=backend.device), valid[:, 0].long()
    norms = torch.rand(1, 7, device=backend.device)
    bwd = getattr(namespace, f"cosine_topk_bwd_{backend.name}").default
    for options in ((None, None, None, None), (valid, *groups, norms), (valid[:, 0], None, None, None)):
        torch.library.opcheck(fwd, (q, x, 3, *options, False, -1.0), test_utils=utils)
        _, indices = fwd(q, x, 3, *options, False, -1.0)
        for need in ((True, True), (True, False), (False, True)):
            args = (torch.randn(1, 4, 3, device=backend.device), q, x, indices, options[3], False, *need)
            torch.library.opcheck(bwd, args, test_utils=utils)
    norms_fwd = getattr(namespace, f"inverse_norms_fwd_{backend.name}").default
    torch.library.opcheck(norms_fwd, (x,), test_utils=utils)
    norms_bwd = getattr(namespace, f"inverse_norms_bwd_{backend.name}").default
    torch.library.opcheck(norms_bwd, (torch.randn(1, 7, device=backend.device), x), test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Any, dtype: torch.dtype) -> None:
    """Autocast changes nothing: scores are float32 dot products whatever surrounds them."""
    queries, database = (x.detach().float() for x in inputs(backend))
    expected = cosine_topk(queries, database, 3, backend=backend.name)
    low = queries.to(dtype).requires_grad_()
    with torch.autocast(backend.device, dtype=dtype):
        found = cosine_topk(queries, database, 3, backend=backend.name)
        mixed = cosine_topk(low, database, 3, backend=backend.name)
    assert torch.equal(found.scores, expected.scores)
    assert mixed.scores.dtype == torch.float32
    mixed.scores.sum().backward()
    assert low.grad.dtype == dtype


def test_checkpointing_and_inference_mode(backend: Any) -> None:
    leaves = inputs(backend, torch.float32)
    function = scores(backend)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(again.sum(), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.inference_mode():
        assert torch.equal(function(*leaves), function(*leaves).detach())


def _rank(rank: int, folder: str, backend: str) -> None:
    q, x, valid = torch.load(f"{folder}/inputs.pt", weights_only=True)
    rows = slice(0, 30) if rank == 0 else slice(30, 71)
    queries, local = q.clone().requires_grad_(), x[rows].clone().requires_grad_()
    options = {"process_group": dist.group.WORLD, "backend": backend}
    found = cosine_topk(queries, local, 9, valid=valid[rows], **options)
    weight = torch.arange(1, 10)
    (found.scores * weight).sum().backward()
    dist.all_reduce(queries.grad)
    few = cosine_topk(queries.detach(), local.detach()[: 2 * rank], 9, **options)
    torch.save(
        {
            "scores": found.scores.detach(),
            "indices": found.indices,
            "queries": queries.grad / 2,
            "database": local.grad / 2,
            "few": tuple(few),
        },
        f"{folder}/{rank}.pt",
    )


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_sharded_search(name: str, tmp_path: Path) -> None:
    if memkern.backends._declines("cosine_topk", name, (torch.empty(1, 1),)):
        pytest.skip(f"backend {name} is not here")
    torch.manual_seed(4)
    q, x = torch.randn(5, 16), torch.randn(71, 16)
    x[40] = x[3]  # a tie across the ranks goes to the first
    x[50] = 0
    q[4] = x[3]
    valid = torch.rand(71) > 0.2
    valid[[3, 40]] = True
    torch.save((q, x, valid), tmp_path / "inputs.pt")
    distributed.spawn(_rank, str(tmp_path), name)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    queries, database = q.requires_grad_(), x.requires_grad_()
    whole = cosine_topk(queries, database, 9, valid=valid, backend=name)
    (whole.scores * torch.arange(1, 10)).sum().backward()
    assert whole.indices[4, :2].tolist() == [3, 40]
    for rank in ranks:
        assert torch.equal(rank["scores"], whole.scores)
        assert torch.equal(rank["indices"], whole.indices)
        # DDP takes the mean over ranks; with the factor world size inside, that is one process that saw all rows.
        torch.testing.assert_close(rank["queries"], queries.grad)
        few, indices = rank["few"]
        assert bool((indices[:, 2:] == -1).all())
        assert bool((few[:, 2:] == -float("inf")).all())
        assert sorted(indices[0, :2].tolist()) == [0, 1]
    torch.testing.assert_close(torch.cat([r["database"] for r in ranks]), database.grad)
