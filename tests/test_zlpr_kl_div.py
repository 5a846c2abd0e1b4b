"""zlpr_kl_div against float64: values, gradients, edge cases, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer.agreement import compare, run

from .conftest import Place

# Rows narrower than a block, one block, several blocks, several chunks; on a CPU several tiles of rows and of columns.
SHAPES = [(3, 28), (2, 3, 130), (5, 983), (3, 9000), (1, 20000)]
FULL_SHAPES = [*SHAPES, (100, 8200), (2, 600001)]


def agree(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> None:
    for result in compare("zlpr_kl_div", inputs, differentiate=("scores", "other"), upstream=upstream):
        assert result.ok, result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_agrees_with_float64(place: Place, dtype: torch.dtype, shape: tuple[int, ...], masked: bool) -> None:
    if place.small and shape not in SHAPES:
        pytest.skip("too large for the interpreter")
    scores, other = (4 * torch.randn(2, *shape, device=place.device)).to(dtype)
    mask = torch.rand(shape, device=place.device) < 0.8 if masked else None
    upstream = torch.randn(shape[:-1], device=place.device)
    agree({"scores": scores, "other": other, "mask": mask, "reduction": "none"}, upstream)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(0, 70)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    # No larger: beyond 35 sigmoid is 1 in float64 too, and the oracle has no relative precision left.
    scores = (torch.randn(shape) * draw(st.sampled_from([0.1, 3.0, 10.0]))).clamp(-25, 25)
    other = scores + torch.randn(shape).clamp(-2, 2) * draw(st.sampled_from([0.01, 1.0, 5.0]))
    mask = draw(st.sampled_from([None, torch.rand(shape) < 0.7]))
    return {"scores": scores, "other": other, "mask": mask, "reduction": draw(st.sampled_from(["none", "sum", "mean"]))}


@settings(max_examples=40, deadline=None)
@given(inputs=problems())
def test_any_shape_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


def test_equal_scores_diverge_by_nothing(place: Place) -> None:
    scores = torch.randn(3, 50, device=place.device)
    loss, *grads = run(fp.zlpr_kl_div, {"scores": scores, "other": scores.clone()}, ("scores", "other"))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("classes", [28, 9000])
def test_extreme_scores(place: Place, classes: int) -> None:
    """Saturated sigmoids: the divergence is linear in the distance, the gradients of equal sides are 0."""
    sign = torch.randn(3, classes, device=place.device).sign()
    agree({"scores": 1e4 * sign, "other": -1e4 * sign, "reduction": "none"})
    loss, *grads = run(fp.zlpr_kl_div, {"scores": 1e4 * sign, "other": 2e4 * sign}, ("scores", "other"))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_invalid_in_both_is_left_out(place: Place) -> None:
    """A cell of -inf in both, as pointer_scores marks it, counts for nothing; in one of them it is infinitely far."""
    scores, other = torch.randn(2, 3, 50, device=place.device)
    mask = torch.rand(3, 50, device=place.device) < 0.5
    expected = run(fp.zlpr_kl_div, {"scores": scores, "other": other, "mask": mask}, ("scores", "other"))
    filled = [x.masked_fill(~mask, -torch.inf) for x in (scores, other)]
    marked = run(fp.zlpr_kl_div, {"scores": filled[0], "other": filled[1]}, ("scores", "other"))
    assert all(map(torch.equal, marked, expected))
    scores[0, 0] = -torch.inf
    assert fp.zlpr_kl_div(scores, other, reduction="none").isinf().tolist() == [True, False, False]


def test_close_and_saturated_sigmoids_do_not_cancel(place: Place) -> None:
    """In the kernels, cell by cell, where eager's difference of two sigmoids loses digits or all of it."""
    s, d = torch.cartesian_prod(torch.linspace(-60, 60, 25), torch.tensor([1e-4, 0.1, 0.24, 0.26, 1.0, 40.0])).unbind(1)
    scores, other = (x.to(place.device).view(-1, 1) for x in (s, s - d))
    ours = run(fp.zlpr_kl_div, {"scores": scores, "other": other, "reduction": "none"}, ("scores", "other"))
    high, low = scores.double(), other.double()
    gap = high.sigmoid() * (-low).sigmoid() * -torch.expm1(low - high)
    by_high, by_low = (x.sigmoid() * (-x).sigmoid() * (high - low) + gap for x in (high, low))
    for x, exact in zip(ours, ((gap * (high - low)).squeeze(1), by_high, -by_low), strict=True):
        error = ((x.double() - exact) / exact).abs().max()
        assert error < 1e-6 if place.backend == "triton" else error <= 1.0


def test_one_infinite_score(place: Place) -> None:
    """It is infinitely far from a finite one, whose gradient is infinite too; its own is NaN, as in eager PyTorch."""
    scores, other = torch.randn(2, 4, 50, device=place.device)
    scores[0, 3], scores[1, 7], other[2, 9], other[3, 11] = -torch.inf, torch.inf, -torch.inf, torch.inf
    inputs = {"scores": scores, "other": other, "reduction": "none"}
    agree(inputs)
    loss, *grads = run(fp.zlpr_kl_div, inputs, ("scores", "other"))
    assert loss.isinf().all()
    assert [(~g.isfinite()).sum().item() for g in grads] == [4, 4]


def test_strides(place: Place) -> None:
    base = torch.randn(2, 50, 3, 2, device=place.device)
    scores, other = base[0].permute(2, 1, 0), base[1, :, :, :1].permute(2, 1, 0).expand(2, 3, 50)
    mask = torch.rand(2, 1, 50, device=place.device) < 0.8
    agree({"scores": scores, "other": other, "mask": mask, "reduction": "none"})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_gradients_survive_a_loss_scale(place: Place, reduction: str) -> None:
    scores = torch.randn(128, 50, device=place.device).half()
    other = scores + 1e-2
    inputs = {"scores": scores, "other": other, "reduction": reduction}
    upstream = torch.tensor(4096.0, device=place.device)
    grad = run(fp.zlpr_kl_div, inputs, ("scores",), upstream)[1]
    exact = run(
        fp.reference.zlpr_kl_div, {**inputs, "scores": scores.double(), "other": other.double()}, ("scores",), upstream
    )[1]
    torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=1e-4 * exact.abs().max().item())


SCORES = torch.randn(2, 5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": 1.0}, TypeError, "scores takes a floating-point tensor.*; got float 1.0"),
        ({"other": SCORES > 0}, TypeError, "other takes a floating-point tensor.*; got a torch.bool"),
        ({"other": SCORES[:1]}, ValueError, r"other must have the shape and dtype.*\(2, 5\).*; got .*\(1, 5\)"),
        ({"other": SCORES.half()}, ValueError, r"other must have the shape and dtype.*float32.*; got .*float16"),
        ({"other": SCORES.to("meta")}, ValueError, "other must be on cpu"),
        ({"mask": 1}, TypeError, "mask takes a bool tensor.*; got int 1"),
        ({"reduction": "batchmean"}, ValueError, "reduction takes one of"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"zlpr_kl_div: {message}"):
        fp.zlpr_kl_div(**{"scores": SCORES, "other": SCORES, **arguments})


@pytest.mark.parametrize("half", [torch.float32, torch.float16])
def test_strides_show_in_no_bit(place: Place, half: torch.dtype) -> None:
    """Of the divergence of a row, nor of its gradients."""
    names = ("scores", "other")
    strided = {name: torch.randn(37, 64, 2, device=place.device, dtype=half).permute(2, 1, 0) for name in names}
    both = [{name: x.contiguous() for name, x in strided.items()}, strided]
    values = [run(fp.zlpr_kl_div, {**inputs, "reduction": "none"}, names) for inputs in both]
    assert all(map(torch.equal, *values))
