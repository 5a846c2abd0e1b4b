"""linear_topk against all scores, sorted: ties, edges, thresholds, strides, memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import flashpointer as fp
from flashpointer.tiled import linear_topk as tiles

from .conftest import Place
from .processes import in_ranks
from .test_memory import DEVICES, peak


@pytest.fixture(params=["one tile", "tiles"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such test with all in one tile, and with tiles of 2 rows and 60 classes."""
    if request.param == "tiles":
        for name, value in {"CPU_CELLS": 120, "CELLS": 120, "CPU_HEIGHT": 2, "HEIGHT": 2}.items():
            monkeypatch.setattr(tiles, name, value)


def problem(
    R: int, C: int, D: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers, whose scores are exact in every dtype and tie everywhere."""
    shapes = ((R, D), (C, D), (C,))
    hidden, weight, bias = (torch.randint(-2, 3, shape, device=device).to(dtype) for shape in shapes)
    return hidden, weight, bias


def sorted_by_hand(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int, threshold: float | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    scores = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    rows = [sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))[:k] for row in scores.tolist()]
    if threshold is not None:
        rows = [[c for c in row if scores[r, c] > threshold] for r, row in enumerate(rows)]
    values = [[scores[r, c].item() for c in row] + [-torch.inf] * (k - len(row)) for r, row in enumerate(rows)]
    return values, [row + [-1] * (k - len(row)) for row in rows]


@pytest.mark.parametrize("k", [1, 3, 200, 230])
@pytest.mark.parametrize("with_bias", [False, True])
def test_all_sorted(place: Place, dtype: torch.dtype, narrow: None, with_bias: bool, k: int) -> None:
    hidden, weight, bias = problem(5, 200, dtype=dtype, device=place.device)
    best = fp.linear_topk(hidden, weight, bias if with_bias else None, k=k)
    assert best.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert best.classes.dtype == torch.int64
    scores, classes = sorted_by_hand(hidden, weight, bias if with_bias else None, k)
    assert best.classes.tolist() == classes
    assert best.scores.tolist() == scores


def test_real_scores(place: Place, dtype: torch.dtype, narrow: None) -> None:
    """Each place has the score that all scores, sorted, have there, to the rounding of a sum in float32."""
    hidden, weight = (torch.randn(n, 32, device=place.device).to(dtype) for n in (7, 500))
    scores, classes = fp.linear_topk(hidden, weight, k=9)
    exact = hidden.double() @ weight.double().T
    rounding = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 3e-5}
    torch.testing.assert_close(scores.double(), exact.topk(9).values, **rounding)
    torch.testing.assert_close(scores.double(), exact.gather(1, classes), **rounding)
    assert all(len(set(row)) == 9 for row in classes.tolist())


@pytest.mark.parametrize("threshold", [-torch.inf, -3, 4.0, 7.5, 1000])
def test_a_threshold(place: Place, narrow: None, threshold: float) -> None:
    hidden, weight, bias = problem(5, 70, device=place.device)
    for k in (4, 90):
        best = fp.linear_topk(hidden, weight, bias, k=k, threshold=threshold)
        assert (best.scores.tolist(), best.classes.tolist()) == sorted_by_hand(hidden, weight, bias, k, threshold)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("C, D", [(0, 6), (1, 6), (50, 0), (50, 1)])
def test_nothing_to_do(place: Place, narrow: None, lead: tuple[int, ...], C: int, D: int) -> None:
    hidden, weight, bias = problem(max(1, torch.Size(lead).numel()), C, D, device=place.device)
    hidden = hidden[: torch.Size(lead).numel()].view(*lead, D)
    best = fp.linear_topk(hidden, weight, bias, k=3)
    assert best.scores.shape == best.classes.shape == (*lead, 3)
    by_hand = sorted_by_hand(hidden.reshape(torch.Size(lead).numel(), D), weight, bias, 3)
    assert (best.scores.view(-1, 3).tolist(), best.classes.view(-1, 3).tolist()) == by_hand


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_infinities_zeros_and_nans(kind: torch.dtype, narrow: None) -> None:
    """A class of score -inf is one; the zeros are one; NaNs of either sign are above all, as in torch.topk."""
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan, -torch.nan, 1e-45, -1e-45, 1.0], dtype=kind)
    bias = special[torch.randint(len(special), (300,))]
    bias[:4] = torch.tensor([-torch.inf, 0.0, -0.0, 0.0])
    hidden, weight = torch.zeros(3, 2, dtype=kind), torch.zeros(300, 2, dtype=kind)
    for chosen in (bias, bias.nan_to_num(nan=2.0, posinf=torch.inf, neginf=-torch.inf)):
        for k in (5, 300, 310):
            scores, classes = fp.linear_topk(hidden, weight, chosen, k=k)
            order = (0 * hidden[:1, 0] + chosen).sort(descending=True, stable=True)
            expected = torch.cat([order.indices, torch.full((310,), -1)])[:k]
            assert torch.equal(classes, expected.expand(3, k))
            values = torch.cat([order.values, torch.full((310,), -torch.inf, dtype=kind)])[:k].expand(3, k)
            torch.testing.assert_close(scores, values, rtol=0, atol=0, equal_nan=True)
    above = fp.linear_topk(hidden, weight, bias, k=300, threshold=-torch.inf)
    assert not above.scores.isnan().any()
    assert (above.scores[:, 1:] <= above.scores[:, :-1]).all()  # what is left out stands behind
    assert (above.classes[:, 1:] >= 0).le(above.classes[:, :-1] >= 0).all()
    assert (above.classes >= 0).sum() == 3 * (bias > -torch.inf).sum()


def test_zeros_are_one() -> None:
    """A product gives no -0 where it starts from 0, but need not."""
    assert tiles._order(torch.tensor([[-1.0, -0.0, 0.0, -0.0]]), 3).tolist() == [[1, 2, 3]]


def test_a_late_nan(narrow: None) -> None:
    bias = torch.zeros(300)
    bias[299] = torch.nan
    assert fp.linear_topk(torch.zeros(2, 1), torch.zeros(300, 1), bias, k=3).classes.tolist() == [[299, 0, 1]] * 2


def test_a_nan_stays_in_its_row(narrow: None) -> None:
    hidden, weight, bias = problem(4, 300)
    expected = fp.linear_topk(hidden, weight, bias, k=5)
    hidden[1] = torch.nan
    best = fp.linear_topk(hidden, weight, bias, k=5)
    assert best.classes[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(best.classes[[0, 2, 3]], expected.classes[[0, 2, 3]])


def test_the_best_come_last(place: Place, narrow: None) -> None:
    """Each tile has better ones than all before, and the last class is the best."""
    hidden, weight = torch.ones(3, 1, device=place.device), torch.arange(1000.0, device=place.device).unsqueeze(1)
    assert fp.linear_topk(hidden, weight, k=4).classes.tolist() == [[999, 998, 997, 996]] * 3
    assert fp.linear_topk(hidden, weight * 0, k=4).classes.tolist() == [[0, 1, 2, 3]] * 3


def test_strides(place: Place, dtype: torch.dtype, narrow: None) -> None:
    hidden, weight, bias = problem(6, 100, 12, dtype, place.device)
    expected = fp.linear_topk(hidden[:, ::2].contiguous(), weight[:, ::2].contiguous(), bias, k=5)
    strided = (hidden[:, ::2], weight.T.contiguous().T[:, ::2], bias.repeat_interleave(3)[::3])
    for best in (fp.linear_topk(*strided, k=5), fp.linear_topk(strided[0].view(2, 3, 6), *strided[1:], k=5)):
        assert torch.equal(best.classes.view(6, 5), expected.classes)
        assert torch.equal(best.scores.view(6, 5), expected.scores)
    one = fp.linear_topk(hidden[:1, :6].expand(6, 6), weight[:1, :6].expand(9, 6), k=9)
    assert one.classes.tolist() == [list(range(9))] * 6


def test_the_reference_is_the_same(narrow: None) -> None:
    hidden, weight, bias = problem(5, 200)
    for k, threshold in ((1, None), (7, 2.0), (230, None)):
        ours = fp.linear_topk(hidden, weight, bias, k=k, threshold=threshold)
        with fp.use_backend("reference"):
            reference = fp.linear_topk(hidden, weight, bias, k=k, threshold=threshold)
        assert torch.equal(ours.classes, reference.classes)
        assert torch.equal(ours.scores, reference.scores)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_no_gradient(backend: str) -> None:
    hidden, weight, bias = (x.requires_grad_() for x in problem(5, 20))
    with fp.use_backend(backend):
        assert not any(x.requires_grad for x in fp.linear_topk(hidden * 2, weight, bias, k=2))


def test_autocast_rounds_nothing() -> None:
    hidden, weight = torch.randn(5, 64), torch.randn(200, 64)
    expected = fp.linear_topk(hidden, weight, k=3)
    half = fp.linear_topk(hidden.bfloat16().float(), weight, k=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp.linear_topk(hidden, weight, k=3).scores, expected.scores)
        assert torch.equal(fp.linear_topk(hidden.bfloat16(), weight, k=3).scores, half.scores)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_fullgraph(backend: str) -> None:
    """Without Inductor, which takes long: of the op's shapes and strides opcheck knows."""

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = fp.linear_topk(hidden * 2, weight, bias, k=3, threshold=0.0)
        return best.scores + 1, best.classes + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with fp.use_backend(backend):
        for R, C in ((4, 20), (5, 31), (6, 2)):
            hidden, weight, bias = (x.requires_grad_() for x in problem(R, C))
            for ours, eager in zip(compiled(hidden, weight, bias), step(hidden, weight, bias), strict=True):
                assert torch.equal(ours, eager)
                assert not ours.requires_grad


def test_opcheck(dtype: torch.dtype, place: Place) -> None:
    hidden, weight, bias = problem(6, 30, 4, dtype, place.device)
    op = torch.ops.flashpointer.linear_topk.default
    torch.library.opcheck(op, (hidden.view(2, 3, 4).transpose(0, 1), weight, None, 3, None, 0))
    torch.library.opcheck(op, (hidden, weight, bias, 40, None, 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R, C, D", [(64, 50_000, 16), (1, 300_000, 16), (2000, 2000, 256)])
def test_small_beside_the_scores(device: str, kind: torch.dtype, R: int, C: int, D: int) -> None:
    """A tile of scores, as much of weights in float32, and its maxima."""
    hidden, weight = (torch.randn(n, D, device=device).to(kind) for n in (R, C))
    inputs = {"hidden": hidden, "weight": weight, "k": 5}
    tile = 4 * min(R * C, tiles.CPU_CELLS if device == "cpu" else tiles.CELLS)
    assert peak(lambda **inputs: fp.linear_topk(**inputs).scores, inputs, (), device) <= 2.5 * tile + 2**20


# --- classes sharded over ranks --------------------------------------------------------------------------------------

# Of three ranks, or two of them: uneven, empty, and in another order than the ranks.
CUTS = [
    [(0, 20), (20, 40), (40, 60)],
    [(0, 3), (3, 57), (57, 60)],
    [(0, 60), (60, 60), (60, 60)],
    [(9, 60), (0, 9), (60, 60)],
]


@in_ranks(2, 3)
def test_sharded(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = problem(4, 60, dtype=dtype)
        bias[50] = -torch.inf
        for cuts in CUTS:
            first, stop = cuts[rank]
            C = max(stop for _, stop in cuts[:ranks])
            for k, threshold in ((1, None), (5, 1.0), (70, None)):
                whole = fp.linear_topk(hidden, weight[:C], bias[:C], k=k, threshold=threshold)
                shard: Any = {"weight": weight[first:stop], "bias": bias[first:stop], "group": group}
                shard |= {} if cuts == CUTS[0] else {"first_class": first}
                ours = fp.linear_topk(hidden.view(2, 2, -1), **shard, k=k, threshold=threshold)
                assert torch.equal(ours.classes.view(4, k), whole.classes)
                assert torch.equal(ours.scores.view(4, k), whole.scores)
    empty = fp.linear_topk(hidden[:0], weight[:0], k=2, group=group, first_class=0)
    assert empty.scores.shape == (0, 2)


@in_ranks(2)
def test_a_sharded_graph(rank: int, ranks: int) -> None:
    hidden, weight, _ = problem(4, 40)
    weight = weight.chunk(ranks)[rank]
    step = lambda hidden, weight: fp.linear_topk(hidden * 2, weight, k=3, group=dist.group.WORLD)  # noqa: E731
    ours, eager = (f(hidden, weight) for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step))
    assert torch.equal(ours.classes, eager.classes)
    assert torch.equal(ours.scores, eager.scores)


@in_ranks(2)
def test_shards_that_do_not_fit(rank: int, ranks: int) -> None:
    hidden, weight, _ = problem(4, 40)
    with pytest.raises(ValueError, match="linear_topk: first_class takes the first class of this rank's shard"):
        fp.linear_topk(hidden, weight, k=3, group=dist.group.WORLD, first_class=rank)
    with fp.use_backend("reference"), pytest.raises(ValueError, match="linear_topk: group takes None under the ref"):
        fp.linear_topk(hidden, weight, k=3, group=dist.group.WORLD)


# --- errors ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an integer": (
        {"hidden": torch.ones(2, 4, dtype=torch.int64)},
        "hidden takes a floating-point tensor [..., D]; ",
    ),
    "a scalar": ({"hidden": torch.tensor(1.0)}, "hidden takes at least one dimension, D; got"),
    "other D": (
        {"weight": torch.ones(5, 3)},
        "weight must be [C, 4], to fit hidden of shape (2, 4); got a torch.float32 tensor",
    ),
    "one class": (
        {"weight": torch.ones(4)},
        "weight must be [C, 4], to fit hidden of shape (2, 4); got a torch.float32 tensor",
    ),
    "another dtype": (
        {"weight": torch.ones(5, 4).half()},
        "weight takes torch.float32, as hidden is, or autocast; ",
    ),
    "another device": ({"weight": torch.ones(5, 4, device="meta")}, "weight must be on cpu, where hidden is; got"),
    "a long bias": (
        {"bias": torch.ones(6)},
        "bias must be [5], to fit weight of shape (5, 4); got",
    ),
    "a list": ({"bias": [0.0] * 5}, "bias takes a floating-point tensor [C]; got list [0.0, 0.0"),
    "no k": ({"k": 0}, "k takes an int of at least 1; got int 0"),
    "half a k": ({"k": 2.5}, "k takes an int of at least 1; got float 2.5"),
    "a true k": ({"k": True}, "k takes an int of at least 1; got bool True"),
    "a group by name": (
        {"group": "world"},
        "group takes a torch.distributed.ProcessGroup that this rank is in, or None",
    ),
    "a shard of none": ({"first_class": 5}, "first_class takes None where group is None; got int 5"),
    "NaN": ({"threshold": float("nan")}, "threshold takes a number, or None; got float nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    arguments, says = WRONG[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        fp.linear_topk(**{"hidden": torch.ones(2, 4), "weight": torch.ones(5, 4), "k": 2, **arguments})
    assert str(caught.value).startswith(f"linear_topk: {says}")
    assert "\n" not in str(caught.value)
