"""The ZLPR loss from lists of positive classes: nothing is subtracted, and a class listed twice counts once.

Where no score is far from 0, and there is no mask, the exponentials of all cells are made, those of the listed ones
taken out, and 0 left in their place: the other half of the loss, and of its gradient, is made of these few. Elsewhere
each tile's labels are set from the lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import zlpr_loss
from ._tiles import SMALL, computing, computing_dtype, exp, one_tile, small_on_one_thread
from .zlpr_loss import SAFE, are_plain, divisors_of, extremes


class Cells(zlpr_loss.Cells):
    """Of scores whose positives [outer, inner, listed] are in lists."""

    def __init__(
        self, scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
    ) -> None:
        super().__init__(scores, _reader(positives, ignore_index), True, mask)
        self._positives, self._ignore_index = positives, ignore_index
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def plain(self, o: int, rows: slice) -> zlpr_loss.PlainRows | None:
        s = computing(self.scores[o, rows])
        return plain_lists(s, self._listed(o, rows, slice(0, s.shape[-1])), *self._two_buffers(s))

    def terms(self, o: int, rows: slice, columns: slice) -> zlpr_loss.Terms:
        s = computing(self.scores[o, rows, columns])
        least, most = extremes(s) if self.mask is None and s.device.type == "cpu" else (-torch.inf, torch.inf)
        if not (least >= -SAFE and most <= SAFE):
            return super().terms(o, rows, columns)
        e, zeros = self._two_buffers(s)
        listed = self._listed(o, rows, columns)
        return TermsOfLists(e, listed, take_listed(s, listed, e, max(-least, most)), zeros)

    def _two_buffers(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like s, in memory that the next tile takes; the second is 0, and is to be so again."""
        if self._buffers is None or self._buffers[0].shape != s.shape:
            self._buffers = s.new_empty(s.shape), s.new_zeros(s.shape)
        return self._buffers

    def _listed(self, o: int, rows: slice, columns: slice) -> torch.Tensor:
        """The numbers of the listed cells among all of a tile; one listed twice is there twice."""
        positives = self._positives[o, rows]
        positives = positives if positives.dtype == torch.int64 else positives.long()
        here = (positives >= columns.start) & (positives < columns.stop)
        if self._ignore_index >= 0:
            here &= positives != self._ignore_index
        width = columns.stop - columns.start
        first = torch.arange(0, len(positives) * width, width, device="cpu").unsqueeze(1)
        listed: torch.Tensor = (positives - columns.start + first).masked_select(here)
        return listed


def _reader(positives: torch.Tensor, ignore_index: int) -> zlpr_loss.LabelReader:
    def read(o: int, rows: slice, columns: slice, out: torch.Tensor) -> None:
        listed = positives[o, rows].to(torch.int64)
        here = (listed >= columns.start) & (listed < columns.stop) & (listed != ignore_index)
        first = columns.start
        out.zero_()
        # amax, for several indices of a row may meet in a cell: those of other tiles all bring a 0 to the first.
        out.scatter_reduce_(1, torch.where(here, listed - first, 0), here.to(out.dtype), "amax")

    return read


class TermsOfLists(NamedTuple):
    """Terms of lists, without pivots."""

    e: torch.Tensor  # [rows, columns]: exp(s), 0 where listed
    listed: torch.Tensor  # numbers of cells
    e_listed: torch.Tensor  # exp(-s) of these
    zeros: torch.Tensor  # [rows, columns]

    def add_to(self, log_n: zlpr_loss.LogSum, log_p: zlpr_loss.LogSum) -> None:
        for log_sum, S in zip((log_n, log_p), sums_of(self.e, self.listed, self.e_listed, self.zeros), strict=True):
            log_sum.add(None, S)

    def gradient(self, log_n: zlpr_loss.LogSum, log_p: zlpr_loss.LogSum, grad_scale: float, out: torch.Tensor) -> None:
        share_n, share_p = (log_sum.share(None).mul_(grad_scale) for log_sum in (log_n, log_p))
        in_place = out.dtype == self.e.dtype
        grad = torch.mul(self.e, share_n, out=out if in_place else self.e)
        subtract(self.e_listed.mul_(share_p.take(rows_of(self.listed, grad))), self.listed, grad)
        if not in_place:
            out.copy_(grad)


class PlainLists(NamedTuple):
    """PlainRows of lists."""

    e: torch.Tensor  # as TermsOfLists
    listed: torch.Tensor
    e_listed: torch.Tensor
    sums: torch.Tensor  # [2, rows, 1]
    losses: torch.Tensor  # [rows]

    def gradient(self, grad_scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """Spends them."""
        of_n, of_p = divisors_of(self.sums, grad_scale).unbind()
        grad = torch.div(self.e, of_n, out=self.e if out is None else out)
        subtract(self.e_listed.div_(of_p.take(rows_of(self.listed, grad))), self.listed, grad)
        return grad


def take_listed(s: torch.Tensor, listed: torch.Tensor, e: torch.Tensor, farthest: float = 0.0) -> torch.Tensor:
    """exp(-s) of the listed cells. Fills e with exp(s), 0 where listed. ``farthest`` as for ``exp``."""
    exp(s, out=e, farthest=farthest)
    e_listed: torch.Tensor = e.take(listed).reciprocal_()
    e.view(-1).index_fill_(0, listed, 0.0)
    return e_listed


def sums_of(
    e: torch.Tensor, listed: torch.Tensor, e_listed: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of e and, where they lie among zeros, of the listed cells: so they have the bits of labels cell by
    cell, and what is listed twice is there once."""
    zeros.view(-1).scatter_(0, listed, e_listed)
    sums = e.sum(-1, keepdim=True), zeros.sum(-1, keepdim=True)
    zeros.view(-1).index_fill_(0, listed, 0.0)
    return sums


def rows_of(listed: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    return listed.div(tile.shape[-1], rounding_mode="floor")


def subtract(x: torch.Tensor, listed: torch.Tensor, grad: torch.Tensor) -> None:
    """x of the listed cells, which is spent, from a gradient that is 0 there; and contiguous, for a tile is of whole
    rows or of a part of one."""
    grad.view(-1).scatter_(0, listed, x.neg_())


def plain_lists(s: torch.Tensor, listed: torch.Tensor, e: torch.Tensor, zeros: torch.Tensor) -> PlainLists | None:
    """Of scores ``s`` [rows, C] of which some are ``listed``. Fills e. None where the losses are not ``are_plain``."""
    e_listed = take_listed(s, listed, e)
    sums = torch.stack(sums_of(e, listed, e_listed, zeros))
    losses = sums.log1p().sum((0, -1))
    return PlainLists(e, listed, e_listed, sums, losses) if are_plain(losses, s) else None


@small_on_one_thread(lambda scores, *_: scores.numel())
def forward(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``zlpr_loss.forward``, with positives in place of labels."""
    if one_tile(scores, mask):
        if scores.numel() <= SMALL:  # where calls cost more than what they do
            labels = _labels(scores, positives, ignore_index)
            done = zlpr_loss.forward_plain(scores, labels, True, grad_scale, with_grad)
            if done is not None:
                return done
        scores, positives = (x.reshape(1, scores.shape[:-1].numel(), x.shape[-1]) for x in (scores, positives))
    return zlpr_loss.sweep(Cells(scores, positives, mask, ignore_index), grad_scale, with_grad)


def _labels(scores: torch.Tensor, positives: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """1 where a class is listed, 0 elsewhere: what pads goes into a column behind the last, which is cut off."""
    listed = positives if positives.dtype == torch.int64 else positives.long()  # and no index is cast to a small dtype
    padding, classes = listed < 0, scores.shape[-1]
    if ignore_index >= 0:
        padding |= listed == ignore_index
    labels = scores.new_zeros((*scores.shape[:-1], classes + 1), dtype=computing_dtype(scores.dtype))
    return labels.scatter_(-1, listed.masked_fill(padding, classes).clamp_(max=classes), 1.0)[..., :-1]


def shard_log_sums(
    scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    return zlpr_loss.sweep_log_sums(Cells(scores, positives, mask, ignore_index))


def shard_gradient(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor,
    grad_scale: float,
    ignore_index: int,
) -> torch.Tensor:
    return zlpr_loss.sweep_gradient(Cells(scores, positives, mask, ignore_index), sums, grad_scale)
