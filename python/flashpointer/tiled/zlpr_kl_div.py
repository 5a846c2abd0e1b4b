"""The symmetric KL divergence of two score vectors: ``kernels/zlpr_kl_div.py`` has the mathematics.

The gradients come of the same sweep as the losses, for what they are made of is in cache then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._tiles import column_tiles, computing, computing_dtype, one_tile, row_tiles, small_on_one_thread


def forward(scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As ``kernels.zlpr_kl_div.forward``; float64 scores have a float64 divergence."""
    return forward_with_gradients(scores, other, mask, 1.0, False, False)[0]


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
    outer, inner, _ = scores.shape
    _, *grads = forward_with_gradients(scores, other, mask, 1.0, need_scores, need_other)
    scale = (upstream * factor).view(outer, inner, 1)
    of_scores, of_other = (grad.mul_(scale) if grad.dim() == 3 else grad for grad in grads)
    return of_scores, of_other


@small_on_one_thread(lambda scores, *_: scores.numel())
def forward_with_gradients(
    scores: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of rows [outer, inner, C], or [..., C] that are ``one_tile``; and grad_scale times the gradients of
    their sum, empty where not needed."""
    needed = need_scores, need_other
    if one_tile(scores, mask):
        losses, grads = _tile(scores, other, None, grad_scale, needed)
        of_scores, of_other = (grad if grad.dtype == scores.dtype else grad.to(scores.dtype) for grad in grads)
        return losses, of_scores, of_other
    grads = [
        torch.empty(x.shape if need else 0, dtype=x.dtype, device=x.device)
        for x, need in zip((scores, other), needed, strict=True)
    ]
    outer, inner, classes = scores.shape
    losses = torch.zeros((outer, inner), dtype=computing_dtype(scores.dtype), device=scores.device)
    work: list[torch.Tensor] = []
    for o, rows in row_tiles(outer, inner, classes):
        for columns in column_tiles(classes):
            s, t, *outs = (x[o, rows, columns] if x.dim() == 3 else x for x in (scores, other, *grads))
            left_in = None if mask is None else mask[o, rows, columns]
            of_tile, _ = _tile(s, t, left_in, grad_scale, needed, outs, work)
            losses[o, rows].add_(of_tile)
    return losses, grads[0], grads[1]


def _tile(
    s: torch.Tensor,
    t: torch.Tensor,
    left_in: torch.Tensor | None,
    grad_scale: float,
    needed: tuple[bool, bool],
    outs: Sequence[torch.Tensor | None] = (None, None),
    work: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The losses of a tile [..., C]; and its gradients, in ``outs``, or new and in the computing dtype. ``work`` is
    a list of buffers, for tile after tile."""
    s, t = computing(s).contiguous(), computing(t).contiguous()  # else sigmoid has other last bits
    # Sigmoids stand where the gradients will: what is written less often stays in cache.
    in_place = [need and out is not None and out.dtype == s.dtype for need, out in zip(needed, outs, strict=True)]
    kept = any(needed)  # the sigmoids, for gradients
    buffers: list[torch.Tensor | None] = [None] * 5
    if work is not None:
        if not work or work[0].shape != s.shape:
            work[:] = s.new_empty((1 + 2 * kept + 2 - sum(in_place), *s.shape)).unbind()
        buffers = list(work)
    of_s, of_t = (out if here else buffers.pop() for out, here in zip(outs, in_place, strict=True))
    if left_in is not None or s.device.type != "cpu":
        s, t = _cleared(s, t, left_in)
    f_s, f_t = torch.sigmoid(s, out=of_s), torch.sigmoid(t, out=of_t)
    gap = torch.sub(f_s, f_t, out=buffers.pop() if kept else f_s)
    distance = torch.sub(s, t, out=buffers.pop())
    losses = torch.mul(gap, distance, out=buffers.pop() if kept else f_t).sum(-1)
    if left_in is None and s.device.type == "cpu" and not math.isfinite(losses.sum()):  # -inf - -inf is NaN
        return _tile(s, t, torch.ones_like(s, dtype=torch.bool), grad_scale, needed, outs, work)
    if grad_scale != 1.0 and kept:
        gap.mul_(grad_scale)
    grads = []
    for sign, f, need, out in zip((1, -1), (f_s, f_t), needed, outs, strict=True):
        if need:
            slope = f.addcmul_(f, f, value=-1)  # f - f * f
            torch.addcmul(gap, slope, distance, value=grad_scale, out=f)
            if sign < 0:
                f.neg_()
            if out is not None and f is not out:
                out.copy_(f)
        grads.append(f if need else f.new_empty(0))
    return losses, grads


def _cleared(s: torch.Tensor, t: torch.Tensor, left_in: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both 0, which adds nothing, where a cell is left out."""
    left_out = (s == -torch.inf) & (t == -torch.inf)
    if left_in is not None:
        left_out |= ~left_in
    return s.masked_fill(left_out, 0.0), t.masked_fill(left_out, 0.0)
