"""Bad arguments of the search: refused by name, before any kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memkern.ops import cosine_topk, inverse_norms

Q, X = torch.randn(3, 8), torch.randn(5, 8)
VALID = torch.ones(5, dtype=torch.bool)
QUERY_GROUP, ROW_GROUP = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], X, 2), {}, ValueError, r"queries: expected shape \(Q, D\)"),
        ((Q, X[:, :7], 2), {}, ValueError, r"database: expected shape \(N, 8\).* got float32\[5, 7\]"),
        ((Q[None], X, 2), {}, ValueError, r"database: expected shape \(1, N, 8\)"),
        ((Q.long(), X, 2), {}, ValueError, "queries: expected a floating dtype"),
        ((Q, X.double(), 2), {}, ValueError, "database: expected float64 together with float64 only"),
        (([1.0], X, 2), {}, TypeError, "queries: expected a tensor"),
        ((Q, X, 0), {}, ValueError, "k: expected 1 <= k <= 2048, got int 0"),
        ((Q, X, 2049), {}, ValueError, "k: expected 1 <= k <= 2048"),
        ((Q, X, 2.0), {}, TypeError, "k: expected an int, got float 2.0"),
        ((Q, X, True), {}, TypeError, "k: expected an int"),
        ((Q, X, 2), {"valid": VALID.long()}, TypeError, "valid: expected a bool mask"),
        ((Q, X, 2), {"valid": VALID[:4]}, ValueError, r"valid: expected shape \(5\)"),
        ((Q, X, 2), {"valid": VALID.expand(2, -1)}, ValueError, r"valid: expected shape \(3, 5\)"),
        ((Q, X, 2), {"query_group": QUERY_GROUP}, ValueError, "row_group: expected both"),
        ((Q, X, 2), {"row_group": ROW_GROUP}, ValueError, "query_group: expected both"),
        ((Q, X, 2), {"query_group": QUERY_GROUP.int(), "row_group": ROW_GROUP}, ValueError, "query_group: .*int64"),
        ((Q, X, 2), {"query_group": QUERY_GROUP, "row_group": ROW_GROUP[1:]}, ValueError, "row_group: expected shape"),
        ((Q, X, 2), {"inverse_norms": torch.ones(4)}, ValueError, "inverse_norms: expected shape"),
        ((Q, X, 2), {"inverse_norms": torch.ones(5), "normalized": True}, ValueError, "inverse_norms: expected None"),
        ((Q, X, 2), {"normalized": 1}, TypeError, "normalized: expected a bool"),
        ((Q, X, 2), {"min_score": "0"}, TypeError, "min_score: expected a float"),
        ((Q, X, 2), {"min_score": float("nan")}, ValueError, "min_score: expected a number"),
        ((Q, X, 2), {"process_group": 3}, TypeError, "process_group: expected a torch.distributed.ProcessGroup"),
        ((Q, X, 2), {"backend": "numpy"}, ValueError, "unknown backend 'numpy'"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cosine_topk(*arguments, **options)


def test_bad_arguments_of_inverse_norms() -> None:
    with pytest.raises(ValueError, match=r"database: expected shape \(N, D\)"):
        inverse_norms(X[0])
    with pytest.raises(ValueError, match="database: expected a floating dtype"):
        inverse_norms(X.long())
    with pytest.raises(TypeError, match="database: expected a tensor"):
        inverse_norms([1.0])  # type: ignore[arg-type]


def test_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKERN_CHECK", "1")
    queries, rows = torch.randn(3, 8), torch.randn(5, 8)
    rows[2, 5] = torch.nan
    for call, message in (
        (lambda: cosine_topk(queries, rows, 2), r"database: .* at index \(2, 5\)"),
        (lambda: cosine_topk(rows, queries, 2), r"queries: .* at index \(2, 5\)"),
        (lambda: inverse_norms(rows), "database: "),
        (lambda: cosine_topk(queries, queries, 2, inverse_norms=torch.tensor([1.0, -1.0, 1.0])), "inverse_norms: "),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    valid = torch.arange(5) != 2
    groups = torch.tensor([4, 4, 1, 7, 4])
    for filters in (
        {"valid": valid},
        {"valid": valid.expand(3, 5)},
        {"query_group": torch.tensor([4, 4, 7]), "row_group": groups},
    ):
        cosine_topk(queries, rows, 2, **filters)
        cosine_topk(queries[None], rows[None], 2, **{name: ids[None] for name, ids in filters.items()})
    with pytest.raises(ValueError, match="database: "):
        cosine_topk(queries, rows, 2, query_group=groups[1:4], row_group=groups)
