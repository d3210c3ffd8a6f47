"""Retrieved attention, fusion and span loss on every backend, against the float64 reference and by their meaning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memkern.ops import fuse_sources, retrieved_attention, span_loss
from memkern.reference import retrieval as reference
from memkern.testing.compare import assert_matches

pytestmark = pytest.mark.usefixtures("poison")

# (B, A, T, C, d, M)
SHAPES = {
    "plain": (2, 3, 4, 8, 16, 20),
    "odd": (1, 2, 5, 7, 19, 11),
    "one pair": (2, 1, 3, 1, 8, 4),
    "many pairs": (1, 1, 2, 70, 33, 90),
    "narrow": (1, 2, 3, 4, 1, 5),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(backend: Any, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size).to(backend.device, dtype).requires_grad_()


def own_pairs(backend: Any, shape: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    batch, heads, count, pairs, width, _ = shape
    made = {"queries": draw(backend, batch, heads, count, width, dtype=dtype)}
    for name in ("keys", "values"):
        made[name] = draw(backend, batch, heads, count, pairs, width, dtype=dtype)
    return made


def bank(backend: Any, shape: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    batch, heads, count, pairs, width, rows = shape
    made: dict[str, Any] = {"queries": draw(backend, batch, heads, count, width, dtype=dtype)}
    for name in ("keys", "values"):
        made[name] = draw(backend, batch, heads, rows, width, dtype=dtype)
    # -1 and beyond the bank are no pairs; repetitions are likely.
    made["indices"] = torch.randint(-1, rows + 1, (batch, heads, count, pairs)).to(backend.device)
    return made


def on(backend: Any, function: Any) -> Any:
    return lambda **kwargs: function(**kwargs, backend=backend.name)


def attention_matches(backend: Any, made: dict[str, Any]) -> None:
    assert_matches(on(backend, retrieved_attention), reference.retrieved_attention, made)


@pytest.mark.parametrize("make", [own_pairs, bank])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend: Any, shape: Any, make: Any) -> None:
    made = make(backend, shape)
    attention_matches(backend, made)
    mask = torch.rand(shape[:4]) > 0.4
    mask[0, 0, 0] = False
    attention_matches(backend, made | {"mask": mask.to(backend.device), "scale": 0.3})


@pytest.mark.parametrize("make", [own_pairs, bank])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: Any, dtype: torch.dtype, make: Any) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    attention_matches(backend, make(backend, SHAPES["odd"], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 96, 128])
def test_rows_of_whole_vectors(backend: Any, width: int, dtype: torch.dtype) -> None:
    """Queries by twos, one lane shorter than the other, and pairs that fill no group: a form of the CPU kernel."""
    if backend.name != "cpp":
        pytest.skip("no other backend treats such rows in a way of their own")
    made = {name: x.detach() for name, x in own_pairs(backend, (1, 3, 3, 11, width, 0), dtype).items()}
    attention_matches(backend, made)
    everyone = torch.ones(1, 3, 3, 11, dtype=torch.bool)
    plain, masked = (retrieved_attention(**made, mask=mask, backend="cpp") for mask in (None, everyone))
    torch.testing.assert_close(plain, masked)


@pytest.mark.parametrize("make", [own_pairs, bank])
def test_mixed_dtypes_and_strides(backend: Any, make: Any) -> None:
    made = make(backend, SHAPES["odd"])
    made["queries"] = made["queries"].detach().bfloat16().requires_grad_()
    attention_matches(backend, made)
    made = make(backend, SHAPES["odd"])
    for name in ("queries", "keys", "values"):
        wide = made[name].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        made[name] = wide.requires_grad_()
    if "indices" in made:
        made["indices"] = made["indices"].transpose(1, 2).contiguous().transpose(1, 2)
    attention_matches(backend, made)
    made["keys"] = made["keys"].detach()[:1].expand_as(made["keys"])
    attention_matches(backend, made)


def test_a_query_without_a_pair_gives_zeros(backend: Any) -> None:
    made = own_pairs(backend, SHAPES["plain"])
    mask = torch.ones(2, 3, 4, 8, dtype=torch.bool, device=backend.device)
    mask[1, 2, 3] = False
    out = retrieved_attention(**made, mask=mask, backend=backend.name)
    assert not out[1, 2, 3].any()
    out.sum().backward()
    assert not made["keys"].grad[1, 2, 3].any()
    made = bank(backend, SHAPES["plain"])
    made["indices"].fill_(-1)
    out = retrieved_attention(**made, backend=backend.name)
    out.sum().backward()
    assert not out.any()
    assert not made["queries"].grad.any()


def test_masked_nan_reaches_nothing(backend: Any) -> None:
    made = own_pairs(backend, SHAPES["plain"])
    mask = torch.ones(2, 3, 4, 8, dtype=torch.bool, device=backend.device)
    mask[0, 0, 0, 3] = False
    with torch.no_grad():
        made["keys"][0, 0, 0, 3] = float("nan")
        made["values"][0, 0, 0, 3] = float("nan")
    out = retrieved_attention(**made, mask=mask, backend=backend.name)
    assert bool(out.isfinite().all())
    out.sum().backward()
    assert all(bool(made[name].grad.isfinite().all()) for name in made)
    assert not made["keys"].grad[0, 0, 0, 3].any()
    with torch.no_grad():
        made["keys"][1, 1, 1, 1] = float("nan")
    assert bool(retrieved_attention(**made, mask=mask, backend=backend.name)[1, 1, 1].isnan().all())


def test_repeated_index_counts_twice_and_gradients_add(backend: Any) -> None:
    made = bank(backend, (1, 1, 1, 3, 4, 5))
    made["indices"] = torch.tensor([[[[2, 2, 4]]]], device=backend.device)
    attention_matches(backend, made)
    double = retrieved_attention(**made, backend=backend.name)
    pairs = {"queries": made["queries"]}
    for name in ("keys", "values"):
        pairs[name] = made[name].detach()[:, :, [2, 2, 4]][:, :, None].contiguous()
    torch.testing.assert_close(double, retrieved_attention(**pairs, backend=backend.name))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8, 5), (2, 2, 0, 4, 8, 5), (1, 2, 3, 0, 8, 5)], ids=str)
def test_empty(backend: Any, shape: Any) -> None:
    for make in (own_pairs, bank):
        made = make(backend, shape)
        out = retrieved_attention(**made, backend=backend.name)
        assert out.shape == made["queries"].shape
        assert not out.any()
        out.sum().backward()
        assert not made["keys"].grad.any()
    made = bank(backend, (1, 2, 3, 4, 8, 0))
    assert not retrieved_attention(**made, backend=backend.name).any()


@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 5, 37), (0, 2, 4), (2, 3, 1)], ids=str)
def test_fuse_sources(backend: Any, shape: Any, present: tuple[bool, ...]) -> None:
    sources = [draw(backend, *shape) if here else None for here in present]
    made = {"sources": sources, "gate_logits": draw(backend, *shape[:2], 3)}
    assert_matches(on(backend, fuse_sources), reference.fuse_sources, made)


def test_fuse_sources_means_a_renormalised_softmax(backend: Any) -> None:
    a, b = draw(backend, 2, 3, 8), draw(backend, 2, 3, 8)
    logits = draw(backend, 2, 3, 3)
    alone = fuse_sources([None, a, None], logits, backend=backend.name)
    assert torch.equal(alone, a)
    gate = torch.softmax(logits[..., [0, 2]], -1)
    both = fuse_sources([a, None, b], logits, backend=backend.name)
    torch.testing.assert_close(both, gate[..., :1] * a + gate[..., 1:] * b)
    both.sum().backward()
    assert not logits.grad[..., 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fuse_sources_low_precision_and_strides(backend: Any, dtype: torch.dtype) -> None:
    wide = torch.randn(2, 16, 3).to(backend.device, dtype).transpose(1, 2).requires_grad_()
    sources = [wide, draw(backend, 2, 3, 16, dtype=dtype)]
    made = {"sources": sources, "gate_logits": draw(backend, 2, 3, 2)}
    assert_matches(on(backend, fuse_sources), reference.fuse_sources, made)


def spans(backend: Any, segments: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    made: dict[str, Any] = {
        "start_logits": draw(backend, segments, tokens, dtype=dtype),
        "end_logits": draw(backend, segments, tokens, dtype=dtype),
        "start_positive": torch.rand(segments, tokens) > 0.8,
        "end_positive": torch.rand(segments, tokens) > 0.8,
        "valid": torch.rand(segments, tokens) > 0.2,
        "document": torch.randint(0, max(1, segments // 2), (segments,)),
    }
    return {name: value.to(backend.device) if not value.is_floating_point() else value for name, value in made.items()}


@pytest.mark.parametrize("size", [(4, 16), (7, 37), (1, 5), (12, 3), (0, 4), (3, 0)], ids=str)
def test_span_loss(backend: Any, size: tuple[int, int]) -> None:
    assert_matches(on(backend, span_loss), reference.span_loss, spans(backend, *size))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_span_loss_dtypes(backend: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.id} declines {dtype}")
    assert_matches(on(backend, span_loss), reference.span_loss, spans(backend, 6, 9, dtype))


def test_span_loss_by_hand(backend: Any) -> None:
    """Two segments are one document with two right starts; a second document; a third without an answer."""
    start = torch.tensor([[1.0, 2.0, 9.0], [0.5, -1.0, 0.0], [3.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[0, 2] = False
    positive = torch.zeros(4, 3, dtype=torch.bool)
    positive[0, 1] = positive[1, 0] = positive[2, 2] = True
    positive[0, 2] = True  # not valid: does not count
    document = torch.tensor([1, 1, 0, 3])
    tensors = [x.to(backend.device) for x in (start, start, positive, positive, valid, document)]
    loss = span_loss(*tensors, backend=backend.name)
    first = [math.exp(v) for v in (1.0, 2.0, 0.5, -1.0, 0.0)]
    second = [math.exp(v) for v in (3.0, 0.0, 1.0)]
    expected = -math.log((first[1] + first[2]) / sum(first)) - math.log(second[2] / sum(second))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_span_loss_without_any_answer_is_zero(backend: Any) -> None:
    made = spans(backend, 3, 4)
    made["start_positive"].zero_()
    loss = span_loss(**made, backend=backend.name)
    loss.backward()
    assert loss.item() == 0.0
    assert not made["start_logits"].grad.any()
    assert not made["end_logits"].grad.any()


def test_invalid_tokens_reach_nothing(backend: Any) -> None:
    made = spans(backend, 4, 6)
    with torch.no_grad():
        made["start_logits"][~made["valid"]] = float("nan")
    loss = span_loss(**made, backend=backend.name)
    loss.backward()
    assert bool(loss.isfinite())
    assert not made["start_logits"].grad[~made["valid"]].any()


@pytest.mark.parametrize("kind", ["own", "bank", "fuse", "span"])
def test_gradcheck_and_double_backward(backend: Any, kind: str) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.id} declines float64")
    if kind in ("own", "bank"):
        made = (own_pairs if kind == "own" else bank)(backend, (1, 2, 2, 3, 4, 5), torch.float64)
        names = ("queries", "keys", "values")
        call = retrieved_attention
    elif kind == "fuse":
        sources = [draw(backend, 1, 2, 3, dtype=torch.float64) for _ in range(2)]
        gates = draw(backend, 1, 2, 2, dtype=torch.float64)

        def function(a: Any, b: Any, g: Any) -> Any:
            return fuse_sources([a, b], g, backend=backend.name)

        assert torch.autograd.gradcheck(function, (*sources, gates))
        assert torch.autograd.gradgradcheck(function, (*sources, gates))
        return
    else:
        made = spans(backend, 3, 5, torch.float64)
        names = ("start_logits", "end_logits")
        call = span_loss
    fixed = {name: value for name, value in made.items() if name not in names}

    def bound(*leaves: torch.Tensor) -> torch.Tensor:
        return call(**dict(zip(names, leaves, strict=True)), **fixed, backend=backend.name)

    leaves = tuple(made[name] for name in names)
    assert torch.autograd.gradcheck(bound, leaves)
    assert torch.autograd.gradgradcheck(bound, leaves)


def test_repeats_bit_for_bit(backend: Any) -> None:
    made = bank(backend, (2, 2, 9, 6, 8, 5))

    def run() -> list[torch.Tensor]:
        out = retrieved_attention(**made, backend=backend.name)
        return [out, *torch.autograd.grad(out.square().sum(), [made[n] for n in ("queries", "keys", "values")])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_functorch_and_autocast(backend: Any) -> None:
    made = own_pairs(backend, SHAPES["plain"])
    fixed = {name: made[name].detach() for name in ("keys", "values")}

    def loss(queries: torch.Tensor) -> torch.Tensor:
        return retrieved_attention(queries, **fixed, backend=backend.name).square().sum()

    queries = made["queries"]
    expected = torch.autograd.grad(loss(queries), queries)[0]
    torch.testing.assert_close(torch.func.grad(loss)(queries.detach()), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        torch.testing.assert_close(loss(queries), loss(queries.detach()))


def test_compile_keeps_our_operator(backend: Any) -> None:
    torch._dynamo.reset()
    made = bank(backend, SHAPES["plain"])
    seen: list[str] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def step(queries: Any, keys: Any, values: Any, indices: Any) -> torch.Tensor:
        return retrieved_attention(queries, keys, values, indices=indices, backend=backend.name).square().sum()

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    leaves = [made[name] for name in ("queries", "keys", "values")]
    actual = torch.autograd.grad(compiled(*leaves, made["indices"]), leaves)
    expected = torch.autograd.grad(step(*leaves, made["indices"]), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    ours = {name for name in seen if "memkern" in name}
    if backend.name == "reference":
        assert not ours
    else:
        assert len(ours) == 2


def bank_call(q: Any, k: Any, i: Any) -> Any:
    return retrieved_attention(q, k[:, :, 0], k[:, :, 0], indices=i)


def span_call(x: Any, document: Any) -> Any:
    return span_loss(x, x, x, x, x, document)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, i: retrieved_attention(q[0], k, k), ValueError, r"queries: expected shape \(B, A, T, d\)"),
        (lambda q, k, i: retrieved_attention(q, k[..., :3], k), ValueError, r"keys: expected shape \(1, 2, 3, C, 4\)"),
        (lambda q, k, i: retrieved_attention(q, k, k[:, :, :, :2]), ValueError, "values: expected shape"),
        (lambda q, k, i: retrieved_attention(q, k, k, mask=i > 0), ValueError, "mask: expected shape"),
        (lambda q, k, i: retrieved_attention(q, k, k, mask=i), TypeError, "mask: expected a bool mask"),
        (lambda q, k, i: bank_call(q, k, i.int()), ValueError, "indices: expected an int64"),
        (lambda q, k, i: retrieved_attention(q, k, k, indices=i), ValueError, r"keys: expected shape \(1, 2, M, 4\)"),
        (lambda q, k, i: retrieved_attention(q, k, k, scale="big"), TypeError, "scale: expected a float or None"),
        (lambda q, k, i: retrieved_attention(q, k, k, scale=math.nan), ValueError, "scale: expected a finite number"),
        (lambda q, k, i: fuse_sources([None, None], q[0]), ValueError, "sources: expected at least one"),
        (lambda q, k, i: fuse_sources(q[0], q[0]), TypeError, "sources: expected a sequence"),
        (lambda q, k, i: fuse_sources([q[0], q[0, :, :2]], q[0]), ValueError, r"sources\[1\]: expected shape"),
        (lambda q, k, i: fuse_sources([q[0]], q[0]), ValueError, r"gate_logits: expected shape \(2, 3, 1\)"),
        (lambda q, k, i: span_call(q[0, 0], i[0, 0, 0]), TypeError, "start_positive: expected a bool"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5, 4)
    with pytest.raises(error, match=message):
        call(q, k, torch.zeros(1, 2, 3, 6, dtype=torch.int64))
