"""sparse_zlpr_loss against float64, and against zlpr_loss of the labels that its lists stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from benchmarks.sparse_zlpr_loss import rival
from flashpointer.agreement import compare, relative_error, run

from .conftest import Place
from .problems import positives

# As for zlpr_loss; 33 classes take a second word of 32 bits, 300 and 9000 words and blocks of words of their own.
SHAPES = [(3, 28), (2, 33), (2, 3, 300), (3, 9000), (1, 20000)]
FULL_SHAPES = [*SHAPES, (100, 8200), (2, 600001)]


def agree(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> None:
    for result in compare("sparse_zlpr_loss", inputs, upstream=upstream):
        assert result.ok, result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("listed", [0, 1, 9])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_agrees_with_float64(
    place: Place, dtype: torch.dtype, shape: tuple[int, ...], listed: int, masked: bool
) -> None:
    if place.small and shape not in SHAPES:
        pytest.skip("too large for the interpreter")
    scores = (4 * torch.randn(shape, device=place.device)).to(dtype)
    mask = torch.rand(shape, device=place.device) < 0.8 if masked else None
    lists = positives(shape, listed, place.device)
    upstream = torch.randn(shape[:-1], device=place.device)
    agree({"scores": scores, "positives": lists, "mask": mask, "reduction": "none"}, upstream)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(0, 70)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    lists = positives(shape, draw(st.integers(0, 12)), "cpu").to(draw(st.sampled_from([torch.int16, torch.int64])))
    scores = torch.randn(shape) * draw(st.sampled_from([0.1, 3.0, 1000.0]))
    mask = draw(st.sampled_from([None, torch.rand(shape) < 0.7]))
    return {"scores": scores, "positives": lists, "mask": mask, "ignore_index": draw(st.sampled_from([-100, 0, 3]))}


@settings(max_examples=40, deadline=None)
@given(inputs=problems())
def test_any_shape_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


@pytest.mark.parametrize("shape", [(5, 70), (2, 9000)], ids=str)
def test_equals_dense_labels(place: Place, shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, device=place.device)
    lists = positives(shape, 11, place.device)
    labels = torch.zeros(shape, dtype=torch.bool, device=place.device)
    for row, indices in enumerate(lists.tolist()):
        labels[row, [i for i in indices if i >= 0]] = True
    sparse = run(fp.sparse_zlpr_loss, {"scores": scores, "positives": lists}, ("scores",))
    dense = run(fp.zlpr_loss, {"scores": scores, "labels": labels}, ("scores",))
    for x, y in zip(sparse, dense, strict=True):  # a chip fuses products and sums of two kernels in two ways
        assert relative_error(x, y) < 1e-6 if place.device == "cuda" else torch.equal(x, y)


@pytest.mark.parametrize("of_scores", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1700, 700), (3, 500_000)], ids=["rows", "parts of rows"])
def test_tile_after_tile_equals_dense_labels(shape: tuple[int, int], of_scores: torch.dtype) -> None:
    """The way of scores that are not far from 0, which takes the listed cells apart. Of four tiles of rows the second
    has a loss above 60, of parts of rows one has a score. Lists have a class twice, two kinds of padding, or none."""
    pad = 7
    scores = (torch.randn(shape) * 3).to(of_scores)
    scores[600 % shape[0], 5:9] = 59.9 if shape[0] > 600 else 100.0
    lists = torch.randint(-3, shape[1], (shape[0], 9))
    lists[:, 0], lists[::3, 1], lists[::5] = shape[1] - 1, lists[::3, 2], pad
    labels = torch.zeros(shape, dtype=torch.bool)
    for row, indices in enumerate(lists.tolist()):
        labels[row, [i for i in indices if i >= 0 and i != pad]] = True
    for reduction, upstream in (("none", torch.rand(shape[0])), ("mean", torch.rand(()))):
        as_lists = {"scores": scores, "positives": lists, "ignore_index": pad, "reduction": reduction}
        as_labels = {"scores": scores, "labels": labels, "reduction": reduction}
        sparse = run(fp.sparse_zlpr_loss, as_lists, ("scores",), upstream)
        dense = run(fp.zlpr_loss, as_labels, ("scores",), upstream)
        assert all(map(torch.equal, sparse, dense))


def test_learned_positives_stay_up(place: Place) -> None:
    """Two positives far above 16,384 negatives, where a difference of sums has no digit left: loss above 0, gradient
    on the positives below."""
    scores = torch.full((1, 16384), -12.0, device=place.device)
    scores += torch.randn_like(scores)
    lists = torch.tensor([[7, 9000, 7, -1]], device=place.device)
    for height in (5.0, 14.0, 30.0):
        scores[0, [7, 9000]] = height
        agree({"scores": scores, "positives": lists})
        loss, grad = run(fp.sparse_zlpr_loss, {"scores": scores, "positives": lists}, ("scores",))
        assert loss > 0
        assert grad[0, [7, 9000]].max() < 0


def test_the_numbers_of_the_readme(place: Place) -> None:
    """The usual formula, and this one, on two positives at 14 and 16,382 negatives at -12."""
    scores = torch.full((1, 16384), -12.0, device=place.device)
    scores[0, :2] = 14.0
    lists = torch.tensor([[0, 1]], device=place.device)
    usual, grad = run(rival, {"scores": scores, "positives": lists}, ("scores",))
    assert round(usual.item(), 2) == -1.42
    assert grad[0, :2].min() > 0.4  # downhill is down
    assert round(fp.sparse_zlpr_loss(scores, lists).item(), 3) == 0.096


def test_duplicates_and_order_do_not_matter(place: Place) -> None:
    scores = torch.randn(2, 40, device=place.device)
    once = torch.tensor([[3, 31, 32], [39, 0, -5]], device=place.device)
    often = torch.tensor([[32, 3, 31, 3, 3], [-1, 0, 39, 39, 0]], device=place.device)
    results = [run(fp.sparse_zlpr_loss, {"scores": scores, "positives": p}, ("scores",)) for p in (once, often)]
    assert all(map(torch.equal, *results))


def test_ignore_index_pads(place: Place) -> None:
    """0 where class 0 is reserved for padding; and one beyond the classes, as some collate functions pad."""
    scores = torch.randn(2, 40, device=place.device)
    expected = fp.sparse_zlpr_loss(scores, torch.tensor([[5, -1], [7, 9]], device=place.device))
    for pad in (0, 40, -7):
        lists = torch.tensor([[5, pad], [7, 9]], device=place.device)
        assert torch.equal(fp.sparse_zlpr_loss(scores, lists, ignore_index=pad), expected)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_a_dtype_too_small_for_all_classes(integer: torch.dtype) -> None:
    """Or for ignore_index: 255 stands for no -1, and 100 for no 2^16 + 100."""
    scores = torch.randn(2, 70_000)
    lists = torch.tensor([[255, 100], [7, 9]]).clamp(max=torch.iinfo(integer).max)
    for pad in (-1, 2**16 + 100, 2**32 + 100):
        expected = fp.sparse_zlpr_loss(scores, lists, ignore_index=pad)
        assert torch.equal(fp.sparse_zlpr_loss(scores, lists.to(integer), ignore_index=pad), expected)
        with pytest.raises(ValueError, match=r"positives takes class indices below 100, .*; got "):
            fp.sparse_zlpr_loss(scores[:, :100], lists.to(integer), ignore_index=pad)


def test_a_strided_list(place: Place) -> None:
    scores = torch.randn(2, 3, 40, device=place.device)
    lists = torch.randint(-5, 40, (6, 3, 2), device=place.device).permute(2, 1, 0)
    agree({"scores": scores, "positives": lists, "reduction": "none"})
    agree({"scores": scores, "positives": lists[:1, :1].expand(2, 3, 6), "reduction": "none"})


def test_an_index_that_nobody_checked_is_dropped(place: Place) -> None:
    """As on a GPU, where to look would be to wait."""
    from flashpointer import backends

    scores = torch.randn(1, 2, 40, device=place.device)
    forward = backends.implementation("sparse_zlpr_loss", place.backend).forward
    wild = torch.tensor([[[5, 40, 2**40], [2**62, 9, 41]]], device=place.device)
    tame = torch.tensor([[[5], [9]]], device=place.device)
    assert all(
        map(torch.equal, forward(scores, wild, None, 1.0, True, -100), forward(scores, tame, None, 1.0, True, -100))
    )


@pytest.mark.gpu
def test_wrong_indices_on_a_gpu_raise_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, wrong = torch.randn(2, 5, device="cuda"), torch.full((2, 1), 5, device="cuda")
    assert fp.sparse_zlpr_loss(scores, wrong).isfinite()
    monkeypatch.setattr("flashpointer.backends.CHECK_INDICES", True)
    with pytest.raises(ValueError, match="positives takes class indices below 5"):
        fp.sparse_zlpr_loss(scores, wrong)


SCORES, LISTS = torch.randn(2, 5), torch.tensor([[1, 2], [3, -1]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": None}, TypeError, "scores takes a floating-point tensor.*; got NoneType"),
        ({"positives": LISTS.float()}, TypeError, "positives takes an integer tensor.*; got a torch.float32"),
        ({"positives": LISTS[:1]}, ValueError, r"positives must be \[..., P\].*\(2,\); got .*\(1, 2\)"),
        ({"positives": LISTS[0]}, ValueError, r"positives must be \[..., P\]"),
        ({"positives": LISTS.to("meta")}, ValueError, "positives must be on cpu"),
        ({"positives": LISTS + 2}, ValueError, r"positives takes class indices below 5.*; got 5 at \(1, 0\)"),
        ({"mask": torch.ones(5)}, TypeError, "mask takes a bool tensor"),
        ({"reduction": None}, ValueError, "reduction takes one of"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index takes an int; got float 0.5"),
    ],
)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_errors(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with fp.use_backend(backend), pytest.raises(error, match=f"sparse_zlpr_loss: {message}"):
        fp.sparse_zlpr_loss(**{"scores": SCORES, "positives": LISTS, **arguments})
