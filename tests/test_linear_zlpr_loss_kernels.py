"""The kernels of linear_zlpr_loss at sizes that no other test has: several tiles of rows, and blocks of classes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from flashpointer.kernels import linear_zlpr_loss as kernels

import flashpointer as fp
from flashpointer.problem import Listed, Lists
from flashpointer.tiled import linear_zlpr_loss as tiled

from .conftest import Place
from .problems import soft_labels
from .test_linear_zlpr_loss import agree, gradients, layer


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of classes to a block, and of rows to a launch."""
    monkeypatch.setattr(kernels, "SCRATCH", 1)
    monkeypatch.setattr(kernels, "PARTIALS", 1)
    monkeypatch.setattr(tiled, "CELLS", 1)
    monkeypatch.setattr(tiled, "WIDTH", 64)


@pytest.mark.parametrize("size", [144, 139, 40], ids=["all kept", "some kept", "none kept"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_tiles_and_blocks(place: Place, dtype: torch.dtype, small_blocks: None, size: int, soft: bool) -> None:
    inputs = layer(140, size, 300, 1, dtype, place.device)
    if soft:
        inputs["positive_labels"] = soft_labels((140, 1)).to(place.device)
    agree(inputs, torch.randn(140, device=place.device))


def test_blocks_of_the_gradient_ascend(place: Place, small_blocks: None) -> None:
    inputs = layer(20, 24, 300, device=place.device)
    expected = gradients(inputs)[2]
    blocks: list[tuple[int, torch.Tensor]] = []
    inputs["weight_grad"] = lambda first, grad: blocks.append((first, grad.clone()))
    inputs["weight"].requires_grad_()
    fp.linear_zlpr_loss(**inputs).sum().backward()
    firsts = [first for first, _ in blocks]
    assert firsts == sorted(firsts) and len(firsts) > 1
    torch.testing.assert_close(torch.cat([grad for _, grad in blocks]), expected)


@pytest.mark.parametrize("labelled", [False, True])
def test_cells_are_sorted_by_tile(place: Place, labelled: bool) -> None:
    """The same cells as on the tiled path, in the order of their tiles, with where those of each tile begin. Among the
    classes are padding, some listed twice, those of other shards, and some that no tensor has."""
    if place.backend == "tiled":
        return  # whose own order is that of the classes
    rows, per_row, first, classes = 300, 7, 40, 500
    positives = torch.randint(30, 560, (per_row, rows), device=place.device).T
    positives[::3, 2:5] = torch.tensor([-100, 2**40, 2**63 - 1], device=place.device)
    positives[1::3, 6] = positives[1::3, 0]
    labels = torch.rand(rows, per_row, device=place.device) if labelled else None
    lists = Lists(positives, labels, -100, first)
    hidden, weight = (torch.zeros(n, 16, device=place.device) for n in (rows, classes))
    cells, order = kernels.sort_cells(hidden, weight, lists)
    assert torch.equal(order // per_row, cells.rows) and order.unique().numel() == rows * per_row
    by_class = tiled.listed_cells(lists, classes)

    def live(listed: Listed) -> list[tuple[float, ...]]:
        columns = [x.tolist() for x in listed if x is not None]
        return sorted(cell for cell in zip(*columns, strict=True) if cell[1] < classes)

    assert live(cells) == live(by_class) != []
    of_row = cells.rows.bincount(minlength=rows)
    assert of_row.eq(per_row).all()
    layer = kernels.prepare(hidden, weight, None, cells)
    bm, bn = layer.rule.bm, layer.rule.bn
    of_rows = -(-rows // bm)
    tiles = [c // bn * of_rows + r // bm for r, c in zip(cells.rows.tolist(), cells.classes.tolist(), strict=True)]
    count = len(live(cells))
    assert tiles[:count] == sorted(tiles[:count])
    assert layer.bounds.tolist() == [sum(t < tile for t in tiles[:count]) for tile in range(len(layer.bounds))]


@pytest.mark.parametrize("level, upstream", [(-14.0, 2.0**14), (14.0, 2.0**-4)])
def test_exponentials_beyond_float16(place: Place, level: float, upstream: float) -> None:
    """exp(-14) leaves float16 hardly a digit, and exp(14) is inf; half the classes are far below the others. A share of
    the upstream gradient has no digit to spare."""
    inputs = layer(9, 32, 300, 2, torch.float16, place.device)
    inputs["weight"] *= 0.1
    inputs["bias"] += level
    inputs["bias"][::2] -= 9
    inputs["positives"].fill_(-1)
    agree(inputs, torch.rand(9, device=place.device) * upstream)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_offsets_beyond_32_bits(place: Place, name: str) -> None:
    """Two vectors 2^31 elements apart: only the pages that are touched exist."""
    if place.device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    if place.device == "cuda" and name == "weight":
        pytest.skip("cuBLAS takes no such stride, in eager PyTorch either")
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would touch them all
    inputs = layer(2, 16, 2, 1, torch.float16, place.device)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=place.device).as_strided((2, 16), (2**31, 1))
    inputs[name] = far.copy_(inputs[name])
    agree(inputs)
