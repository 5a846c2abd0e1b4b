"""The ZLPR loss of each row, and its gradient in the same pass: ``kernels/zlpr_loss.py`` has the mathematics.

Where no score is far from 0 no pivot is needed, and so no logarithm of a label: exp overflows nowhere, exp(-s) is
1 / exp(s), and whatever underflows is nothing beside the 1 inside the logarithm. A CPU can look whether it was so, at
the losses of whole rows, and at the scores of parts of rows. Labels are copied as uint8, in a ninth of bool's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..problem import log_one_plus
from ._tiles import (
    EXACT_EXP,
    FEW_EXPONENTIALS,
    SMALL,
    TILE,
    column_tiles,
    computing,
    computing_dtype,
    exp,
    one_tile,
    row_tiles,
    small_on_one_thread,
)

SAFE = 60.0

# (outer index, rows, columns, out) fills ``out`` with the labels of a tile: 0 to 1, or -100 for a cell to leave out.
LabelReader = Callable[[int, slice, slice, torch.Tensor], None]


class Terms(Protocol):
    """The exponentials of a tile."""

    def add_to(self, log_n: LogSum, log_p: LogSum) -> None: ...

    def gradient(self, log_n: LogSum, log_p: LogSum, grad_scale: float, out: torch.Tensor) -> None:
        """Spends them."""


class TermsOfCells(NamedTuple):
    """Terms of labels cell by cell: e [rows, columns] under the pivots m [rows, 1] of the rows; None stands for 0."""

    m_n: torch.Tensor | None
    e_n: torch.Tensor
    m_p: torch.Tensor | None
    e_p: torch.Tensor

    def add_to(self, log_n: LogSum, log_p: LogSum) -> None:
        log_n.add(self.m_n, self.e_n.sum(-1, keepdim=True))
        log_p.add(self.m_p, self.e_p.sum(-1, keepdim=True))

    def gradient(self, log_n: LogSum, log_p: LogSum, grad_scale: float, out: torch.Tensor) -> None:
        self.e_n.mul_(log_n.share(self.m_n).mul_(grad_scale))
        self.e_p.mul_(log_p.share(self.m_p).mul_(grad_scale))
        if out.dtype == self.e_n.dtype:
            torch.sub(self.e_n, self.e_p, out=out)
        else:
            out.copy_(self.e_n.sub_(self.e_p))


class Cells:
    """Scores [outer, inner, classes] with their labels, tile by tile."""

    def __init__(
        self, scores: torch.Tensor, read_labels: LabelReader, labels_surely_valid: bool, mask: torch.Tensor | None
    ) -> None:
        self.scores, self.mask, self.dtype = scores, mask, computing_dtype(scores.dtype)
        self.labels_surely_valid, self._read_labels = labels_surely_valid, read_labels
        self._work: list[torch.Tensor] = []

    def read(self, o: int, rows: slice, columns: slice) -> tuple[torch.Tensor, ...]:
        """The scores and the labels of a tile, and two more buffers, side by side and each: in memory that the next
        tile takes."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        if not self._work or self._work[0].shape != shape:
            both = self.scores.new_empty((2, *shape), dtype=self.dtype)
            self._work = [self.scores.new_empty(shape, dtype=self.dtype), both, *both.unbind()]
        self._read_labels(o, rows, columns, self._work[0])
        return computing(self.scores[o, rows, columns]), *self._work

    def plain(self, o: int, rows: slice) -> PlainRows | None:
        """Of whole rows, if ``plain_rows`` will do."""
        s, p, e, *_ = self.read(o, rows, slice(0, self.scores.shape[-1]))
        return plain_rows(s, p, e, self.labels_surely_valid)

    def terms(self, o: int, rows: slice, columns: slice) -> Terms:
        s, p, _, n, u = self.read(o, rows, columns)
        left_out = None if self.mask is None else ~self.mask[o, rows, columns]
        return tile_terms(s, p, n, u, left_out, self.labels_surely_valid)


def labelled(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> Cells:
    def read(o: int, rows: slice, columns: slice, out: torch.Tensor) -> None:
        out.copy_(_countable(labels)[o, rows, columns])

    return Cells(scores, read, labels.dtype == torch.bool, mask)


def _countable(labels: torch.Tensor) -> torch.Tensor:
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels


@small_on_one_thread(lambda scores, *_: scores.numel())
def forward(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.zlpr_loss.forward``, and of scores [..., C] that are ``one_tile``; float64 scores have a float64
    loss."""
    if one_tile(scores, mask):
        p = _countable(labels).to(computing_dtype(scores.dtype), copy=True)
        done = forward_plain(scores, p, labels.dtype == torch.bool, grad_scale, with_grad)
        if done is not None:
            return done
        scores, labels = (x.reshape(1, -1, x.shape[-1]) for x in (scores, labels))
    return sweep(labelled(scores, labels, mask), grad_scale, with_grad)


def forward_plain(
    scores: torch.Tensor, p: torch.Tensor, hard: bool, grad_scale: float, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Loss and gradient of one tile of scores [..., C] and labels in the computing dtype, if ``plain_rows`` will do."""
    s = computing(scores)
    plain = plain_rows(s, p, s.new_empty((2, *s.shape)), hard)
    if plain is None:
        return None
    grad = plain.gradient(grad_scale) if with_grad else s.new_empty(0)
    return plain.losses, grad if grad.dtype == scores.dtype else grad.to(scores.dtype)


class Plain(NamedTuple):
    """PlainRows of labels cell by cell."""

    e: torch.Tensor  # [2, ..., C]
    e_n: torch.Tensor  # the first of it, (1 - t) exp(s)
    e_p: torch.Tensor  # the second, t exp(-s)
    sums: torch.Tensor  # [2, ..., 1]
    losses: torch.Tensor  # [...]

    def gradient(self, grad_scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """Spends them."""
        divisors = divisors_of(self.sums, grad_scale)
        if self.e_n.numel() <= SMALL:
            self.e.div_(divisors)
            return torch.sub(self.e_n, self.e_p, out=out)
        of_n, of_p = divisors.unbind()  # here, too, each thread its own
        return torch.addcdiv(self.e_n.div_(of_n), self.e_p, of_p, value=-1, out=out)


def divisors_of(sums: torch.Tensor, grad_scale: float) -> torch.Tensor:
    """(1 + sum) / grad_scale"""
    ones = 1.0 / grad_scale
    return torch.rsub(sums, ones, alpha=-ones)


def plain_rows(s: torch.Tensor, p: torch.Tensor, e: torch.Tensor, hard: bool) -> Plain | None:
    """Of scores ``s`` and labels ``p``, which are spent; e is filled. None where the losses say that a score was far
    from 0, or where a label, if they are not surely ``hard``, is none."""
    # A hard label far from 0 makes a large loss; a soft one may be as small as its exponential.
    if not hard and not (within(p, 0.0, 1.0) and within(s, -SAFE, SAFE)):
        return None
    e_n, e_p = e.unbind()
    exp(s, out=e_n)
    torch.div(p, e_n, out=e_p)
    if hard:
        e_n.addcmul_(p, e_n, value=-1)
    else:
        e_n.mul_(torch.sub(1.0, p, out=p))
    if e_n.numel() <= SMALL:
        sums = e.sum(-1, keepdim=True)
    else:  # each thread sums what it has written; of both at once it would be what another has, at six times the cost
        sums = torch.stack([e_n.sum(-1, keepdim=True), e_p.sum(-1, keepdim=True)])
    losses = sums.log1p().sum((0, -1))
    return Plain(e, e_n, e_p, sums, losses) if are_plain(losses, s) else None


def are_plain(losses: torch.Tensor, s: torch.Tensor) -> bool:
    """Whether no score of these rows that counts was far from 0, nor all of a row on its right side so far that ``exp``
    lost digits of its loss: then all classes come to less."""
    if s.numel() <= FEW_EXPONENTIALS:
        return float(losses.amax()) <= SAFE  # which NaN is not
    least, most = extremes(losses)
    return 2 * s.shape[-1] * math.exp(-EXACT_EXP) <= least and most <= SAFE


def sweep(cells: Cells, grad_scale: float, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient."""
    outer, inner, classes = cells.scores.shape
    loss = torch.zeros((outer, inner), dtype=cells.dtype, device=cells.scores.device)
    grad = torch.empty(cells.scores.shape if with_grad else 0, dtype=cells.scores.dtype, device=cells.scores.device)
    columns = column_tiles(classes)
    if not columns:
        return loss, grad
    for o, rows in row_tiles(outer, inner, classes):
        if cells.mask is None and len(columns) == 1 and cells.scores.device.type == "cpu":
            plain = cells.plain(o, rows)
            if plain is not None:
                loss[o, rows] = plain.losses
                if with_grad and grad.dtype == cells.dtype:
                    plain.gradient(grad_scale, out=grad[o, rows])
                elif with_grad:
                    grad[o, rows] = plain.gradient(grad_scale)
                continue
        tile: Terms | None = None
        log_n, log_p = LogSum(), LogSum()
        for cols in columns:
            tile = cells.terms(o, rows, cols)
            tile.add_to(log_n, log_p)
        loss[o, rows] = (log_n.value() + log_p.value()).squeeze(-1)
        if with_grad:
            for cols in columns:
                if len(columns) > 1 or tile is None:
                    tile = cells.terms(o, rows, cols)
                tile.gradient(log_n, log_p, grad_scale, grad[o, rows, cols])
    return loss, grad


def tile_terms(
    s: torch.Tensor,
    p: torch.Tensor,
    n: torch.Tensor,
    u: torch.Tensor,
    left_out: torch.Tensor | None,
    labels_surely_valid: bool,
) -> TermsOfCells:
    """The terms of scores ``s`` and labels ``p``; the buffers p, n, u become part of the result or are spent."""
    if left_out is not None:  # first, for nothing in such a cell may count: not NaN, not a label of 7
        s = s.masked_fill(left_out, 0.0)
        p.masked_fill_(left_out, 0.0)
    least, most = extremes(s) if s.device.type == "cpu" else (-torch.inf, torch.inf)
    if least >= -SAFE and most <= SAFE and (labels_surely_valid or within(p, 0.0, 1.0)):
        exp(s, out=u, farthest=max(-least, most))
        torch.sub(1.0, p, out=n)
        if left_out is not None:
            n.masked_fill_(left_out, 0.0)
        return TermsOfCells(None, n.mul_(u), None, p.div_(u))
    ignored = (p == -100) | (s == -torch.inf)
    left_out = ignored if left_out is None else left_out | ignored
    s = s.masked_fill(((p < 0) | (p > 1)) & ~left_out, torch.nan)  # a label of NaN makes a NaN by itself
    torch.neg(p, out=n).log1p_().add_(s).masked_fill_(left_out | (p == 1), -torch.inf)  # inf + log 0 is NaN
    p.log_().sub_(s).masked_fill_(left_out, -torch.inf)
    return TermsOfCells(*_pivoted(n), *_pivoted(p))


def extremes(x: torch.Tensor) -> tuple[float, float]:
    """The least and the largest number, NaN if there is one; 0 of none."""
    if x.numel() == 0:
        return 0.0, 0.0
    least, most = torch.aminmax(x)
    return float(least), float(most)


def within(x: torch.Tensor, low: float, high: float) -> bool:
    least, most = extremes(x)
    return low <= least and most <= high


def _pivoted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, exp(x - m)), in the place of x; exp(inf - m) is inf, never NaN."""
    m = x.amax(-1, keepdim=True).clamp_(0.0, torch.finfo(x.dtype).max)
    return m, x.sub_(m).exp_()


class PlainRows(Protocol):
    """Exponentials without pivots: of whole rows, of which none is far from 0."""

    @property
    def losses(self) -> torch.Tensor:
        """[...]"""

    def gradient(self, grad_scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """Spends them."""


class LogSum:
    """The running log(1 + sum of S * exp(m)) of each row."""

    def __init__(self, m: torch.Tensor | None = None, S: torch.Tensor | None = None) -> None:
        self.m = m
        self.sum = S

    def add(self, m: torch.Tensor | None, S: torch.Tensor) -> None:
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
    columns = column_tiles(classes, TILE)
    for o, rows in row_tiles(outer, inner, classes, TILE) if columns else ():
        terms = LogSum(), LogSum()
        for cols in columns:
            cells.terms(o, rows, cols).add_to(*terms)
        for m, S, term in zip(sums[::2], sums[1::2], terms, strict=True):
            assert term.sum is not None
            m[o, rows] = 0.0 if term.m is None else term.m.squeeze(-1)
            S[o, rows] = term.sum.squeeze(-1)
    return sums.view(1, 4, outer * inner)


def sweep_gradient(cells: Cells, sums: torch.Tensor, grad_scale: float) -> torch.Tensor:
    outer, inner, classes = cells.scores.shape
    grad = torch.empty(cells.scores.shape, dtype=cells.scores.dtype, device=cells.scores.device)
    sums = sums.view(4, outer, inner, 1)
    for o, rows in row_tiles(outer, inner, classes, TILE):
        m_n, S_n, m_p, S_p = sums[:, o, rows]
        for cols in column_tiles(classes, TILE):
            logs = LogSum(m_n, S_n), LogSum(m_p, S_p)
            cells.terms(o, rows, cols).gradient(*logs, grad_scale, grad[o, rows, cols])
    return grad
