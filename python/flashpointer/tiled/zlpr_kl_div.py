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


def _gap(s: torch.Tensor, t: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """sigmoid(s) - sigmoid(t), to full relative precision."""
    size = torch.maximum(s, t).sigmoid_().mul_(torch.minimum(s, t).neg_().sigmoid_())
    return size.mul_(difference.abs().neg_().expm1_()).mul_(difference.sign()).neg_()


def forward(scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As ``kernels.zlpr_kl_div.forward``; float64 scores have a float64 divergence."""
    outer, inner, classes = scores.shape
    loss = torch.zeros((outer, inner), dtype=computing_dtype(scores.dtype), device=scores.device)
    for o, rows in row_tiles(outer, inner, classes):
        for columns in column_tiles(classes):
            s, t = _load(scores, other, mask, o, rows, columns)
            difference = s - t
            loss[o, rows] += _gap(s, t, difference).mul_(difference).sum(-1)
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
            gap = _gap(s, t, difference)
            if need_scores:
                slope = torch.sigmoid(s).mul_(s.neg_().sigmoid_())
                grad_scores[o, rows, columns] = slope.mul_(difference).add_(gap).mul_(g)
            if need_other:
                slope = torch.sigmoid(t).mul_(t.neg_().sigmoid_())
                grad_other[o, rows, columns] = slope.mul_(difference).add_(gap).mul_(-g)
    return grad_scores, grad_other
