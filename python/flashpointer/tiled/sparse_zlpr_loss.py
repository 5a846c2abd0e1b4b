"""The ZLPR loss from lists of positive classes: each tile's labels are set from the lists, so nothing is subtracted and
a class listed twice counts once."""

from __future__ import annotations

import torch

from . import zlpr_loss
from ._tiles import computing_dtype, one_tile, small_on_one_thread


def labelled(
    scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
) -> zlpr_loss.Cells:
    """The cells of scores whose positives [outer, inner, listed] are in lists."""

    def read(o: int, rows: slice, columns: slice, out: torch.Tensor) -> None:
        listed = positives[o, rows].to(torch.int64)
        here = (listed >= columns.start) & (listed < columns.stop) & (listed != ignore_index)
        first = columns.start
        out.zero_()
        # amax, for several indices of a row may meet in a cell: those of other tiles all bring a 0 to the first.
        out.scatter_reduce_(1, torch.where(here, listed - first, 0), here.to(out.dtype), "amax")

    return zlpr_loss.Cells(scores, read, True, mask)


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
        done = zlpr_loss.forward_plain(scores, _labels(scores, positives, ignore_index), True, grad_scale, with_grad)
        if done is not None:
            return done
        scores, positives = (x.reshape(1, scores.shape[:-1].numel(), x.shape[-1]) for x in (scores, positives))
    return zlpr_loss.sweep(labelled(scores, positives, mask, ignore_index), grad_scale, with_grad)


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
    return zlpr_loss.sweep_log_sums(labelled(scores, positives, mask, ignore_index))


def shard_gradient(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor,
    grad_scale: float,
    ignore_index: int,
) -> torch.Tensor:
    return zlpr_loss.sweep_gradient(labelled(scores, positives, mask, ignore_index), sums, grad_scale)
