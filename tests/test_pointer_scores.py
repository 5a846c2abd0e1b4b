"""pointer_scores against float64: values, gradients, masks, strides, errors."""

from __future__ import annotations

import importlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer.agreement import cancellation, compare, relative_error, run, score_terms

from .conftest import INTERPRETED, Place

# (B, H, N, D): one token; less than a tile; several tiles, the last ragged; D no power of two; several chunks of D.
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 8), (2, 9, 70, 20), (1, 2, 33, 130)]
FULL_SHAPES = [*SHAPES, (2, 10, 300, 64), (1, 100, 130, 256), (3, 20, 64, 64)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tril_mask": False},
    {"max_width": 7},
    {"max_width": 3, "tril_mask": False},
    {"rope": False, "scale": 0.3},
]


def tensors(
    shape: tuple[int, int, int, int], shared: bool, dtype: torch.dtype, device: str, biases: bool = True
) -> dict[str, torch.Tensor]:
    """q, k, and perhaps start, end."""
    B, H, N, D = shape
    values = {name: torch.randn((B, N, D) if shared else shape, device=device).to(dtype) for name in ("q", "k")}
    return {
        **values,
        **({n: torch.randn(B, H, N, device=device).to(dtype) for n in ("start", "end")} if biases else {}),
    }


def differentiable(inputs: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in ("q", "k", "start", "end") if inputs.get(name) is not None)


def evaluate(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The scores, and the gradients of all that has one."""
    return run(fp.pointer_scores, inputs, differentiable(inputs), upstream)


def agree(inputs: dict[str, Any]) -> None:
    """Of scores and gradients. The upstream gradient is NaN where no span can be, which must count for nothing."""
    scores = fp.reference.pointer_scores(**inputs)
    upstream = torch.randn_like(scores, dtype=torch.float32).masked_fill(scores.isinf(), torch.nan)
    for result in compare("pointer_scores", inputs, differentiate=differentiable(inputs), upstream=upstream):
        assert result.ok, result


def holes(batch: int, length: int, device: str) -> torch.Tensor:
    """A mask with holes, and one sentence that is all padding if there are two."""
    mask = torch.rand(batch, length, device=device) < 0.8
    mask[1:2] = False
    return mask


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_finite_upstream_gradients_of_invalid_cells_count_for_nothing(
    place: Place, shared: bool, options: dict[str, Any]
) -> None:
    """As NaN does, which ``agree`` puts there: but a product with 0 is rid of these alone."""
    inputs = {**tensors((2, 3, 20, 8), shared, torch.float32, place.device), **options}
    inputs["mask"] = holes(2, 20, place.device)
    inputs["mask"][1, :5] = True
    upstream = torch.randn(2, 3, 20, 20, device=place.device)
    for result in compare("pointer_scores", inputs, differentiate=differentiable(inputs), upstream=upstream):
        assert result.ok, result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_agrees_with_float64(
    place: Place, dtype: torch.dtype, shape: tuple[int, int, int, int], shared: bool, options: dict[str, Any]
) -> None:
    if place.small and shape not in SHAPES:
        pytest.skip("too large for the interpreter")
    mask = holes(shape[0], shape[2], place.device)
    agree({**tensors(shape, shared, dtype, place.device), "mask": mask, **options})


def test_more_is_allowed_only_where_terms_cancel() -> None:
    inputs = tensors((2, 9, 70, 20), True, torch.float64, "cpu")
    assert cancellation(fp.reference.pointer_scores(**inputs), score_terms(inputs)) < 1.1
    inputs = tensors((1, 1, 1, 2), True, torch.float64, "cpu")
    product = fp.reference.pointer_scores(inputs["q"], inputs["k"]).squeeze(-1)
    inputs["start"], inputs["end"] = torch.full_like(product, 100.0), 1.0 - product - 100.0
    ratio = cancellation(fp.reference.pointer_scores(**inputs), score_terms(inputs))  # of a score of 1
    assert 100 < ratio < 200


def test_float32_scores_are_within_1e_5(place: Place) -> None:
    values = tensors((2, 4, 40 if place.small else 256, 64), True, torch.float32, place.device)
    exact = fp.reference.pointer_scores(**{name: x.double() for name, x in values.items()})
    scores = fp.pointer_scores(**values).double()
    valid = exact.isfinite()
    assert torch.equal(valid, scores.isfinite())
    assert (scores - exact)[valid].abs().max() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "start", "end"])
def test_invalid_cells_are_minus_inf_whatever_their_tokens_hold(place: Place, name: str, value: float) -> None:
    inputs = tensors((2, 3, 20, 8), True, torch.float32, place.device)
    inputs[name][0, ..., 7] = value
    inputs["mask"] = holes(2, 20, place.device)
    inputs["mask"][0, 7] = True
    valid = fp.reference.valid_cells(20, inputs["mask"], True, 5, inputs["q"].device).expand(2, 3, 20, 20)
    scores = fp.pointer_scores(**inputs, max_width=5)
    assert (scores[~valid] == -torch.inf).all()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_biases_are_optional(place: Place, shared: bool) -> None:
    values = tensors((2, 3, 20, 16), shared, torch.float32, place.device)
    for without in (("start", "end"), ("end",), ("start",)):
        agree({**values, **dict.fromkeys(without)})
    assert fp.pointer_scores(values["q"], values["k"]).shape == (2, 1 if shared else 3, 20, 20)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_masks_of_all_kinds(place: Place, mask_dtype: torch.dtype) -> None:
    mask = holes(3, 20, place.device).to(mask_dtype)
    agree({**tensors((3, 2, 20, 16), True, torch.float32, place.device), "mask": mask})


def test_positions(place: Place) -> None:
    """Shifted, packed, far: only their differences count."""
    values = tensors((2, 3, 40, 16), True, torch.float32, place.device)
    packed = torch.cat([torch.arange(15), torch.arange(25)]).to(place.device)
    each = torch.randint(0, 2000, (2, 40), device=place.device)
    for positions in (packed, each, each.to(torch.int32)):
        agree({**values, "positions": positions})
    shifted = fp.pointer_scores(**values, positions=torch.arange(40, device=place.device) + 100000)
    torch.testing.assert_close(shifted, fp.pointer_scores(**values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_padding_holds_anything(place: Place, garbage: float) -> None:
    values = tensors((2, 3, 30, 16), True, torch.float32, place.device)
    mask = torch.ones(2, 30, dtype=torch.bool, device=place.device)
    mask[0, 20:] = mask[1, 7] = False
    upstream = torch.randn(2, 3, 30, 30, device=place.device)
    clean = evaluate({**values, "mask": mask}, upstream)
    for name, x in values.items():
        values[name] = x.masked_fill(~mask.unsqueeze(-1 if name in "qk" else 1), garbage)
    for x, y in zip(evaluate({**values, "mask": mask}, upstream), clean, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_backward_does_not_visit_padding(place: Place, shared: bool) -> None:
    """A batch padded to 192 tokens whose sentences have 64 reads the tiles of 64, and below the triangle none."""
    if place.backend != "triton" or place.device == "cuda":
        pytest.skip("kernels are counted where they are interpreted")
    kernels = importlib.import_module("flashpointer.kernels.pointer_scores")
    name = "sum_heads" if shared else "load_tile"
    counts = []
    for length in (64, 192):
        inputs = tensors((1, 2, length, 4), shared, torch.float32, place.device)
        mask = torch.arange(length)[None] < 64
        with patch.object(kernels, name, wraps=getattr(kernels, name)) as visited:
            evaluate({**inputs, "mask": mask})
        counts.append(visited.call_count)
    assert counts[0] == counts[1] == (3 if shared else 12)  # of 2 x 2; for 2 heads along rows and columns


def test_strides(place: Place) -> None:
    """Views of one projection, as the heads pass them; transposed and stride-0 inputs and upstream gradients."""
    projection = torch.randn(2, 20, 2, 3, 16, device=place.device)
    q, k = (projection[:, :, i].transpose(1, 2) for i in range(2))
    bias = torch.randn(2, 20, 3, 2, device=place.device)
    start, end = (bias[..., i].transpose(1, 2) for i in range(2))
    agree({"q": q, "k": k, "start": start, "end": end})
    agree({"q": q[:, :1].expand(2, 3, 20, 16), "k": k, "start": start[:, :1].expand(2, 3, 20), "end": end})
    values = {"q": q.contiguous(), "k": k.contiguous(), "start": start, "end": end}
    for upstream in (torch.ones((), device=place.device).expand(2, 3, 20, 20), torch.randn(2, 3, 20, 20).mT):
        upstream = upstream.to(place.device)
        dense = evaluate(values, upstream.contiguous())
        for x, y in zip(evaluate(values, upstream), dense, strict=True):
            assert relative_error(x, y) < 1e-6


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    B, H, N, D = (draw(st.integers(*bounds)) for bounds in ((0, 3), (1, 5), (0, 40), (1, 20)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    values = tensors((B, H, N, 2 * D), draw(st.booleans()), torch.float32, "cpu", draw(st.booleans()))
    return {
        **values,
        "mask": draw(st.sampled_from([None, torch.rand(B, N) < 0.7])),
        "rope": draw(st.booleans()),
        "tril_mask": draw(st.booleans()),
        "max_width": draw(st.sampled_from([None, 1, 5, 100])),
    }


@settings(max_examples=10 if INTERPRETED else 25, deadline=None)
@given(inputs=problems())
def test_any_shape_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


def test_bitwise_repeatable(place: Place) -> None:
    values = tensors((2, 9, 70, 32), True, torch.float32, place.device)
    first = evaluate(values)
    for _ in range(2 if place.small else 20):
        assert all(map(torch.equal, first, evaluate(values)))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradcheck(shared: bool) -> None:
    values = [x.requires_grad_() for x in tensors((2, 2, 5, 6), shared, torch.float64, "cpu").values()]
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])

    def finite(*inputs: torch.Tensor) -> torch.Tensor:
        scores = fp.pointer_scores(*inputs, mask=mask, max_width=4)
        return scores.masked_fill(scores.isinf(), 0.0)

    assert torch.autograd.gradcheck(finite, values)


def test_autocast(place: Place) -> None:
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    values = tensors((2, 3, 20, 16), True, torch.float32, place.device)
    with torch.autocast(place.device, half):
        scores, *grads = evaluate(values)
    assert scores.dtype == half
    assert all(g.dtype == torch.float32 for g in grads)
    expected = fp.pointer_scores(**{name: x.to(half) for name, x in values.items()})
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_opcheck(place: Place, shared: bool) -> None:
    values = [x.requires_grad_() for x in tensors((2, 3, 9, 8), shared, torch.float32, place.device).values()]
    mask = holes(2, 9, place.device)
    options = (True, False, 4, 0.3)
    ops = torch.ops.flashpointer
    # Without the triangle and the mask: opcheck compares sums, and there is none with -inf in it.
    torch.library.opcheck(ops.pointer_scores.default, (*values, None, None, True, False, None, 0.3, 3, place.backend))
    grad = torch.randn(2, 3, 9, 9, device=place.device)
    vectors = [x.detach() for x in values[:2]]
    for need in (True, False):
        arguments = (grad, *vectors, mask, None, *options, need, True, place.backend)
        torch.library.opcheck(ops.pointer_scores_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(place: Place, dynamic: bool) -> None:
    if place.small:
        pytest.skip("one compiled process is enough: opcheck traces the interpreted kernels")
    torch._dynamo.reset()

    def step(q: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        return fp.pointer_scores(2 * q, **rest)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 10, 8), (3, 3, 17, 8)):
        inputs = {**tensors(shape, True, torch.float32, place.device), "mask": holes(shape[0], shape[2], place.device)}
        expected = run(step, inputs, differentiable(inputs))
        for x, y in zip(run(compiled, inputs, differentiable(inputs)), expected, strict=True):
            assert relative_error(x, y) < 1e-6


Q, BIAS = torch.randn(2, 5, 8), torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"q": Q.long()}, TypeError, "q takes a floating-point tensor.*; got a torch.int64"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, N, D\].*; got .*\(5, 8\)"),
        ({"q": Q[..., :7]}, ValueError, "q must be .* even D of at most 256"),
        ({"q": torch.randn(2, 5, 258)}, ValueError, "q must be .* even D of at most 256"),
        ({"k": None}, TypeError, "k takes a floating-point tensor like q; got NoneType"),
        ({"k": Q.half()}, ValueError, "k must have the shape and dtype of q.*float32.*; got .*float16"),
        ({"k": Q[:1]}, ValueError, r"k must have the shape.*; got .*\(1, 5, 8\)"),
        ({"k": Q.to("meta")}, ValueError, "k must be on cpu"),
        ({"start": BIAS.double()}, TypeError, "start takes a torch.float32 tensor.*; got a torch.float64"),
        ({"start": BIAS[..., :4]}, ValueError, r"start must be \[2, H, 5\].*; got .*\(2, 3, 4\)"),
        ({"end": BIAS[:, :2]}, ValueError, r"end must have 3 heads.*; got .*\(2, 2, 5\)"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask must be \[B, N\] = \(2, 5\).*; got .*\(2, 4\)"),
        ({"mask": [1]}, TypeError, "mask takes a bool tensor.*; got list"),
        ({"rope": "yes"}, TypeError, "rope takes a bool; got str 'yes'"),
        ({"tril_mask": 1}, TypeError, "tril_mask takes a bool; got int 1"),
        ({"positions": torch.rand(5)}, TypeError, "positions takes an integer tensor.*; got a torch.float32"),
        ({"positions": torch.arange(4)}, ValueError, r"positions must be \[N\] or \[B, N\].*; got .*\(4,\)"),
        ({"max_width": 0}, ValueError, "max_width takes an int of at least 1, or None; got int 0"),
        ({"scale": "big"}, TypeError, "scale takes a number, or None; got str 'big'"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"pointer_scores: {message}"):
        fp.pointer_scores(**{"q": Q, "k": Q, "start": BIAS, "end": BIAS, **arguments})
