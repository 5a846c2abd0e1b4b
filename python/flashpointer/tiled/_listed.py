"""The cells that ``pointer_loss`` is given labels of: which of them count, and in which rows of which tile they lie.

The number of a cell has the digits band, sentence, head, start, end, where a band is the start tokens of tiles side by
side: so the cells of a tile follow one another in order. Up to FEW of them are a list, for Python; more are a tensor,
for PyTorch. Both come to the same.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch

from ..problem import FEW, Problem
from ._cells import Tile

# Sorts behind every cell, and says that there is none.
NOWHERE = torch.iinfo(torch.int64).max

Numbers = list[int] | torch.Tensor


class Grid(NamedTuple):
    """What the numbers of cells, rows and planes are made of."""

    batch: int
    heads: int
    of_group: int  # heads that share q and k
    length: int
    height: int  # start tokens of a band


class Cells(NamedTuple):
    """The listed cells of some rows, in order."""

    listed: slice  # which of all listed cells they are
    planes: torch.Tensor  # [S]: b * H + h
    at: torch.Tensor  # [S]: where in [R, end tokens of the tile]
    slots: torch.Tensor | None = None  # [S]: where in [R, most], a row's side by side; None if each row has one
    most: int = 1  # to a row


class Rows(NamedTuple):
    """Some rows of a tile."""

    numbers: torch.Tensor  # [R]: (b * H + h) * N + start
    planes: torch.Tensor  # [R]: b * H + h
    places: torch.Tensor  # [R]: which of the tile's rows have their products
    cells: Cells | None = None

    def split(self, depth: int, width: int) -> Iterator[Rows]:
        """At most so many at a time, of a tile of that width."""
        count, cells = len(self.numbers), self.cells
        if count <= depth:
            yield self
            return
        firsts = range(0, count, depth)
        of_rows = (torch.split(x, depth) for x in (self.numbers, self.planes, self.places))
        parts = [Rows(*some) for some in zip(*of_rows, strict=True)]
        if cells is None:
            yield from parts
            return
        cuts = torch.searchsorted(cells.at, cells.at.new_tensor([*firsts, count]) * width).tolist()
        for first, rows, i, j in zip(firsts, parts, cuts, cuts[1:], strict=False):
            slots = None if cells.slots is None else cells.slots[i:j] - first * cells.most
            listed, at = slice(cells.listed.start + i, cells.listed.start + j), cells.at[i:j] - first * width
            yield rows._replace(cells=Cells(listed, cells.planes[i:j], at, slots, cells.most))


# --- which count ---------------------------------------------------------------------------------------------------


def counted(spans: torch.Tensor, grid: Grid, problem: Problem) -> tuple[Numbers, Numbers]:
    """The cells of the spans [S, 4] that count, and which span each is of: of valid cells, of repeated ones the
    first."""
    return (_few if len(spans) <= FEW else _many)(spans, grid, problem)


def _few(spans: torch.Tensor, grid: Grid, problem: Problem) -> tuple[Numbers, Numbers]:
    B, H, _, N, height = grid
    width, below = problem.max_width or N, not problem.tril_mask
    first: dict[int, int] = {}
    for i, (b, h, m, n) in enumerate(spans.tolist()):
        if 0 <= b < B and 0 <= h < H and 0 <= m < N and 0 <= n < N and n - m < width and (below or m <= n):
            first.setdefault((((m // height * B + b) * H + h) * N + m) * N + n, i)
    cells = sorted(first)
    if problem.mask is not None and cells:
        sentences = [cell // (H * N**2) % B * N for cell in cells]
        tokens = [s + cell // place % N for place in (N, 1) for s, cell in zip(sentences, cells, strict=True)]
        kept = problem.mask.flatten().index_select(0, as_tensor(tokens, spans)).tolist()
        cells = [cell for cell, m, n in zip(cells, kept, kept[len(cells) :], strict=False) if m and n]
    return cells, [first[cell] for cell in cells]


def _many(spans: torch.Tensor, grid: Grid, problem: Problem) -> tuple[Numbers, Numbers]:
    B, H, _, N, height = grid
    valid = ((spans >= 0) & (spans < spans.new_tensor([B, H, N, N]))).all(1)
    b, _, m, n = spans.unbind(1)
    if problem.tril_mask:
        valid &= m <= n
    if problem.max_width is not None:
        valid &= n - m < problem.max_width
    if problem.mask is not None:
        valid[valid.clone()] = problem.mask[b[valid], m[valid]] & problem.mask[b[valid], n[valid]]
    numbers = (spans * spans.new_tensor([H * N**2, N**2, N, 1])).sum(1).add_(m // height, alpha=B * H * N**2)
    numbers, order = numbers.masked_fill_(~valid, NOWHERE).sort(stable=True)
    counts = numbers != NOWHERE
    counts[1:] &= numbers[1:] != numbers[:-1]
    return numbers[counts], order[counts]


def saved(cells: Numbers, count: int, like: torch.Tensor) -> torch.Tensor:
    """So many numbers, on the device of ``like``: those of the cells, then NOWHERE."""
    if isinstance(cells, list):
        return as_tensor(cells + [NOWHERE] * (count - len(cells)), like)
    return torch.cat((cells, cells.new_full((count - len(cells),), NOWHERE)))


def recalled(numbers: torch.Tensor) -> Numbers:
    """The cells of what was saved."""
    if len(numbers) <= FEW:
        return [number for number in numbers.tolist() if number != NOWHERE]
    return numbers[numbers != NOWHERE]


def as_tensor(numbers: Numbers, like: torch.Tensor) -> torch.Tensor:
    """On the device of ``like``."""
    return numbers if isinstance(numbers, torch.Tensor) else _tensors(like, numbers)[0]


def _tensors(like: torch.Tensor, *lists: list[int]) -> tuple[torch.Tensor, ...]:
    """Parts of one, of memory that is there already: one copy to a GPU, and on a CPU none."""
    numbers = array("q", chain.from_iterable(lists))
    if not numbers:
        return tuple(torch.empty(0, dtype=torch.int64, device=like.device) for _ in lists)
    whole: torch.Tensor = torch.frombuffer(numbers, dtype=torch.int64)
    if like.device.type != "cpu":
        whole = whole.to(like.device)
    return whole.split_with_sizes(list(map(len, lists))) if len(lists) > 1 else (whole,)


# --- where they lie ------------------------------------------------------------------------------------------------


def rows_of(cells: Numbers, tile: Tile, grid: Grid, like: torch.Tensor) -> Rows | None:
    """The rows of a tile that hold some of the cells, if any do; on the device of ``like``."""
    band = tile[1].start // grid.height * grid.batch * grid.heads
    ends = [(band + group * grid.of_group) * grid.length**2 for group in (tile[0].start, tile[0].stop)]
    if isinstance(cells, list):
        here = slice(*(bisect_left(cells, end) for end in ends))
        return _rows_of_few(cells[here], here, tile, grid, like) if here.start < here.stop else None
    here = slice(*torch.searchsorted(cells, cells.new_tensor(ends)).tolist())
    return _rows_of_many(cells[here], here, tile, grid) if here.start < here.stop else None


def _rows_of_few(cells: list[int], here: slice, tile: Tile, grid: Grid, like: torch.Tensor) -> Rows:
    (B, H, of_group, N, _), (g, r, c, _) = grid, tile
    tall, width = r.stop - r.start, c.stop - c.start
    row_of = [cell // N % (B * H * N) for cell in cells]
    ranks = {row: rank for rank, row in enumerate(dict.fromkeys(row_of))}
    planes = [row // N for row in ranks]
    places = [(row // N // of_group - g.start) * tall + row % N - r.start for row in ranks]
    at = [ranks[row] * width + cell % N - c.start for row, cell in zip(row_of, cells, strict=True)]
    if len(ranks) == len(cells):
        numbers, of_planes, of_places, of_at = _tensors(like, list(ranks), planes, places, at)
        return Rows(numbers, of_planes, of_places, Cells(here, of_planes, of_at))
    first: dict[int, int] = {}
    ordinals = [i - first.setdefault(row, i) for i, row in enumerate(row_of)]
    most = max(ordinals) + 1
    slots = [ranks[row] * most + ordinal for row, ordinal in zip(row_of, ordinals, strict=True)]
    planes_of_cells = [row // N for row in row_of]
    numbers, of_planes, of_places, *of_cells = _tensors(like, list(ranks), planes, places, planes_of_cells, at, slots)
    return Rows(numbers, of_planes, of_places, Cells(here, of_cells[0], of_cells[1], of_cells[2], most))


def _rows_of_many(cells: torch.Tensor, here: slice, tile: Tile, grid: Grid) -> Rows:
    (B, H, of_group, N, _), (g, r, c, _) = grid, tile
    tall, width = r.stop - r.start, c.stop - c.start
    row_of = cells // N % (B * H * N)
    numbers, ranks, counts = torch.unique_consecutive(row_of, return_inverse=True, return_counts=True)
    planes, at = numbers // N, ranks * width + cells % N - c.start
    places = (planes // of_group - g.start) * tall + numbers % N - r.start
    most = int(counts.amax())
    if most == 1:
        return Rows(numbers, planes, places, Cells(here, planes, at))
    ordinals = torch.arange(len(cells), device=cells.device) - (counts.cumsum(0) - counts)[ranks]
    return Rows(numbers, planes, places, Cells(here, row_of // N, at, ranks * most + ordinals, most))
