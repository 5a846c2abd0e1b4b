"""Scores of all spans, from queries and keys of the tokens.

    s[b, h, m, n] = scale * <R_m q[b, (h,) m], R_n k[b, (h,) n]> + start[b, h, m] + end[b, h, n]

-inf where no span can be: a token that the mask drops, m > n under the triangle, n - m >= max_width. R is the rotary
embedding: ``rotate`` turns q and k beforehand and leaves 0 for the tokens that the mask drops.

Forward is one write of the scores: a tile of q.k serves all heads that share q and k, and a tile without a valid cell
computes nothing. Backward, with G the upstream gradient, 0 outside the valid cells:

    d(start) = sum_n G        d(end) = sum_m G        S = scale * sum_h G  (S = scale * G where heads share nothing)
    dq = R^T (S R k)          dk = R^T (S^T R q)

One sweep reads G and leaves S [B, N, N] and the sums of each tile, which are added in a fixed order; then one sweep
along the rows and one along the columns of S give dq and dk, which are turned back in place. Heads with q and k of
their own have no S but G, and the two sweeps read that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import all_registers, float32_precision
from .rotate import rotate, rotate_back_

# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def load_vectors(x, token, first, length, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK elements of the tokens' vectors x [length, SIZE], contiguous: [BLOCK, CHUNK], 0 beyond both."""
    d = first + tl.arange(0, CHUNK)[None, :]
    at = x + token.to(tl.int64)[:, None] * SIZE + d
    return tl.load(at, mask=(token < length)[:, None] & (d < SIZE), other=0.0)


@triton.jit
def valid_cells(m, n, kept_m, kept_n, max_width, TRIL: tl.constexpr, BANDED: tl.constexpr):
    """Which cells of a tile may be spans, from start tokens m and end tokens n that broadcast against each other."""
    valid = kept_m & kept_n
    if TRIL:
        valid = valid & (m <= n)
    if BANDED:
        valid = valid & (n - m < max_width)
    return valid


@triton.jit
def load_kept(mask, token, length, stride, HAS_MASK: tl.constexpr):
    kept = token < length
    if HAS_MASK:
        kept = kept & (tl.load(mask + token.to(tl.int64) * stride, mask=kept, other=0) != 0)
    return kept


@triton.jit
def load_bias(bias, kept, h, token, stride_h, stride_n, HAS_BIAS: tl.constexpr):
    """The bias of tokens in float32: 0 where there is none, -inf for tokens that are not kept."""
    x = tl.where(kept, 0.0, float("-inf"))
    if HAS_BIAS:
        at = bias + h.to(tl.int64) * stride_h + token.to(tl.int64) * stride_n
        x = tl.load(at, mask=kept, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def may_be_valid(
    m_first, n_first, max_width, TRIL: tl.constexpr, BANDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Whether triangle and band leave the tile any cell."""
    alive = m_first >= 0
    if TRIL:
        alive = alive & (m_first < n_first + BN)
    if BANDED:
        alive = alive & (n_first - (m_first + BM - 1) < max_width)
    return alive


# --- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def tile_product(q, k, m, n, length, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """<q_m, k_n> of a tile, in float32; q, k [length, SIZE], turned."""
    product = tl.zeros([m.shape[0], n.shape[0]], dtype=tl.float32)
    for first in range(0, SIZE, CHUNK):
        q_m = load_vectors(q, m, first, length, SIZE, CHUNK)
        k_n = load_vectors(k, n, first, length, SIZE, CHUNK)
        product = tl.dot(q_m, tl.trans(k_n), acc=product, input_precision=PRECISION)
    return product


@triton.jit
def pointer_scores_kernel(
    q, k, start, end, mask, scores,
    heads, own_heads, length, max_width, scale,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn,
    SIZE: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK, BLOCK] of the scores of HEADS heads, which share q and k, to a program."""
    tiles = tl.cdiv(length, BLOCK)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    m_first = tl.program_id(0) % (tiles * tiles) // tiles * BLOCK
    n_first = tl.program_id(0) % tiles * BLOCK
    m = m_first + tl.arange(0, BLOCK)
    n = n_first + tl.arange(0, BLOCK)
    kept_m = load_kept(mask + b * stride_mb, m, length, stride_mn, HAS_MASK)
    kept_n = load_kept(mask + b * stride_mb, n, length, stride_mn, HAS_MASK)
    valid = valid_cells(m[:, None], n[None, :], kept_m[:, None], kept_n[None, :], max_width, TRIL, BANDED)
    alive = may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK)
    alive = alive & (tl.max(kept_m.to(tl.int32), axis=0) > 0) & (tl.max(kept_n.to(tl.int32), axis=0) > 0)
    inside = (m < length)[:, None] & (n < length)[None, :]

    h_first = tl.program_id(1) * HEADS
    plane = (b * own_heads + tl.minimum(h_first, own_heads - 1)) * length * SIZE
    product = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    if alive:
        product = tile_product(q + plane, k + plane, m, n, length, SIZE, CHUNK, PRECISION) * scale
    for i in range(h_first, tl.minimum(h_first + HEADS, heads)):
        h = tl.cast(i, tl.int64)
        s_m = load_bias(start + b * stride_sb, kept_m, h, m, stride_sh, stride_sn, HAS_START)
        e_n = load_bias(end + b * stride_eb, kept_n, h, n, stride_eh, stride_en, HAS_END)
        s = tl.where(valid, product + s_m[:, None] + e_n[None, :], float("-inf"))
        at = scores + ((b * heads + h) * length + m.to(tl.int64)[:, None]) * length + n[None, :]
        tl.store(at, s.to(scores.dtype.element_ty), mask=inside)


# --- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def sum_heads_kernel(
    grad, mask, sums, start_parts, end_parts,
    heads, length, max_width,
    stride_gb, stride_gh, stride_gm, stride_gn, stride_mb, stride_mn,
    HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr, WITH_SUMS: tl.constexpr,
    WITH_START: tl.constexpr, WITH_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of all heads to a program: its sum over the heads, and its row and column sums for each head.

    start_parts [B, heads, tiles, length] hold the row sums of a row's tiles, end_parts the column sums of a column's.
    """
    tiles = tl.cdiv(length, BLOCK)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    tile_m = tl.program_id(0) % (tiles * tiles) // tiles
    tile_n = tl.program_id(0) % tiles
    m = tile_m * BLOCK + tl.arange(0, BLOCK)
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    kept_m = load_kept(mask + b * stride_mb, m, length, stride_mn, HAS_MASK)
    kept_n = load_kept(mask + b * stride_mb, n, length, stride_mn, HAS_MASK)
    valid = valid_cells(m[:, None], n[None, :], kept_m[:, None], kept_n[None, :], max_width, TRIL, BANDED)
    cells = m.to(tl.int64)[:, None] * stride_gm + n.to(tl.int64)[None, :] * stride_gn
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i in range(heads):
        h = tl.cast(i, tl.int64)
        plane = grad + b * stride_gb + h * stride_gh
        g = tl.load(plane + cells, mask=valid, other=0.0).to(tl.float32)  # nothing is read where no cell is valid
        total += g
        part = (b * heads + h) * tiles
        if WITH_START:
            tl.store(start_parts + (part + tile_n) * length + m, tl.sum(g, axis=1), mask=m < length)
        if WITH_END:
            tl.store(end_parts + (part + tile_m) * length + n, tl.sum(g, axis=0), mask=n < length)
    if WITH_SUMS:
        at = sums + (b * length + m.to(tl.int64)[:, None]) * length + n[None, :]
        tl.store(at, total, mask=(m < length)[:, None] & (n < length)[None, :])


@triton.jit
def pointer_sweep_kernel(
    grad, x, mask, out,
    own_heads, length, max_width, scale,
    stride_gb, stride_gh, stride_gr, stride_gc, stride_mb, stride_mn,
    SIZE: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R dq of BLOCK tokens r from x = R k, sweeping grad along its columns c; with COLUMNS, R dk from x = R q along its
    rows. CHUNK elements of out [B, own_heads, length, SIZE], contiguous as x is, to a program."""
    tiles = tl.cdiv(length, BLOCK)
    first = tl.program_id(1) * CHUNK
    b = (tl.program_id(0) // (own_heads * tiles)).to(tl.int64)
    h = (tl.program_id(0) % (own_heads * tiles) // tiles).to(tl.int64)
    r_first = tl.program_id(0) % tiles * BLOCK
    r = r_first + tl.arange(0, BLOCK)
    kept_r = load_kept(mask + b * stride_mb, r, length, stride_mn, HAS_MASK)
    plane = (b * own_heads + h) * length * SIZE
    total = tl.zeros([BLOCK, CHUNK], dtype=tl.float32)
    for c_first in range(0, length, BLOCK):
        m_first = c_first if COLUMNS else r_first
        n_first = r_first if COLUMNS else c_first
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            c = c_first + tl.arange(0, BLOCK)
            kept_c = load_kept(mask + b * stride_mb, c, length, stride_mn, HAS_MASK)
            if COLUMNS:
                valid = valid_cells(c[None, :], r[:, None], kept_c[None, :], kept_r[:, None], max_width, TRIL, BANDED)
            else:
                valid = valid_cells(r[:, None], c[None, :], kept_r[:, None], kept_c[None, :], max_width, TRIL, BANDED)
            cells = r.to(tl.int64)[:, None] * stride_gr + c.to(tl.int64)[None, :] * stride_gc
            g = tl.load(grad + b * stride_gb + h * stride_gh + cells, mask=valid, other=0.0)
            g = g.to(x.dtype.element_ty)
            x_c = load_vectors(x + plane, c, first, length, SIZE, CHUNK)
            total = tl.dot(g, x_c, acc=total, input_precision=PRECISION)
    d = first + tl.arange(0, CHUNK)[None, :]
    at = out + plane + r.to(tl.int64)[:, None] * SIZE + d
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=(r < length)[:, None] & (d < SIZE))


# --- launchers -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """To a program ``block`` x ``block`` cells of ``heads`` heads, made of ``chunk`` elements at a time."""

    block: int
    chunk: int
    heads: int
    num_warps: int


def plan(own_heads: int, head_size: int, dtype: torch.dtype) -> Plan:
    """The launch parameters, by rule: one product serves up to eight heads that share it."""
    heads = 8 if own_heads == 1 else 1
    chunk = max(16, triton.next_power_of_2(head_size))
    if dtype == torch.float32:
        return Plan(32, min(32, chunk), heads, 4)
    return Plan(32, chunk, heads, 2) if head_size <= 32 else Plan(64, 64, heads, 4)


def masking(problem: Any, anything: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], dict[str, bool]]:
    """The mask, or any pointer where none is read; its strides; and the constants that say which cells are valid."""
    mask = anything if problem.mask is None else problem.mask.view(torch.uint8)
    strides = (0, 0) if problem.mask is None else problem.mask.stride()
    constants = {
        "HAS_MASK": problem.mask is not None,
        "TRIL": problem.tril_mask,
        "BANDED": problem.max_width is not None,
    }
    return mask, strides, constants


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Any,
) -> torch.Tensor:
    """Scores [B, heads, N, N] in the dtype of q, contiguous.

    q, k [B, heads or 1, N, D]; start, end [B, heads, N]; problem has mask [B, N] bool and positions [N] or [B, N], or
    None for either, and rope, tril_mask, max_width and scale.
    """
    batch, own_heads, length, size = q.shape
    scores = torch.empty((batch, heads, length, length), dtype=q.dtype, device=q.device)
    if scores.numel() == 0:
        return scores
    rule = plan(own_heads, size, q.dtype)
    q, k = rotate(q, k, problem.mask, problem.positions, problem.rope)
    mask, mask_strides, constants = masking(problem, q)
    bias_strides = [(0, 0, 0) if bias is None else bias.stride() for bias in (start, end)]
    with torch.cuda.device_of(q):
        pointer_scores_kernel[(batch * triton.cdiv(length, rule.block) ** 2, triton.cdiv(heads, rule.heads))](
            q, k, q if start is None else start, q if end is None else end, mask, scores,
            heads, own_heads, length, problem.max_width or 0, problem.scale,
            *bias_strides[0], *bias_strides[1], *mask_strides,
            SIZE=size, HAS_START=start is not None, HAS_END=end is not None, PRECISION=float32_precision(),
            CHUNK=rule.chunk, BLOCK=rule.block, HEADS=rule.heads, num_warps=rule.num_warps, num_stages=2, **constants,
        )  # fmt: skip
    return scores


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    need_start: bool,
    need_end: bool,
    problem: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, start and end, in the dtype of q and contiguous; those of the biases empty if not needed."""
    batch, own_heads, length, size = q.shape
    heads = grad.shape[1]
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    d_start, d_end = (
        torch.zeros((batch, heads, length) if needed else 0, dtype=q.dtype, device=q.device)
        for needed in (need_start, need_end)
    )
    if grad.numel() == 0:
        return d_q.zero_(), d_k.zero_(), d_start, d_end
    rule = plan(own_heads, size, q.dtype)
    tiles = triton.cdiv(length, rule.block)
    q, k = rotate(q, k, problem.mask, problem.positions, problem.rope)
    mask, mask_strides, constants = masking(problem, q)
    launch = {"BLOCK": rule.block, "num_warps": rule.num_warps, **constants}
    shared = own_heads != heads
    with torch.cuda.device_of(q):
        if shared or need_start or need_end:
            sums = torch.empty((batch, 1, length, length) if shared else 0, dtype=torch.float32, device=q.device)
            start_parts, end_parts = (
                torch.empty((batch, heads, tiles, length) if needed else 0, dtype=torch.float32, device=q.device)
                for needed in (need_start, need_end)
            )
            sum_heads_kernel[(batch * tiles**2,)](
                grad, mask, sums, start_parts, end_parts, heads, length, problem.max_width or 0,
                *grad.stride(), *mask_strides,
                WITH_SUMS=shared, WITH_START=need_start, WITH_END=need_end, **launch,
            )  # fmt: skip
            if need_start:
                d_start = start_parts.sum(2).to(q.dtype)
            if need_end:
                d_end = end_parts.sum(2).to(q.dtype)
            if shared:  # and 0 wherever the mask drops a token
                grad, launch = sums, {**launch, "HAS_MASK": False}
        b, h, m, n = grad.stride()
        for x, out, along in ((k, d_q, (b, h, m, n)), (q, d_k, (b, h, n, m))):
            pointer_sweep_kernel[(batch * own_heads * tiles, triton.cdiv(size, rule.chunk))](
                grad, x, mask, out, own_heads, length, problem.max_width or 0, problem.scale, *along, *mask_strides,
                SIZE=size, COLUMNS=x is q, PRECISION=float32_precision(), CHUNK=rule.chunk, num_stages=2, **launch,
                **all_registers(),
            )  # fmt: skip
    if problem.rope:
        rotate_back_(d_q, d_k, problem.positions)
    return d_q, d_k, d_start, d_end
