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

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..problem import Listed, LogSums
from ._tiles import computing_dtype

CELLS = 1 << 16  # to a tile of scores
HEIGHT = 256  # rows to a block, at most
WIDTH = 256  # classes to a tile, at least: a product over fewer is slow
CONVERTED = 1 << 18  # elements of weight to a tile, where that is converted
SAFE = 40.0


class Block(NamedTuple):
    rows: slice
    kept: bool  # whether there is room for its E


class Tile(NamedTuple):
    classes: slice
    listed: slice  # its own listed cells

    @property
    def width(self) -> int:
        first, stop = self.classes.start, self.classes.stop
        return int(stop - first)


class Cells(NamedTuple):
    """The listed cells of a block of a tile."""

    numbers: torch.Tensor  # among all that are listed
    rows: torch.Tensor  # in the block
    columns: torch.Tensor  # in the tile


class Sweep:
    """The scores, tile by tile and block by block: in the same order and shapes forward and backward, so that E
    computed again is E kept."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, listed: Listed) -> None:
        self.dtype = computing_dtype(hidden.dtype)
        self.hidden, self.weight, self.bias, self.listed = hidden.to(self.dtype), weight, bias, listed
        (rows, size), classes = hidden.shape, len(weight)
        self.kept_rows = min(rows, size * weight.itemsize // self.dtype.itemsize)
        self.blocks = [
            Block(slice(first, min(first + HEIGHT, end)), kept)
            for start, end, kept in ((0, self.kept_rows, True), (self.kept_rows, rows, False))
            for first in range(start, end, HEIGHT)
        ]
        width = max(WIDTH, CELLS // max(1, min(rows, HEIGHT)))
        if weight.dtype != self.dtype:
            width = min(width, max(WIDTH, CONVERTED // max(1, size)))
        self.width = min(width, classes)
        edges = [*range(0, classes, width), classes]
        cuts = torch.searchsorted(listed.classes, listed.classes.new_tensor(edges)).tolist()
        self.tiles = [Tile(slice(*edges[i : i + 2]), slice(*cuts[i : i + 2])) for i in range(len(edges) - 1)]
        self.converted = None if weight.dtype == self.dtype else self.scratch(self.width, size)
        self.buffer = self.scratch(min(rows, HEIGHT) * self.width)

    def scratch(self, *shape: int) -> torch.Tensor:
        return self.hidden.new_empty(shape)

    def layer(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [classes, D] and bias [classes] of a tile, as they are computed with."""
        weight = self.weight[tile.classes]
        if self.converted is not None:
            weight = self.converted[: tile.width].copy_(weight)
        return weight, None if self.bias is None else self.bias[tile.classes].to(self.dtype)

    def cells(self, tile: Tile, block: Block) -> Cells | None:
        if tile.listed.start == tile.listed.stop:
            return None
        numbers = torch.arange(tile.listed.start, tile.listed.stop, device=self.hidden.device)
        rows, classes = self.listed.rows[tile.listed], self.listed.classes[tile.listed]
        if len(self.blocks) > 1:
            inside = (rows >= block.rows.start) & (rows < block.rows.stop)
            numbers, rows, classes = numbers[inside], rows[inside], classes[inside]
        return Cells(numbers, rows - block.rows.start, classes - tile.classes.start)

    def exponents(
        self,
        block: Block,
        layer: tuple[torch.Tensor, torch.Tensor | None],
        cells: Cells | None,
        out: torch.Tensor | None = None,
        listed_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Those of the negatives [rows, classes]: the scores, and log(1 - label) more in listed cells, whose scores are
        written among all listed ones."""
        hidden, (weight, bias) = self.hidden[block.rows], layer
        if out is None:
            out = self.buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        if cells is not None:
            scores: torch.Tensor | float = out[cells.rows, cells.columns]
            if listed_scores is not None:
                listed_scores[cells.numbers] = scores
            if self.listed.labels is not None:
                t = self.listed.labels[cells.numbers].to(self.dtype)
                scores = torch.where((t >= 0) & (t < 1), scores + torch.log1p(-t), -torch.inf)
            out[cells.rows, cells.columns] = -torch.inf if self.listed.labels is None else scores
        return out

    def room(self, kept: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Where E of the kept rows of a tile lies: in the memory of the gradient of its classes."""
        ratio = self.dtype.itemsize // kept.itemsize
        flat = kept.view(-1)[: kept.numel() // ratio * ratio].view(self.dtype)
        first = -(-tile.classes.start * kept.shape[1] // ratio)
        return flat[first : first + self.kept_rows * tile.width].view(self.kept_rows, tile.width)


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, listed: Listed, keep: bool
) -> tuple[LogSums, torch.Tensor, torch.Tensor]:
    """As ``kernels.linear_zlpr_loss.forward``.

    Returns:
        The sums; the exponents x [n] of the positives; and, like weight but contiguous, memory for its gradient, where
        E waits: empty if ``keep`` is False.
    """
    sweep = Sweep(hidden, weight, bias, listed)
    kept = torch.empty(weight.shape if keep else 0, dtype=weight.dtype, device=weight.device)
    m = sweep.hidden.new_zeros(len(hidden))
    # Of a thousand tiles or more: float32 would lose a digit.
    S = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    scores = sweep.hidden.new_full(listed.rows.shape, -torch.inf)
    pivoted = dict.fromkeys((block.rows.start for block in sweep.blocks), hidden.device.type != "cpu")
    for tile in sweep.tiles:
        layer = sweep.layer(tile)
        for block in sweep.blocks:
            rows, first = block.rows, block.rows.start
            out = sweep.room(kept, tile)[rows] if keep and block.kept else None
            s = sweep.exponents(block, layer, sweep.cells(tile, block), out, scores)
            pivoted[first] = pivoted[first] or not bool(s.max() <= SAFE)  # which a NaN is not
            if pivoted[first]:
                pivot = torch.maximum(m[rows], s.amax(1).clamp_(0.0, torch.finfo(s.dtype).max))
                S[rows] *= torch.exp(m[rows] - pivot)
                m[rows] = pivot
                s.sub_(pivot.unsqueeze(1))
            S[rows] += s.exp_().sum(1)
    x = _positives(scores, listed)
    return LogSums(m, S.to(sweep.dtype), *_sums(x, listed, len(hidden))), x, kept


def _positives(scores: torch.Tensor, listed: Listed) -> torch.Tensor:
    """Their exponents log t - s; -inf for what is no cell, or is left out, as by a score of -inf."""
    x = scores.neg().masked_fill_(scores == -torch.inf, -torch.inf)
    if listed.labels is None:
        return x
    t = listed.labels.to(x.dtype)
    return torch.where(t > 0, x + torch.log(t), -torch.inf)


def _sums(x: torch.Tensor, listed: Listed, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """m_p and S_p: of each row there are as many listed cells as of another."""
    by_row = x[listed.rows.argsort(stable=True)].view(rows, -1) if len(x) else x.new_full((rows, 1), -torch.inf)
    m = by_row.amax(1).clamp_(0.0, torch.finfo(x.dtype).max)
    return m, torch.exp(by_row - m.unsqueeze(1)).sum(1)


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
    share = upstream.to(sweep.dtype) / whole_n
    # What a positive takes from E, in units of the share as E is, so that it rides in the same products.
    pull = torch.exp(x - sums.m_p[listed.rows]) * (whole_n / whole_p)[listed.rows]
    pivots = sums.m_n.unsqueeze(1)
    pivoted = hidden.device.type != "cpu" or bool(sums.m_n.any())

    needs_weight = wanted[1] or weight_grad is not None
    shared = sweep.hidden * share.unsqueeze(1) if needs_weight else None  # [R, D]
    grad_hidden = torch.zeros_like(sweep.hidden) if wanted[0] else None
    grad_weight = grad_bias = of_classes = waiting = None
    if wanted[1] and weight_grad is None:
        grad_weight = kept if kept.numel() else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if needs_weight and (grad_weight is None or grad_weight.dtype != sweep.dtype):
        of_classes = sweep.scratch(sweep.width, weight.shape[1])
    if bias is not None and wanted[2]:
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if kept.numel() and not pivoted:
        waiting = sweep.scratch(sweep.kept_rows * sweep.width)

    for tile in sweep.tiles:
        layer = sweep.layer(tile)
        if waiting is not None:  # out of the way of the gradient
            room = sweep.room(kept, tile)
            E_kept = waiting[: room.numel()].view(room.shape).copy_(room)
        d_weight = d_bias = None  # of these classes, in the computing dtype
        if of_classes is not None:
            d_weight = of_classes[: tile.width]
        elif grad_weight is not None:
            d_weight = grad_weight[tile.classes]
        if grad_bias is not None:
            d_bias = sweep.scratch(tile.width)
        for block in sweep.blocks:
            rows, beta = block.rows, float(block.rows.start > 0)
            cells = sweep.cells(tile, block)
            if waiting is not None and block.kept:
                E = E_kept[rows]
            else:
                E = sweep.exponents(block, layer, cells)
                if pivoted:
                    E.sub_(pivots[rows])
                E.exp_()
            if cells is not None:
                E[cells.rows, cells.columns] -= pull[cells.numbers]
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(E, layer[0])
            if d_weight is not None and shared is not None:
                d_weight.addmm_(E.t(), shared[rows], beta=beta)
            if d_bias is not None:
                d_bias.addmv_(E.t(), share[rows], beta=beta)
        for total in (d_weight, d_bias):
            if total is not None and not sweep.blocks:
                total.zero_()
        if grad_bias is not None and d_bias is not None:
            grad_bias[tile.classes] = d_bias
        if weight_grad is not None and d_weight is not None:
            weight_grad(tile.classes.start, d_weight)
        elif of_classes is not None and grad_weight is not None and d_weight is not None:
            grad_weight[tile.classes] = d_weight
    if grad_hidden is not None:
        grad_hidden.mul_(share.unsqueeze(1))
    return grad_hidden, grad_weight, grad_bias
