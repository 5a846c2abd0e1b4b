"""The symmetric KL divergence of two score vectors, and its gradient.

With f = sigmoid,

    D(s, t) = sum_i (f(s_i) - f(t_i)) (s_i - t_i)
    dD/ds_i =  f'(s_i) (s_i - t_i) + f(s_i) - f(t_i)          f' = f (1 - f)
    dD/dt_i = -f'(t_i) (s_i - t_i) - f(s_i) + f(t_i)

The gap f(s) - f(t) of two close or saturated sigmoids would cancel; with high = max(s, t) and low = min(s, t) it is

    |f(s) - f(t)| = f(high) f(-low) (1 - exp(low - high))

The gradient of a cell needs nothing of its row but the upstream scalar, so backward recomputes it from the scores, in
one pass that scales in float32: nothing is stored, and nothing underflows in float16. A cell where both scores are -inf
is invalid in both and left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LONGEST_BLOCK = 1024
CHUNK = 8192


@triton.jit
def one_minus_exp(d):
    """1 - exp(-d) for d >= 0; near 0, where that cancels, by its series."""
    series = d * (1.0 - d / 2 * (1.0 - d / 3 * (1.0 - d / 4 * (1.0 - d / 5 * (1.0 - d / 6)))))
    return tl.where(d < 0.125, series, 1.0 - tl.exp(-d))


@triton.jit
def gap(s, t):
    """sigmoid(s) - sigmoid(t), to full relative precision; 0 where s = t."""
    size = tl.sigmoid(tl.maximum(s, t)) * tl.sigmoid(-tl.minimum(s, t)) * one_minus_exp(tl.abs(s - t))
    return tl.where(s < t, -size, size)


@triton.jit
def load_pair(
    scores, other, mask, row, inner, col, classes,
    stride_so, stride_si, stride_sc, stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The two scores of each cell in float32; both 0, which adds nothing, where the cell is left out."""
    o = row // inner
    i = row % inner
    inside = col < classes
    s = tl.load(scores + o * stride_so + i * stride_si + col * stride_sc, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(other + o * stride_to + i * stride_ti + col * stride_tc, mask=inside, other=0.0).to(tl.float32)
    left_out = (s == float("-inf")) & (t == float("-inf"))
    if HAS_MASK:
        left_out = left_out | (
            tl.load(mask + o * stride_mo + i * stride_mi + col * stride_mc, mask=inside, other=0) == 0
        )
    return tl.where(left_out, 0.0, s), tl.where(left_out, 0.0, t)


@triton.jit
def zlpr_kl_div_kernel(
    scores, other, mask, partials, inner, classes,
    stride_so, stride_si, stride_sc, stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The divergence over CHUNK columns of a row goes to partials [rows, chunks]."""
    chunks = tl.cdiv(classes, CHUNK)
    row = tl.program_id(0).to(tl.int64) // chunks
    start = tl.program_id(0).to(tl.int64) % chunks * CHUNK
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, classes), BLOCK):
        col = first + tl.arange(0, BLOCK)
        s, t = load_pair(
            scores, other, mask, row, inner, col, classes, stride_so, stride_si, stride_sc,
            stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc, HAS_MASK,
        )  # fmt: skip
        total += gap(s, t) * (s - t)
    tl.store(partials + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def zlpr_kl_div_backward_kernel(
    scores, other, mask, upstream, grad_scores, grad_other, inner, classes, factor, stride_upstream,
    stride_so, stride_si, stride_sc, stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc,
    HAS_MASK: tl.constexpr, NEED_SCORES: tl.constexpr, NEED_OTHER: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(classes, CHUNK)
    row = tl.program_id(0).to(tl.int64) // chunks
    start = tl.program_id(0).to(tl.int64) % chunks * CHUNK
    g = tl.load(upstream + row * stride_upstream).to(tl.float32) * factor
    for first in range(start, tl.minimum(start + CHUNK, classes), BLOCK):
        col = first + tl.arange(0, BLOCK)
        s, t = load_pair(
            scores, other, mask, row, inner, col, classes, stride_so, stride_si, stride_sc,
            stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc, HAS_MASK,
        )  # fmt: skip
        between = gap(s, t)
        at = row * classes + col
        if NEED_SCORES:
            ds = g * (tl.sigmoid(s) * tl.sigmoid(-s) * (s - t) + between)
            tl.store(grad_scores + at, ds.to(grad_scores.dtype.element_ty), mask=col < classes)
        if NEED_OTHER:
            dt = g * (tl.sigmoid(t) * tl.sigmoid(-t) * (t - s) - between)
            tl.store(grad_other + at, dt.to(grad_other.dtype.element_ty), mask=col < classes)


class Plan(NamedTuple):
    """``block`` columns at a time, CHUNK of them to a program."""

    block: int
    num_warps: int


def plan(classes: int) -> Plan:
    """The launch parameters for a shape, by rule."""
    block = min(LONGEST_BLOCK, max(32, triton.next_power_of_2(classes)))
    return Plan(block, max(1, block // 256))


def _operands(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    visible = scores if mask is None else mask.view(torch.uint8)  # any pointer will do where none is read
    return visible, (*scores.stride(), *other.stride(), *(visible.stride() if mask is not None else (0, 0, 0)))


def forward(scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Divergences [outer, inner] in float32; scores, other and the bool mask are [outer, inner, classes]."""
    outer, inner, classes = scores.shape
    chunks = triton.cdiv(classes, CHUNK)
    partials = torch.empty((outer, inner, chunks), dtype=torch.float32, device=scores.device)
    if partials.numel() > 0:
        visible, strides = _operands(scores, other, mask)
        block, num_warps = plan(classes)
        with torch.cuda.device_of(scores):
            zlpr_kl_div_kernel[(partials.numel(),)](
                scores, other, visible, partials, inner, classes, *strides,
                HAS_MASK=mask is not None, BLOCK=block, CHUNK=CHUNK, num_warps=num_warps,
            )  # fmt: skip
    return partials.sum(-1)


def backward(
    scores: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor | None,
    upstream: torch.Tensor,
    factor: float,
    need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``factor * upstream`` [rows] times the two gradients, each in its scores' dtype and contiguous; empty if not
    needed."""
    outer, inner, classes = scores.shape
    grad_scores = torch.empty(scores.shape if need_scores else 0, dtype=scores.dtype, device=scores.device)
    grad_other = torch.empty(other.shape if need_other else 0, dtype=other.dtype, device=other.device)
    if scores.numel() > 0:
        visible, strides = _operands(scores, other, mask)
        block, num_warps = plan(classes)
        with torch.cuda.device_of(scores):
            zlpr_kl_div_backward_kernel[(outer * inner * triton.cdiv(classes, CHUNK),)](
                scores, other, visible, upstream, grad_scores, grad_other, inner, classes, factor,
                upstream.stride(0), *strides,
                HAS_MASK=mask is not None, NEED_SCORES=need_scores, NEED_OTHER=need_other,
                BLOCK=block, CHUNK=CHUNK, num_warps=num_warps,
            )  # fmt: skip
    return grad_scores, grad_other
