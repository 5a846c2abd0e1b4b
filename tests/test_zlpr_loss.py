"""zlpr_loss against float64: values, gradients, edge cases, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer import backends
from flashpointer.agreement import compare, run
from flashpointer.tiled._tiles import FEW_EXPONENTIALS, exp

from .conftest import Place
from .problems import soft_labels

# Each shape for its path: rows that share a block, a block a row, an odd row that fits no vector load, leading
# dimensions, two sweeps (many rows), a split row (few), and on a CPU several tiles of rows and of columns.
SHAPES = [(3, 28), (2, 1024), (5, 983), (2, 3, 130), (3, 9000), (1, 20000)]
FULL_SHAPES = [*SHAPES, (100, 8200), (2, 600001)]


def agree(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> None:
    for result in compare("zlpr_loss", inputs, upstream=upstream):
        assert result.ok, result


def hard_labels(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.rand(shape, device=device) < 0.05


def labels_of(kind: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    labels = hard_labels(shape, device)
    if kind == "bool":
        return labels
    if kind == "soft":
        soft = soft_labels(shape, device)
        soft[torch.rand(shape, device=device) < 0.1] = -100.0
        return soft
    if kind == "uint8":
        return labels.to(torch.uint8)
    labels = labels.to(getattr(torch, kind))
    labels[torch.rand(shape, device=device) < 0.1] = -100
    return labels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["bool", "int64", "soft"])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_agrees_with_float64(place: Place, dtype: torch.dtype, shape: tuple[int, ...], kind: str, masked: bool) -> None:
    if place.small and shape not in SHAPES:
        pytest.skip("too large for the interpreter")
    scores = (4 * torch.randn(shape, device=place.device)).to(dtype)
    mask = torch.rand(shape, device=place.device) < 0.8 if masked else None
    labels = labels_of(kind, shape, place.device)
    upstream = torch.randn(shape[:-1], device=place.device)
    agree({"scores": scores, "labels": labels, "mask": mask, "reduction": "none"}, upstream)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 983), (256, 30938), (8, 1000000)], ids=str)
def test_agrees_at_full_size(place: Place, shape: tuple[int, ...]) -> None:
    if place.small:
        pytest.skip("too large for the interpreter")
    agree({"scores": 4 * torch.randn(shape, device=place.device), "labels": hard_labels(shape, place.device)})


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["bool", "uint8", "int8", "int16", "int32", "int64", "soft"])
def test_every_label_dtype_and_reduction(place: Place, dtype: torch.dtype, kind: str, reduction: str) -> None:
    labels = labels_of(kind, (2, 3, 77), place.device)
    if kind == "soft":
        labels = labels.to(dtype)
    scores = (4 * torch.randn(2, 3, 77, device=place.device)).to(dtype)
    agree({"scores": scores, "labels": labels, "reduction": reduction})


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    lead = draw(st.lists(st.integers(0, 4), max_size=3))
    classes = draw(st.integers(0, 70))
    shape = (*lead, classes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(shape) * draw(st.sampled_from([0.1, 3.0, 30.0, 1000.0]))
    scores[torch.rand(shape) < draw(st.sampled_from([0.0, 0.3]))] = -torch.inf
    labels = labels_of(draw(st.sampled_from(["bool", "uint8", "int64", "soft"])), shape, "cpu")
    mask_shape = tuple(draw(st.sampled_from([1, n])) for n in shape)[draw(st.integers(0, len(shape))) :]
    mask = draw(st.sampled_from([None, torch.rand(mask_shape) < 0.7]))
    reduction = draw(st.sampled_from(["none", "sum", "mean"]))
    return {"scores": scores, "labels": labels, "mask": mask, "reduction": reduction}


@settings(max_examples=40, deadline=None)
@given(inputs=problems())
def test_any_shape_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


@st.composite
def soft_problems(draw: st.DrawFn) -> dict[str, Any]:
    """Scores that make each weight count; with and without what lets a CPU compute without a pivot."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 60)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    scores = (2 * torch.rand(shape) - 1) * draw(st.sampled_from([3.0, 30.0, 60.0, 100.0, 1000.0]))
    labels = soft_labels(shape, dtype=torch.float64)
    labels[torch.rand(shape) < draw(st.sampled_from([0.0, 0.2]))] = -100.0
    mask = draw(st.sampled_from([None, torch.rand(shape) < 0.7]))
    return {"scores": scores, "labels": labels, "mask": mask, "reduction": "none"}


@settings(max_examples=40, deadline=None)
@given(inputs=soft_problems(), label_dtype=st.sampled_from([None, torch.float32, torch.float64]))
def test_any_soft_label_agrees(
    place: Place, dtype: torch.dtype, inputs: dict[str, Any], label_dtype: torch.dtype | None
) -> None:
    scores, labels = inputs["scores"].to(place.device, dtype), inputs["labels"].to(place.device, label_dtype or dtype)
    mask = None if inputs["mask"] is None else inputs["mask"].to(place.device)
    upstream = torch.randn(scores.shape[:-1], device=place.device)
    agree({**inputs, "scores": scores, "labels": labels, "mask": mask}, upstream)


@pytest.mark.parametrize("classes", [3, 9000])  # one block; swept
@pytest.mark.parametrize("score, label, loss", [(-18.0, 1e-8, 0.55335), (-14.0, 1e-6, 0.83823), (-10.0, 1e-4, 1.21261)])
def test_a_small_weight_does_not_cancel(place: Place, score: float, label: float, loss: float, classes: int) -> None:
    """Where the score alone would be a pivot far above its term, and an ignored cell forbids to do without one."""
    scores = torch.full((1, classes), -torch.inf, device=place.device)
    labels = torch.zeros_like(scores)
    scores[0, :2], labels[0, 0], labels[0, -1] = torch.tensor([score, -3.0]), label, -100.0
    torch.testing.assert_close(fp.zlpr_loss(scores, labels).item(), loss, rtol=0, atol=5e-6)
    agree({"scores": scores, "labels": labels})


def test_subnormal_labels_count(place: Place) -> None:
    for label in (2.0**-149, 2.0**-140, 2.0**-127):
        labels = torch.tensor([[label, 0.0, 1.0]], device=place.device)
        for score in (-50.0, -100.0, -300.0):
            agree({"scores": torch.tensor([[score, -3.0, 3.0]], device=place.device), "labels": labels})


@pytest.mark.parametrize("classes", [1, 28, 9000, 20000])
@pytest.mark.parametrize(
    "case",
    [
        "no positives",
        "all positives",
        "large",
        "-inf at negatives",
        "-inf at positives",
        "+inf at a negative",
        "tiny loss",
    ],
)
def test_edges(place: Place, case: str, classes: int) -> None:
    scores = torch.randn(3, classes, device=place.device)
    labels = torch.rand(3, classes, device=place.device) < 0.3
    if case == "no positives":
        labels.zero_()
    elif case == "all positives":
        labels.fill_(True)
    elif case == "large":
        scores = scores.sign() * 1e4
    elif case == "-inf at negatives":
        scores[~labels] = -torch.inf
    elif case == "-inf at positives":
        scores[labels] = -torch.inf  # an invalid cell, which a label leaves invalid
    elif case == "+inf at a negative":
        labels[1, 0], scores[1, 0] = False, torch.inf
    elif case == "tiny loss":
        scores = torch.where(labels, 40.0, -40.0)
        scores += torch.randn_like(scores)
    agree({"scores": scores, "labels": labels, "reduction": "none"})


def test_a_learned_row_keeps_its_small_loss(place: Place) -> None:
    """Two positives far above 16,384 negatives: the case where implementations by subtraction go negative."""
    scores = torch.full((1, 16384), -12.0, device=place.device)
    scores += torch.randn_like(scores)
    labels = torch.zeros(1, 16384, dtype=torch.bool, device=place.device)
    labels[0, :2] = True
    for height in (5.0, 14.0, 30.0):
        scores[0, :2] = height
        agree({"scores": scores, "labels": labels})
        loss, grad = run(fp.zlpr_loss, {"scores": scores, "labels": labels}, ("scores",))
        assert loss > 0
        assert grad[0, :2].max() < 0


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("classes", [28, 9000])
def test_a_masked_row_is_empty_whatever_it_holds(place: Place, classes: int, garbage: float) -> None:
    scores = torch.randn(3, classes, device=place.device)
    scores[1] = garbage
    labels = torch.ones(3, classes, dtype=torch.int64, device=place.device)
    labels[1, ::2] = 7  # no label, but no matter
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1] = False
    loss, grad = run(fp.zlpr_loss, {"scores": scores, "labels": labels, "mask": mask, "reduction": "none"}, ("scores",))
    assert loss[1] == 0
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert loss[[0, 2]].isfinite().all()
    assert (grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("classes", [40, 9000])
def test_strides(place: Place, classes: int) -> None:
    """Transposed, stride-0 and shifted inputs, and a mask broadcast between two leading dimensions."""
    base = torch.randn(classes, 3, 2, device=place.device)
    scores = base.permute(2, 1, 0)  # [2, 3, classes], no dimension contiguous
    labels = hard_labels((2, 1, classes), place.device).expand(2, 3, classes)
    mask = torch.rand(2, 1, classes, device=place.device) < 0.8
    agree({"scores": scores, "labels": labels, "mask": mask, "reduction": "none"})
    agree({"scores": scores, "labels": labels, "mask": torch.rand(3, 1, device=place.device) < 0.5})
    shifted = torch.randn(3 * classes + 1, device=place.device)[1:].view(3, classes)
    agree({"scores": shifted, "labels": hard_labels((classes, 3), place.device).t()})
    agree({"scores": torch.randn(classes, device=place.device).expand(3, classes), "labels": labels[0]})


def test_a_leading_shape_no_two_dimensions_can_hold(place: Place) -> None:
    scores = torch.randn(2, 3, 4, 2, 20, device=place.device)
    labels = hard_labels((2, 1, 4, 1, 20), place.device).expand(scores.shape)
    mask = torch.rand(3, 1, 2, 20, device=place.device) < 0.7
    agree({"scores": scores, "labels": labels, "mask": mask, "reduction": "none"})


def test_float16_gradients_survive_a_loss_scale(place: Place) -> None:
    """8,192 rows share a mean: small gradients would vanish if the share were taken before the scale."""
    rows = 128 if place.small else 8192
    scores = torch.randn(rows, 50, device=place.device).half() - 6
    labels = torch.zeros(rows, 50, dtype=torch.bool, device=place.device)
    upstream = torch.tensor(65536.0, device=place.device)
    grad = run(fp.zlpr_loss, {"scores": scores, "labels": labels}, ("scores",), upstream)[1]
    exact = run(fp.reference.zlpr_loss, {"scores": scores.double(), "labels": labels}, ("scores",), upstream)[1]
    assert (grad != 0).all()
    torch.testing.assert_close(grad.double(), exact, rtol=3e-3, atol=0)


def test_without_gradient_none_is_computed(place: Place) -> None:
    scores = torch.randn(3, 50, device=place.device)
    labels = hard_labels((3, 50), place.device)
    op = torch.ops.flashpointer.zlpr_loss
    assert op(scores, labels, None, "mean", False, place.backend)[1].numel() == 0
    with torch.no_grad():
        silent = fp.zlpr_loss(scores.clone().requires_grad_(), labels)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, fp.zlpr_loss(scores.requires_grad_(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("labels_dtype", [torch.bool, torch.float64], ids=str)
def test_gradcheck(labels_dtype: torch.dtype) -> None:
    scores = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(2, 3, 7) if labels_dtype.is_floating_point else torch.rand(2, 3, 7) < 0.4
    mask = torch.rand(2, 1, 7) < 0.8
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: fp.zlpr_loss(s, labels.to(labels_dtype), mask=mask, reduction=r), (scores,)
        )


def test_offsets_beyond_32_bits(place: Place) -> None:
    """Two rows 2^31 elements apart: only the pages that are touched exist."""
    if place.device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would touch them all
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=place.device).as_strided((2, 64), (2**31, 1))
    far.copy_(torch.randn(2, 64))
    labels = hard_labels((2, 64), place.device)
    agree({"scores": far, "labels": labels, "reduction": "none"})


@pytest.mark.gpu
def test_more_than_32_bits_of_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    scores = torch.randn(2**18 + 1, 8192 + 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(scores.shape, device="cuda", dtype=torch.bool)
    labels[-1, -5:] = True
    loss, grad = run(fp.zlpr_loss, {"scores": scores, "labels": labels, "reduction": "none"}, ("scores",))
    last = {"scores": scores[-1:], "labels": labels[-1:], "reduction": "none"}
    expected_loss, expected_grad = run(fp.zlpr_loss, last, ("scores",))
    assert torch.equal(loss[-1:], expected_loss)
    assert torch.equal(grad[-1:], expected_grad)


SCORES, LABELS = torch.randn(2, 5), torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": [1.0]}, TypeError, "scores takes a floating-point tensor.*; got list"),
        ({"scores": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "scores takes .*; got a torch.int64 tensor"),
        ({"scores": torch.tensor(1.0)}, ValueError, r"scores takes at least one dimension.*shape \(\)"),
        ({"labels": None}, TypeError, "labels takes .*; got NoneType"),
        ({"labels": LABELS.to(torch.complex64)}, TypeError, "labels takes a bool, integer or floating.*complex64"),
        ({"labels": LABELS[:, :4]}, ValueError, r"labels must have the shape of scores, \(2, 5\); got .*\(2, 4\)"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels must be on cpu.*got .*meta"),
        ({"labels": LABELS.float().requires_grad_()}, ValueError, r"labels takes no gradient.*detach\(\)"),
        ({"labels": LABELS + 2}, ValueError, r"labels takes 0 to 1, or -100.*; got 2 at \(0, 0\)"),
        ({"labels": (LABELS + 156).to(torch.uint8)}, ValueError, r"labels takes 0 to 1, or -100.*; got 15[67] at"),
        ({"labels": LABELS.float() - 0.5}, ValueError, r"labels takes 0 to 1, or -100.*; got -0.5 at \(0, 0\)"),
        ({"labels": LABELS * torch.nan}, ValueError, r"labels takes 0 to 1, or -100.*; got nan at \(0, 0\)"),
        ({"mask": torch.ones(2, 5)}, TypeError, r"mask takes a bool tensor.*mask == 1\).*; got a torch.float32"),
        ({"mask": torch.ones(3, 5).bool()}, ValueError, r"mask must broadcast to .*\(2, 5\); got .*\(3, 5\)"),
        ({"mask": torch.ones(1, 2, 5).bool()}, ValueError, r"mask must broadcast to .*\(1, 2, 5\)"),
        ({"mask": torch.ones(2, 5).bool().to("meta")}, ValueError, "mask must be on cpu"),
        ({"reduction": "avg"}, ValueError, "reduction takes one of 'none', 'sum', 'mean'; got str 'avg'"),
    ],
)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_errors(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with fp.use_backend(backend), pytest.raises(error, match=f"zlpr_loss: {message}"):
        fp.zlpr_loss(**{"scores": SCORES, "labels": LABELS, **arguments})


@pytest.mark.parametrize("wrong", [2, -1, 1.5, float("nan")])
@pytest.mark.parametrize("classes", [28, 9000])
def test_a_wrong_label_that_nobody_checked_is_a_nan(place: Place, classes: int, wrong: float) -> None:
    labels = torch.zeros(1, 3, classes, dtype=torch.int64 if isinstance(wrong, int) else torch.float32)
    labels[0, 1, -1] = wrong
    forward = backends.implementation("zlpr_loss", place.backend).forward
    scores = torch.randn(labels.shape, device=place.device)
    loss, _ = forward(scores, labels.to(place.device), None, 1.0, False)
    assert loss.isnan().tolist() == [[False, True, False]]


@pytest.mark.gpu
def test_wrong_labels_on_a_gpu_raise_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.full((2, 5), 3, device="cuda")
    assert fp.zlpr_loss(SCORES.cuda(), labels).isnan()
    monkeypatch.setattr("flashpointer.backends.CHECK_INDICES", True)
    with pytest.raises(ValueError, match="labels takes 0 to 1"):
        fp.zlpr_loss(SCORES.cuda(), labels)


def test_module() -> None:
    module = fp.nn.ZLPRLoss(reduction="sum")
    mask = torch.rand(2, 5) < 0.5
    assert torch.equal(module(SCORES, LABELS, mask), fp.zlpr_loss(SCORES, LABELS, mask=mask, reduction="sum"))
    assert repr(module) == "ZLPRLoss(reduction='sum')"
    with pytest.raises(ValueError, match="ZLPRLoss: reduction takes one of"):
        fp.nn.ZLPRLoss("max")


@pytest.mark.parametrize("count", [FEW_EXPONENTIALS, FEW_EXPONENTIALS + 1])
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_exponentials_of_few_numbers_and_of_many(count: int, of: torch.dtype) -> None:
    """Off by what the last bit of a number is worth, in its place too, and at the ends not at all."""
    x = torch.empty(count, dtype=of).uniform_(-80.0, 80.0)
    x[:5] = x.new_tensor([0.0, torch.inf, -torch.inf, 1e4, -1e4])
    x[5] = torch.nan
    e = exp(x, out=torch.empty_like(x))
    assert e[5].isnan() and e[:5].tolist() == [1.0, torch.inf, 0.0, torch.inf, 0.0]
    in_place = x.clone()
    assert exp(in_place, out=in_place) is in_place and torch.equal(in_place.nan_to_num(), e.nan_to_num())
    x, e = x[6:].double(), e[6:].double()
    assert ((e - x.exp()).abs() <= torch.finfo(of).eps * (2 + x.abs()) * x.exp()).all()


@pytest.mark.parametrize("shape", [(30, 100), (1, 500_000)], ids=str)
@pytest.mark.parametrize("score", [-58.7, -41.3, -30.0, -22.01, -21.99, -15.5, -10.9, 10.9, 30.0, 58.7])
def test_rows_whose_scores_are_all_far_from_0_keep_their_digits(shape: tuple[int, int], score: float) -> None:
    """Each cell is off to the same side. Of rows, and of parts of one."""
    scores = torch.full(shape, score)
    for name, labels in ("labels", torch.zeros(shape, dtype=torch.bool)), ("positives", torch.full((shape[0], 1), -1)):
        for result in compare({"labels": "zlpr_loss"}.get(name, "sparse_zlpr_loss"), {"scores": scores, name: labels}):
            assert result.ok, result
    for result in compare("zlpr_loss", {"scores": scores, "labels": torch.ones(shape, dtype=torch.bool)}):
        assert result.ok, result
