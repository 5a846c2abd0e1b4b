"""The ZLPR loss of a linear layer without its scores: ``kernels/linear_zlpr_loss.py`` has the mathematics.

The scores s = h W^T + b come in tiles of classes, and these in blocks of rows. Forward takes one product, backward two,
and a third for the scores again: but for those whose E = exp(s - m) forward kept, in the memory of the gradient of
weight. There is room for D rows (half of them where weight is of two bytes). What backward needs for a tile of classes
lies where their gradient comes to lie. Under a pivot, which a later tile may have moved, E is computed again.

A product wants a large tile; the operations that follow it want one that stays in cache, for they are bound by memory.
On a CPU, which can look, there is no pivot until a score is above SAFE: what underflows is nothing beside the 1 inside
the logarithm, and neither E nor a row's share of it leaves the range of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch

from ..problem import Listed, Lists, LogSums
from ._tiles import computing_dtype, small_on_one_thread

CELLS = 1 << 17  # to a tile of scores: the products lose a tenth with half of them
HEIGHT = 256  # rows to a block, at most
WIDTH = 256  # classes to a tile, at least: a product over fewer is slow
CONVERTED = 1 << 18  # elements of weight to a tile, where that is converted
SAFE = 40.0
SUMMED = 16  # rows that float32 sums one after the other


class Block(NamedTuple):
    number: int
    rows: slice
    hidden: torch.Tensor  # [rows, D]
    kept: bool  # whether there is room for its E


class Tile(NamedTuple):
    number: int
    classes: slice
    weight: torch.Tensor  # [classes, D]
    bias: torch.Tensor | None  # [classes]


class Sweep:
    """The scores, tile by tile and block by block: in the same order and shapes forward and backward, so that E
    computed again is E kept. Sorted by tile and block, as ``order`` has them, the listed cells of each are a slice."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, listed: Listed) -> None:
        self.dtype = computing_dtype(hidden.dtype)
        self.hidden, self.weight, self.bias = hidden.to(self.dtype), weight, bias
        (rows, size), classes = hidden.shape, len(weight)
        self.room = min(rows, size * weight.itemsize // self.dtype.itemsize)  # rows whose E is kept
        parts = ((0, self.room, True), (self.room, rows, False))
        edges = [
            (first, min(first + HEIGHT, end), kept) for start, end, kept in parts for first in range(start, end, HEIGHT)
        ]
        self.blocks = [
            Block(number, slice(first, end), self.hidden[first:end], kept)
            for number, (first, end, kept) in enumerate(edges)
        ]
        width = max(WIDTH, CELLS // max(1, min(rows, HEIGHT)))
        if weight.dtype != self.dtype:
            width = min(width, max(WIDTH, CONVERTED // max(1, size)))
        self.width = max(1, min(width, classes))

        starts = listed.rows.new_tensor([first for first, *_ in edges])
        tile, block = listed.classes // self.width, torch.searchsorted(starts, listed.rows, right=True) - 1
        steps = -(-classes // self.width) * len(edges)
        step = torch.where(listed.classes < classes, tile * len(edges) + block, steps)
        step, self.order = step.sort(stable=True)
        self.cuts = torch.searchsorted(step, torch.arange(steps + 1, device=step.device)).tolist()
        width_there = (classes - tile * self.width).clamp(max=self.width)
        at = (listed.rows - starts[block]) * width_there + listed.classes % self.width
        self.at = at[self.order]  # in the flat scores of their tile and block
        self.labels = None if listed.labels is None else listed.labels[self.order].to(self.dtype)

    @cached_property
    def buffer(self) -> torch.Tensor:
        """For what is not kept: where all is, nobody asks for it."""
        return self.scratch(min(len(self.hidden), HEIGHT) * self.width)

    def scratch(self, *shape: int) -> torch.Tensor:
        return self.hidden.new_empty(shape)

    def tiles(self) -> Iterator[Tile]:
        converted = None if self.weight.dtype == self.dtype else self.scratch(self.width, self.weight.shape[1])
        for number, first in enumerate(range(0, len(self.weight), self.width)):
            classes = slice(first, min(first + self.width, len(self.weight)))
            weight = self.weight[classes]
            if converted is not None:
                weight = converted[: len(weight)].copy_(weight)
            yield Tile(number, classes, weight, None if self.bias is None else self.bias[classes].to(self.dtype))

    def listed(self, tile: Tile, block: Block) -> slice:
        step = tile.number * len(self.blocks) + block.number
        return slice(self.cuts[step], self.cuts[step + 1])

    def exponents(
        self, tile: Tile, block: Block, out: torch.Tensor | None = None, listed_scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Those of the negatives [rows, classes]: the scores, and log(1 - label) more in listed cells, whose scores are
        written among all listed ones."""
        shape = len(block.hidden), len(tile.weight)
        if out is None:
            out = self.buffer[: shape[0] * shape[1]].view(shape)
        if tile.bias is None:
            torch.mm(block.hidden, tile.weight.t(), out=out)
        else:
            torch.addmm(tile.bias, block.hidden, tile.weight.t(), out=out)
        cells = self.listed(tile, block)
        if cells.start < cells.stop:
            flat, at = out.view(-1), self.at[cells]
            scores = flat[at]
            if listed_scores is not None:
                listed_scores[cells] = scores
            if self.labels is None:
                flat.index_fill_(0, at, -torch.inf)
            else:
                t = self.labels[cells]
                flat[at] = torch.where((t >= 0) & (t < 1), scores + torch.log1p(-t), -torch.inf)
        return out

    def places(self, memory: torch.Tensor) -> Callable[[Tile], torch.Tensor]:
        """Where E [room, classes] of a tile lies: in the memory of the gradient of its classes."""
        ratio = self.dtype.itemsize // memory.itemsize
        flat = memory.view(-1)[: memory.numel() // ratio * ratio].view(self.dtype)

        def of(tile: Tile) -> torch.Tensor:
            first, shape = -(-tile.classes.start * memory.shape[1] // ratio), (self.room, len(tile.weight))
            return flat[first : first + shape[0] * shape[1]].view(shape)

        return of


def _work(hidden: torch.Tensor, weight: torch.Tensor, *_: object) -> int:
    """In cells of other ops: a product with 64 numbers is about as much as the exponentials of one."""
    return len(hidden) * len(weight) * max(1, hidden.shape[1] // 64)


@small_on_one_thread(_work)
def forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lists: Lists, keep: bool
) -> tuple[LogSums, Listed, torch.Tensor, torch.Tensor]:
    """As ``kernels.linear_zlpr_loss.forward``.

    Returns:
        The sums; the listed cells, sorted by class; the exponents x [n] of the positives; and, like weight but
        contiguous, memory for its gradient, where E waits: empty if ``keep`` is False.
    """
    listed = listed_cells(lists, len(weight))
    sweep = Sweep(hidden, weight, bias, listed)
    memory = torch.empty(weight.shape if keep else 0, dtype=weight.dtype, device=weight.device)
    place_of = sweep.places(memory) if keep else None
    m = sweep.hidden.new_zeros(len(hidden))
    # Of a thousand tiles or more: float32 would lose a digit.
    S = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    sums = [(m[block.rows], S[block.rows]) for block in sweep.blocks]
    pivoted = [hidden.device.type != "cpu"] * len(sweep.blocks)
    scores = sweep.hidden.new_full(listed.rows.shape, -torch.inf)
    for tile in sweep.tiles():
        E_tile = None if place_of is None else place_of(tile)
        for block in sweep.blocks:
            out = E_tile[block.rows] if E_tile is not None and block.kept else None
            s = sweep.exponents(tile, block, out, scores)
            m_b, S_b = sums[block.number]
            if pivoted[block.number] or not s.max().item() <= SAFE:  # which a NaN is not
                pivoted[block.number] = True
                pivot = torch.maximum(m_b, s.amax(1).clamp_(0.0, torch.finfo(s.dtype).max))
                S_b.mul_(torch.exp(m_b - pivot))
                m_b.copy_(pivot)
                s.sub_(pivot.unsqueeze(1))
            S_b.add_(s.exp_().sum(1))
    x = torch.empty_like(scores)
    x[sweep.order] = scores
    x = _positives(x, listed)
    of_rows = LogSums(m, S.to(sweep.dtype), *positive_sums(x, listed.rows, len(hidden)))
    return of_rows, listed, x, memory


def listed_cells(lists: Lists, classes: int) -> Listed:
    """The cells that lists name among so many classes; of one listed twice the first counts."""
    positives, labels, ignore_index, first = lists
    height = max(1, positives.shape[0])
    rows = torch.arange(positives.shape[0], device=positives.device).unsqueeze(1)
    local = positives - first
    here = (local >= 0) & (local < classes) & (positives != ignore_index)
    cells, order = (torch.where(here, local, classes) * height + rows).flatten().sort(stable=True)
    again = torch.zeros_like(cells, dtype=torch.bool)
    again[1:] = cells[1:] == cells[:-1]
    cells, kept = torch.where(again, classes * height + cells % height, cells).sort(stable=True)
    return Listed(cells % height, cells // height, None if labels is None else labels.flatten()[order[kept]])


def positive_sums(x: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """m_p and S_p of ``count`` rows, of the exponents x [n] of listed cells: each row has as many, perhaps none."""
    if len(x) == 0:
        return x.new_zeros(count), x.new_zeros(count)
    by_row = x[rows.argsort(stable=True)].view(count, -1)
    m = by_row.amax(1).clamp_(0.0, torch.finfo(x.dtype).max)
    return m, by_row.sub_(m.unsqueeze(1)).exp_().sum(1)


def _positives(scores: torch.Tensor, listed: Listed) -> torch.Tensor:
    """Their exponents log t - s; -inf for what is no cell, or is left out, as by a score of -inf."""
    x = scores.neg().masked_fill_(scores == -torch.inf, -torch.inf)
    if listed.labels is None:
        return x
    t = listed.labels.to(x.dtype)
    return torch.where(t > 0, x + torch.log(t), -torch.inf)


@small_on_one_thread(_work)
def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    listed: Listed,
    x: torch.Tensor,
    kept: torch.Tensor,
    sums: LogSums,
    upstream: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    weight_grad: Callable[[int, torch.Tensor], None] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As ``kernels.linear_zlpr_loss.backward``.

    Args:
        x, kept: as forward gave them. kept is overwritten by the gradient of weight; of an empty one all E is computed
            again.
        sums: of all shards.
        upstream: [R], the gradient of the losses.
        wanted: which gradients are, of hidden, weight and bias.
        weight_grad: is given that of weight in blocks, in the computing dtype, instead.

    Returns:
        The gradients of hidden, in the computing dtype, of weight and of bias; None for what is not wanted.
    """
    sweep = Sweep(hidden, weight, bias, listed)
    whole_n, whole_p = sums.S_n + torch.exp(-sums.m_n), sums.S_p + torch.exp(-sums.m_p)
    infinite = whole_n == torch.inf  # rows with a score of inf, whose other negatives count for nothing
    unit = whole_n.masked_fill(infinite, 1.0)
    share = upstream.to(sweep.dtype) / unit
    # What a positive takes from E, in units of the share as E is, so that it rides in the same products.
    pull = (torch.exp(x - sums.m_p[listed.rows]) * (unit / whole_p)[listed.rows])[sweep.order]
    pivots = sums.m_n.unsqueeze(1)
    pivoted = _perhaps(sums.m_n)
    finite = (~infinite).to(sweep.dtype).unsqueeze(1) if pivoted and _perhaps(infinite) else None

    of_weight = weight_grad is not None or wanted[1]
    shared = sweep.hidden * share.unsqueeze(1) if of_weight else None  # [R, D]
    grad_hidden = torch.zeros_like(sweep.hidden) if wanted[0] else None
    grad_weight = grad_bias = None
    if of_weight and weight_grad is None:
        grad_weight = kept if kept.numel() else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if bias is not None and wanted[2]:
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    d_weight = OfClasses(sweep, weight, grad_weight) if of_weight else None
    place_of = waiting = None
    if kept.numel() and not pivoted:
        place_of, waiting = sweep.places(kept), sweep.scratch(sweep.room * sweep.width)

    for tile in sweep.tiles():
        d_bias = None if grad_bias is None else tile.weight.new_zeros(len(tile.weight), dtype=torch.float64)
        if place_of is not None and waiting is not None:  # out of the way of the gradient
            E_tile = place_of(tile)
            E_tile = waiting[: E_tile.numel()].view(E_tile.shape).copy_(E_tile)
        for block in sweep.blocks:
            rows = block.rows
            if place_of is not None and block.kept:
                E = E_tile[rows]
            else:
                E = sweep.exponents(tile, block)
                if pivoted:
                    E.sub_(pivots[rows])
                E.exp_()
                if finite is not None:
                    E.mul_(finite[rows])  # inf to NaN
            cells = sweep.listed(tile, block)
            if cells.start < cells.stop:
                E.view(-1).index_add_(0, sweep.at[cells], pull[cells], alpha=-1)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(E, tile.weight)
            if d_weight is not None and shared is not None:
                d_weight.of(tile).addmm_(E.t(), shared[rows], beta=float(block.number > 0))
            if d_bias is not None:
                add_rows(d_bias, E, share[rows])
        if d_weight is not None:
            d_weight.store(tile)
            if weight_grad is not None:
                weight_grad(tile.classes.start, d_weight.of(tile))
        if d_bias is not None and grad_bias is not None:
            grad_bias[tile.classes] = d_bias
    if grad_hidden is not None:
        grad_hidden.mul_(share.unsqueeze(1))
    return grad_hidden, grad_weight, grad_bias


def _perhaps(of_rows: torch.Tensor) -> bool:
    """Whether any is not 0, or might be: elsewhere than on a CPU to look is to wait."""
    return of_rows.device.type != "cpu" or bool(of_rows.any())


def add_rows(total: torch.Tensor, E: torch.Tensor, share: torch.Tensor) -> None:
    """Adds share E to the total [classes], in float64: row after row, float32 would lose two digits of 2,000 rows, and
    five of a million. So it sums but SUMMED."""
    whole = len(E) // SUMMED * SUMMED
    parts = torch.bmm(share[:whole].view(-1, 1, SUMMED), E[:whole].view(-1, SUMMED, E.shape[1]))
    total.add_(parts.sum((0, 1), dtype=total.dtype))
    if whole < len(E):
        total.add_(torch.mv(E[whole:].t(), share[whole:]))


class OfClasses:
    """The gradient by the weight of a tile's classes, summed over its blocks: in its place among all, or else in
    scratch memory, to be rounded once."""

    def __init__(self, sweep: Sweep, like: torch.Tensor, target: torch.Tensor | None) -> None:
        in_place = target is not None and target.dtype == sweep.dtype
        self.target, self.empty = target, not sweep.blocks
        self.scratch = None if in_place else sweep.scratch(sweep.width, like.shape[1])

    def of(self, tile: Tile) -> torch.Tensor:
        if self.scratch is not None:
            return self.scratch[: len(tile.weight)]
        assert self.target is not None
        return self.target[tile.classes]

    def store(self, tile: Tile) -> None:
        total = self.of(tile)
        if self.empty:  # no block has written to it
            total.zero_()
        if self.scratch is not None and self.target is not None:
            self.target[tile.classes] = total
