"""Expert updates under what surrounds an operator: gradcheck, functorch, autocast, opcheck, libraries; bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import memkern
from memkern.ops import aggregate_experts, gather_slots, scatter_slots, update_experts
from memkern.ops._cpu_gemm import from_rows

pytestmark = pytest.mark.usefixtures("declared")

IDS = torch.tensor([[7, 5, 9, 7], [9, 9, 1, 2]])
SLOT_IDS = torch.tensor([7, 9, 7])


@pytest.fixture
def declared(request: pytest.FixtureRequest) -> None:
    """Skips on a backend that has no implementation of this column."""
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend").name
        reason = memkern.backends.explain("update_experts")[name] or ""
        if "has no" in reason:
            pytest.skip(reason)


def inputs(device: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    made = (
        torch.randn(2, 2, 2, 3),
        torch.randn(2, 2, 3),
        torch.rand(2, 2),
        torch.randn(2, 3, 6),
        torch.randn(2, 3),
        torch.randn(2, 3, 6),
        torch.randn(2, 3),
    )
    made[2][0, 1] = 0.0  # a probability of zero has a gradient
    return tuple(x.to(device, dtype).requires_grad_() for x in made)


def calls(backend: Any) -> list[tuple[Any, tuple[torch.Tensor, ...]]]:
    dtype, ids, slots = torch.float64, IDS.to(backend.device), SLOT_IDS.to(backend.device)
    leaf = lambda *size: torch.randn(*size, dtype=dtype, device=backend.device, requires_grad=True)  # noqa: E731
    mask = torch.tensor([True, False], device=backend.device)
    made = inputs(backend.device)
    return [
        (lambda *x: update_experts(*x, backend=backend.name), made),
        (lambda *x: update_experts(*x, row_mask=mask, save="none", backend=backend.name), made),
        (lambda m, p: aggregate_experts(m, p, backend=backend.name), (made[0], made[2])),
        (lambda h: gather_slots(h, ids, slots, backend=backend.name), (leaf(2, 4, 3),)),
        (lambda x, s: scatter_slots(x, s, ids, slots, backend=backend.name), (leaf(2, 4, 3), leaf(2, 3, 3))),
    ]


@pytest.mark.parametrize("case", range(5))
def test_gradcheck_and_double_backward(backend: Any, case: int) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    function, leaves = calls(backend)[case]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_double_backward_in_float32(backend: Any) -> None:
    def second(name: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = inputs(backend.device, torch.float32)
        out = update_experts(*leaves, backend=name)
        first = torch.autograd.grad((out * out).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

    for actual, expected in zip(second(backend.name), second("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_functorch_and_forward_mode(backend: Any) -> None:
    made = tuple(x.detach() for x in inputs(backend.device, torch.float32))

    def loss(hiddens: torch.Tensor) -> torch.Tensor:
        return update_experts(made[0], hiddens, *made[2:], backend=backend.name).square().sum()

    plain = made[1].clone().requires_grad_()
    expected = torch.autograd.grad(loss(plain), plain)[0]
    torch.testing.assert_close(torch.func.grad(loss)(made[1]), expected, rtol=1e-4, atol=1e-5)
    stacked = torch.stack([made[1], 2 * made[1]])
    per_sample = torch.func.vmap(torch.func.grad(loss))(stacked)
    torch.testing.assert_close(per_sample[0], expected, rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(made[1])
    _, derivative = torch.func.jvp(loss, (made[1],), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing(backend: Any) -> None:
    leaves = inputs(backend.device, torch.float32)
    expected = update_experts(*leaves, backend=backend.name)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out = update_experts(*leaves, backend=backend.name)
        read = aggregate_experts(leaves[0].bfloat16(), leaves[2], backend=backend.name)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert read.dtype == torch.bfloat16
    out.sum().backward()


def test_opcheck(backend: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    made = tuple(x.detach().float() for x in inputs(backend.device))
    mask = torch.tensor([True, False], device=backend.device)
    ids, slots = IDS.to(backend.device), SLOT_IDS.to(backend.device)

    def check(name: str, *args: Any) -> Any:
        op = getattr(torch.ops.memkern, f"{name}_{backend.name}").default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        return op(*args)

    for save in (True, False):
        out, gates, updates = check("update_experts_fwd", *made, None, save)
    check("update_experts_fwd", *made[:4], None, *made[5:], mask, False)
    out, gates, updates = check("update_experts_fwd", *made, None, True)
    for needs in ((True, True, True, True), (False, False, False, False)):
        check("update_experts_bwd", out, *made, None, gates, updates, *needs)
    check("update_experts_bwd", out, *made, mask, gates[:0], updates[:0], True, True, True, True)
    read = check("aggregate_experts_fwd", made[0], made[2])
    check("aggregate_experts_bwd", read, made[0], made[2], True, False)
    check("aggregate_experts_bwd", read, made[0], made[2], False, True)
    sequence = torch.randn(2, 4, 3, device=backend.device)
    means = check("gather_slots_fwd", sequence, ids, slots)
    check("gather_slots_bwd", means, ids, slots)
    check("scatter_slots_fwd", sequence, means, ids, slots)
    check("scatter_slots_bwd", sequence, ids, slots, True, True)
    check("scatter_slots_bwd", sequence, ids, slots, False, False)


def test_saved_memory() -> None:
    """Forward keeps the gates and the updates, or nothing of its own."""
    if memkern.backends._absent("cpp", "cpu"):
        pytest.skip("backend cpp is not here")
    leaves = inputs("cpu", torch.float32)
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if all(x.data_ptr() != leaf.data_ptr() for leaf in leaves):
            kept.append(x.nbytes)
        return x

    for save, expected in (("activations", 2 * leaves[0].nbytes), ("none", 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            update_experts(*leaves, save=save, backend="cpp")
        assert sum(kept) == expected


@pytest.mark.parametrize(
    ("library", "dtype"),
    [(library, torch.float32) for library in ("onednn", "own", "blas")]
    + [(library, torch.bfloat16) for library in ("own", "onednn")],
)
def test_either_library_on_the_cpu(library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table would choose elsewhere is right here too, with several blocks of rows."""
    if memkern.backends._absent("cpp", "cpu") or not torch.backends.mkldnn.is_available():
        pytest.skip("backend cpp or oneDNN is not here")
    if library == "own" and dtype == torch.bfloat16 and not torch.ops.memkern.matmul_takes_bf16():
        pytest.skip("this processor does not multiply pairs of bfloat16")
    from memkern.ops import _cpu_gemm, _expert_update_cpu
    from memkern.reference import expert_update as reference
    from memkern.testing.compare import assert_matches

    monkeypatch.setattr(_cpu_gemm, "_rows_here", lambda: 1 if library == "onednn" else None)
    monkeypatch.setattr(_cpu_gemm, "_own_here", lambda of: 1 if library == "own" else None)
    monkeypatch.setattr(_expert_update_cpu, "BLOCK_ELEMENTS", 2 * 3 * 21)
    monkeypatch.setattr(_expert_update_cpu, "LOW_ROWS", 2 * 3)
    names = ("states", "hiddens", "probs", "gate_weight", "gate_bias", "update_weight", "update_bias")
    made = (
        torch.randn(5, 2, 3, 21),
        torch.randn(5, 3, 21),
        torch.rand(5, 2),
        torch.randn(2, 21, 42) / 4,
        torch.randn(2, 21),
        torch.randn(2, 21, 42) / 4,
        torch.randn(2, 21),
    )
    arguments: dict[str, Any] = {name: x.to(dtype).requires_grad_() for name, x in zip(names, made, strict=True)}
    for mask in (None, torch.tensor([True, False, True, True, False])):
        for save in ("activations", "none"):
            assert_matches(
                lambda **kwargs: update_experts(**kwargs, backend="cpp"),
                reference.update_experts,
                arguments | {"row_mask": mask, "save": save},
            )


def test_the_table_of_cpu_models() -> None:
    assert from_rows("onednn", ("AuthenticAMD", 26, 2)) == 64
    assert from_rows("own", ("AuthenticAMD", 25, 17)) == 16
    assert from_rows("own", ("AuthenticAMD", 25, 17), "bfloat16") == 16
    assert from_rows("own", ("GenuineIntel", 6, 143), "bfloat16") is None
    for library in ("onednn", "own"):
        assert from_rows(library, ("GenuineIntel", 6, 143)) is None
        assert from_rows(library, ("", 0, 0)) is None


M, H, P, W, V = (
    torch.randn(2, 3, 4, 8),
    torch.randn(2, 4, 8),
    torch.rand(2, 3),
    torch.randn(3, 8, 16),
    torch.randn(3, 8),
)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"states": M[0]}, ValueError, r"states: expected shape \(B, K, S, D\).*float32\[3, 4, 8\]"),
    ({"states": M.long()}, ValueError, "states: expected a floating dtype"),
    ({"states": 1.0}, TypeError, "states: expected a tensor, got float"),
    ({"hiddens": H[:, :3]}, ValueError, r"hiddens: expected shape \(2, 4, 8\)"),
    ({"hiddens": H.double()}, ValueError, "hiddens: expected float64 together with float64 only"),
    ({"probs": P[:, :2]}, ValueError, r"probs: expected shape \(2, 3\)"),
    ({"gate_weight": W[..., :8]}, ValueError, r"gate_weight: expected shape \(3, 8, 16\)"),
    ({"update_weight": W[:2]}, ValueError, r"update_weight: expected shape \(3, 8, 16\)"),
    ({"gate_bias": V[:, :7]}, ValueError, r"gate_bias: expected shape \(3, 8\)"),
    ({"update_bias": V.to("meta")}, ValueError, "update_bias: expected the device of states"),
    ({"row_mask": torch.ones(2)}, TypeError, "row_mask: expected a bool mask"),
    ({"row_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"row_mask: expected shape \(2\)"),
    ({"save": "all"}, ValueError, "save: expected one of 'activations', 'none', got str 'all'"),
    ({"backend": "gpu"}, ValueError, "backend: unknown backend 'gpu'"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = {
        "states": M,
        "hiddens": H,
        "probs": P,
        "gate_weight": W,
        "gate_bias": V,
        "update_weight": W,
        "update_bias": V,
    }
    with pytest.raises(error, match=message):
        update_experts(**made | change)


def test_bad_input_of_the_others() -> None:
    ids, slot_ids = torch.zeros(2, 4, dtype=torch.int64), torch.arange(3)
    slots = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"probs: expected shape \(2, 3\)"):
        aggregate_experts(M, P[:1])
    with pytest.raises(ValueError, match="input_ids: expected an int64 tensor"):
        gather_slots(H, ids.int(), slot_ids)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(2, 4\)"):
        gather_slots(H, ids[:, :3], slot_ids)
    with pytest.raises(ValueError, match=r"slot_ids: expected shape \(S\)"):
        gather_slots(H, ids, slot_ids[None])
    with pytest.raises(ValueError, match=r"slots: expected shape \(2, S, 8\)"):
        scatter_slots(H, slots[:1], ids, slot_ids)
    with pytest.raises(ValueError, match=r"slot_ids: expected shape \(3\)"):
        scatter_slots(H, slots, ids, slot_ids[:2])


def test_values_are_checked_on_request() -> None:
    program = """
import torch
from memkern.ops import aggregate_experts, update_experts
M, H, P, W = torch.randn(2, 3, 4, 8), torch.randn(2, 4, 8), torch.rand(2, 3), torch.randn(3, 8, 16)
update_experts(M, H, P, W, None, W, None)
bad = P.clone(); bad[1, 2] = 1.5
nan = H.clone(); nan[1, 3, 5] = float("nan")
for call in (lambda: update_experts(M, H, bad, W, None, W, None), lambda: update_experts(M, nan, P, W, None, W, None),
             lambda: aggregate_experts(M, -P)):
    try:
        call()
    except ValueError as error:
        print(error)
update_experts(M, nan, bad, W, None, W, None, row_mask=torch.tensor([True, False]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MEMKERN_CHECK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("probs: expected values in [0, 1], got 1.5 at index (1, 2)")
    assert lines[1].startswith("hiddens: expected no NaN, got nan at index (1, 3, 5)")
    assert lines[2].startswith("probs: expected values in [0, 1]")
