"""The symmetric KL divergence of two score vectors: ``kernels/zlpr_kl_div.py`` has the mathematics.

The gradients come of the same sweep as the losses, for what they are made of is in cache then.
"""

from __future__ import annotations

import math

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
    grads = [
        torch.empty(x.shape if needed else 0, dtype=x.dtype, device=x.device)
        for x, needed in ((scores, need_scores), (other, need_other))
    ]
    if one_tile(scores, mask):
        losses = _tile(scores, other, None, grad_scale, grads)
        return losses, grads[0], grads[1]
    outer, inner, classes = scores.shape
    losses = torch.zeros((outer, inner), dtype=computing_dtype(scores.dtype), device=scores.device)
    work: list[torch.Tensor] = []
    for o, rows in row_tiles(outer, inner, classes):
        for columns in column_tiles(classes):
            of_tile = [x[o, rows, columns] if x.dim() == 3 else x for x in (scores, other, *grads)]
            left_in = None if mask is None else mask[o, rows, columns]
            losses[o, rows].add_(_tile(of_tile[0], of_tile[1], left_in, grad_scale, of_tile[2:], work))
    return losses, grads[0], grads[1]


def _tile(
    s: torch.Tensor,
    t: torch.Tensor,
    left_in: torch.Tensor | None,
    grad_scale: float,
    grads: list[torch.Tensor],
    work: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The losses of a tile [..., C]; its gradients, but for those that are empty, are written. ``work`` is a list of
    buffers, for tile after tile."""
    of_s, of_t = grads
    s, t = computing(s).contiguous(), computing(t).contiguous()  # else sigmoid has other last bits
    work = [] if work is None else work
    # Sigmoids stand where the gradients will: what is written less often stays in cache.
    in_place = [out.numel() > 0 and out.dtype == s.dtype for out in grads]
    kept = of_s.numel() + of_t.numel() > 0  # the sigmoids, for gradients
    if not work or work[0].shape != s.shape:
        work.clear()
        work[:] = s.new_empty((1 + 2 * kept + 2 - sum(in_place), *s.shape)).unbind()
    rest = list(work)
    f_s, f_t = (out if here else rest.pop() for out, here in zip(grads, in_place, strict=True))
    distance, gap, product = rest if kept else (rest[0], f_s, f_t)
    if left_in is not None or s.device.type != "cpu":
        s, t = _cleared(s, t, left_in)
    torch.sub(torch.sigmoid(s, out=f_s), torch.sigmoid(t, out=f_t), out=gap)
    torch.sub(s, t, out=distance)
    losses = torch.mul(gap, distance, out=product).sum(-1)
    if left_in is None and s.device.type == "cpu" and not math.isfinite(losses.sum()):  # -inf - -inf is NaN
        return _tile(s, t, torch.ones_like(s, dtype=torch.bool), grad_scale, grads, work)
    if grad_scale != 1.0 and (of_s.numel() or of_t.numel()):
        gap.mul_(grad_scale)
    for sign, f, out in ((1, f_s, of_s), (-1, f_t, of_t)):
        if out.numel():
            slope = f.addcmul_(f, f, value=-1)  # f - f * f
            torch.addcmul(gap, slope, distance, value=grad_scale, out=f)
            if sign < 0:
                f.neg_()
            if f is not out:
                out.copy_(f)
    return losses


def _cleared(s: torch.Tensor, t: torch.Tensor, left_in: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both 0, which adds nothing, where a cell is left out."""
    left_out = (s == -torch.inf) & (t == -torch.inf)
    if left_in is not None:
        left_out |= ~left_in
    return s.masked_fill(left_out, 0.0), t.masked_fill(left_out, 0.0)
