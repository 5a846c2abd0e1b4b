"""linear_zlpr_loss against float64, and what it promises of products, memory and weight_grad."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flashpointer as fp
from flashpointer import backends
from flashpointer.agreement import compare, judge, relative_error, run
from flashpointer.problem import Lists
from flashpointer.tiled import linear_zlpr_loss as tiled
from flashpointer.tiled.linear_zlpr_loss import listed_cells

from .conftest import DTYPES, Place
from .problems import positives, soft_labels
from .processes import in_ranks
from .test_memory import peak

OP = "linear_zlpr_loss"
LAYER = ("hidden", "weight", "bias")
# Rows, D and classes in tiles of 64 and blocks of 8 rows: fewer rows than D, as many, more, and so many that no block
# but the first is kept; one class, a tile, a tile and one more, and no multiple of anything.
SMALL = {"CELLS": 512, "HEIGHT": 8, "WIDTH": 64, "CONVERTED": 512}
SHAPES = [(3, 5, 1), (5, 8, 64), (8, 8, 65), (9, 3, 150), (30, 12, 200), (2, 1, 130)]


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "large_tiles" not in request.fixturenames:
        for name, size in SMALL.items():
            monkeypatch.setattr(tiled, name, size)


@pytest.fixture
def large_tiles() -> None:
    """Leaves them as they are."""


def layer(
    rows: int, size: int, classes: int, listed: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    shapes = {"hidden": (rows, size), "weight": (classes, size), "bias": (classes,)}
    inputs = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    return {**inputs, "positives": positives((rows, classes), listed, device), "reduction": "none"}


def agree(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> None:
    names = tuple(name for name in LAYER if inputs.get(name) is not None)
    cancelled = cancelled_cells(inputs, upstream)
    for result in compare(OP, inputs, differentiate=names, upstream=upstream):
        result = result._replace(epsilon=result.epsilon * cancelled.get(result.what, 1.0))
        assert result.ok, result


def cancelled_cells(inputs: dict[str, Any], upstream: torch.Tensor | None) -> dict[str, float]:
    """How many times as large as each gradient the parts of its cells are, at least 1. Kernels' half-precision products
    read these rounded; tiles do not."""
    half = inputs["hidden"].dtype in (torch.float16, torch.bfloat16)
    if not half or backends.choose(inputs["hidden"]) != "triton":
        return {}
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    hidden, weight, bias = exact.pop("hidden"), exact.pop("weight"), exact.pop("bias", None)
    scores = hidden @ weight.t() + (0.0 if bias is None else bias)
    layer = {"hidden": scores, "weight": torch.eye(len(weight), dtype=scores.dtype, device=scores.device)}
    of_scores = run(fp.reference.linear_zlpr_loss, layer | exact, ("hidden",), upstream)[1].flatten(0, -2)  # [R, C]
    rows = hidden.flatten(0, -2)

    def parts(g: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": g @ w, "weight": g.t() @ h, "bias": g.sum(0)}

    sums, sizes = parts(of_scores, rows, weight), parts(of_scores.abs(), rows.abs(), weight.abs())
    return {name: (sizes[name].norm() / sums[name].norm()).item() for name in LAYER}


def gradients(inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    return run(fp.linear_zlpr_loss, inputs, LAYER, upstream)


# --- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "no bias"])
@pytest.mark.parametrize("rows, size, classes", SHAPES)
def test_agrees_with_float64(place: Place, dtype: torch.dtype, rows: int, size: int, classes: int, kind: str) -> None:
    """Under an upstream gradient of its own for each row."""
    inputs = layer(rows, size, classes, 4, dtype, place.device)
    if kind == "soft":
        inputs["positive_labels"] = torch.rand(rows, 4, device=place.device)
        inputs["positive_labels"][::2, 0] = -100
    if kind == "no bias":
        del inputs["bias"]
    agree(inputs, torch.randn(rows, device=place.device))


@pytest.mark.parametrize("rows, size, classes", [(64, 96, 9001), (300, 40, 3000)])
def test_agrees_in_tiles_of_their_size(
    place: Place, dtype: torch.dtype, large_tiles: None, rows: int, size: int, classes: int
) -> None:
    if place.small:
        rows, classes = rows // 4, classes // 4
    agree(layer(rows, size, classes, 9, dtype, place.device), torch.randn(rows, device=place.device))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    lead, size, classes = (
        draw(st.lists(st.integers(0, 4), max_size=3)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 200)),
    )
    torch.manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    inputs: dict[str, Any] = {"hidden": torch.randn(*lead, size) * scale, "weight": torch.randn(classes, size)}
    inputs["bias"] = draw(st.sampled_from([None, torch.randn(classes), torch.randn(classes) - 30]))
    lists = positives((*lead, classes), draw(st.integers(0, 12)), "cpu")
    inputs["positives"] = lists.to(draw(st.sampled_from([torch.int16, torch.int64])))
    inputs["positive_labels"] = draw(st.sampled_from([None, soft_labels(lists.shape)]))
    inputs["ignore_index"] = draw(st.sampled_from([-100, 0, 3]))
    return inputs


@settings(max_examples=40, deadline=None)
@given(inputs=problems())
def test_any_layer_agrees(place: Place, inputs: dict[str, Any]) -> None:
    agree({k: v.to(place.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


@pytest.mark.parametrize("shift", [-0.05, -0.01, 0.003, 0.02])
def test_a_soft_label_whose_terms_cancel(place: Place, dtype: torch.dtype, shift: float) -> None:
    """At a score of 0 those of 1/2 do; near it a term that was rounded first would leave few digits."""
    if dtype not in (torch.float16, torch.bfloat16):
        pytest.skip("rounded to its own precision")
    inputs = layer(1, 4, 1, 1, dtype, place.device)
    inputs |= {"hidden": torch.ones(1, 4, dtype=dtype, device=place.device), "bias": None}
    inputs["weight"] = torch.full((1, 4), shift / 4, dtype=dtype, device=place.device)
    inputs["positives"] = torch.zeros(1, 1, dtype=torch.int64, device=place.device)
    inputs["positive_labels"] = torch.full((1, 1), 0.5, device=place.device)
    for result in compare(OP, inputs, differentiate=("hidden", "weight")):
        assert result.ok, result


def test_a_tiny_label_of_the_largest_class(place: Place, dtype: torch.dtype) -> None:
    """Its logarithm, near -80, takes no digits of the score."""
    for _ in range(12):
        inputs = {**layer(1, 5, 26, 1, dtype, place.device), "bias": None}
        scores = inputs["hidden"].double() @ inputs["weight"].double().t()
        inputs["positives"] = scores.argmax(-1, keepdim=True)
        inputs["positive_labels"] = torch.full((1, 1), 1e-34, device=place.device)
        agree(inputs)


@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(soft: bool) -> None:
    inputs = layer(9, 4, 70, dtype=torch.float64)
    labels = torch.rand(9, 4, dtype=torch.float64) if soft else None
    leaves = [inputs[name].requires_grad_() for name in LAYER]

    def losses(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fp.linear_zlpr_loss(hidden, weight, inputs["positives"], bias, positive_labels=labels, reduction="none")

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_leading_dimensions_strides_and_upstream_gradients(place: Place, reduction: str) -> None:
    inputs = {**layer(6, 5, 100, device=place.device), "reduction": reduction}
    inputs["hidden"] = torch.randn(3, 5, 2, device=place.device).permute(2, 0, 1)
    inputs["weight"] = torch.randn(5, 200, device=place.device).t()[::2]
    inputs["bias"] = torch.randn(200, device=place.device)[::2]
    inputs["positives"] = inputs["positives"].view(3, 2, 4).transpose(0, 1)
    for upstream in (torch.randn(2, 3), torch.tensor(3.0).expand(2, 3), torch.zeros(2, 3), torch.randn(3, 2).t()):
        agree(inputs, (upstream if reduction == "none" else upstream[0, 0]).to(place.device))
    row = {**inputs, "hidden": inputs["hidden"][0, 0], "positives": inputs["positives"][0, 0]}
    assert fp.linear_zlpr_loss(**row).shape == ()
    agree(row)


def test_a_row_without_upstream_gradient_adds_nothing(place: Place) -> None:
    """Whatever its scores: 0 times something large is 0."""
    inputs = layer(4, 5, 100, device=place.device)
    inputs["hidden"][1] *= 100
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0], device=place.device)
    agree(inputs, upstream)
    some = [0, 2]
    fewer = {**inputs, "hidden": inputs["hidden"][some], "positives": inputs["positives"][some]}
    _, hidden, *others = gradients(inputs, upstream)
    assert torch.equal(hidden[[1, 3]], torch.zeros_like(hidden[[1, 3]]))
    for ours, theirs in zip(others, gradients(fewer, upstream[some])[2:], strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_the_last_class_is_a_positive(place: Place) -> None:
    for classes in (1, 64, 100, 129):
        inputs = layer(3, 5, classes, device=place.device)
        inputs["positives"] = torch.tensor([[classes - 1], [-1], [classes - 1]], device=place.device)
        agree(inputs, torch.randn(3, device=place.device))


@pytest.mark.parametrize("height", [39.0, 41.0, 100.0, 1e4])
@pytest.mark.parametrize("where", ["the last tile", "the first tile", "a positive", "all tiles"])
def test_large_scores(place: Place, where: str, height: float) -> None:
    """Of one class in all rows, of some of the others' signs; pivots that come late, early, for a positive only."""
    inputs = layer(9, 5, 150, device=place.device)
    inputs["bias"][
        {"the last tile": 149, "the first tile": 3, "a positive": 70, "all tiles": slice(None, None, 50)}[where]
    ] = height
    if where == "a positive":
        inputs["positives"][:, 0] = 70
    agree(inputs, torch.randn(9, device=place.device))
    inputs["hidden"][::2] *= -1
    inputs["bias"].neg_()
    agree(inputs, torch.randn(9, device=place.device))


def test_learned_positives_stay_up(place: Place) -> None:
    """Where a difference of sums has no digit left: two positives far above all others."""
    inputs = layer(2, 5, 1000, device=place.device)
    inputs["hidden"] /= 10
    inputs["bias"] = torch.full((1000,), -12.0, device=place.device)
    inputs["positives"] = torch.tensor([[7, 900, -1], [900, 7, 7]], device=place.device)
    for height in (5.0, 14.0, 30.0):
        inputs["bias"][[7, 900]] = height
        agree(inputs)
        loss, _, _, bias = gradients(inputs)
        assert loss.min() > 0
        assert bias[[7, 900]].max() < 0


def test_soft_labels_as_near_to_0_and_to_1_as_may_be(place: Place) -> None:
    inputs = {**layer(9, 5, 150, 40, device=place.device), "positive_labels": soft_labels((9, 40), place.device)}
    agree(inputs, torch.randn(9, device=place.device))
    ones = {**inputs, "positive_labels": torch.ones(9, 40, dtype=torch.float64, device=place.device)}
    del inputs["positive_labels"]
    for soft, hard in zip(gradients(ones), gradients(inputs), strict=True):
        assert relative_error(soft, hard) < 1e-6


def test_duplicates_order_and_padding_do_not_matter(place: Place) -> None:
    inputs = {**layer(3, 5, 100, device=place.device), "reduction": "sum"}
    once = torch.tensor([[3, 64, 99], [-1, -7, 0], [-1, -1, -1]], device=place.device)
    often = torch.tensor([[99, 64, 3, 64, 3], [0, -100, 0, 0, -3], [-5, -1, -2, -3, -4]], device=place.device)
    results = [gradients({**inputs, "positives": lists}) for lists in (once, often)]
    assert all(map(torch.equal, *results))
    for pad in (0, 100, -7):
        lists = torch.where(once < 0, pad, once) if pad else torch.where(once == 0, -1, once)
        padded = torch.where(once < 0, pad, once)
        results = [gradients({**inputs, "positives": x, "ignore_index": i}) for x, i in ((padded, pad), (lists, pad))]
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("soft", [False, True])
def test_indices_of_a_dtype_too_small_for_all_classes(integer: torch.dtype, soft: bool) -> None:
    """Or for ignore_index: 255 stands for no -1, and 100 for no 2^16 + 100."""
    inputs = {**layer(2, 1, 70_000), "positive_labels": torch.rand(2, 2) if soft else None}
    lists = torch.tensor([[255, 100], [7, 9]]).clamp(max=torch.iinfo(integer).max)
    few = {"weight": inputs["weight"][:100], "bias": inputs["bias"][:100]}
    for pad in (-1, 2**16 + 100, 2**32 + 100):
        inputs["ignore_index"] = pad
        narrow, wide = ({**inputs, "positives": x} for x in (lists.to(integer), lists))
        assert torch.equal(fp.linear_zlpr_loss(**narrow), fp.linear_zlpr_loss(**wide))
        with pytest.raises(ValueError, match=r"positives takes class indices below 100, .*; got "):
            fp.linear_zlpr_loss(**{**narrow, **few})


def test_of_a_class_listed_twice_the_first_label_counts(place: Place) -> None:
    inputs = layer(1, 5, 100, device=place.device)
    lists, labels = torch.tensor([[3, -1, 3, 9]]), torch.tensor([[0.25, 9.0, 0.75, 1.0]])
    one, two = (
        gradients(
            {**inputs, "positives": lists[:, at].to(place.device), "positive_labels": labels[:, at].to(place.device)}
        )
        for at in ([0, 1, 2, 3], [0, 3])
    )
    assert all(map(torch.equal, one, two))


def test_cells_that_are_left_out(place: Place) -> None:
    """By a label of -100, and a class by a bias of -inf, whatever its label; a row of nothing else has loss 0."""
    inputs = layer(3, 5, 100, device=place.device)
    inputs["positives"] = torch.tensor([[3, 70], [70, 4], [99, -1]], device=place.device)
    inputs["bias"][[4, 99]] = -torch.inf
    agree(inputs, torch.randn(3, device=place.device))
    inputs["positive_labels"] = torch.tensor([[-100, 0.5], [-100, 1.0], [0.7, 0.1]], device=place.device)
    agree(inputs, torch.randn(3, device=place.device))
    inputs["bias"][:] = -torch.inf
    for result in gradients(inputs):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("rows, size, classes, listed", [(0, 5, 100, 2), (4, 5, 0, 2), (4, 0, 100, 2), (4, 5, 100, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_of_something(place: Place, rows: int, size: int, classes: int, listed: int, reduction: str) -> None:
    inputs = {**layer(rows, size, classes, listed, device=place.device), "reduction": reduction}
    agree(inputs)
    loss, *grads = gradients(inputs)
    assert [x.shape for x in grads] == [inputs[name].shape for name in LAYER]
    assert loss.isfinite().all()


def test_nan_stays_in_its_row(place: Place) -> None:
    inputs = layer(9, 5, 150, device=place.device)
    clean, others = gradients(inputs), [0, 1, 2, 3, 5, 6, 7, 8]
    for wrong in (torch.nan, torch.inf):
        inputs["hidden"][4, 2] = wrong
        loss, hidden, *_ = gradients(inputs)
        assert not loss[4].isfinite() and not hidden[4].isfinite().all()
        assert relative_error(loss[others], clean[0][others]) < 1e-6
        assert relative_error(hidden[others], clean[1][others]) < 1e-6


def test_an_infinite_score_is_alone(place: Place) -> None:
    """At a negative: the positives of its rows, and their other negatives, keep their gradients."""
    inputs = layer(9, 5, 150, device=place.device)
    inputs["positives"] = inputs["positives"].where(inputs["positives"] != 7, 8)
    inputs["bias"][7] = torch.inf
    loss, _, weight, bias = gradients(inputs)
    assert (loss == torch.inf).all() and bias[7].isnan() and (bias[8:] < 0).any()
    assert bias.isfinite().sum() == 149 and weight.isfinite().all(1).sum() == 149
    agree(inputs)


def test_the_bias_gradient_of_many_rows(place: Place) -> None:
    """Of one that all of them predict: summed one after the other in float32, it would lose a digit."""
    rows = 3000 if place.small else 50_000
    inputs = layer(rows, 4, 7, device=place.device)
    inputs["bias"][3] = 8.0
    agree(inputs)


def test_the_gradient_of_weight_is_rounded_once(place: Place) -> None:
    """In bfloat16 as float64 rounds it, but where that lies between two numbers."""
    if place.small:
        return  # the interpreter computes bfloat16 wrongly
    inputs = layer(60, 24, 500, dtype=torch.bfloat16, device=place.device)
    exact = run(
        fp.reference.linear_zlpr_loss, {k: v.double() if k in LAYER else v for k, v in inputs.items()}, ("weight",)
    )
    ours = run(fp.linear_zlpr_loss, inputs, ("weight",))
    # The products of kernels take E in bfloat16.
    assert (ours[1] == exact[1].bfloat16()).float().mean() > (0.999 if place.backend == "tiled" else 0.6)


# --- products and memory -------------------------------------------------------------------------------------------


def products(inputs: dict[str, Any], names: tuple[str, ...], **options: Any) -> tuple[int, int]:
    """How many products of scores and of gradients there were."""
    leaves = [inputs[name].requires_grad_() for name in names]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = fp.linear_zlpr_loss(**inputs, **options).sum()
        if leaves:
            loss.backward()
    for leaf in leaves:
        leaf.requires_grad_(False).grad = None
    counts = {event.key: event.count for event in profile.key_averages()}
    return counts.get("aten::addmm", 0), counts.get("aten::addmm_", 0)


@pytest.mark.parametrize("tiles", [1, 3])
def test_three_products_and_no_more(tiles: int) -> None:
    """Where all rows fit; of what is frozen none; two where nothing is to be differentiated."""
    inputs = layer(6, 7, 85 * tiles)
    assert products(inputs, LAYER) == (tiles, 2 * tiles)
    assert products(inputs, ("weight", "bias")) == (tiles, tiles)
    assert products(inputs, ("weight",)) == (tiles, tiles)
    assert products(inputs, ()) == (tiles, 0)
    with torch.no_grad():
        assert products(inputs, ()) == (tiles, 0)
    # The scores again, for no memory is there.
    assert products(inputs, ("hidden", "bias")) == (2 * tiles, tiles)
    assert products(inputs, ("bias",)) == (2 * tiles, 0)
    assert products(inputs, LAYER, weight_grad=lambda first, gradient: None) == (2 * tiles, 2 * tiles)
    # A block of those beyond D rows, twice.
    assert products(layer(8, 7, 64), LAYER) == (3, 4)


def test_a_default_device_is_no_mode() -> None:
    """PyTorch has it as one. Under another one than that of the tensors too."""
    inputs = layer(6, 7, 85)
    expected, blocks = gradients(inputs), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert products(inputs, LAYER) == (1, 2)
            assert all(map(torch.equal, gradients(inputs), expected))
            run(
                fp.linear_zlpr_loss, {**inputs, "weight_grad": lambda _, gradient: blocks.append(gradient)}, ("hidden",)
            )
    assert len(blocks) == 2


@pytest.mark.parametrize("of, size", [(torch.float32, 7), (torch.bfloat16, 6), (torch.bfloat16, 7)])
def test_what_forward_kept_is_where_the_gradient_comes_to_lie(of: torch.dtype, size: int) -> None:
    inputs = layer(4, size, 200, dtype=of)
    weight = inputs["weight"].requires_grad_()
    loss = fp.linear_zlpr_loss(**inputs).sum()
    address = loss.grad_fn.next_functions[0][0].saved_tensors[-1].data_ptr()  # and no more: nobody else may have it
    loss.backward()
    assert weight.grad.data_ptr() == address


@pytest.mark.parametrize("rows, size, classes", [(64, 128, 20000), (256, 256, 10000), (32, 48, 40000)])
def test_memory(large_tiles: None, rows: int, size: int, classes: int) -> None:
    """Beside the gradients a megabyte; the scores alone take 5 to 10."""
    inputs = {**layer(rows, size, classes, 8), "reduction": "mean"}
    grads = sum(inputs[name].nbytes for name in LAYER)
    assert peak(fp.linear_zlpr_loss, inputs, LAYER, "cpu") <= grads + 2**20
    assert peak(fp.linear_zlpr_loss, inputs, (), "cpu") <= 2**20
    assert peak(fp.linear_zlpr_loss, inputs, ("hidden",), "cpu") <= inputs["hidden"].nbytes + 2**20
    assert peak(fp.reference.linear_zlpr_loss, inputs, LAYER, "cpu") > grads + 4 * rows * classes


def test_half_precision_is_never_upcast_whole(large_tiles: None) -> None:
    inputs = {**layer(64, 128, 30000, 8, torch.bfloat16), "reduction": "mean"}
    grads = sum(inputs[name].nbytes for name in LAYER)
    assert peak(fp.linear_zlpr_loss, inputs, LAYER, "cpu") <= grads + 4 * 2**20


# --- backward, again and in parts ------------------------------------------------------------------------------------


def test_bitwise_repeatable(place: Place) -> None:
    inputs = layer(20, 9, 300, device=place.device)
    first = gradients(inputs)
    for _ in range(2 if place.small else 20):
        assert all(map(torch.equal, first, gradients(inputs)))


def test_a_graph_that_is_kept_gives_the_same_again(place: Place) -> None:
    inputs = layer(20, 9, 300, device=place.device)
    leaves = [inputs[name].requires_grad_() for name in LAYER]
    loss = fp.linear_zlpr_loss(**inputs).sum()
    first, second, last = (torch.autograd.grad(loss, leaves, retain_graph=keep) for keep in (True, True, False))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert relative_error(c, a) < (1e-6 if place.backend == "tiled" else 1e-3)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("names", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")])
def test_what_is_frozen_gets_nothing_and_the_rest_the_same(place: Place, names: tuple[str, ...]) -> None:
    inputs = layer(20, 9, 300, device=place.device)
    whole = dict(zip(("loss", *LAYER), gradients(inputs), strict=True))
    for name, ours in zip(("loss", *names), run(fp.linear_zlpr_loss, inputs, names), strict=True):
        assert relative_error(ours, whole[name]) < (1e-6 if place.backend == "tiled" else 1e-3), name


def test_saved_tensors_may_be_packed(place: Place) -> None:
    inputs = layer(20, 9, 300, device=place.device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.cpu().clone(), lambda x: x.to(place.device)):
        packed = gradients(inputs)
    assert all(map(torch.equal, packed, gradients(inputs)))


# --- weight_grad -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_grad_takes_the_gradient_of_weight(place: Place, dtype: torch.dtype, frozen: bool) -> None:
    inputs = {**layer(20, 9, 300, dtype=dtype, device=place.device), "reduction": "mean"}
    expected = gradients(inputs)
    leaves = {name: inputs[name].requires_grad_(not frozen or name != "weight") for name in LAYER}
    blocks: list[tuple[int, torch.Tensor]] = []
    loss = fp.linear_zlpr_loss(**inputs, weight_grad=lambda first, gradient: blocks.append((first, gradient.clone())))
    loss.backward()
    assert leaves["weight"].grad is None
    sizes = [len(gradient) for _, gradient in blocks]
    assert [first for first, _ in blocks] == [sum(sizes[:i]) for i in range(len(sizes))] and sum(sizes) == 300
    assert all(gradient.dtype == loss.dtype for _, gradient in blocks)
    together = torch.cat([gradient for _, gradient in blocks]).to(dtype)
    if place.backend == "tiled":
        assert torch.equal(together, expected[2])
    for ours, theirs in zip((leaves["hidden"].grad, together, leaves["bias"].grad), expected[1:], strict=True):
        assert relative_error(ours, theirs) < max(1e-6, torch.finfo(dtype).eps)


def test_a_step_of_sgd_in_weight_grad(place: Place) -> None:
    """On the rows that it is given, while backward goes on over the others."""
    inputs = layer(20, 9, 300, device=place.device)
    _, hidden, weight, bias = gradients(inputs)
    stepped = inputs["weight"] - 0.1 * weight
    for name in LAYER:
        inputs[name].requires_grad_()

    def step(first: int, gradient: torch.Tensor) -> None:
        inputs["weight"].data[first : first + len(gradient)] -= 0.1 * gradient

    fp.linear_zlpr_loss(**inputs, weight_grad=step).sum().backward()
    for ours, theirs in ((inputs["weight"], stepped), (inputs["hidden"].grad, hidden), (inputs["bias"].grad, bias)):
        assert relative_error(ours.detach(), theirs) < 1e-6


def test_weight_grad_is_refused_where_nothing_could_call_it() -> None:
    inputs = layer(2, 3, 10)
    inputs["weight"].requires_grad_()
    step = lambda first, gradient: None  # noqa: E731
    with pytest.raises(Exception, match=r"weight_grad is a function, which torch\.compile"):
        torch.compile(lambda **inputs: fp.linear_zlpr_loss(**inputs, weight_grad=step), backend="eager")(**inputs)
    with (
        torch.utils.flop_counter.FlopCounterMode(display=False),
        pytest.raises(RuntimeError, match=f"^{OP}: weight_grad is a function"),
    ):
        fp.linear_zlpr_loss(**inputs, weight_grad=step)
    with fp.use_backend("reference"), pytest.raises(ValueError, match=f"{OP}: weight_grad takes None under"):
        fp.linear_zlpr_loss(**inputs, weight_grad=step)


# --- as an op of PyTorch's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(place: Place, reduction: str, keep: bool, soft: bool) -> None:
    inputs = layer(6, 5, 40, device=place.device)
    inputs["hidden"] = inputs["hidden"].view(2, 3, 5).transpose(0, 1)
    inputs["positives"] = inputs["positives"].view(3, 2, 4)
    labels = torch.rand(3, 2, 4, device=place.device) if soft else None
    hidden, weight, bias = (inputs[name].requires_grad_() for name in LAYER)
    options = (reduction, -100, None, True, 0, 40, keep, place.backend)
    op = torch.ops.flashpointer
    # What is kept it shows as a second output, and it is another one each time.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        op.linear_zlpr_loss.default,
        (hidden, weight, inputs["positives"], bias, labels, *options),
        test_utils=utilities if keep else (*utilities, "test_aot_dispatch_dynamic"),
    )
    with torch.no_grad():
        loss, saved = op.linear_zlpr_loss(hidden, weight, inputs["positives"], bias, labels, *options)
        for wanted in ([True, True, True], [False, True, False]):
            arguments = (torch.rand_like(loss), hidden, weight, bias, saved[:-1], soft, reduction, None, wanted)
            torch.library.opcheck(op.linear_zlpr_loss_backward.default, (*arguments, place.backend))


def test_fullgraph(place: Place) -> None:
    """Inside a graph with work before and after, one for all numbers of rows."""
    if place.small:
        return  # one compiled process is enough: opcheck traces the interpreted kernels

    def step(**inputs: Any) -> torch.Tensor:
        inputs["hidden"] = inputs["hidden"] * 2
        return fp.linear_zlpr_loss(**inputs) * 3

    torch._dynamo.reset()
    for function, backend in ((step, "aot_eager"), (fp.linear_zlpr_loss, "inductor")):  # which has nothing to generate
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for rows in (3, 6, 7):  # none as many as listed, which tracing would hold to stay so
            inputs = {**layer(rows, 5, 90, device=place.device), "reduction": "mean"}
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = run(compiled, inputs, LAYER)
            for ours, truth in zip(found, run(function, dict(inputs), LAYER), strict=True):
                assert relative_error(ours, truth) < 1e-6


def test_autocast(place: Place) -> None:
    """A layer and its loss as torch.nn.Linear would be cast; the weights get their gradient in float32."""
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    inputs = {**layer(20, 9, 300, device=place.device), "reduction": "mean"}
    with torch.autocast(place.device, half):
        loss, *grads = gradients({**inputs, "hidden": inputs["hidden"].to(half)})
    cast = {name: x.to(half) if name in LAYER else x for name, x in inputs.items()}
    assert torch.equal(loss, gradients(cast)[0])
    assert [x.dtype for x in grads] == [half, torch.float32, torch.float32]
    for ours, theirs in zip(grads, gradients(cast)[1:], strict=True):
        assert torch.equal(ours.to(half), theirs)


# --- the layer as a module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_module(place: Place, bias: bool) -> None:
    """It is a torch.nn.Linear, state dict and scores, and its loss is the op's."""
    inputs = layer(20, 9, 300, device=place.device)
    theirs, ours = nn.Linear(9, 300, bias).to(place.device), fp.nn.LinearZLPR(9, 300, bias).to(place.device)
    assert ours.weight.abs().max() <= 1 / 3 and ours.weight.std() > 0.17
    assert not bias or torch.equal(ours.bias, torch.full_like(ours.bias, -math.log(300)))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(inputs["hidden"]), theirs(inputs["hidden"]))
    best = ours.topk(inputs["hidden"], 5, threshold=0.5)
    for x, y in zip(
        best, fp.linear_topk(inputs["hidden"], theirs.weight, theirs.bias, k=5, threshold=0.5), strict=True
    ):
        assert torch.equal(x, y)
    loss = ours.loss(inputs["hidden"], inputs["positives"])
    expected = fp.linear_zlpr_loss(inputs["hidden"], theirs.weight, inputs["positives"], theirs.bias)
    assert torch.equal(loss, expected)
    loss.backward()
    assert torch.equal(ours.weight.grad, torch.autograd.grad(expected, theirs.weight)[0])
    blocks: list[torch.Tensor] = []
    ours.loss(
        inputs["hidden"], inputs["positives"], weight_grad=lambda first, gradient: blocks.append(gradient.clone())
    ).backward()
    assert relative_error(torch.cat(blocks), ours.weight.grad) < 1e-6
    assert repr(ours) == f"LinearZLPR(hidden_size=9, classes=300, bias={bias})"


def test_the_module_learns(place: Place) -> None:
    """By Adam, and its classes are those with scores above 0."""
    hidden = torch.randn(16, 32, device=place.device)
    positives = torch.randint(200, (16, 3), device=place.device)
    head = fp.nn.LinearZLPR(32, 200).to(place.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(8 if place.small else 60):
        optimizer.zero_grad()
        head.loss(hidden, positives).backward()
        optimizer.step()
    labels = torch.zeros(16, 200, dtype=torch.bool, device=place.device).scatter(1, positives, True)
    wrong = ((head(hidden) > 0) != labels).float().mean()
    assert wrong < (0.1 if place.small else 1e-3)


# --- sharded over ranks ----------------------------------------------------------------------------------------------

COUNTS = (2, 3)


def cuts_of(ranks: int) -> list[list[int]]:
    """Where shards of 150 classes begin and end: uneven, empty, a single class."""
    many = [[0, 40, 150], [0, 150, 150], [0, 149, 150]]
    return many if ranks == 2 else [[0, 40, 70, 150], [0, 0, 150, 150], [0, 9, 149, 150]]


def shard_of(inputs: dict[str, Any], cuts: list[int], rank: int) -> dict[str, Any]:
    own = {name: inputs[name][cuts[rank] : cuts[rank + 1]] for name in ("weight", "bias")}
    return {**inputs, **own, "group": dist.group.WORLD, "first_class": cuts[rank]}


def of_all_ranks(x: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, x)
    return everybody


@in_ranks(*COUNTS)
def test_sharded_loss_and_gradients_are_those_of_the_whole(rank: int, ranks: int) -> None:
    """Of the same bits on all ranks, for positives anywhere, soft labels, and scores that need a pivot on one rank."""
    cases = [*itertools.product([torch.float32], cuts_of(ranks), ("hard", "soft", "large", "the last class"))]
    cases += [(dtype, cuts_of(ranks)[0], "hard") for dtype in DTYPES if dtype != torch.float32]
    for dtype, cuts, kind in cases:
        inputs, upstream = layer(20, 9, 150, dtype=dtype), torch.randn(20)
        if kind == "soft":
            inputs["positive_labels"] = torch.rand(20, 4)
        if kind == "large":
            inputs["bias"][149] = 100.0
        if kind == "the last class":
            inputs["positives"] = torch.full((20, 1), 149)
        with mock.patch.multiple(tiled, **SMALL):
            of_ranks = of_all_ranks(gradients(shard_of(inputs, cuts, rank), upstream))
        losses, hiddens, weights, biases = zip(*of_ranks, strict=True)
        assert all(torch.equal(x, same[0]) for same in (losses, hiddens) for x in same)
        ours = [losses[0], hiddens[0], torch.cat(weights), torch.cat(biases)]
        for result in judge(OP, inputs, ours, differentiate=LAYER, upstream=upstream):
            assert result.ok, (dtype, cuts, kind, result)


@in_ranks(*COUNTS)
def test_sharded_parts_may_be_frozen(rank: int, ranks: int) -> None:
    """On some ranks, but for hidden: where one waits for its gradient all must, and all are told."""
    inputs, cuts = layer(20, 9, 150), cuts_of(ranks)[0]
    whole = gradients(inputs)
    names = LAYER if rank == 0 else ("hidden",)
    grads = run(fp.linear_zlpr_loss, shard_of(inputs, cuts, rank), names)
    assert relative_error(grads[1], whole[1]) < 1e-6
    blocks: list[torch.Tensor] = []
    taken = {**shard_of(inputs, cuts, rank), "weight_grad": lambda first, gradient: blocks.append(gradient.clone())}
    run(fp.linear_zlpr_loss, taken, ("hidden",))
    assert relative_error(torch.cat(blocks), whole[2][cuts[rank] : cuts[rank + 1]]) < 1e-6
    hidden = inputs["hidden"].clone().requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=rf"{OP}: hidden must require a gradient on all ranks .*; got \[True, False"):
        fp.linear_zlpr_loss(**{**shard_of(inputs, cuts, rank), "hidden": hidden})


@in_ranks(*COUNTS)
def test_sharded_compiled(rank: int, ranks: int) -> None:
    cuts = cuts_of(ranks)[0]

    def step(**inputs: Any) -> torch.Tensor:
        return fp.linear_zlpr_loss(**inputs) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 5):
        shard = shard_of(layer(rows, 9, 150), cuts, rank)
        for ours, truth in zip(run(compiled, shard, LAYER), run(step, shard, LAYER), strict=True):
            assert relative_error(ours, truth) < 1e-6


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_the_listed_cells(place: Place) -> None:
    lists = torch.tensor([[5, 1, -1, 5], [9, 30, 3, 7]], device=place.device)
    labels = torch.arange(8.0, device=place.device).view(2, 4)
    listed = listed_cells(Lists(lists, labels, 7, 3), 7)
    cells = list(zip(*(x.tolist() for x in listed), strict=True))
    assert cells[:3] == [(1, 0, 6.0), (0, 2, 0.0), (1, 6, 4.0)]
    assert [classes for _, classes, _ in cells[3:]] == [7] * 5
    assert sorted(row for row, *_ in cells) == [0] * 4 + [1] * 4


def test_an_index_that_nobody_checked_is_dropped(place: Place) -> None:
    """As on a GPU, where to look would be to wait."""
    wild = torch.tensor([[5, 40, 2**40], [2**62, 9, 2**63 - 1]], device=place.device)
    tame = torch.tensor([[5, -1, -1], [-1, 9, -1]], device=place.device)
    for first in (0, 3):
        wild_cells, tame_cells = (listed_cells(Lists(x, None, -100, first), 40 - first) for x in (wild, tame))
        assert torch.equal(wild_cells.classes, tame_cells.classes)


@pytest.mark.gpu
def test_wrong_indices_on_a_gpu_raise_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(2, 3, 5, device="cuda")
    inputs["positives"][:] = 5
    assert fp.linear_zlpr_loss(**inputs).isfinite().all()
    monkeypatch.setattr("flashpointer.backends.CHECK_INDICES", True)
    with pytest.raises(ValueError, match="positives takes class indices below 5"):
        fp.linear_zlpr_loss(**inputs)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("rows, size, classes", [(4096, 16, 600_000), (8, 768, 3_000_000)])
def test_more_than_2_to_the_31_numbers(large_tiles: None, rows: int, size: int, classes: int) -> None:
    """Of scores, and of weight: whose classes repeat, so that those of a part tell the loss of all."""
    part = layer(rows, size, classes // 100, dtype=torch.bfloat16, device="cuda")
    part["positives"][:] = -1
    sums = fp.linear_zlpr_loss(**part).double().expm1()  # of the negatives
    inputs = {**part, "weight": part["weight"].repeat(100, 1), "bias": part["bias"].repeat(100)}
    loss, hidden, weight, bias = gradients(inputs)
    assert relative_error(loss, (100 * sums).log1p()) < 1e-5
    for x in (weight, bias):  # of another block of classes, which is rounded relative to another largest score
        assert relative_error(x[-classes // 100 :], x[: classes // 100]) < 1e-2
    assert hidden.isfinite().all()


HIDDEN, WEIGHT, LISTS = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([[1, 2], [3, -1]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden": None}, TypeError, "hidden takes a floating-point tensor.*; got NoneType"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden takes at least one dimension"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \[C, 3\], to fit hidden .*; got .*\(3,\)"),
        ({"weight": WEIGHT[:, :2]}, ValueError, r"weight must be \[C, 3\]"),
        ({"weight": WEIGHT.double()}, ValueError, "weight takes torch.float32, as hidden is, or autocast; got"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, where hidden is"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[5\], to fit weight"),
        ({"bias": torch.ones(5).half()}, ValueError, "bias takes torch.float32"),
        ({"positives": LISTS.float()}, TypeError, "positives takes an integer tensor.*; got a torch.float32"),
        ({"positives": LISTS[:1]}, ValueError, r"positives must be \[..., P\].*\(2,\); got .*\(1, 2\)"),
        ({"positives": LISTS[0]}, ValueError, r"positives must be \[..., P\]"),
        ({"positives": LISTS.to("meta")}, ValueError, "positives must be on cpu"),
        ({"positives": LISTS + 2}, ValueError, r"positives takes class indices below 5.*; got 5 at \(1, 0\)"),
        ({"positive_labels": LISTS}, TypeError, "positive_labels takes a floating-point tensor"),
        (
            {"positive_labels": torch.ones(2, 1)},
            ValueError,
            r"positive_labels must be of the shape of positives, \(2, 2\)",
        ),
        ({"positive_labels": torch.ones(2, 2, requires_grad=True)}, ValueError, "positive_labels takes no gradient"),
        (
            {"positive_labels": torch.full((2, 2), 1.5)},
            ValueError,
            r"positive_labels takes 0 to 1, or -100 .*got 1.5 at",
        ),
        ({"positive_labels": torch.full((2, 2), torch.nan)}, ValueError, "positive_labels takes 0 to 1"),
        ({"reduction": None}, ValueError, "reduction takes one of"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index takes an int; got float 0.5"),
        ({"group": 3}, TypeError, "group takes a torch.distributed.ProcessGroup"),
        ({"first_class": 3}, ValueError, "first_class takes None where group is None; got int 3"),
        ({"weight_grad": 3}, TypeError, "weight_grad takes a function, or None; got int 3"),
    ],
)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_errors(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with fp.use_backend(backend), pytest.raises(error, match=f"{OP}: {message}"):
        fp.linear_zlpr_loss(**{"hidden": HIDDEN, "weight": WEIGHT, "positives": LISTS, **arguments})


@pytest.mark.parametrize("wrong", [1.5, -1.0, torch.nan])
def test_a_label_that_nobody_checked_makes_its_row_nan(
    place: Place, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """As on a GPU."""
    monkeypatch.setattr("flashpointer.ops._checks.can_look", lambda values: False)
    inputs = {**layer(3, 5, 100, device=place.device), "positive_labels": torch.rand(3, 4, device=place.device)}
    inputs["positives"][1, 2] = 7
    clean = gradients(inputs)
    inputs["positive_labels"][1, 2] = wrong
    loss, hidden, *_ = gradients(inputs)
    assert loss.isnan().tolist() == [False, True, False]
    assert hidden[1].isnan().all()
    assert relative_error(loss[::2], clean[0][::2]) < 1e-6
    assert relative_error(hidden[::2], clean[1][::2]) < 1e-6


def test_a_label_of_padding_is_nobodys(place: Place) -> None:
    inputs = layer(2, 3, 5, device=place.device)
    inputs["positives"] = LISTS.to(place.device)
    inputs["positive_labels"] = torch.tensor([[1.0, 0.5], [0.2, torch.nan]], device=place.device)
    agree(inputs)
