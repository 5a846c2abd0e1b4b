"""The symmetric KL divergence of two score vectors: ``kernels/zlpr_kl_div.py`` has the mathematics."""

from __future__ import annotations

import torch

from ._tiles import column_tiles, computing_dtype, row_tiles


def _load(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, o: int, rows: slice, columns: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two scores of each cell in the computing dtype; both 0, which adds nothing, where the cell is left out."""
    dtype = computing_dtype(scores.dtype)
    s, t = scores[o, rows, columns].to(dtype), other[o, rows, columns].to(dtype)
    if mask is None and s.device.type == "cpu" and s.numel() > 0 and bool(s.amin() > -torch.inf):
        return s, t  # on a CPU, which can look: nothing is left out
    left_out = (s == -torch.inf) & (t == -torch.inf)
    if mask is not None:
        left_out |= ~mask[o, rows, columns]
    return s.masked_fill(left_out, 0.0), t.masked_fill(left_out, 0.0)


def forward(scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As ``kernels.zlpr_kl_div.forward``; float64 scores have a float64 divergence."""
    outer, inner, classes = scores.shape
    loss = torch.zeros((outer, inner), dtype=computing_dtype(scores.dtype), device=scores.device)
    for o, rows in row_tiles(outer, inner, classes):
        for columns in column_tiles(classes):
            s, t = _load(scores, other, mask, o, rows, columns)
            loss[o, rows].add_(torch.sigmoid(s).sub_(torch.sigmoid(t)).mul_(s - t).sum(-1))
    return loss


def backward(
    scores: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor | None,
    upstream: torch.Tensor,
    factor: float,
    need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.zlpr_kl_div.backward``."""
    outer, inner, classes = scores.shape
    grad_scores = torch.empty(scores.shape if need_scores else 0, dtype=scores.dtype, device=scores.device)
    grad_other = torch.empty(other.shape if need_other else 0, dtype=other.dtype, device=other.device)
    scale = upstream.view(outer, inner, 1)
    for o, rows in row_tiles(outer, inner, classes):
        g = scale[o, rows].to(computing_dtype(scores.dtype)) * factor
        for columns in column_tiles(classes):
            s, t = _load(scores, other, mask, o, rows, columns)
            f_s, f_t = torch.sigmoid(s), torch.sigmoid(t)
            distance, gap = (s - t).mul_(g), (f_s - f_t).mul_(g)
            if need_scores:
                slope = f_s.addcmul_(f_s, f_s, value=-1)  # f - f * f
                torch.addcmul(gap, slope, distance, out=slope)
                grad_scores[o, rows, columns] = slope
            if need_other:
                slope = f_t.addcmul_(f_t, f_t, value=-1)
                torch.addcmul(gap, slope, distance, out=slope)
                grad_other[o, rows, columns] = slope.neg_()
    return grad_scores, grad_other
