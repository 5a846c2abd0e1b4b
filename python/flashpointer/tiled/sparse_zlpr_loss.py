"""The ZLPR loss from lists of positive classes: each tile's labels are set from the lists, so nothing is subtracted and
a class listed twice counts once."""

from __future__ import annotations

import torch

from . import zlpr_loss
from ._tiles import one_tile


def forward(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``zlpr_loss.forward``, with positives [outer, inner, listed] in place of labels."""
    if one_tile(scores, mask):
        scores, positives = (x.reshape(1, scores.shape[:-1].numel(), x.shape[-1]) for x in (scores, positives))

    def read(o: int, rows: slice, columns: slice, out: torch.Tensor) -> None:
        listed = positives[o, rows].to(torch.int64)
        here = (listed >= columns.start) & (listed < columns.stop) & (listed != ignore_index)
        first = columns.start
        out.zero_()
        # amax, for several indices of a row may meet in a cell: those of other tiles all bring a 0 to the first.
        out.scatter_reduce_(1, torch.where(here, listed - first, 0), here.to(out.dtype), "amax")

    return zlpr_loss.sweep(scores, read, True, mask, grad_scale, with_grad)
