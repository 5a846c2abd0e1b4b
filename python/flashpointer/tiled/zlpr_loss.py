"""The ZLPR loss of each row, and its gradient in the same pass: ``kernels/zlpr_loss.py`` has the mathematics.

Where every score of a tile lies within +-60 (the rule on a CPU, which can look), no pivot is needed, and so no
logarithm of a label: exp overflows nowhere, exp(-s) is 1 / exp(s), and whatever underflows is nothing beside the 1
inside the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..problem import log_one_plus
from ._tiles import column_tiles, computing_dtype, row_tiles

SAFE = 60.0

# (outer index, rows, columns, out) fills ``out`` with the labels of a tile: 0 to 1, or -100 for a cell to leave out.
LabelReader = Callable[[int, slice, slice, torch.Tensor], None]


class Terms(NamedTuple):
    """A tile's exponentials e [rows, columns] under the pivots m [rows, 1] of its rows; None stands for 0."""

    m_n: torch.Tensor | None
    e_n: torch.Tensor
    m_p: torch.Tensor | None
    e_p: torch.Tensor


class Cells:
    """Scores [outer, inner, classes] with their labels, tile by tile."""

    def __init__(
        self, scores: torch.Tensor, read_labels: LabelReader, labels_surely_valid: bool, mask: torch.Tensor | None
    ) -> None:
        self.scores, self.mask, self.dtype = scores, mask, computing_dtype(scores.dtype)
        self._read_labels, self._labels_surely_valid = read_labels, labels_surely_valid
        self._work: list[torch.Tensor] = []

    def terms(self, o: int, rows: slice, columns: slice) -> Terms:
        """Of a tile, in memory that the next one takes."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        if not self._work or self._work[0].shape != shape:
            self._work = [torch.empty(shape, dtype=self.dtype, device=self.scores.device) for _ in range(3)]
        p, n, u = self._work
        self._read_labels(o, rows, columns, p)
        left_out = None if self.mask is None else ~self.mask[o, rows, columns]
        s = self.scores[o, rows, columns].to(self.dtype)
        return tile_terms(s, p, n, u, left_out, self._labels_surely_valid)


def labelled(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> Cells:
    def read(o: int, rows: slice, columns: slice, out: torch.Tensor) -> None:
        out.copy_(labels[o, rows, columns])

    return Cells(scores, read, labels.dtype == torch.bool, mask)


def forward(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.zlpr_loss.forward``; float64 scores have a float64 loss."""
    return sweep(labelled(scores, labels, mask), grad_scale, with_grad)


def sweep(cells: Cells, grad_scale: float, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient."""
    outer, inner, classes = cells.scores.shape
    loss = torch.zeros((outer, inner), dtype=cells.dtype, device=cells.scores.device)
    grad = torch.empty(cells.scores.shape if with_grad else 0, dtype=cells.scores.dtype, device=cells.scores.device)
    columns = column_tiles(classes)
    if not columns:
        return loss, grad
    for o, rows in row_tiles(outer, inner, classes):
        tile: Terms | None = None
        log_n, log_p = LogSum(), LogSum()
        for cols in columns:
            tile = cells.terms(o, rows, cols)
            log_n.add(tile.m_n, tile.e_n)
            log_p.add(tile.m_p, tile.e_p)
        loss[o, rows] = (log_n.value() + log_p.value()).squeeze(-1)
        if with_grad:
            for cols in columns:
                if len(columns) > 1 or tile is None:
                    tile = cells.terms(o, rows, cols)
                grad[o, rows, cols] = _tile_gradient(tile, log_n, log_p, grad_scale)
    return loss, grad


def _tile_gradient(tile: Terms, log_n: LogSum, log_p: LogSum, grad_scale: float) -> torch.Tensor:
    """In the place of the tile."""
    tile.e_n.mul_(log_n.share(tile.m_n).mul_(grad_scale))
    tile.e_p.mul_(log_p.share(tile.m_p).mul_(grad_scale))
    return torch.sub(tile.e_n, tile.e_p, out=tile.e_n)


def tile_terms(
    s: torch.Tensor,
    p: torch.Tensor,
    n: torch.Tensor,
    u: torch.Tensor,
    left_out: torch.Tensor | None,
    labels_surely_valid: bool,
) -> Terms:
    """The terms of scores ``s`` and labels ``p``; the buffers p, n, u become part of the result or are spent."""
    if left_out is not None:  # first, for nothing in such a cell may count: not NaN, not a label of 7
        s = s.masked_fill(left_out, 0.0)
        p.masked_fill_(left_out, 0.0)
    if s.device.type == "cpu" and _within(s, -SAFE, SAFE) and (labels_surely_valid or _within(p, 0.0, 1.0)):
        torch.exp(s, out=u)
        torch.sub(1.0, p, out=n)
        if left_out is not None:
            n.masked_fill_(left_out, 0.0)
        return Terms(None, n.mul_(u), None, p.div_(u))
    ignored = (p == -100) | (s == -torch.inf)
    left_out = ignored if left_out is None else left_out | ignored
    s = s.masked_fill(((p < 0) | (p > 1)) & ~left_out, torch.nan)  # a label of NaN makes a NaN by itself
    torch.neg(p, out=n).log1p_().add_(s).masked_fill_(left_out | (p == 1), -torch.inf)  # inf + log 0 is NaN
    p.log_().sub_(s).masked_fill_(left_out, -torch.inf)
    return Terms(*_pivoted(n), *_pivoted(p))


def _within(x: torch.Tensor, low: float, high: float) -> bool:
    if x.numel() == 0:
        return True
    least, most = torch.aminmax(x)
    return bool((least >= low) & (most <= high))  # False for a NaN


def _pivoted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, exp(x - m)), in the place of x; exp(inf - m) is inf, never NaN."""
    m = x.amax(-1, keepdim=True).clamp_(0.0, torch.finfo(x.dtype).max)
    return m, x.sub_(m).exp_()


class LogSum:
    """The running log(1 + sum of e * exp(m)) of each row."""

    def __init__(self, m: torch.Tensor | None = None, S: torch.Tensor | None = None) -> None:
        self.m = m
        self.sum = S

    def add(self, m: torch.Tensor | None, e: torch.Tensor) -> None:
        S = e.sum(-1, keepdim=True)
        if self.sum is None:
            self.m, self.sum = m, S
        elif self.m is None and m is None:
            self.sum = self.sum + S
        else:
            zero = torch.zeros_like(S)
            m_old, m_new = zero if self.m is None else self.m, zero if m is None else m
            self.m = torch.maximum(m_old, m_new)
            self.sum = self.sum * torch.exp(m_old - self.m) + S * torch.exp(m_new - self.m)

    def value(self) -> torch.Tensor:
        assert self.sum is not None
        if self.m is None:
            return torch.log1p(self.sum)
        return log_one_plus(self.m, self.sum)

    def share(self, m: torch.Tensor | None) -> torch.Tensor:
        """What turns a tile's e = exp(s - m) into the gradient exp(s - value)."""
        assert self.sum is not None
        if self.m is None:
            return 1.0 / (1.0 + self.sum)
        return torch.exp((0.0 if m is None else m) - self.m) / (self.sum + torch.exp(-self.m))


# --- of a shard of the classes ---------------------------------------------------------------------------------------


def shard_log_sums(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As ``kernels.zlpr_loss.shard_log_sums``: one part."""
    return sweep_log_sums(labelled(scores, labels, mask))


def shard_gradient(
    scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, sums: torch.Tensor, grad_scale: float
) -> torch.Tensor:
    """As ``kernels.zlpr_loss.shard_gradient``."""
    return sweep_gradient(labelled(scores, labels, mask), sums, grad_scale)


def sweep_log_sums(cells: Cells) -> torch.Tensor:
    outer, inner, classes = cells.scores.shape
    sums = torch.zeros((4, outer, inner), dtype=cells.dtype, device=cells.scores.device)
    columns = column_tiles(classes)
    for o, rows in row_tiles(outer, inner, classes) if columns else ():
        terms = LogSum(), LogSum()
        for cols in columns:
            tile = cells.terms(o, rows, cols)
            terms[0].add(tile.m_n, tile.e_n)
            terms[1].add(tile.m_p, tile.e_p)
        for m, S, term in zip(sums[::2], sums[1::2], terms, strict=True):
            assert term.sum is not None
            m[o, rows] = 0.0 if term.m is None else term.m.squeeze(-1)
            S[o, rows] = term.sum.squeeze(-1)
    return sums.view(1, 4, outer * inner)


def sweep_gradient(cells: Cells, sums: torch.Tensor, grad_scale: float) -> torch.Tensor:
    outer, inner, classes = cells.scores.shape
    grad = torch.empty(cells.scores.shape, dtype=cells.scores.dtype, device=cells.scores.device)
    sums = sums.view(4, outer, inner, 1)
    for o, rows in row_tiles(outer, inner, classes):
        m_n, S_n, m_p, S_p = sums[:, o, rows]
        for cols in column_tiles(classes):
            tile = cells.terms(o, rows, cols)
            grad[o, rows, cols] = _tile_gradient(tile, LogSum(m_n, S_n), LogSum(m_p, S_p), grad_scale)
    return grad
