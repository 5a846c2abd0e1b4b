"""pointer_loss against float64: values, gradients, spans of all kinds, extremes, memory, errors."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer.agreement import compare, relative_error, run
from flashpointer.problem import FEW
from flashpointer.spans import FromOffsets
from flashpointer.tiled import _listed as listing
from flashpointer.tiled import pointer_loss as tiles

from .conftest import INTERPRETED, Place
from .problems import soft_labels
from .test_memory import peak
from .test_pointer_scores import OPTIONS, differentiable, holes, tensors

# (B, H, N, D): one token; less than a tile; several tiles, the last ragged; D no power of two; several tiles of heads.
SHAPES = [(1, 1, 1, 2), (2, 3, 20, 8), (1, 4, 70, 20), (1, 40, 33, 6)]
FULL_SHAPES = [(2, 10, 300, 64), (1, 100, 130, 256), (1, 3, 700, 64), (20, 9, 64, 64)]


# On a CPU: of one sentence and 16 tokens, and of 5 direct rows at a time; forward keeps the first of them for backward.
SMALL_TILES = patch.multiple(tiles, CELLS=200, HEIGHT=16, KEPT=4000)


def pointer_kernels() -> Any:
    return importlib.import_module("flashpointer.kernels.pointer_loss")


def some_spans(shape: tuple[int, int, int, int], count: int, device: str) -> torch.Tensor:
    """In any order: valid and invalid ones, some in one row, some listed twice."""
    B, H, N, _ = shape
    spans = torch.stack([torch.randint(size, (count,)) for size in (B, H, N, N)], dim=1)
    spans[count // 3 :: 3, :3] = spans[: len(spans[count // 3 :: 3]), :3].clone()
    return torch.cat([spans, spans[: count // 4]])[torch.randperm(count + count // 4)].to(device)


def problem(
    shape: tuple[int, int, int, int],
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    count: int = 12,
    scale: float = 1.0,
) -> dict[str, Any]:
    values = {name: (scale * x).to(dtype) for name, x in tensors(shape, shared, torch.float32, device).items()}
    return {**values, "spans": some_spans(shape, count, device)}


def evaluate(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    return run(fp.pointer_loss, inputs, differentiable(inputs), upstream)


def agree(inputs: dict[str, Any], upstream: torch.Tensor | None = None, at_most: float | None = None) -> None:
    """Of the loss and all gradients; at_most is a bound on the error besides.

    exp makes of the rounding of a score a relative error of its term. Eager's rounding of the few that count may by
    chance be next to none, so that of the largest score is allowed as well. So is that of the upstream gradient in
    those of the biases: they sum what their cells get, and where +1 of the negatives cancels -1 of the positives the
    error of the terms stays.
    """
    options = {name: value for name, value in inputs.items() if name not in ("spans", "span_labels", "reduction")}
    scores = fp.reference.pointer_scores(**options).detach()
    largest = scores[scores.isfinite()].abs().amax().item() if scores.isfinite().any() else 0.0
    spacing = torch.finfo(torch.float64 if scores.dtype == torch.float64 else torch.float32).eps
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    wrt = differentiable(inputs)
    truth = dict(zip(("loss", *wrt), run(fp.reference.pointer_loss, exact, wrt, upstream), strict=True))
    terms = 1.0 if upstream is None else upstream.abs().max().item()
    for result in compare("pointer_loss", inputs, differentiate=wrt, upstream=upstream):
        rounding = spacing * largest
        if result.what in ("start", "end"):
            cancelled = terms / max(truth[result.what].norm().item(), torch.finfo(torch.float64).tiny)
            rounding = max(rounding, rounding * cancelled) + spacing * cancelled
        assert result.error <= result.allowed + rounding, result
        assert at_most is None or result.error <= at_most, result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(
    place: Place, dtype: torch.dtype, shape: tuple[int, int, int, int], shared: bool, options: dict[str, Any]
) -> None:
    if place.small and not shared and shape[1] > 4:
        pytest.skip("heads of their own are interpreted one by one")
    B, H, N, _ = shape
    inputs = {**problem(shape, shared, dtype, place.device), "mask": holes(B, N, place.device), **options}
    agree({**inputs, "reduction": "none"}, 100 * torch.rand(B, H, device=place.device))


@pytest.mark.parametrize("options", [{}, {"max_width": 30, "tril_mask": False}], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_real_sizes(place: Place, shape: tuple[int, int, int, int], shared: bool, options: dict[str, Any]) -> None:
    if place.small:
        pytest.skip("too large for the interpreter")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = problem(shape, shared, dtype, place.device, count=60)
        agree({**inputs, "mask": holes(shape[0], shape[2], place.device), **options})


@pytest.mark.parametrize("size", [20, 130])
def test_tiles_for_an_older_triton(
    place: Place, size: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """They are smaller, in float32."""
    if place.backend != "triton":
        pytest.skip("of kernels")
    workspace = importlib.import_module("flashpointer.kernels.workspace")
    monkeypatch.setattr(workspace, "TRITON", (3, 4))
    workspace.tile_of.cache_clear()
    request.addfinalizer(workspace.tile_of.cache_clear)
    _, tile = workspace.tile_of(size, 9, torch.float32, True, True, False)
    assert tile.BM.value == tile.BN.value == tile.BACK_BM.value == 16
    agree(problem((1, 9, 40, size), device=place.device))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(place: Place, reduction: str, shared: bool) -> None:
    inputs = {**problem((2, 3, 20, 8), shared, device=place.device), "reduction": reduction}
    agree(inputs, torch.tensor(-3.0, device=place.device), at_most=2e-5)


def test_upstream_of_any_strides(place: Place) -> None:
    inputs = {**problem((2, 3, 20, 8), device=place.device), "reduction": "none"}
    for upstream in (torch.tensor(2.0).expand(2, 3), torch.rand(3, 2).T, torch.rand(2, 1).expand(2, 3)):
        agree(inputs, upstream.to(place.device))


def test_equals_the_loss_of_the_scores(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    spans = inputs.pop("spans")
    scores = fp.pointer_scores(**inputs)
    labels = fp.spans.to_dense(spans, 2, 3, 20)
    expected = fp.zlpr_loss(scores.flatten(2), labels.flatten(2), reduction="none")
    torch.testing.assert_close(fp.pointer_loss(**inputs, spans=spans, reduction="none"), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_biases_are_optional(place: Place, shared: bool) -> None:
    inputs = problem((2, 1, 20, 16), shared, device=place.device)
    for without in (("start", "end"), ("end",), ("start",)):
        agree({**inputs, **dict.fromkeys(without)})


@pytest.mark.parametrize("label_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_soft_labels(place: Place, label_dtype: torch.dtype) -> None:
    """However near to 0 and 1; of a cell listed twice the first listing counts."""
    inputs = problem((2, 3, 20, 16), device=place.device, count=30)
    labels = soft_labels((len(inputs["spans"]),)).to(label_dtype)
    labels[:4], labels[4:8] = 0, 1
    agree({**inputs, "span_labels": labels.to(place.device), "reduction": "none"})


def test_positions_and_masks_of_integers(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    for positions in (torch.randint(0, 2000, (2, 20)), torch.arange(20) + 7):
        mask = holes(2, 20, place.device).to(torch.int64)
        agree({**inputs, "positions": positions.to(place.device), "mask": mask})


def test_strides(place: Place) -> None:
    """Views of one projection, as the heads pass them."""
    projection, biases = torch.randn(2, 20, 2, 3, 16), torch.randn(2, 20, 3, 2)
    q, k = (projection[:, :, i].transpose(1, 2).to(place.device) for i in range(2))
    start, end = (biases[..., i].transpose(1, 2).to(place.device) for i in range(2))
    spans = some_spans((2, 3, 20, 16), 12, place.device)
    agree({"q": q, "k": k, "start": start, "end": end, "spans": spans.T.contiguous().T})
    agree({"q": q[:, 0], "k": k[:, 1], "start": start[:, :1].expand(2, 3, 20), "end": end, "spans": spans})


# --- spans -----------------------------------------------------------------------------------------------------------


def test_no_spans(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    agree({**inputs, "spans": inputs["spans"][:0]})


def test_order_and_repetition_do_not_matter(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    once = inputs["spans"].unique(dim=0)
    expected = evaluate({**inputs, "spans": once})
    for x, y in zip(evaluate({**inputs, "spans": once.flip(0).repeat(3, 1)}), expected, strict=True):
        assert relative_error(x, y) < 1e-6


def test_many_spans_are_sorted_elsewhere(place: Place) -> None:
    """In the order of the few: by PyTorch on a GPU, where counting would take quadratic time. Padded ones too."""
    inputs = {**problem((2, 3, 20, 16), device=place.device, count=30), "reduction": "none"}
    inputs["span_labels"] = torch.rand(len(inputs["spans"]), device=place.device)
    expected = evaluate(inputs)
    with (
        patch("flashpointer.kernels.pointer_loss.COUNTED", 8) if place.backend == "triton" else contextlib.nullcontext()
    ):
        for x, y in zip(evaluate(inputs), expected, strict=True):
            assert torch.equal(x, y)
        agree({**inputs, "span_labels": None})
        agree({**inputs, "span_labels": None, "spans": padded(inputs["spans"], 2)})


@pytest.mark.parametrize("options", [{}, {"max_width": 9, "tril_mask": False}], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_python_and_pytorch_list_the_same(shared: bool, options: dict[str, Any]) -> None:
    """Bit for bit, in one tile and in many, with rows of several cells: up to FEW spans are sorted in Python."""
    shape = (2, 3, 40, 16)
    inputs = {**problem(shape, shared, count=100), "mask": holes(2, 40, "cpu"), **options}
    inputs["span_labels"] = torch.rand(len(inputs["spans"]))
    for reduction in ("none", "mean"):
        for tiling in (contextlib.nullcontext(), SMALL_TILES):
            with tiling:
                expected = evaluate({**inputs, "reduction": reduction})
                with patch.object(listing, "FEW", 0):
                    assert all(map(torch.equal, evaluate({**inputs, "reduction": reduction}), expected))


@pytest.mark.parametrize("count, name", [(FEW, "_few"), (FEW + 1, "_many")])
def test_so_many_are_few(count: int, name: str) -> None:
    inputs = problem((2, 3, 40, 16), count=0)
    inputs["spans"] = some_spans((2, 3, 40, 16), count, "cpu")[:count]
    with patch.object(listing, name, wraps=getattr(listing, name)) as sort:
        agree(inputs)
    assert sort.call_count == 1 and len(inputs["spans"]) == count


PAD_ROWS = torch.tensor([[-100, -100, -100], [0, -1, 2], [1, 3, -7], [-1, 999, 999]])  # one negative entry is enough


def padded(spans: torch.Tensor, batch: int, extra: int = 1) -> torch.Tensor:
    """Batch-first, with padding of every kind, ``extra`` rows of it behind each sentence and some in between."""
    lists = [spans[spans[:, 0] == b, 1:].cpu() for b in range(batch)]
    most = max(map(len, lists)) + extra + 1
    rows = PAD_ROWS[torch.arange(most * batch) % len(PAD_ROWS)].view(batch, most, 3).clone()
    for b, listed in enumerate(lists):
        rows[b, 1 : 1 + len(listed)] = listed
    return rows.to(spans.device)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_padded_list_is_the_flat_one(place: Place, dtype: torch.dtype, shared: bool, soft: bool) -> None:
    """Bit for bit: padding lists nothing, and makes no row a direct one."""
    inputs = {**problem((3, 3, 20, 16), shared, dtype, place.device, count=20), "reduction": "none"}
    inputs["spans"] = flat = inputs["spans"][inputs["spans"][:, 0].argsort(stable=True)]
    inputs["mask"] = holes(3, 20, place.device)
    batch_first = padded(flat, 3)
    assert batch_first.shape[1] > 3 and torch.equal(fp.spans.flatten(batch_first), flat)
    both = [inputs, {**inputs, "spans": batch_first}, {**inputs, "spans": batch_first.mT.contiguous().mT}]
    if soft:
        labels = torch.rand(len(flat), device=place.device)
        labels[::4] = -100
        of_rows = torch.full(batch_first.shape[:2], 7.0, device=place.device)  # padding may have any label
        of_rows[(batch_first >= 0).all(-1)] = labels
        both = [{**one, "span_labels": x} for one, x in zip(both, (labels, of_rows, of_rows), strict=True)]
    upstream = torch.rand(3, 3, device=place.device)
    expected, *others = (evaluate(one, upstream) for one in both)
    for values in others:
        assert all(map(torch.equal, values, expected))
    with fp.use_backend("reference"):
        expected, *others = (evaluate(one, upstream) for one in both)
    for values in others:
        assert all(map(torch.equal, values, expected))


def test_nothing_but_padding(place: Place) -> None:
    inputs = {**problem((2, 3, 20, 16), device=place.device), "reduction": "mean"}
    expected = evaluate({**inputs, "spans": inputs["spans"][:0]})
    for spans in (torch.full((2, 3, 3), -100), torch.zeros(2, 0, 3, dtype=torch.int64)):
        assert all(map(torch.equal, evaluate({**inputs, "spans": spans.to(place.device)}), expected))
    nothing = {name: x[:0] for name, x in inputs.items() if name != "reduction"}
    assert fp.pointer_loss(**{**nothing, "spans": torch.zeros(0, 5, 3, dtype=torch.int64, device=place.device)}) == 0


def test_padding_is_not_visited(place: Place) -> None:
    """A batch padded to 192 tokens whose sentences have 64 computes the tiles of 64."""
    if place.device == "cuda":
        pytest.skip("kernels are counted where they are interpreted")
    module, name = (pointer_kernels(), "keep_valid") if place.backend == "triton" else (tiles, "_products")
    counts = []
    for length in (64, 192):
        inputs = problem((1, 2, length, 16), device=place.device, count=0)
        inputs["spans"] = inputs["spans"][:0]
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[:, :64] = True
        with patch.object(module, name, wraps=getattr(module, name)) as visited, SMALL_TILES:
            evaluate({**inputs, "mask": mask, "tril_mask": False})
        counts.append(visited.call_count)
    assert counts[0] == counts[1] > 0


def test_spans_on_invalid_cells_leave_both_terms(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    mask = torch.ones(2, 20, dtype=torch.bool, device=place.device)
    mask[0, 5] = mask[1, 12:] = False
    invalid = torch.tensor([[0, 0, 5, 7], [0, 1, 3, 5], [1, 2, 4, 13], [0, 2, 9, 2], [1, 0, 1, 8]], device=place.device)
    options = {"mask": mask, "max_width": 7, "reduction": "none"}
    agree({**inputs, **options, "spans": invalid})
    losses = fp.pointer_loss(**{**inputs, **options, "spans": invalid})
    assert torch.equal(losses, fp.pointer_loss(**{**inputs, **options, "spans": invalid[:0]}))


def test_a_score_of_minus_infinity_leaves_both_terms(place: Place) -> None:
    inputs = problem((1, 2, 20, 8), device=place.device)
    inputs["start"][0, 0, 3] = -torch.inf
    inputs["spans"] = torch.tensor([[0, 0, 3, 6], [0, 0, 2, 6]], device=place.device)
    agree({**inputs, "reduction": "none"})


# --- extremes ---------------------------------------------------------------------------------------------------------


def all_starts(inputs: dict[str, Any]) -> torch.Tensor:
    B, H, N = inputs["start"].shape
    starts = torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(N))
    return torch.cat([starts, starts[:, 2:]], dim=1)


def extreme(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    N = inputs["q"].shape[-2]
    if name == "biases of 1000":
        inputs["start"][:, 0], inputs["end"][:, 1] = 1000.0, -1000.0
        inputs["start"][:, 1, ::2] = -1000.0
        inputs["end"][:, 2, ::3] = 1000.0
    elif name == "largest product where end is -220":
        inputs["q"][:], inputs["k"][:], inputs["rope"] = 0.0, 0.0, False
        inputs["q"][..., 0], inputs["k"][..., N // 2, 0] = 1.0, 220 * inputs["q"].shape[-1] ** 0.5
        inputs["end"][:, :, N // 2] = -220.0
    elif name == "learned":
        b, h, m, n = inputs["spans"].unbind(1)
        inputs["q"] *= 0.1
        inputs["start"] -= 12
        inputs["start"][b, h, m] += 26
        inputs["end"][b, h, n] += 26
    elif name == "every row listed":
        inputs["spans"] = all_starts(inputs)
    elif name == "617 spans in a plane":
        cells = torch.randperm(N * N)[:617]
        inputs["spans"] = torch.stack([0 * cells, 0 * cells + 1, cells // N, cells % N], dim=1)
    elif name == "large products":
        inputs["q"] *= 40
    return {**inputs, "spans": inputs["spans"].to(inputs["q"].device)}


EXTREMES = [
    "biases of 1000",
    "largest product where end is -220",
    "learned",
    "every row listed",
    "617 spans in a plane",
    "large products",
]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(place: Place, name: str, reduction: str, shared: bool) -> None:
    inputs = extreme(name, problem((2, 3, 40, 16), shared, device=place.device))
    agree({**inputs, "reduction": reduction}, at_most=2e-3)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_in_small_tiles(name: str, reduction: str, shared: bool) -> None:
    with SMALL_TILES:
        agree({**extreme(name, problem((2, 3, 40, 16), shared)), "reduction": reduction}, at_most=2e-3)


def infinite(case: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """With inf in some cells of sentence 0, and in those alone."""
    inputs = {**inputs, "rope": False, "reduction": "none"}
    if "start" in case:
        inputs["start"][0, 1, 4] = torch.inf
    if "end" in case:
        inputs["end"][0, 2, 6] = torch.inf
    if "head" in case:
        inputs["start"][0, 0] = torch.inf
    if "product" in case:
        inputs["q"][0, ..., 3, :] = -1e20 if "negative" in case else 1e20
        inputs["k"][0, ..., 7, :] = 1e20
    if "below the triangle" in case:  # where it is no matter
        inputs["q"][0, ..., 9, :], inputs["k"][0, ..., 2, :] = 1e20, 1e20
    if "row left out" in case:  # so is this
        inputs["q"][0, ..., 12, :], inputs["start"][0, :, 12] = 1e20, -1e30
    return inputs


FINITE = ["negative product", "below the triangle", "row left out"]  # the loss, or it may be
INFINITE = ["start", "end", "start and end", "a head", "product", *FINITE]


@pytest.mark.parametrize("labels", [None, [1.0, 0.5, 0.0, -100.0, 1.0, 0.3]], ids=["hard", "soft"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("case", INFINITE)
def test_inf_is_inf_where_it_is_in_eager(place: Place, case: str, shared: bool, labels: list[float] | None) -> None:
    """A loss of inf, and a gradient of NaN in the cells of inf alone. The products overflow in float32: so eager's.
    Beyond 1e42 those of the small parts of tf32x3 do as well, with signs of their own."""
    inputs = infinite(case, problem((2, 3, 20, 8), shared, device=place.device))
    # Of the inf themselves, of their rows and columns, and of others.
    spans = [[0, 1, 4, 9], [0, 2, 5, 6], [0, 0, 3, 7], [0, 1, 3, 8], [0, 0, 2, 2], [1, 1, 2, 5]]
    inputs["spans"] = torch.tensor(spans, device=place.device)
    inputs["span_labels"] = None if labels is None else torch.tensor(labels, device=place.device)
    eager = run(fp.reference.pointer_loss, inputs, differentiable(inputs))
    assert case in FINITE or eager[0][0].isinf().any()
    assert not eager[0].isnan().any()
    for tiling in (contextlib.nullcontext(), SMALL_TILES) if place.backend == "tiled" else (contextlib.nullcontext(),):
        with tiling:
            ours = evaluate(inputs)
        for x, truth in zip(ours, eager, strict=True):
            assert torch.equal(x.isnan(), truth.isnan())
            assert relative_error(x.nan_to_num(nan=0.0), truth.nan_to_num(nan=0.0)) < 1e-5


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_bound_may_be_far_above_a_small_row(place: Place, shared: bool) -> None:
    """The largest end stands where its row can hardly be: bounds say 60, and every log-sum is below 0."""
    inputs = problem((2, 3, 20, 8), shared, device=place.device, scale=0.1)
    inputs["start"] -= 8.0
    inputs["end"][..., 0] = 70.0
    inputs["start"][..., 0] = -80.0
    for result in compare("pointer_loss", {**inputs, "reduction": "none"}, differentiate=differentiable(inputs)):
        assert result.error <= result.allowed + 1e-5, result
    rows = evaluate({**inputs, "spans": inputs["spans"][:0]})[3]  # d_start, where nothing is listed
    assert (rows[..., 1:] != 0).all()


def test_a_label_of_minus_100_leaves_its_cell_out(place: Place, dtype: torch.dtype) -> None:
    """Of both terms, as in zlpr_loss; listed again it stays so, for the first listing counts."""
    inputs = {**problem((2, 3, 20, 8), True, dtype, place.device), "reduction": "none"}
    count = len(inputs["spans"])
    inputs["span_labels"] = soft_labels((count,), place.device)
    inputs["span_labels"][::3] = -100.0
    agree(inputs, torch.rand(2, 3, device=place.device))
    inputs = {**problem((2, 3, 7, 8), True, dtype, place.device), "reduction": "none"}
    everywhere = torch.ones(2, 3, 7, 7, device=place.device).nonzero()
    alone = {**inputs, "spans": everywhere, "span_labels": torch.full((len(everywhere),), -100.0, device=place.device)}
    for x in evaluate(alone):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_float32_is_within_2e_5(place: Place, scale: float) -> None:
    shape = (2, 4, 40, 64) if place.small else (4, 10, 256, 64)
    agree(problem(shape, device=place.device, scale=scale), at_most=2e-5)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_padding_holds_anything(place: Place, garbage: float) -> None:
    inputs = problem((2, 3, 30, 16), device=place.device)
    mask = torch.ones(2, 30, dtype=torch.bool, device=place.device)
    mask[0, 20:] = mask[1, 7] = False
    clean = {**inputs, "mask": mask}
    filled = {
        name: inputs[name].masked_fill(~mask.unsqueeze(-1 if name in "qk" else 1), garbage)
        for name in ("q", "k", "start", "end")
    }
    for backend in (place.backend, "reference"):
        with fp.use_backend(backend):
            for x, y in zip(evaluate(clean | filled), evaluate(clean), strict=True):
                assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("name", ["q", "k", "start", "end"])
def test_nan_stays_where_it_is(place: Place, name: str) -> None:
    """In its sentence; a NaN in a bias in the loss of its head."""
    inputs = problem((3, 4, 20, 16), device=place.device)
    clean = evaluate({**inputs, "reduction": "none"})
    inputs[name] = inputs[name].clone()
    inputs[name][1, 2] = torch.nan
    losses, *grads = evaluate({**inputs, "reduction": "none"})
    touched = torch.zeros(3, 4, dtype=torch.bool, device=place.device)
    touched[1, slice(None) if name in "qk" else 2] = True
    assert torch.equal(losses.isnan(), touched)
    for x, y in zip(grads, clean[1:], strict=True):
        assert relative_error(x[[0, 2]], y[[0, 2]]) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 3, 5, 8)], ids=str)
def test_nothing_valid(place: Place, shape: tuple[int, int, int, int]) -> None:
    inputs = {**problem((2, 3, 5, 8), device=place.device), **tensors(shape, True, torch.float32, place.device)}
    inputs["mask"] = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=place.device)
    inputs["spans"] = inputs["spans"] if shape == (2, 3, 5, 8) else inputs["spans"][:0]
    for reduction in ("none", "sum", "mean"):
        loss, *grads = evaluate({**inputs, "reduction": reduction})
        assert torch.equal(loss, torch.zeros_like(loss))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)
    assert evaluate({**inputs, "reduction": "none"})[0].shape == shape[:2]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    shape = tuple(draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 5), (1, 40), (1, 10)))
    shape = (*shape[:3], 2 * shape[3])
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = problem(
        shape, draw(st.booleans()), count=draw(st.integers(0, 40)), scale=draw(st.sampled_from([1, 5, 30]))
    )
    return {
        **inputs,
        "span_labels": draw(st.sampled_from([None, soft_labels((len(inputs["spans"]),))])),
        "mask": draw(st.sampled_from([None, torch.rand(shape[0], shape[2]) < 0.7])),
        "rope": draw(st.booleans()),
        "tril_mask": draw(st.booleans()),
        "max_width": draw(st.sampled_from([None, 1, 5, 100])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
    }


@settings(max_examples=100, deadline=None)
@given(inputs=problems())
def test_any_problem_agrees_in_small_tiles(inputs: dict[str, Any]) -> None:
    with SMALL_TILES:
        agree(inputs)


@settings(max_examples=4 if INTERPRETED else 40, deadline=None)
@given(inputs=problems())
def test_any_problem_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradcheck(shared: bool, soft: bool) -> None:
    inputs = problem((2, 2, 5, 6), shared, torch.float64)
    inputs["start"][0, 1] += 60  # beyond the safe bound
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    labels = torch.rand(len(inputs["spans"])) if soft else None
    values = [inputs[name].requires_grad_() for name in ("q", "k", "start", "end")]

    def loss(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        options = {"mask": mask, "max_width": 4, "span_labels": labels, "reduction": "none"}
        return fp.pointer_loss(q, k, inputs["spans"], start, end, **options)

    assert torch.autograd.gradcheck(loss, values)


def test_bitwise_repeatable(place: Place) -> None:
    inputs = {**problem((2, 9, 70, 32), device=place.device, count=40), "reduction": "none"}
    first = evaluate(inputs)
    for _ in range(2 if place.small else 20):
        assert all(map(torch.equal, first, evaluate(inputs)))


def test_inputs_stay_as_they_are(place: Place) -> None:
    inputs = problem((2, 3, 20, 16), device=place.device)
    before = {name: x.clone() for name, x in inputs.items()}
    for rope in (True, False):
        evaluate({**inputs, "rope": rope})
        assert all(torch.equal(before[name], x) for name, x in inputs.items())


def test_autocast(place: Place) -> None:
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    inputs = problem((2, 3, 20, 16), device=place.device)
    with torch.autocast(place.device, half):
        loss, *grads = evaluate(inputs)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grads)
    values = {name: inputs[name].to(half) for name in ("q", "k", "start", "end")}
    assert torch.equal(loss, fp.pointer_loss(**{**inputs, **values}))


def test_a_loss_scaler_steps(place: Place) -> None:
    """float16 gradients under a scale of 65536 neither overflow nor underflow."""
    inputs = {**problem((2, 3, 20, 16), dtype=torch.float16, device=place.device), "reduction": "mean"}
    grads = evaluate(inputs, torch.tensor(65536.0, device=place.device))[1:]
    exact = {k: v.double() if v is not None and k in ("q", "k", "start", "end") else v for k, v in inputs.items()}
    for x, y in zip(grads, run(fp.reference.pointer_loss, exact, differentiable(inputs))[1:], strict=True):
        assert relative_error(x.double() / 65536, y) < 2e-3


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_opcheck(place: Place, shared: bool, form: str) -> None:
    if place.small and shared == (form == "padded"):
        pytest.skip("interpreted, a pair with each kind of heads and of spans is enough")
    inputs = problem((2, 3, 9, 8), shared, device=place.device)
    if form == "padded":
        inputs["spans"] = padded(inputs["spans"], 2)
    values = [inputs[name].requires_grad_() for name in ("q", "k", "start", "end")]
    labels, mask = torch.rand(inputs["spans"].shape[:-1], device=place.device), holes(2, 9, place.device)
    rest = (inputs["spans"], labels, mask, None, True, True, 4, 0.3, 3)
    ops = torch.ops.flashpointer
    for reduction in ("none", "mean")[: 1 if place.small else 2]:
        torch.library.opcheck(ops.pointer_loss.default, (*values, *rest, reduction, place.backend))
    if place.backend == "tiled":
        torch.library.opcheck(ops.pointer_loss_with_gradient.default, (*values, *rest, "mean"))
    saved = [x.detach() for x in ops.pointer_loss(*values, *rest, "none", place.backend)[1]]
    biases = [x.detach() for x in values[2:]]
    upstream = torch.rand(2, 3, device=place.device)
    shape = [2, 1 if shared else 3, 9, 8, 3, labels.numel()]
    arguments = (upstream, saved, *biases, mask, None, True, True, 4, 0.3, shape, "none", torch.float32, place.backend)
    torch.library.opcheck(ops.pointer_loss_backward.default, arguments)


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(place: Place, dynamic: bool, form: str) -> None:
    if place.small:
        pytest.skip("one compiled process is enough: opcheck traces the interpreted kernels")
    torch._dynamo.reset()

    def step(q: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        return fp.pointer_loss(2 * q, **rest)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):  # one graph for all
        for shape, count in (((2, 5, 10, 8), 12), ((3, 5, 17, 8), 20)):
            mask = holes(shape[0], shape[2], place.device)
            inputs = {**problem(shape, device=place.device, count=count), "mask": mask}
            if form == "padded":  # to a size of their own: one that another has is taken for the same
                spans = padded(inputs["spans"], shape[0])
                inputs["spans"] = torch.nn.functional.pad(spans, (0, 0, 0, count + 1 - spans.shape[1]), value=-1)
            expected = run(step, inputs, differentiable(inputs))
            for x, y in zip(run(compiled, inputs, differentiable(inputs)), expected, strict=True):
                assert relative_error(x, y) < 1e-6


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_memory_is_linear(device: str, reduction: str) -> None:
    """Forward and backward of 64 heads on 2,048 tokens: the scores alone would take 1 GB."""
    inputs = {**problem((1, 64, 2048, 64), device=device, count=50), "reduction": reduction}
    assert peak(fp.pointer_loss, inputs, differentiable(inputs), device) < 100e6


@pytest.mark.parametrize("shape", [(1, 64, 512, 64), (1, 2, 4096, 16)], ids=str)
def test_what_forward_keeps_for_backward_has_its_limit(shape: tuple[int, int, int, int]) -> None:
    """Where every row is listed, and in a long sentence: each would fill 32 MiB and more."""
    inputs, (_, H, N, _) = problem(shape), shape
    if H > 2:
        h, m = torch.meshgrid(torch.arange(H), torch.arange(N), indexing="ij")
        inputs["spans"] = torch.stack([0 * h, h, m, m], -1).view(-1, 4)
    alone, kept = (
        peak(fp.pointer_loss, {**inputs, "reduction": reduction}, differentiable(inputs), "cpu")
        for reduction in ("none", "mean")
    )
    assert alone < 12 * 2**20
    assert kept < alone + 4 * tiles.KEPT


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    """Captured, it waits for nothing; replayed on other numbers in the same memory, it gives theirs."""
    inputs = problem((4, 9, 128, 64), dtype=torch.bfloat16, device="cuda", count=40)
    evaluate(inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(inputs)
    for name, x in problem((4, 9, 128, 64), dtype=torch.bfloat16, device="cuda", count=40).items():
        inputs[name].copy_(x)
    graph.replay()
    assert all(map(torch.equal, captured, evaluate(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["flat", "padded"])
def test_no_host_sync(form: str) -> None:
    inputs = problem((4, 9, 128, 64), dtype=torch.bfloat16, device="cuda", count=40)
    if form == "padded":
        inputs["spans"] = padded(inputs["spans"], 4)
    evaluate(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- errors -----------------------------------------------------------------------------------------------------------


Q, BIAS, SPANS = torch.randn(2, 5, 8), torch.randn(2, 3, 5), torch.tensor([[0, 1, 2, 3], [1, 2, 0, 0]])
PADDED = torch.tensor([[[1, 2, 3], [-100, -100, -100]], [[2, 0, 0], [2, 4, -1]]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"q": Q.long()}, TypeError, "q takes a floating-point tensor.*; got a torch.int64"),
        ({"k": Q[:1]}, ValueError, r"k must have the shape.*; got .*\(1, 5, 8\)"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask must be \[B, N\] = \(2, 5\).*; got .*\(2, 4\)"),
        ({"spans": [[0, 1, 2, 3]]}, TypeError, r"spans takes an int64 tensor .*\[S, 4\], or .*\[B, P, 3\]; got list"),
        ({"spans": FromOffsets(SPANS, [], [])}, TypeError, r"spans takes an .*; got FromOffsets, whose \.spans is one"),
        ({"spans": SPANS.int()}, TypeError, "spans takes an int64 tensor.*; got a torch.int32"),
        ({"spans": SPANS[:, :3]}, ValueError, r"spans must be an .*\[S, 4\], or .*\[B, P, 3\]; got .*\(2, 3\)"),
        ({"spans": torch.tensor(3)}, ValueError, r"spans must be an .*\[S, 4\], or .*\[B, P, 3\]; got .*\(\)"),
        ({"spans": PADDED[..., :2]}, ValueError, r"spans must be an .*\[B, P, 3\]; got .*\(2, 2, 2\)"),
        ({"spans": SPANS[None]}, ValueError, r"spans must be an .*\[B, P, 3\]; got .*\(1, 2, 4\)"),
        ({"spans": PADDED[:1]}, ValueError, r"spans must be \[2, P, 3\], for the sentences of q; got .*\(1, 2, 3\)"),
        (
            {"spans": PADDED + torch.tensor([1, 0, 0])},
            ValueError,
            r"rows \(head, start, end\) below \(3, 5, 5\); got \(3, 0, 0\) at \(1, 0\)",
        ),
        (
            {"spans": PADDED, "span_labels": torch.ones(2)},
            ValueError,
            r"must be \(2, 2\), one for each.*; got .*\(2,\)",
        ),
        (
            {"spans": PADDED, "span_labels": torch.tensor([[1.0, 9.0], [-1.0, 9.0]])},
            ValueError,
            r"span_labels takes 0 to 1, or -100 for a cell to leave out; got -1.0 at \(1, 0\)",
        ),
        ({"spans": SPANS.to("meta")}, ValueError, "spans must be on cpu"),
        ({"spans": SPANS + torch.tensor([0, 0, 0, 2])}, ValueError, r"below \(2, 3, 5, 5\); got \(0, 1, 2, 5\) at 0"),
        ({"spans": SPANS - torch.tensor([0, 2, 0, 0])}, ValueError, r"got \(0, -1, 2, 3\) at 0"),
        ({"span_labels": torch.ones(3)}, ValueError, r"must be \(2,\), one for each row of spans; got .*\(3,\)"),
        ({"span_labels": torch.ones(2).long()}, TypeError, "span_labels takes a floating-point tensor"),
        (
            {"span_labels": torch.tensor([0.5, 1.5])},
            ValueError,
            "span_labels takes 0 to 1, or -100 for a cell to leave out; got 1.5 at 1",
        ),
        ({"span_labels": torch.ones(2, requires_grad=True)}, ValueError, "span_labels takes no gradient"),
        ({"reduction": "max"}, ValueError, "reduction takes one of 'none', 'sum', 'mean'; got str 'max'"),
        ({"max_width": 0}, ValueError, "max_width takes an int of at least 1"),
    ],
)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_errors(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with fp.use_backend(backend), pytest.raises(error, match=f"pointer_loss: .*{message}"):
        fp.pointer_loss(**{"q": Q, "k": Q, "spans": SPANS, "start": BIAS, "end": BIAS, **arguments})
