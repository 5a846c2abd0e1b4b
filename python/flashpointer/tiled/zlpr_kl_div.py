"""The symmetric KL divergence of two score vectors: ``kernels/zlpr_kl_div.py`` has the mathematics.

The gradients come of the same sweep as the losses, for what they are made of is in cache then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._tiles import column_tiles, computing, computing_dtype, one_tile, row_tiles, small_on_one_thread

# Whatever goes over a tile costs the time that its memory takes, so that two operations in one save half of it.
times_slope = torch.ops.aten.sigmoid_backward.grad_input  # (x, f) -> x f (1 - f), the slope of a sigmoid f
scaled_difference = torch.ops.aten.mse_loss_backward.grad_input  # (z, x, y, 2) -> 2 z (x - y)


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
    scale = (upstream * factor).view(outer, inner, 1)
    _, of_scores, of_other = forward_with_gradients(scores, other, mask, scale, need_scores, need_other)
    return of_scores, of_other


@small_on_one_thread(lambda scores, *_: scores.numel())
def forward_with_gradients(
    scores: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float | torch.Tensor,
    need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of rows [outer, inner, C], or [..., C] that are ``one_tile``; and grad_scale, of all rows or [outer,
    inner, 1], times the gradients of their sum, empty where not needed."""
    needed = need_scores, need_other
    if one_tile(scores, mask):
        losses, *made = _tile(scores, other, None, grad_scale, needed)
        if not all(needed):
            nothing = scores.new_empty(0)
            made = [grad if need else nothing for grad, need in zip(made, needed, strict=True)]
        of_scores, of_other = (grad if grad.dtype == scores.dtype else grad.to(scores.dtype) for grad in made)
        return losses, of_scores, of_other
    of_scores, of_other = grads = [
        torch.empty(x.shape if need else 0, dtype=x.dtype, device=x.device)
        for x, need in zip((scores, other), needed, strict=True)
    ]
    outer, inner, classes = scores.shape
    losses = torch.zeros((outer, inner), dtype=computing_dtype(scores.dtype), device=scores.device)
    in_place = [need and scores.dtype == losses.dtype for need in needed]
    buffers: Sequence[torch.Tensor] = ()
    for o, rows in row_tiles(outer, inner, classes):
        scale = grad_scale[o, rows] if isinstance(grad_scale, torch.Tensor) else grad_scale
        for columns in column_tiles(classes):
            s, t = (x[o, rows, columns] for x in (scores, other))
            left_in = None if mask is None else mask[o, rows, columns]
            if not buffers or buffers[0].shape != s.shape:
                buffers = losses.new_empty((4 - sum(in_place), *s.shape)).unbind()
            spare = iter(buffers)
            outs = [grad[o, rows, columns] if need else None for grad, need in zip(grads, needed, strict=True)]
            places = [out if here else next(spare) for out, here in zip(outs, in_place, strict=True)]
            of_tile, *made = _tile(s, t, left_in, scale, needed, (*places, *spare))
            losses[o, rows].add_(of_tile)
            for out, grad in zip(outs, made, strict=True):
                if out is not None and out is not grad:
                    out.copy_(grad)
    return losses, of_scores, of_other


def _tile(
    s: torch.Tensor,
    t: torch.Tensor,
    left_in: torch.Tensor | None,
    grad_scale: float | torch.Tensor,
    needed: tuple[bool, bool],
    places: Sequence[torch.Tensor | None] = (None, None, None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of a tile [..., C]; and its gradients, where needed. Sigmoids become these in place, for what is
    written less often stays in cache: in the first two of ``places``, if they are there; the others are for work."""
    of_s, of_t, of_distance, of_gap = places
    s, t = computing(s).contiguous(), computing(t).contiguous()  # else sigmoid has other last bits
    if left_in is not None or s.device.type != "cpu":
        s, t = _cleared(s, t, left_in)
    f_s, f_t = torch.sigmoid(s, out=of_s), torch.sigmoid(t, out=of_t)
    distance = torch.sub(s, t, out=of_distance)
    gap = torch.sub(f_t, f_s, out=of_gap if any(needed) else f_s)
    if any(needed):
        half_scale = grad_scale / 2
        if not isinstance(half_scale, torch.Tensor):
            half_scale = s.new_full((), half_scale)
    if needed[0]:
        scaled_difference(half_scale, times_slope(distance, f_s, grad_input=f_s), gap, 2, grad_input=f_s)
    if needed[1]:
        scaled_difference(half_scale, gap, times_slope(distance, f_t, grad_input=f_t), 2, grad_input=f_t)
    losses = distance.mul_(gap).sum(-1).neg_()
    if left_in is None and s.device.type == "cpu" and not math.isfinite(losses.sum()):  # -inf - -inf is NaN
        return _tile(s, t, torch.ones_like(s, dtype=torch.bool), grad_scale, needed, places)
    return losses, f_s, f_t


def _cleared(s: torch.Tensor, t: torch.Tensor, left_in: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both 0, which adds nothing, where a cell is left out."""
    left_out = (s == -torch.inf) & (t == -torch.inf)
    if left_in is not None:
        left_out |= ~left_in
    return s.masked_fill(left_out, 0.0), t.masked_fill(left_out, 0.0)
