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
            difference = s - t
            loss[o, rows] += s.sigmoid_().sub_(t.sigmoid_()).mul_(difference).sum(-1)
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
    dtype = computing_dtype(scores.dtype)
    grad_scores = torch.empty(scores.shape if need_scores else 0, dtype=scores.dtype, device=scores.device)
    grad_other = torch.empty(other.shape if need_other else 0, dtype=other.dtype, device=other.device)
    scale = upstream.view(outer, inner, 1)
    for o, rows in row_tiles(outer, inner, classes):
        g = scale[o, rows].to(dtype) * factor
        for columns in column_tiles(classes):
            s, t = _load(scores, other, mask, o, rows, columns)
            difference = s - t
            f_s, f_t = torch.sigmoid(s), torch.sigmoid(t)
            gap = f_s - f_t
            if need_scores:
                grad_scores[o, rows, columns] = f_s.mul_(s.neg_().sigmoid_()).mul_(difference).add_(gap).mul_(g)
            if need_other:
                grad_other[o, rows, columns] = f_t.mul_(t.neg_().sigmoid_()).mul_(difference).add_(gap).mul_(-g)
    return grad_scores, grad_other
