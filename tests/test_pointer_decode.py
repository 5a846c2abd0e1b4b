"""pointer_decode against the scores in float64: which spans, in which order, under every option; memory, errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer.agreement import relative_error
from flashpointer.tiled import pointer_decode as tiles

from .conftest import INTERPRETED, Place
from .test_memory import peak
from .test_pointer_scores import OPTIONS, holes, tensors

SHAPES = [(1, 1, 1, 2), (2, 3, 20, 8), (1, 4, 70, 20), (1, 17, 33, 6)]
FULL_SHAPES = [(2, 10, 300, 64), (1, 1000, 64, 16), (1, 3, 700, 64), (20, 9, 64, 64)]


@pytest.fixture(autouse=True, scope="module", params=["few"] if INTERPRETED else ["few", "bounded"])
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test also where tiles rule out what they can, however few the scores are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bounded":
            patch.setattr(tiles, "FEW", 0)
        yield


def truth(inputs: dict[str, Any]) -> torch.Tensor:
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return fp.reference.pointer_scores(**exact)


def agree(inputs: dict[str, Any], threshold: float = 0.0) -> None:
    """The spans above the threshold, in order; only where the score all but equals it may they differ."""
    spans, scores = fp.pointer_decode(**inputs, threshold=threshold)
    exact, dtype = truth(inputs), inputs["q"].dtype
    assert spans.dtype == torch.int64 and scores.dtype == dtype and not scores.requires_grad
    assert torch.equal(spans, spans.unique(dim=0))  # which is sorted, too
    found = torch.zeros(exact.shape, dtype=torch.bool, device=exact.device)
    found[spans.unbind(1)] = True
    finite = exact.isfinite()
    epsilon = 1e-13 if dtype == torch.float64 else max(1e-6, torch.finfo(dtype).eps)
    rounding = float(4 * epsilon * (1 + exact[finite].abs().max() if finite.any() else 1))
    assert not (found & ~finite).any()
    differs = found != (exact > threshold)
    assert not (differs & ((exact - threshold).abs() > rounding)).any()
    torch.testing.assert_close(scores.double(), exact[spans.unbind(1)], rtol=0, atol=rounding)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finds_what_is_above(
    place: Place, dtype: torch.dtype, shape: tuple[int, int, int, int], shared: bool, options: dict[str, Any]
) -> None:
    if place.small and not shared and shape[1] > 4:
        pytest.skip("heads of their own are interpreted one by one")
    inputs = {**tensors(shape, shared, dtype, place.device), "mask": holes(shape[0], shape[2], place.device), **options}
    for threshold in (0.0, 3.5):
        agree(inputs, threshold)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_real_sizes(place: Place, shape: tuple[int, int, int, int], shared: bool) -> None:
    if place.small:
        pytest.skip("too large for the interpreter")
    for shift in (0.0, -2.5):
        inputs = tensors(shape, shared, torch.float32, place.device)
        inputs["start"] += shift
        agree(inputs)


def test_any_threshold(place: Place) -> None:
    inputs = tensors((2, 3, 20, 8), True, torch.float32, place.device)
    valid = int(truth(inputs).isfinite().sum())
    assert len(fp.pointer_decode(**inputs, threshold=float("-inf"))[0]) == valid
    assert len(fp.pointer_decode(**inputs, threshold=float("inf"))[0]) == 0
    everything = fp.pointer_decode(**inputs, threshold=-1e6)[1].sort().values
    assert len(fp.pointer_decode(**inputs, threshold=everything[-5].item())[0]) == 4  # strictly above


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_padding_holds_anything(place: Place, garbage: float) -> None:
    inputs = tensors((2, 3, 30, 16), True, torch.float32, place.device)
    mask = torch.ones(2, 30, dtype=torch.bool, device=place.device)
    mask[0, 20:] = mask[1, 7] = False
    clean = fp.pointer_decode(**inputs, mask=mask)
    for name, x in inputs.items():
        inputs[name] = x.masked_fill(~mask.unsqueeze(-1 if name in "qk" else 1), garbage)
    assert all(map(torch.equal, clean, fp.pointer_decode(**inputs, mask=mask)))


@pytest.mark.parametrize("name", ["q", "k", "start", "end"])
def test_nan_is_no_span(place: Place, name: str) -> None:
    inputs = tensors((2, 3, 40, 16), True, torch.float32, place.device)
    inputs[name][1, 2] = torch.nan
    agree({**inputs, "tril_mask": False})


def test_extreme_biases(place: Place) -> None:
    inputs = tensors((2, 3, 40, 16), True, torch.float32, place.device)
    inputs["start"][:, 0], inputs["end"][:, 1], inputs["start"][:, 2, ::3] = 1000.0, -1000.0, -torch.inf
    agree(inputs)


def exact_numbers(
    shape: tuple[int, int, int, int], shared: bool, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Whole numbers, of which no score is rounded."""
    inputs = {name: (2 * x).round() for name, x in tensors(shape, shared, torch.float32, device).items()}
    return {**{name: x.to(dtype) for name, x in inputs.items()}, "rope": False, "scale": 1.0}  # type: ignore[dict-item]


def agree_exactly(inputs: dict[str, Any], threshold: float = 0.0) -> None:
    exact = truth(inputs)
    spans, scores = fp.pointer_decode(**inputs, threshold=threshold)
    assert torch.equal(spans, (exact > threshold).nonzero())
    assert torch.equal(scores, exact[exact > threshold].to(scores.dtype))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("options", [{}, {"tril_mask": False, "max_width": 66}], ids=str)
def test_a_score_that_equals_the_threshold_is_not_above(
    place: Place, dtype: torch.dtype, shared: bool, options: dict[str, Any]
) -> None:
    inputs = {**exact_numbers((1, 2, 70, 8), shared, dtype, place.device), **options}
    for threshold in (10.0, 20.0):
        assert (truth(inputs) == threshold).any()
        agree_exactly(inputs, threshold)


def test_bounds_touch_the_best_score(place: Place) -> None:
    """The best cell of each tile is of its largest product, start and end, so that its score is the bound itself, once
    above the threshold by the last digit of float32 and once equal to it."""
    length = 110
    q = torch.zeros(1, length, 8, device=place.device)
    q[0, :, 0] = 0.1 + (torch.arange(length, device=place.device) % 64 == 40)
    start, end = (torch.full((1, 2, length), x, device=place.device) for x in (-0.3, 0.7))
    inputs = {"q": q, "k": q, "start": start, "end": end, "rope": False, "scale": 0.37, "tril_mask": False}
    best = fp.pointer_decode(**inputs, threshold=0.7)[1].max()
    below = torch.nextafter(best, best - 1).item()
    spans, _ = fp.pointer_decode(**inputs, threshold=below)
    of_one = [m for m in range(length) if m % 64 == 40]
    assert spans.tolist() == [[0, h, m, n] for h in (0, 1) for m in of_one for n in of_one]
    assert len(fp.pointer_decode(**inputs, threshold=best.item())[0]) == 0


@pytest.mark.parametrize("bias", [1e4, -1e4])
def test_every_tile_or_none(place: Place, dtype: torch.dtype, bias: float) -> None:
    """Full rows, of several tiles, in several blocks of heads; and the same with one cell of one head alone."""
    inputs = exact_numbers((1, 2, 140, 8), True, dtype, place.device)
    inputs["start"] = torch.full_like(inputs["start"], bias)
    agree_exactly(inputs)
    inputs["end"] = torch.full_like(inputs["end"], -bias)
    inputs["start"][0, 1, 100] = inputs["end"][0, 1, 131] = abs(bias)
    agree_exactly(inputs, 100.0)


def test_one_span_of_each_of_many_heads(place: Place) -> None:
    """More heads than a program counts, each with a tile that is for it alone."""
    heads, length = 70, 3
    inputs = exact_numbers((1, heads, length, 4), True, torch.float32, place.device)
    inputs["start"] = torch.full_like(inputs["start"], -100.0)
    h = torch.arange(heads, device=place.device)
    inputs["start"][0, h, h % 3] = 100.0
    agree_exactly({**inputs, "max_width": 1}, 20.0)
    assert len(fp.pointer_decode(**inputs, max_width=1, threshold=20.0)[0]) == heads


def test_one_kept_token_in_a_tile(place: Place) -> None:
    """After a tile that is dropped whole; what a dropped token holds must not even loosen a bound."""
    inputs = exact_numbers((2, 2, 200, 8), True, torch.float32, place.device)
    mask = torch.zeros(2, 200, dtype=torch.bool, device=place.device)
    mask[0, [70, 130]] = mask[1, 199] = True
    for name in ("start", "end"):
        inputs[name] = inputs[name].masked_fill(~mask[:, None], 1e4)
    for options in ({}, {"tril_mask": False, "max_width": 61}):
        agree_exactly({**inputs, "mask": mask, **options}, -5.0)


def test_padding_is_not_visited(place: Place) -> None:
    """A batch padded to 192 tokens whose sentences have 64 computes the tiles of 64."""
    if place.backend != "triton" or place.device == "cuda":
        pytest.skip("kernels are counted where they are interpreted")
    kernels = importlib.import_module("flashpointer.kernels.pointer_decode")
    counts = []
    for length in (64, 192):
        inputs = tensors((1, 2, length, 16), True, torch.float32, place.device)
        mask = torch.arange(length)[None] < 64
        with patch.object(kernels, "keep_valid", wraps=kernels.keep_valid) as visited:
            fp.pointer_decode(**inputs, mask=mask, tril_mask=False)
        counts.append(visited.call_count)
    assert counts[0] == counts[1] > 0


def test_rows_without_a_span_are_not_written(place: Place) -> None:
    """The second sweep computes the rows of heads with a span, and of these what max_spans leaves."""
    if place.backend != "triton" or place.device == "cuda":
        pytest.skip("kernels are counted where they are interpreted")
    kernels = importlib.import_module("flashpointer.kernels.pointer_decode")
    inputs = exact_numbers((2, 3, 128, 8), True, torch.float32, place.device)
    inputs["start"] = torch.full_like(inputs["start"], -1e3)
    inputs["start"][0, 1, 5] = inputs["start"][1, 2, 100] = 1e3
    counts = []
    for options in ({}, {"max_spans": 3}):
        written = patch.object(kernels, "write_rows", wraps=kernels.write_rows)
        with written as written, warnings.catch_warnings(action="ignore"):
            fp.pointer_decode(**inputs, **options)
        counts.append(written.call_count)
    assert counts == [2, 1]


@pytest.mark.parametrize("max_spans", [1, 60, 64, 65, 200])
def test_max_spans_within_a_row_and_a_tile(place: Place, max_spans: int) -> None:
    inputs = exact_numbers((1, 2, 70, 4), True, torch.float32, place.device)
    inputs["start"] = torch.full_like(inputs["start"], 1e3)
    exact = truth(inputs)
    with pytest.warns(UserWarning, match=f"{(exact > 0).sum():,} spans"):
        spans, scores = fp.pointer_decode(**inputs, max_spans=max_spans)
    assert torch.equal(spans, (exact > 0).nonzero()[:max_spans])
    assert torch.equal(scores.double(), exact[exact > 0][:max_spans])


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)], ids=str)
def test_nothing(place: Place, shape: tuple[int, int, int, int]) -> None:
    for options in ({}, {"top_k": 3}, {"non_overlapping": True}):
        spans, scores = fp.pointer_decode(**tensors(shape, True, torch.float32, place.device), **options)
        assert (spans.shape, scores.shape) == ((0, 4), (0,))
    spans, scores = fp.pointer_decode(**tensors(shape, True, torch.float32, place.device), padded=True)
    assert (spans.shape, scores.shape) == ((shape[0], 0, 3), (shape[0], 0))


def test_strides_and_bitwise_repeatable(place: Place) -> None:
    projection, biases = torch.randn(2, 20, 2, 3, 16), torch.randn(2, 20, 3, 2)
    q, k = (projection[:, :, i].transpose(1, 2).to(place.device) for i in range(2))
    start, end = (biases[..., i].transpose(1, 2).to(place.device) for i in range(2))
    inputs = {"q": q, "k": k, "start": start, "end": end}
    agree(inputs)
    assert all(map(torch.equal, fp.pointer_decode(**inputs), fp.pointer_decode(**inputs)))


def test_nothing_has_a_gradient(place: Place) -> None:
    inputs = tensors((2, 3, 20, 8), True, torch.float32, place.device)
    scores = fp.pointer_decode(**{name: x.requires_grad_() for name, x in inputs.items()})[1]
    assert len(scores) > 0 and not scores.requires_grad


def test_autocast(place: Place) -> None:
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    inputs = tensors((2, 3, 20, 16), True, torch.float32, place.device)
    with torch.autocast(place.device, half):
        found = fp.pointer_decode(**inputs)
    assert found[1].dtype == half
    assert all(map(torch.equal, found, fp.pointer_decode(**{name: x.to(half) for name, x in inputs.items()})))


def test_scores_are_compared_before_they_are_rounded(place: Place) -> None:
    """1 + 2 ** -12 is above 1, and in float16 it is 1."""
    q = torch.zeros(1, 2, 8, device=place.device, dtype=torch.float16)
    start = torch.ones(1, 1, 2, device=place.device, dtype=torch.float16)
    end = torch.tensor([[[0.0, 2**-12]]], device=place.device, dtype=torch.float16)
    spans, scores = fp.pointer_decode(q, q, start, end, threshold=1.0)
    assert spans.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert scores.tolist() == [1.0, 1.0]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    B, H, N, D = (draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 5), (1, 70), (1, 10)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return {
        **tensors((B, H, N, 2 * D), draw(st.booleans()), torch.float32, "cpu", draw(st.booleans())),
        "mask": draw(st.sampled_from([None, torch.rand(B, N) < 0.7])),
        "rope": draw(st.booleans()),
        "tril_mask": draw(st.booleans()),
        "max_width": draw(st.sampled_from([None, 1, 5, 100])),
    }


@settings(max_examples=5 if INTERPRETED else 25, deadline=None)
@given(inputs=problems(), threshold=st.sampled_from([-3.0, 0.0, 2.0]))
def test_any_problem_agrees(place: Place, inputs: dict[str, Any], threshold: float) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, threshold)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("top_k", [1, 3, 1000])
def test_top_k_of_each_head(place: Place, top_k: int, shared: bool) -> None:
    inputs = tensors((2, 3, 40, 16), shared, torch.float32, place.device)
    spans, scores = fp.pointer_decode(**inputs, top_k=top_k)
    every, of_every = fp.pointer_decode(**inputs)
    expected = []
    for b in range(2):
        for h in range(3):
            plane = ((every[:, 0] == b) & (every[:, 1] == h)).nonzero().squeeze(1)
            best = of_every[plane].sort(descending=True, stable=True).indices[:top_k].sort().values
            expected.append(every[plane[best]])
    assert torch.equal(spans, torch.cat(expected))
    assert torch.equal(spans, spans.unique(dim=0)) and len(scores) == len(spans)


def test_of_equal_spans_the_first_are_best(place: Place) -> None:
    q = torch.zeros(1, 40, 8, device=place.device)
    ones = torch.ones(1, 1, 40, device=place.device)
    spans, _ = fp.pointer_decode(q, q, ones, ones, top_k=3)
    assert spans.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


def test_max_spans_bounds_and_says_so(place: Place) -> None:
    inputs = tensors((2, 3, 20, 8), True, torch.float32, place.device)
    spans, scores = fp.pointer_decode(**inputs)
    with pytest.warns(UserWarning, match=rf"pointer_decode: {len(spans)} spans are above the threshold 0; the first 7"):
        some = fp.pointer_decode(**inputs, max_spans=7)
    assert torch.equal(some[0], spans[:7]) and torch.equal(some[1], scores[:7])
    assert torch.equal(fp.pointer_decode(**inputs, max_spans=len(spans))[0], spans)  # and no warning


def test_non_overlapping_takes_the_best_first(place: Place) -> None:
    inputs = tensors((3, 4, 40, 16), True, torch.float32, place.device)
    every, of_every = fp.pointer_decode(**inputs)
    free = torch.ones(3, 40, dtype=torch.bool)
    expected = []
    for i in of_every.sort(descending=True, stable=True).indices.tolist():
        b, _, m, n = every[i].tolist()
        if free[b, m : n + 1].all():
            free[b, m : n + 1] = False
            expected.append(i)
    spans, scores = fp.pointer_decode(**inputs, non_overlapping=True)
    assert torch.equal(spans, every[sorted(expected)])
    assert torch.equal(scores, of_every[sorted(expected)])


@pytest.mark.parametrize("options", [{"max_spans": 500}, {"top_k": 11}, {"top_k": 90, "max_spans": 500}], ids=str)
def test_what_is_dropped_on_the_way_would_not_have_stayed(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """Small tiles, and so many rounds of dropping; scores of few values, and so many equal ones."""
    inputs = {name: x.round() for name, x in tensors((2, 5, 200, 2), True, torch.float32, "cpu").items()}
    arguments = {**inputs, "rope": False, "scale": 1.0, **options}
    with fp.use_backend("reference"), warnings.catch_warnings(record=True) as expected_warnings:
        expected = fp.pointer_decode(**arguments)
    monkeypatch.setattr("flashpointer.tiled.pointer_decode.TILE", 2048)
    with warnings.catch_warnings(record=True) as caught:
        assert all(map(torch.equal, fp.pointer_decode(**arguments), expected))
    assert [str(w.message) for w in caught] == [str(w.message) for w in expected_warnings]
    assert len(caught) == ("max_spans" in options)


# GLiNER's greedy modes: which of two spans (start, end) of one sentence rule each other out.


def overlap(a: list[int], b: list[int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def cross(a: list[int], b: list[int]) -> bool:
    return overlap(a, b) and not (a[0] <= b[0] and b[1] <= a[1]) and not (b[0] <= a[0] and a[1] <= b[1])


def same(a: list[int], b: list[int]) -> bool:
    return a == b


MODES = {
    ("non_overlapping",): [overlap],
    ("non_crossing",): [cross],
    ("one_label",): [same],
    ("non_crossing", "one_label"): [cross, same],
    ("non_overlapping", "one_label"): [overlap],
}


@pytest.mark.parametrize("grid", [None, 0.5, 1e9], ids=["distinct", "some equal", "all equal"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_best_first_then_what_goes_with_it(place: Place, mode: tuple[str, ...], grid: float | None) -> None:
    """Against comparing each span with all that are kept; of equal ones the first is the better one."""
    B, H, N = 3, 4, 20
    inputs = tensors((B, H, N, 8), True, torch.float32, place.device)
    inputs["start"] += 1
    if grid is not None:
        inputs = {name: torch.zeros_like(x) for name, x in inputs.items()}
        inputs["start"] = (torch.randn(B, H, N, device=place.device) / grid).round() * grid + 1
    every, of_every = fp.pointer_decode(**inputs)
    rows, kept = every.tolist(), []
    for i in of_every.sort(descending=True, stable=True).indices.tolist():
        others = [rows[j][2:] for j in kept if rows[j][0] == rows[i][0]]
        if not any(conflict(rows[i][2:], other) for other in others for conflict in MODES[mode]):
            kept.append(i)
    spans, scores = fp.pointer_decode(**inputs, **dict.fromkeys(mode, True))
    assert torch.equal(spans, every[sorted(kept)]) and torch.equal(scores, of_every[sorted(kept)])
    assert 0 < len(spans) < len(every)


def test_pairs_that_run_backwards_are_chosen_among_too(place: Place) -> None:
    """By the tokens between their ends; one_label tells the two directions apart."""
    inputs = {**tensors((2, 3, 15, 8), True, torch.float32, place.device), "tril_mask": False}
    every, of_every = fp.pointer_decode(**inputs)
    ends, rows = every[:, 2:].sort(dim=1).values.tolist(), every.tolist()
    for name, conflict, of in (("non_crossing", cross, ends), ("one_label", same, [row[2:] for row in rows])):
        kept: list[int] = []
        for i in of_every.sort(descending=True, stable=True).indices.tolist():
            if not any(rows[j][0] == rows[i][0] and conflict(of[i], of[j]) for j in kept):
                kept.append(i)
        assert torch.equal(fp.pointer_decode(**inputs, **{name: True})[0], every[sorted(kept)])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"max_spans": 9}, {"top_k": 4, "max_spans": 9}], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.filterwarnings("ignore:pointer_decode")
def test_a_threshold_for_each_head(place: Place, dtype: torch.dtype, shared: bool, options: dict[str, int]) -> None:
    """What each head alone finds above its own, bit for bit: at the score of a span too, which is not above itself."""
    inputs = tensors((2, 4, 20, 8), shared, dtype, place.device)
    exact = fp.pointer_scores(**{name: x.float() if dtype != torch.float64 else x for name, x in inputs.items()})
    thresholds = [-0.5, float("inf"), exact[0, 2, 3, 5].item(), 1.25]
    limit, top_k = options.get("max_spans"), options.get("top_k")
    by_tiles = limit is not None and place.backend == "triton"  # whose rounding is another one
    with fp.use_backend("tiled") if by_tiles else nullcontext():
        of_heads = [fp.pointer_decode(**inputs, threshold=t, top_k=top_k) for t in thresholds]
    each = [(spans[spans[:, 1] == h], scores[spans[:, 1] == h]) for h, (spans, scores) in enumerate(of_heads)]
    every, of_every = (torch.cat(x) for x in zip(*each, strict=True))
    order = torch.tensor(sorted(range(len(every)), key=lambda i: every[i].tolist()), device=place.device)
    spans, scores = fp.pointer_decode(**inputs, threshold=thresholds, **options)
    assert len(every) > 4 and not (spans[:, 1] == 1).any()
    assert torch.equal(spans, every[order][:limit]) and torch.equal(scores, of_every[order][:limit])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_thresholds_in_any_form(backend: str) -> None:
    inputs, listed = tensors((2, 3, 20, 8), True, torch.float32, "cpu"), [0.5, -1.0, 0.0]
    with fp.use_backend(backend):
        expected = fp.pointer_decode(**inputs, threshold=listed)
        assert len(expected[0]) > 0
        for given in (
            tuple(listed),
            torch.tensor(listed),
            torch.tensor(listed).numpy(),
            torch.tensor(listed).to(torch.float16),
        ):
            assert all(map(torch.equal, fp.pointer_decode(**inputs, threshold=given), expected))
        assert all(
            map(torch.equal, fp.pointer_decode(**inputs, threshold=[1.5]), fp.pointer_decode(**inputs, threshold=1.5))
        )


def test_max_spans_with_a_threshold_for_each_head_says_so(place: Place) -> None:
    inputs = tensors((2, 2, 20, 8), True, torch.float32, place.device)
    found = fp.pointer_decode(**inputs, threshold=[0.0, 1.0])
    count, above_the_least = len(found[0]), len(fp.pointer_decode(**inputs, threshold=0.0)[0])
    with pytest.warns(UserWarning, match=f"{count} spans are above the thresholds of their heads; the first 7"):
        fp.pointer_decode(**inputs, threshold=[0.0, 1.0], max_spans=7)
    for enough in (count, above_the_least - 1, above_the_least):  # and no warning
        spans, scores = fp.pointer_decode(**inputs, threshold=[0.0, 1.0], max_spans=enough)
        assert torch.equal(spans, found[0])
        assert relative_error(scores, found[1]) < 1e-6  # tiles serve where it is less than above the least


def test_an_untrained_head_does_not_fill_the_memory() -> None:
    head = fp.nn.EfficientGlobalPointer(8, heads=6, head_size=4)
    hidden = 9 * torch.randn(1, 500, 8)
    with pytest.warns(UserWarning, match="the first 250,000 are returned, as max_spans asks"):
        spans, _ = head.decode(hidden, threshold=-100.0)
    everything, _ = head.decode(hidden, threshold=-100.0, max_spans=None)
    assert torch.equal(spans, everything[:250_000])
    assert len(everything) > 700_000


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"non_overlapping": True}, {"threshold": 1e9}], ids=str)
def test_padded(place: Place, options: dict[str, Any]) -> None:
    inputs = tensors((3, 2, 20, 8), True, torch.float32, place.device)
    inputs["start"][1] = -torch.inf  # a sentence without a span
    spans, scores = fp.pointer_decode(**inputs, **options)
    batch_first, of_rows = fp.pointer_decode(**inputs, **options, padded=True)
    most = int(spans[:, 0].bincount(minlength=3).max())
    assert batch_first.shape == (3, most, 3) and of_rows.shape == (3, most)
    assert batch_first.dtype == torch.int64 and of_rows.dtype == scores.dtype
    for b in range(3):
        of_sentence = spans[:, 0] == b
        count = int(of_sentence.sum())
        assert torch.equal(batch_first[b, :count], spans[of_sentence, 1:])
        assert torch.equal(of_rows[b, :count], scores[of_sentence])
        assert (batch_first[b, count:] == -100).all() and (of_rows[b, count:] == -100).all()


def test_in_a_compiled_model() -> None:
    head = fp.nn.EfficientGlobalPointer(12, 3, 8)
    hidden = torch.randn(2, 9, 12)
    assert all(map(torch.equal, torch.compile(lambda x: head.decode(x + 1))(hidden), head.decode(hidden + 1)))


def test_the_import_does_not_import_the_compiler() -> None:
    """As ``torch.compiler.disable`` would, to decorate: it takes seconds."""
    subprocess.run(
        [sys.executable, "-c", "import sys, flashpointer; assert 'torch._dynamo' not in sys.modules"], check=True
    )


def decode(**arguments: Any) -> torch.Tensor:
    return fp.pointer_decode(**arguments)[1]


def test_memory_is_linear() -> None:
    """The scores would take a gigabyte."""
    inputs = tensors((1, 16, 4096, 64), True, torch.float32, "cpu")
    inputs["start"] -= 12
    assert peak(decode, inputs, (), "cpu") < 8e6


@pytest.mark.parametrize("options", [{"max_spans": 1000}, {"top_k": 5}], ids=str)
def test_memory_does_not_grow_with_what_is_found(options: dict[str, int]) -> None:
    """An untrained model with two million spans, which would take 168 MB."""
    inputs = tensors((1, 4, 1024, 16), True, torch.float32, "cpu")
    inputs["start"] += 2
    with pytest.warns(UserWarning) if "max_spans" in options else nullcontext():
        assert peak(decode, {**inputs, **options}, (), "cpu") < 50e6


# --- errors -----------------------------------------------------------------------------------------------------------


Q = torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"q": Q.long()}, TypeError, "q takes a floating-point tensor"),
        ({"threshold": "0"}, ValueError, "threshold takes a number, or one for each of 1 heads; got str '0'"),
        ({"threshold": float("nan")}, ValueError, "threshold takes a number, .*; got float nan"),
        ({"threshold": [0.0, 1.0]}, ValueError, r"threshold takes a number, .*; got list \[0.0, 1.0\]"),
        ({"threshold": ["0"]}, ValueError, r"threshold takes a number, .*; got list \['0'\]"),
        ({"threshold": torch.zeros(1, 1)}, ValueError, r"threshold takes a number, .*; got a torch.float32 tensor"),
        ({"threshold": True}, ValueError, r"threshold takes a number, .*; got bool True"),
        ({"non_crossing": "yes"}, TypeError, "non_crossing takes a bool; got str 'yes'"),
        ({"one_label": None}, TypeError, "one_label takes a bool; got NoneType None"),
        ({"top_k": 0}, ValueError, "top_k takes an int of at least 1, or None; got int 0"),
        ({"max_spans": 2.0}, ValueError, "max_spans takes an int of at least 1, or None; got float 2.0"),
        ({"non_overlapping": 1}, TypeError, "non_overlapping takes a bool; got int 1"),
        ({"padded": None}, TypeError, "padded takes a bool; got NoneType None"),
        ({"max_width": 0}, ValueError, "max_width takes an int of at least 1"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"pointer_decode: {message}"):
        fp.pointer_decode(**{"q": Q, "k": Q, **arguments})
