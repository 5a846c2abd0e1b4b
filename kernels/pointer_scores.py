"""Scores of all spans, from queries and keys of the tokens.

    s[b, h, m, n] = scale * <R_m q[b, (h,) m], R_n k[b, (h,) n]> + start[b, h, m] + end[b, h, n]

-inf where no span can be: a token that the mask drops, m > n under the triangle, n - m >= max_width. R is the rotary
embedding: ``turned`` makes R q and R k beforehand, which are 0 for the tokens that the mask drops.

Forward is one write of the scores: a tile of q.k serves all heads that share q and k, and a tile without a valid cell
computes nothing. Backward, with G the upstream gradient, 0 outside the valid cells:

    d(start) = sum_n G        d(end) = sum_m G        S = scale * sum_h G  (S = scale * G where heads share nothing)
    dq = R^T (S R k)          dk = R^T (S^T R q)

    1  turn    q and k
    2  sum     where heads share q and k: reads G once, and leaves sum_h G and the row and column sums of each tile
    3  sweep   dq along the rows and dk along the columns of sum_h G; beside them the sums of 2, tile after tile. Or
               along those of G itself, where heads share nothing, with its row and column sums

Whatever is summed is summed in a fixed order, and no tile without a valid cell is read.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashpointer.problem import Problem

from .cells import (
    PAD,
    TRITON,
    Bias,
    Shape,
    Tokens,
    all_registers,
    columns_of,
    constant,
    float32_precision,
    keep_valid,
    load_bias,
    load_kept,
    load_positions,
    load_vectors,
    multiply,
    offset,
    power_of_two,
    rows_of,
    strides,
    up_to,
)
from .rotate import rotation, store_turned_back, turned

SUMMED = tl.constexpr(16)  # heads to a program that adds the sums of tiles
LANES = tl.constexpr(1024)
PER_BATCH = ["groups", "max_width"]  # what a kernel is not compiled anew for: alignment needs to know the length


@constant
class Tile:
    """Made on the host."""

    BM: Any
    BN: Any
    BACK_BM: Any  # the same, for tiles along the columns
    HEADS: Any  # to a program: forward
    SIZE: Any  # D
    VECTOR: Any  # D, padded to a power of two
    CHUNK: Any  # of it, in products of q and k
    PART: Any  # of it, to a program that sweeps
    PRECISION: Any  # of products whose operands are float32
    STAGES: Any
    TRIL: Any
    ROPE: Any


class Matrix(NamedTuple):
    """[size, size]: a gradient by the products of some rows r with columns c, which are the keys or the queries."""

    ptr: Any
    stride_r: Any
    stride_c: Any
    size: Any
    mask: Any  # Tokens


# --- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PER_BATCH)
def scores_kernel(
    vectors, start, end, mask, scores,
    own_heads, groups, heads, length, max_width, scale,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn,
    tile: tl.constexpr,
):  # fmt: skip
    """A tile of the scores of HEADS heads, which share q and k, to a program; scores [groups, heads, N, N]."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), max_width)
    tiles = tl.cdiv(length, tile.BM)
    i = tl.program_id(0) // (tiles * tiles)
    m_first = tl.program_id(0) % (tiles * tiles) // tiles * tile.BM
    n_first = tl.program_id(0) % tiles * tile.BN
    b = i // own_heads
    h = i % own_heads * heads
    kept = Tokens(mask, offset(b, 0, stride_mb, 0), stride_mn)
    of_start = Bias(start, offset(b, h, stride_sb, stride_sh), stride_sh, stride_sn)
    of_end = Bias(end, offset(b, h, stride_eb, stride_eh), stride_eh, stride_en)
    m = m_first + tl.arange(0, tile.BM)
    n = n_first + tl.arange(0, tile.BN)
    kept_m = load_kept(kept, m, length)
    kept_n = load_kept(kept, n, length)
    first, stop = columns_of(m_first, m_first + tile.BM - 1, length, shape, tile)
    alive = (first <= n_first) & (n_first < stop)
    alive = alive & (tl.max(kept_m.to(tl.int32), axis=0) > 0) & (tl.max(kept_n.to(tl.int32), axis=0) > 0)
    inside = (m < length)[:, None] & (n < length)[None, :]
    h_first = tl.program_id(1) * tile.HEADS
    h_stop = tl.minimum(h_first + tile.HEADS, heads)
    plane = tl.cast(length, tl.int64) * length
    scores += tl.cast(i, tl.int64) * heads * plane + tl.cast(m_first, tl.int64) * length + n_first
    at = (tl.arange(0, tile.BM) * length)[:, None] + tl.arange(0, tile.BN)[None, :]  # [BM, BN], of few rows: in int32
    nothing = tl.full([tile.BM, tile.BN], float("-inf"), scores.dtype.element_ty)
    if alive:
        valid = kept_m[:, None] & kept_n[None, :]
        valid = keep_valid(valid, m[:, None], n[None, :], False, shape.max_width, tile.TRIL)  # [BM, BN]
        of_q = vectors + tl.cast(i, tl.int64) * shape.padded * tile.VECTOR
        of_k = of_q + tl.cast(groups, tl.int64) * shape.padded * tile.VECTOR
        q_m = load_vectors(of_q, m_first, tile.BM, tile.VECTOR)
        k_n = load_vectors(of_k, n_first, tile.BN, tile.VECTOR)
        x = multiply(q_m, k_n, tile) * scale
        for h in range(h_first, h_stop):
            s = x + load_bias(of_start, m < length, h, m)[:, None] + load_bias(of_end, n < length, h, n)[None, :]
            tl.store(scores + h * plane + at, tl.where(valid, s.to(scores.dtype.element_ty), nothing), mask=inside)
    else:
        for h in range(h_first, h_stop):
            tl.store(scores + h * plane + at, nothing, mask=inside)


# --- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def extent_of(mask, length):
    """One more than the last kept token."""
    extent = length
    if mask.ptr is not None:
        extent = 0
        for first in range(0, length, LANES):
            token = first + tl.arange(0, LANES)
            extent = tl.maximum(extent, tl.max(tl.where(load_kept(mask, token, length), token + 1, 0), axis=0))
    return extent


class Parts(NamedTuple):
    """The sums of one tile, of each head: those of a bias that needs no gradient are None."""

    start: Any  # [heads, padded], from the first row on
    end: Any  # [heads, padded], from the first column on


@triton.jit
def sum_heads(g, stride_h, valid, inside, parts, shape, tile, EDGE: tl.constexpr):
    """The sum of a tile g [BM, BN] over the heads; its row and column sums into parts. At no EDGE all is valid."""
    total = tl.zeros([tile.BM, tile.BN], dtype=tl.float32)
    m = tl.arange(0, tile.BM)
    n = tl.arange(0, tile.BN)
    for h in tl.range(0, shape.heads, num_stages=tile.STAGES):
        g_h = tl.load(g + tl.cast(h, tl.int64) * stride_h, mask=inside, other=0.0).to(tl.float32)
        if EDGE:
            g_h = tl.where(valid, g_h, 0.0)
        total += g_h
        if parts.start is not None:
            tl.store(parts.start + tl.cast(h, tl.int64) * shape.padded + m, tl.sum(g_h, axis=1))
        if parts.end is not None:
            tl.store(parts.end + tl.cast(h, tl.int64) * shape.padded + n, tl.sum(g_h, axis=0))
    return total


@triton.jit(do_not_specialize=PER_BATCH)
def sum_kernel(
    grad, mask, sums, start_parts, end_parts,
    groups, heads, length, max_width,
    stride_gb, stride_gh, stride_gm, stride_gn, stride_mb, stride_mn,
    tile: tl.constexpr,
):  # fmt: skip
    """One tile of all heads to a program: its sum over the heads, into sums [groups, padded, padded], and its row and
    column sums for each head, into start_parts and end_parts [groups, tiles, heads, padded]."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), max_width)
    tiles = shape.padded // tile.BM
    i = tl.program_id(0) // (tiles * tiles)
    m_first = tl.program_id(0) % (tiles * tiles) // tiles * tile.BM
    n_first = tl.program_id(0) % tiles * tile.BN
    kept = Tokens(mask, offset(i, 0, stride_mb, 0), stride_mn)
    first, stop = columns_of(m_first, m_first + tile.BM - 1, extent_of(kept, length), shape, tile)
    if (first <= n_first) & (n_first < stop):
        m = m_first + tl.arange(0, tile.BM)
        n = n_first + tl.arange(0, tile.BN)
        valid = load_kept(kept, m, length)[:, None] & load_kept(kept, n, length)[None, :]
        valid = keep_valid(valid, m[:, None], n[None, :], False, shape.max_width, tile.TRIL)  # [BM, BN]
        inside = (m < length)[:, None] & (n < length)[None, :]
        g = (grad + offset(i, 0, stride_gb, 0) + m.to(tl.int64) * stride_gm)[:, None]
        g += (n.to(tl.int64) * stride_gn)[None, :]  # [BM, BN]
        of_start = start_parts
        of_end = end_parts
        if start_parts is not None:
            of_start += offset(i * tiles + n_first // tile.BN, 0, heads * shape.padded, 0) + m_first
        if end_parts is not None:
            of_end += offset(i * tiles + m_first // tile.BM, 0, heads * shape.padded, 0) + n_first
        parts = Parts(of_start, of_end)
        if tl.min(valid.to(tl.int32)) > 0:
            total = sum_heads(g, stride_gh, valid, inside, parts, shape, tile, False)
        else:
            total = sum_heads(g, stride_gh, valid, inside, parts, shape, tile, True)
        row = (tl.cast(i, tl.int64) * shape.padded + m) * shape.padded
        tl.store((sums + row)[:, None] + n[None, :], total.to(sums.dtype.element_ty))


@triton.jit
def load_tile(matrix, r, c, shape, tile, COLUMNS: tl.constexpr):
    """Of a gradient its valid cells, and 0 for the others: [rows, columns] of the matrix."""
    at = (matrix.ptr + r.to(tl.int64) * matrix.stride_r)[:, None] + (c.to(tl.int64) * matrix.stride_c)[None, :]
    g = tl.load(at, mask=(r < matrix.size)[:, None] & (c < matrix.size)[None, :], other=0.0)
    if tile.HEADS == 1:  # else sum_kernel has written 0 for the others
        g = tl.where(load_kept(matrix.mask, r, shape.length)[:, None], g, 0.0)
        g = tl.where(load_kept(matrix.mask, c, shape.length)[None, :], g, 0.0)
        if COLUMNS:
            g = keep_valid(g, c[None, :], r[:, None], 0.0, shape.max_width, tile.TRIL)
        else:
            g = keep_valid(g, r[:, None], c[None, :], 0.0, shape.max_width, tile.TRIL)
    return g


@triton.jit
def sweep(matrix, x, first, within, shape, tile, COLUMNS: tl.constexpr):
    """Of BM rows of a gradient the product with x [padded, VECTOR], PART elements of it, and the row sums."""
    r = first + tl.arange(0, tile.BM)
    d = tl.arange(0, tile.PART)
    total = tl.zeros([tile.BM, tile.PART], dtype=tl.float32)
    sums = tl.zeros([tile.BM], dtype=tl.float32)
    for c_first in tl.range(within[0], within[1], tile.BN, num_stages=tile.STAGES):
        c = c_first + tl.arange(0, tile.BN)
        g = load_tile(matrix, r, c, shape, tile, COLUMNS)  # [BM, BN]
        x_c = tl.load(x + c.to(tl.int64)[:, None] * tile.VECTOR + d[None, :])  # [BN, PART]
        total = tl.dot(g.to(x_c.dtype), x_c, acc=total, input_precision=tile.PRECISION)
        sums += tl.sum(g.to(tl.float32), axis=1)
    return total, sums


@triton.jit
def store_sums(out, at, sums, token, part, length, tile):
    """The gradient of a bias, where heads share nothing; by one of the programs that have it."""
    if (tile.HEADS == 1) & (out is not None):
        tl.store(out + at + token, sums.to(out.dtype.element_ty), mask=(token < length) & (part == 0))


@triton.jit
def add_parts(parts, out, within, plane, token, shape):
    """The sums of the tiles of SUMMED heads, one after another; parts [tiles, heads, padded] of a group."""
    h = plane + tl.arange(0, SUMMED)[:, None]
    here = (h < shape.heads) & (token < shape.length)[None, :]
    total = tl.zeros([SUMMED, token.shape[0]], dtype=tl.float32)
    for t in range(within[0], within[1]):
        at = parts + (tl.cast(t, tl.int64) * shape.heads + h) * shape.padded + token[None, :]
        total += tl.load(at, mask=here, other=0.0)
    to = out + h.to(tl.int64) * shape.length + token[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=PER_BATCH)
def sweep_kernel(
    grad, vectors, mask, positions, start_parts, end_parts, d_q, d_k, d_start, d_end,
    own_heads, groups, heads, length, max_width, scale, size,
    stride_gb, stride_gh, stride_gm, stride_gn, stride_mb, stride_mn, stride_pb, stride_pn,
    tile: tl.constexpr,
):  # fmt: skip
    """Of BM tokens of a group to a program: PART elements of dq, or of dk, or the biases of SUMMED heads."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), max_width)
    i = tl.program_id(0) % groups
    first = tl.program_id(0) // groups * tile.BM
    b = i // own_heads
    kept = Tokens(mask, offset(b, 0, stride_mb, 0), stride_mn)
    extent = extent_of(kept, length)
    columns = columns_of(first, first + tile.BM - 1, extent, shape, tile)
    rows = rows_of(first, extent, shape, tile)
    token = first + tl.arange(0, tile.BM)
    parts: tl.constexpr = tile.VECTOR // tile.PART
    role = tl.program_id(1)
    if role < 2 * parts:
        grad += offset(b, i % own_heads, stride_gb, stride_gh)
        part = role % parts * tile.PART
        angles = (0.0, 0.0)
        if tile.ROPE:
            at = Tokens(positions, offset(b, 0, stride_pb, 0), stride_pn)
            angles = rotation(load_positions(at, token, length), tile.SIZE, tile.PART // 2, part // 2)
        of_q = vectors + tl.cast(i, tl.int64) * shape.padded * tile.VECTOR
        of_k = of_q + tl.cast(groups, tl.int64) * shape.padded * tile.VECTOR
        at = tl.cast(i, tl.int64) * length
        if role < parts:
            along = Matrix(grad, stride_gm, stride_gn, size, kept)
            d, sums = sweep(along, of_k + part, first, columns, shape, tile, False)
            store_turned_back(d_q + at * tile.SIZE, d * scale, token, part, angles, length, tile)
            store_sums(d_start, at, sums, token, part, length, tile)
        else:
            across = Matrix(grad, stride_gn, stride_gm, size, kept)
            d, sums = sweep(across, of_q + part, first, rows, shape, tile, True)
            store_turned_back(d_k + at * tile.SIZE, d * scale, token, part, angles, length, tile)
            store_sums(d_end, at, sums, token, part, length, tile)
    else:
        h_first = (role - 2 * parts) * SUMMED
        at = tl.cast(i, tl.int64) * heads
        if start_parts is not None:
            of_group = start_parts + at * shape.padded * (shape.padded // tile.BM)
            within = (columns[0] // tile.BN, tl.cdiv(columns[1], tile.BN))
            add_parts(of_group, d_start + at * length, within, h_first, token, shape)
        if end_parts is not None:
            of_group = end_parts + at * shape.padded * (shape.padded // tile.BM)
            within = (rows[0] // tile.BM, tl.cdiv(rows[1], tile.BM))
            add_parts(of_group, d_end + at * length, within, h_first, token, shape)


# --- launchers -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """See Tile."""

    block: int  # BM and BN
    chunk: int
    part: int
    heads: int
    num_warps: int
    stages: int


def plan(vector: int, heads: int, dtype: torch.dtype, even: bool = True) -> Plan:
    """The launch parameters, by rule: one product serves up to eight heads that share it, and tiles are the largest
    that no chip spills. Of a gradient whose rows are not even each cell needs an address, in registers."""
    heads = 1 if heads == 1 else 8
    part = min(64 if heads == 1 or dtype == torch.float32 else 128, vector)
    stages = 2 if TRITON < (3, 4) and heads == 1 else 3  # with 3 it spills there
    if dtype == torch.float32:
        return Plan(32, 16 if vector > 64 else min(32, vector), part, heads, 4, stages)
    return Plan(64 if even or heads > 1 else 32, min(128, vector), part, heads, 4, stages)


@cache
def tile_of(
    size: int, heads: int, dtype: torch.dtype, tril: bool, rope: bool, precision: str, even: bool = True
) -> tuple[Plan, Tile]:
    vector = max(16, power_of_two(size))
    rule = plan(vector, heads, dtype, even)
    fields = (
        rule.block, rule.block, rule.block, rule.heads, size, vector, rule.chunk, rule.part, precision, rule.stages,
        tril, rope,
    )  # fmt: skip
    return rule, Tile(*map(tl.constexpr, fields))


def _prepared(
    q: torch.Tensor, k: torch.Tensor, of_group: int, problem: Problem, even: bool = True
) -> tuple[Plan, Tile, torch.Tensor, torch.Tensor | None, int | None]:
    """The launch parameters; q and k, turned; the mask; the band."""
    rule, tile = tile_of(q.shape[3], of_group, q.dtype, problem.tril_mask, problem.rope, float32_precision(), even)
    mask = None if problem.mask is None else problem.mask.view(torch.uint8)
    width = None if problem.max_width is None else min(problem.max_width, q.shape[2])
    return rule, tile, turned(q, k, mask, problem.positions, tile), mask, width


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Problem,
) -> torch.Tensor:
    """Scores [B, heads, N, N] in the dtype of q, contiguous.

    q, k [B, heads or 1, N, D]; start, end [B, heads, N]; problem has mask [B, N] bool and positions [N] or [B, N], or
    None for either, and rope, tril_mask, max_width and scale.
    """
    batch, own_heads, length, _ = q.shape
    scores = torch.empty((batch, heads, length, length), dtype=q.dtype, device=q.device)
    if scores.numel() == 0:
        return scores
    groups, of_group = batch * own_heads, heads // own_heads
    with torch.cuda.device_of(q):
        rule, tile, vectors, mask, width = _prepared(q, k, of_group, problem)
        tiles = (length + rule.block - 1) // rule.block
        scores_kernel[(groups * tiles**2, (of_group + rule.heads - 1) // rule.heads)](
            vectors, start, end, mask, scores, own_heads, groups, of_group, length, width, problem.scale,
            *strides(start, 3), *strides(end, 3), *strides(mask, 2), tile, num_warps=rule.num_warps,
            **all_registers(),
        )  # fmt: skip
    return scores


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    need_start: bool,
    need_end: bool,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, start and end, in the dtype of q and contiguous; those of the biases empty if not needed."""
    batch, own_heads, length, _ = q.shape
    heads = grad.shape[1]
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    d_start, d_end = (
        torch.empty((batch, heads, length) if needed else 0, dtype=q.dtype, device=q.device)
        for needed in (need_start, need_end)
    )
    if grad.numel() == 0:
        return d_q.zero_(), d_k.zero_(), d_start.zero_(), d_end.zero_()
    groups, of_group, rows = batch * own_heads, heads // own_heads, grad.stride()[2:]
    even = min(rows) == 1 and max(rows) % 16 == 0
    sizes, padded = (groups, of_group, length), (length + PAD.value - 1) // PAD.value * PAD.value
    with torch.cuda.device_of(q):
        rule, tile, vectors, mask, width = _prepared(q, k, of_group, problem, even)
        tiles, biases, size = padded // rule.block, 0, length
        start_parts = end_parts = None
        if of_group > 1:
            biases = (of_group + SUMMED.value - 1) // SUMMED.value if need_start or need_end else 0
            sums = q.new_empty((groups, 1, padded, padded))
            start_parts, end_parts = (
                q.new_empty((groups, tiles, of_group, padded), dtype=torch.float32) if needed else None
                for needed in (need_start, need_end)
            )
            sum_kernel[(groups * tiles**2,)](
                grad, mask, sums, start_parts, end_parts, *sizes, width, *grad.stride(), *strides(mask, 2), tile,
                num_warps=rule.num_warps, num_stages=rule.stages, **all_registers(),
            )  # fmt: skip
            grad, size = sums, padded
        sweep_kernel[(groups * tiles, 2 * (tile.VECTOR.value // rule.part) + biases)](
            grad, vectors, mask, problem.positions if problem.rope else None, start_parts, end_parts,
            d_q, d_k, d_start if need_start else None, d_end if need_end else None,
            own_heads, *sizes, width, problem.scale, size,
            *grad.stride(), *strides(mask, 2), *strides(problem.positions if problem.rope else None, 2), tile,
            num_warps=rule.num_warps, num_stages=rule.stages, **all_registers(),
        )  # fmt: skip
    return d_q, d_k, d_start, d_end
