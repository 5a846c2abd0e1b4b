"""The symmetric KL divergence of two score vectors, and its gradient.

With f = sigmoid,

    D(s, t) = sum_i (f(s_i) - f(t_i)) (s_i - t_i)
    dD/ds_i =  f'(s_i) (s_i - t_i) + f(s_i) - f(t_i)          f'(s) = f(s) f(-s)
    dD/dt_i = -f'(t_i) (s_i - t_i) - f(s_i) + f(t_i)

A cell is the same to both: with high and low the larger and the smaller one of s and t, it has the distance
d = high - low, and the gap f(high) - f(low), which of two close or saturated sigmoids would cancel. Without that it is

    gap = f(high) f(-low) (1 - exp(-d))
    D = sum gap d      dD/dhigh = f'(high) d + gap      dD/dlow = -(f'(low) d + gap)

Both sigmoids are 1 / (1 + e), of e = exp(-high) and e = exp(low). Where e is inf its sigmoid is 0, and any finite
number will do in its place in a product.

The gradient of a cell needs nothing of its row but the upstream scalar, so backward recomputes it from the scores, in
one pass that scales in float32: nothing is stored, and nothing underflows in float16. A cell where both scores are -inf
is invalid in both and left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .rows import (
    FLOAT_MAX,
    LOG2_E,
    LONGEST_BLOCK,
    NEGATIVE,
    Strided,
    block_of,
    exp,
    load_tile,
    reciprocal,
    strides,
    tile_of_program,
)


class Pair(NamedTuple):
    """The two scores of each cell in float32, both -inf where it is left out: [ROWS, BLOCK]."""

    s: Any
    t: Any


class Sides(NamedTuple):
    """Something of the larger score of each cell, or of minus the smaller one: of what a sigmoid is taken."""

    high: Any
    low: Any


# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def distance(x):
    """|s - t|; 0 where both are -inf."""
    return tl.where(tl.maximum(x.s, x.t) == float("-inf"), 0.0, tl.abs(x.s - x.t))


@triton.jit
def exponentials(x, EXACT: tl.constexpr):
    """exp(-high) and exp(low), EXACT or as exact as scores of 16 bits."""
    return Sides(exp(tl.maximum(x.s, x.t) * NEGATIVE, EXACT), exp(tl.minimum(x.s, x.t), EXACT))


@triton.jit
def gap(d, both):
    """both (1 - exp(-d)), of both = f(high) f(-low): near 0, where 1 - exp(-d) cancels, by its series."""
    series = d * (1 - d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720))))))
    return tl.where(d < 0.25, series, 1.0 - tl.exp2(d * -LOG2_E)) * both


@triton.jit
def slope(e, f):
    """f(x) f(-x), of e = exp(-x) and f = f(x)."""
    return tl.minimum(e, FLOAT_MAX) * f * f


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def load_pair(scores, other, mask, tile):
    s = load_tile(scores, tile, float("-inf")).to(tl.float32)
    t = load_tile(other, tile, float("-inf")).to(tl.float32)
    if mask.ptr is not None:
        kept = load_tile(mask, tile, 0) != 0
        s = tl.where(kept, s, float("-inf"))
        t = tl.where(kept, t, float("-inf"))
    return Pair(s, t)


@triton.jit
def zlpr_kl_div_kernel(
    scores, other, mask, partials, inner, classes, chunks,
    stride_so, stride_si, stride_sc, stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc,
    EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence over a chunk of each row goes to partials [rows, chunks]."""
    tile = tile_of_program(inner, classes, chunks, ROWS, BLOCK)
    x = load_pair(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(other, stride_to, stride_ti, stride_tc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        tile,
    )
    d = distance(x)
    e = exponentials(x, EXACT)
    both = reciprocal((1.0 + e.high) * (1.0 + e.low))
    D = gap(d, both) * d  # [ROWS, BLOCK]
    tl.store(partials + tile.row * chunks + tile.first // BLOCK, tl.sum(D, axis=1)[:, None])


@triton.jit
def zlpr_kl_div_backward_kernel(
    scores, other, mask, upstream, grad_scores, grad_other, inner, classes, chunks, factor, stride_upstream,
    stride_so, stride_si, stride_sc, stride_to, stride_ti, stride_tc, stride_mo, stride_mi, stride_mc,
    EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tile_of_program(inner, classes, chunks, ROWS, BLOCK)
    x = load_pair(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(other, stride_to, stride_ti, stride_tc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        tile,
    )
    d = distance(x)
    e = exponentials(x, EXACT)
    f = Sides(reciprocal(1.0 + e.high), reciprocal(1.0 + e.low))
    g = tl.load(upstream + tile.row * stride_upstream).to(tl.float32) * factor  # [ROWS, 1]
    between = gap(d, f.high * f.low)
    by_high = g * (slope(e.high, f.high) * d + between)
    by_low = -g * (slope(e.low, f.low) * d + between)
    at = tile.row * classes + tile.first + tile.col
    if grad_scores is not None:
        ds = tl.where(x.s >= x.t, by_high, by_low)
        tl.store(grad_scores + at, ds.to(grad_scores.dtype.element_ty), mask=tile.inside)
    if grad_other is not None:
        dt = tl.where(x.s >= x.t, by_low, by_high)
        tl.store(grad_other + at, dt.to(grad_other.dtype.element_ty), mask=tile.inside)


# --- launchers -----------------------------------------------------------------------------------------------------


def forward(scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Divergences [outer, inner] in float32; scores, other and the bool mask are [outer, inner, classes]."""
    outer, inner, classes = scores.shape
    together, block, num_warps = block_of(classes, 32 if classes <= LONGEST_BLOCK // 2 else 16)
    chunks = -(-classes // block)
    partials = torch.empty((outer, inner, chunks), dtype=torch.float32, device=scores.device)
    if partials.numel() > 0:
        mask = None if mask is None else mask.view(torch.uint8)
        with torch.cuda.device_of(scores):
            zlpr_kl_div_kernel[(outer * -(-inner // together) * chunks,)](
                scores, other, mask, partials, inner, classes, chunks, *strides(scores, other, mask),
                EXACT=scores.dtype == torch.float32, ROWS=together, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    return partials.sum(-1) if chunks != 1 else partials.view(outer, inner)


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
    grad_scores = torch.empty(scores.shape if need_scores else 0, dtype=scores.dtype, device=scores.device)
    grad_other = torch.empty(other.shape if need_other else 0, dtype=other.dtype, device=other.device)
    if scores.numel() > 0:
        mask = None if mask is None else mask.view(torch.uint8)
        inputs = (scores, other) if mask is None else (scores, other, mask)
        if upstream.stride(0) == 0 and all(x.is_contiguous() for x in inputs):  # one scalar for all: the rows are one
            scores, other = scores.view(1, 1, -1), other.view(1, 1, -1)
            mask = None if mask is None else mask.view(1, 1, -1)
        outer, inner, classes = scores.shape
        together, block, num_warps = block_of(classes, 16, longest=2048)
        chunks = -(-classes // block)
        with torch.cuda.device_of(scores):
            zlpr_kl_div_backward_kernel[(outer * -(-inner // together) * chunks,)](
                scores, other, mask, upstream, grad_scores if need_scores else None, grad_other if need_other else None,
                inner, classes, chunks, factor, upstream.stride(0), *strides(scores, other, mask),
                EXACT=scores.dtype == torch.float32, ROWS=together, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
    return grad_scores, grad_other
