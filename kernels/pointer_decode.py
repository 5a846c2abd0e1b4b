"""The spans whose score is above the threshold, without storing the scores.

    1  prepare   q, k turned, 0 where dropped; biases, -inf there; the largest bias of each tile; the last kept token
    2  count     how many spans each row of each head has
    3  write     the spans of the rows that have any

The sums of the counts before it tell each row where its spans belong. So they come out sorted by (batch, head, start,
end), and in between the host learns how many there are.

x_mn = scale * <R q_m, R k_n> is the same for all heads that share q and k, and the largest x of a tile, plus the
largest start of its rows, plus the largest end of its columns, bounds the scores of the tile. Rounding is monotone and
the terms are added in one order, so no bound falls below a score: where it does not exceed the threshold, the head, and
mostly the tile, is done.

2 and 3 must find the same. They compute a score by the same helpers on tiles of the same shape, and no product is
contracted with a sum that follows it, which would be rounded less: in one of the two, or in a score and not its bound.
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
    Bias,
    Shape,
    Strided,
    Tokens,
    all_registers,
    columns_of,
    constant,
    float32_precision,
    keep_valid,
    load_bias,
    load_kept,
    load_vectors,
    multiply,
    offset,
    power_of_two,
    strides,
    up_to,
)
from .rotate import Source, turn_tokens

BIASES = tl.constexpr(16)  # heads to a program that prepares biases
LANES = tl.constexpr(128)
TURNED = 4096  # elements of q and of k to a step
PER_BATCH = ["groups", "length", "max_width", "limit"]  # what a kernel is not compiled anew for


@constant
class Tile:
    """Made on the host."""

    BM: Any
    BN: Any
    TOKENS: Any  # to a step of the launch that turns
    HEADS: Any  # to a program that counts: a bit of an int64 each
    WRITERS: Any  # heads to a program that writes: a bit of an int32 each
    SIZE: Any  # D
    VECTOR: Any  # D, padded to a power of two
    CHUNK: Any  # of it, in products of q and k
    PRECISION: Any  # of these in float32
    STAGES: Any
    TRIL: Any
    ROPE: Any


class Clean(NamedTuple):
    """A bias: -inf for dropped tokens."""

    ptr: Any  # [heads, padded]
    most: Any  # [heads, tiles]: the largest of each tile; NaN is above no threshold, and max passes over it


class Group(NamedTuple):
    """Of one group."""

    q: Any  # [padded, VECTOR]: turned, 0 for dropped tokens
    k: Any
    start: Any  # Clean
    end: Any  # Clean
    extents: Any  # [tiles]: one more than the last kept token of a tile, 0 without any
    counts: Any  # [heads, length]: spans of a row
    scale: Any
    threshold: Any


@triton.jit
def open_group(vectors, biases, integers, i, numbers, shape, tile):
    """Of vectors [2, groups, padded, VECTOR], biases [2, groups, heads, padded + tiles], integers: counts, extents;
    numbers: scale, threshold."""
    groups = tl.cast(shape.groups, tl.int64)
    at = tl.cast(i, tl.int64)
    tiles = shape.padded // tile.BN
    planes = groups * shape.heads
    most = biases + 2 * planes * shape.padded
    return Group(
        vectors + at * shape.padded * tile.VECTOR,
        vectors + (groups + at) * shape.padded * tile.VECTOR,
        Clean(biases + at * shape.heads * shape.padded, most + at * shape.heads * tiles),
        Clean(biases + (planes + at * shape.heads) * shape.padded, most + (planes + at * shape.heads) * tiles),
        integers + planes * shape.length + at * tiles,
        integers + at * shape.heads * shape.length,
        numbers[0],
        numbers[1],
    )


# --- launch 1: prepare -----------------------------------------------------------------------------------------------


@triton.jit
def prepare_bias(bias, clean, here, h, token, shape, tile):
    """Of a bias a tile of BIASES heads h [BIASES, 1] and BN tokens [1, BN]."""
    x = load_bias(bias, here, h, token)
    tl.store(clean.ptr + tl.cast(h, tl.int64) * shape.padded + token, x, mask=h < shape.heads)
    at = tl.cast(h, tl.int64) * (shape.padded // tile.BN) + tl.max(token, axis=1)[:, None] // tile.BN  # [BIASES, 1]
    tl.store(clean.most + at, tl.max(x, axis=1)[:, None], mask=h < shape.heads)


@triton.jit(do_not_specialize=PER_BATCH)
def prepare_kernel(
    q, k, start, end, mask, positions, vectors, biases, integers,
    own_heads, groups, heads, length,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn, stride_pb, stride_pn,
    tile: tl.constexpr,
):  # fmt: skip
    """Of BN tokens of a group to a program: their vectors, or the biases of BIASES heads."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), None)
    i = tl.program_id(0) % groups
    b = i // own_heads
    h = i % own_heads
    first = tl.program_id(0) // groups * tile.BN
    group = open_group(vectors, biases, integers, i, (1.0, 0.0), shape, tile)
    source = Source(
        Strided(q + offset(b, h, stride_qb, stride_qh), stride_qn, stride_qd),
        Strided(k + offset(b, h, stride_kb, stride_kh), stride_kn, stride_kd),
        Tokens(mask, offset(b, 0, stride_mb, 0), stride_mn),
        Tokens(positions, offset(b, 0, stride_pb, 0), stride_pn),
        length,
    )
    if tl.program_id(1) == 0:
        for step in range(0, tile.BN, tile.TOKENS):
            turn_tokens(source, group.q, group.k, first + step + tl.arange(0, tile.TOKENS), 1.0, tile)
    else:
        token = first + tl.arange(0, tile.BN)
        here = load_kept(source.mask, token, length)
        extent = tl.max(tl.where(here, token + 1, 0), axis=0)
        tl.store(group.extents + first // tile.BN, extent, mask=tl.program_id(1) == 1)
        some = (tl.program_id(1) - 1) * BIASES + tl.arange(0, BIASES)[:, None]
        token = token[None, :]
        here = (some < heads) & here[None, :]  # [BIASES, BN]
        of_start = Bias(start, offset(b, h * heads, stride_sb, stride_sh), stride_sh, stride_sn)
        of_end = Bias(end, offset(b, h * heads, stride_eb, stride_eh), stride_eh, stride_en)
        prepare_bias(of_start, group.start, here, some, token, shape, tile)
        prepare_bias(of_end, group.end, here, some, token, shape, tile)
        counts = group.counts + tl.cast(some, tl.int64) * length + token
        tl.store(counts, tl.zeros([BIASES, tile.BN], tl.int32), mask=(some < heads) & (token < length))


# --- what both sweeps compute ----------------------------------------------------------------------------------------


@triton.jit
def extent_of(group, shape, tile):
    """One more than the last kept token."""
    tiles = shape.padded // tile.BN
    extent = 0
    for first in range(0, tiles, LANES):
        i = first + tl.arange(0, LANES)
        extent = tl.maximum(extent, tl.max(tl.load(group.extents + i, mask=i < tiles, other=0), axis=0))
    return extent


@triton.jit
def multiply_tile(q_m, group, m_first, n_first, shape, tile):
    """x of a tile: -inf where triangle and band leave no span."""
    m = m_first + tl.arange(0, tile.BM)
    n = n_first + tl.arange(0, tile.BN)
    k_n = load_vectors(group.k, n_first, tile.BN, tile.VECTOR)
    x = multiply(q_m, k_n, tile) * group.scale  # [BM, BN]
    # Where nothing stands between product and sum CUDA 12.9's assembler contracts them for sm_100, though told not to.
    if not tile.TRIL and shape.max_width is None:
        x = tl.where((n < shape.padded)[None, :], x, float("-inf"))
    return keep_valid(x, m[:, None], n[None, :], float("-inf"), shape.max_width, tile.TRIL)


@triton.jit
def add_biases(x, group, h, m_first, n_first, shape):
    """The scores of a tile of a head, -inf or NaN where there is no span."""
    row = tl.cast(h, tl.int64) * shape.padded
    s_m = tl.load(group.start.ptr + row + m_first + tl.arange(0, x.shape[0]))
    e_n = tl.load(group.end.ptr + row + n_first + tl.arange(0, x.shape[1]))
    return x + s_m[:, None] + e_n[None, :]  # [BM, BN]


# --- launch 2: count -------------------------------------------------------------------------------------------------


@triton.jit
def lowest_bit(bits):
    """The place of the lowest one that is set, from the exponent of that power of two."""
    return (((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def load_most(clean, h, i, shape, tile):
    """The largest of a bias in tile i, of each head."""
    at = clean.most + tl.cast(h, tl.int64) * (shape.padded // tile.BN) + i
    return tl.load(at, mask=h < shape.heads, other=float("-inf"))


@triton.jit(do_not_specialize=PER_BATCH)
def count_kernel(vectors, biases, integers, groups, heads, length, max_width, scale, threshold, tile: tl.constexpr):
    """BM rows of HEADS heads of a group to a program, longest rows first. No other program counts these."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), max_width)
    blocks = tl.cdiv(heads, tile.HEADS)
    m_first = tl.program_id(0) // (groups * blocks) * tile.BM
    h_first = tl.program_id(0) // groups % blocks * tile.HEADS
    group = open_group(vectors, biases, integers, tl.program_id(0) % groups, (scale, threshold), shape, tile)
    m = m_first + tl.arange(0, tile.BM)
    h = tl.arange(0, tile.HEADS)
    most_start = load_most(group.start, h_first + h, m_first // tile.BM, shape, tile)
    q_m = load_vectors(group.q, m_first, tile.BM, tile.VECTOR)
    first, stop = columns_of(m_first, m_first + tile.BM - 1, extent_of(group, shape, tile), shape, tile)
    for n_first in tl.range(first, stop, tile.BN, num_stages=tile.STAGES):
        most_end = load_most(group.end, h_first + h, n_first // tile.BN, shape, tile)
        x = multiply_tile(q_m, group, m_first, n_first, shape, tile)
        bounds = tl.max(x) + most_start + most_end  # [HEADS]
        bits = tl.sum(tl.where(bounds > group.threshold, tl.full([tile.HEADS], 1, tl.int64) << h, 0), axis=0)
        if bits != 0:
            while bits != 0:
                i = h_first + lowest_bit(bits)
                bits &= bits - 1
                found = add_biases(x, group, i, m_first, n_first, shape) > group.threshold
                more = tl.sum(found.to(tl.int32), axis=1)
                counts = group.counts + tl.cast(i, tl.int64) * length + m
                tl.atomic_add(counts, more, mask=more > 0, sem="relaxed")


# --- launch 3: write -------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Of one group, but for the last three, which hold the first ``limit`` spans of all."""

    behind: Any  # [heads, length]: where the spans of a row stop among those of all
    first_row: Any
    cells: Any
    scores: Any
    limit: Any


@triton.jit
def pop_spans(s, to, cell, group, out, tile):
    """The spans of a tile, of scores s [BM, BN] and first cells ``cell`` [BM], to places from ``to`` [BM] on; and where
    the next ones belong."""
    found = s > group.threshold
    most = tl.max(tl.sum(found.to(tl.int32), axis=1, keep_dims=True))
    if most > 0:  # so that the loop over the tiles has no loop in it, whose loads could not run ahead
        n = tl.arange(0, tile.BN)
        bits = tl.sum(found.to(tl.int64) << n[None, :], axis=1)  # [BM]
        for _ in range(0, most):  # the first span of each row, then the second
            n_m = lowest_bit(bits)
            s_m = tl.sum(tl.where(n[None, :] == n_m[:, None], s, 0.0), axis=1)
            here = (bits != 0) & (to < out.limit)
            tl.store(out.cells + to, cell + n_m, mask=here)
            tl.store(out.scores + to, s_m, mask=here)
            to += (bits != 0).to(tl.int64)
            bits &= bits - 1
    return to


@triton.jit
def write_rows(group, out, h, m_first, columns, shape, tile):
    """The spans of BM rows of a head."""
    m = m_first + tl.arange(0, tile.BM)
    row = tl.cast(h, tl.int64) * shape.length + m
    to = tl.load(out.behind + row, mask=m < shape.length, other=0)
    to -= tl.load(group.counts + row, mask=m < shape.length, other=0)
    cell = (out.first_row + row) * shape.length
    q_m = load_vectors(group.q, m_first, tile.BM, tile.VECTOR)
    for n_first in tl.range(columns[0], columns[1], tile.BN, num_stages=tile.STAGES):
        x = multiply_tile(q_m, group, m_first, n_first, shape, tile)
        s = add_biases(x, group, h, m_first, n_first, shape)
        to = pop_spans(s, to, cell + n_first, group, out, tile)


@triton.jit(do_not_specialize=PER_BATCH)
def write_kernel(
    vectors, biases, integers, behind, cells, scores,
    groups, heads, length, max_width, scale, threshold, limit, tile: tl.constexpr,
):  # fmt: skip
    """BM rows of WRITERS heads of a group to a program, longest rows first. Mostly there is nothing to write."""
    shape = Shape(groups, heads, length, heads, up_to(length, PAD), max_width)
    i = tl.program_id(0) % groups
    blocks = tl.cdiv(heads, tile.WRITERS)
    m_first = tl.program_id(0) // (groups * blocks) * tile.BM
    h_first = tl.program_id(0) // groups % blocks * tile.WRITERS
    group = open_group(vectors, biases, integers, i, (scale, threshold), shape, tile)
    first_row = tl.cast(i, tl.int64) * heads * length
    out = Output(behind + first_row, first_row, cells, scores, limit)
    h = tl.arange(0, tile.WRITERS)
    m = m_first + tl.arange(0, tile.BM)
    row = tl.cast(h_first + h, tl.int64)[:, None] * length + m[None, :]  # [WRITERS, BM]
    inside = (h_first + h < heads)[:, None] & (m < length)[None, :]
    count = tl.load(group.counts + row, mask=inside, other=0)
    before = tl.load(out.behind + row, mask=inside, other=0) - count
    some = tl.max(tl.where(before < limit, count, 0), axis=1)
    bits = tl.sum((some > 0).to(tl.int32) << h, axis=0)
    columns = columns_of(m_first, m_first + tile.BM - 1, extent_of(group, shape, tile), shape, tile)
    while bits != 0:
        write_rows(group, out, h_first + lowest_bit(bits), m_first, columns, shape, tile)
        bits &= bits - 1


# --- launchers -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """See Tile."""

    block: int  # BM and BN
    chunk: int
    heads: int
    writers: int
    num_warps: int
    stages: int


def plan(vector: int, heads: int, dtype: torch.dtype) -> Plan:
    """The launch parameters, by rule: the largest tiles that no chip spills, vectors whole where they fit."""
    single = dtype == torch.float32
    chunk = 4096 // vector if single and vector > 64 else vector
    return Plan(32 if single or vector > 128 else 64, chunk, 1 if heads == 1 else 64, 1 if heads == 1 else 16, 4, 3)


@cache
def tile_of(size: int, heads: int, dtype: torch.dtype, tril: bool, rope: bool, precision: str) -> tuple[Plan, Tile]:
    vector = max(16, power_of_two(size))
    rule = plan(vector, heads, dtype)
    tokens = min(rule.block, TURNED // vector)
    fields = (
        rule.block, rule.block, tokens, rule.heads, rule.writers, size, vector, rule.chunk, precision, rule.stages,
        tril, rope,
    )  # fmt: skip
    return rule, Tile(*map(tl.constexpr, fields))


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Problem,
    threshold: float,
    max_spans: int | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The cells ((b * heads + h) * N + start) * N + end whose score is above the threshold, sorted, and their scores in
    float32, [S] each; the first max_spans of them, and how many there are. It waits for the device once, to learn that.

    q, k, start, end and problem as for ``pointer_scores.forward``.
    """
    batch, own_heads, length, size = q.shape
    cells, scores = (torch.empty(0, dtype=dtype, device=q.device) for dtype in (torch.int64, torch.float32))
    if batch * heads * length == 0:
        return cells, scores, 0
    groups, of_group = batch * own_heads, heads // own_heads
    rule, tile = tile_of(size, of_group, q.dtype, problem.tril_mask, problem.rope, float32_precision())
    padded, planes = (length + PAD.value - 1) // PAD.value * PAD.value, groups * of_group
    tiles = padded // rule.block
    vectors = torch.empty(2 * groups * padded * tile.VECTOR.value, dtype=q.dtype, device=q.device)
    biases = torch.empty(2 * planes * (padded + tiles), dtype=torch.float32, device=q.device)
    integers = torch.empty(planes * length + groups * tiles, dtype=torch.int32, device=q.device)
    mask = None if problem.mask is None else problem.mask.view(torch.uint8)
    positions = problem.positions if problem.rope else None
    width = None if problem.max_width is None else min(problem.max_width, length)
    sizes = (groups, of_group, length)
    launch = {"num_warps": rule.num_warps, "num_stages": rule.stages, "enable_fp_fusion": False, **all_registers()}
    with torch.cuda.device_of(q):
        prepare_kernel[(groups * tiles, 1 + (of_group + BIASES.value - 1) // BIASES.value)](
            q, k, start, end, mask, positions, vectors, biases, integers, own_heads, *sizes,
            *q.stride(), *k.stride(), *strides(start, 3), *strides(end, 3), *strides(mask, 2), *strides(positions, 2),
            tile, num_warps=4,
        )  # fmt: skip
        count_kernel[(groups * tiles * ((of_group + rule.heads - 1) // rule.heads),)](
            vectors, biases, integers, *sizes, width, problem.scale, threshold, tile, **launch
        )
        behind = integers[: planes * length].cumsum(0)
        count = int(behind[-1])
        some = count if max_spans is None else min(count, max_spans)
        if some > 0:
            cells, scores = cells.new_empty(some), scores.new_empty(some)
            write_kernel[(groups * tiles * ((of_group + rule.writers - 1) // rule.writers),)](
                vectors, biases, integers, behind, cells, scores, *sizes, width, problem.scale, threshold, some, tile,
                **launch,
            )  # fmt: skip
    return cells, scores, count
