"""The ZLPR loss of a linear layer with very many classes, without its scores.

With s = h W^T + b, labels t of the few cells that are listed and 0 elsewhere, each row has

    l_n = log(1 + sum (1 - t) exp(s))      l_p = log(1 + sum_listed t exp(-s))      loss = l_n + l_p

The exponents x = log t - s of the second sum are computed cell by cell. The first sum runs over tiles of E = (1 - t)
exp(s), where listed cells are set to 0 if t = 1: they are never subtracted. Backward, with g upstream, c = g exp(-l_n),

    G = E - exp(x - l_p + l_n) at listed cells       dh = c (G W)       dW = G^T (c h)       db = G^T c

so c stands in the small operands, listed cells ride in the same products, and where g = 0 nothing is divided by it.

    forward    1  number, sort (the library's), arrange, bounds: the listed cells, by tile
               2  listed   x
               3  exponentials: product, E, and its sums over each row of each tile, in one
               4  merge    the sums of tiles, and of each row's positives
    backward   5  scales   l_n and c; 1 gives the bounds again
               then block of classes after block, G in scratch memory:
               6  rescale  rows of E that forward kept in the memory of the gradient of W, as many as fit; or 3 again
               7  put      listed cells
               8  matrix products, by the library

A row of a tile is computed under a pivot p of its own, its largest score: E exp(-p). The sums of tiles are merged in a
fixed order, as numbers (m, S) that stand for S exp(m), m >= 0. Backward puts all tiles under the l_n of a row, so that
G is the gradient itself, but for g: neither too large nor lost. In float16 it is 2^LIFT times as large, and has all its
digits down to 2^-29 of the largest; so has c h, which is scaled by a power of two that its largest element sets.

What is kept beside E are the pivots [tiles, rows], at the end of that memory. E lies packed at its beginning, block
after block [rows, classes of the block]. So blocks go from the last one to the first: what the gradient of one is
written over has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashpointer.problem import Listed, Lists, LogSums

from .cells import all_registers, constant, float32_precision, strides
from .rows import FLOAT_MAX, LOG2_E, exp, exp_parts

PARTIALS = 1 << 25  # sums of rows of tiles at a time
SCRATCH = 1 << 26  # elements of G, or of a block of dW in float32
LISTED = 16  # cells to a program
LANES = 1024
MERGED = 8  # rows to a program that merges sums

# --- what belongs together -----------------------------------------------------------------------------------------


@constant
class Tile:
    """Made on the host."""

    BM: Any  # rows
    BN: Any  # classes
    BK: Any  # of D at a time
    EVEN: Any  # BK divides D
    ALIGNED: Any  # 16 divides C
    PRECISION: Any  # of products whose operands are float32
    LIFT: Any  # of E and G, in float16; else 0
    STAGES: Any


class Matrix(NamedTuple):
    """hidden [R, D] or weight [C, D]."""

    ptr: Any
    stride_n: Any
    stride_d: Any
    count: Any  # R or C
    size: Any  # D


class Corner(NamedTuple):
    """The first cell of a tile."""

    m: Any  # row
    n: Any  # class
    number: Any  # of the tile: those of the same classes follow each other


class Cells(NamedTuple):
    """The listed cells, sorted by tile."""

    rows: Any
    classes: Any
    labels: Any  # or None
    bounds: Any  # [tiles + 1]


# --- the product ---------------------------------------------------------------------------------------------------


@triton.jit
def load_vectors(x, at, d_first, tile):
    """BK elements of the vectors of x: [vectors, BK], 0 where there are none."""
    d = d_first + tl.arange(0, tile.BK)
    inside = (at < x.count)[:, None]
    if not tile.EVEN:
        inside = inside & (d < x.size)[None, :]
    ptrs = (x.ptr + at.to(tl.int64) * x.stride_n)[:, None] + (d.to(tl.int64) * x.stride_d)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def scores_of(hidden, weight, bias, stride_b, corner, tile):
    """[BM, BN]; -inf where there is no class."""
    m = corner.m + tl.arange(0, tile.BM)
    n = corner.n + tl.arange(0, tile.BN)
    s = tl.zeros([tile.BM, tile.BN], dtype=tl.float32)
    for d_first in tl.range(0, hidden.size, tile.BK, num_stages=tile.STAGES):
        h_m = load_vectors(hidden, m, d_first, tile)  # [BM, BK]
        w_n = load_vectors(weight, n, d_first, tile)  # [BN, BK]
        s = tl.dot(h_m, tl.trans(w_n), acc=s, input_precision=tile.PRECISION)
    b_n = tl.where(n < weight.count, 0.0, float("-inf"))
    if bias is not None:
        b_n = tl.load(bias + n.to(tl.int64) * stride_b, mask=n < weight.count, other=float("-inf")).to(tl.float32)
    return s + b_n[None, :]


@triton.jit
def weigh(s, cells, corner, tile):
    """The scores of a tile, plus log(1 - t) where cells are listed; t is 1, or left out, if it is not in [0, 1)."""
    stop = tl.load(cells.bounds + corner.number + 1)
    for i in range(tl.load(cells.bounds + corner.number), stop):
        # Compared with constants, for which no thread needs registers.
        m = (tl.load(cells.rows + i) - corner.m).to(tl.int32) == tl.arange(0, tile.BM)
        n = (tl.load(cells.classes + i) - corner.n).to(tl.int32) == tl.arange(0, tile.BN)
        here = m[:, None] & n[None, :]
        if cells.labels is None:
            s = tl.where(here, float("-inf"), s)
        else:
            t = tl.load(cells.labels + i).to(tl.float32)
            partly = (t >= 0.0) & (t < 1.0)
            log_rest = tl.log(tl.where(partly, 1.0 - t, 1.0))
            s = tl.where(here, tl.where(partly, s + log_rest, float("-inf")), s)
    return s


@triton.jit
def store_exponentials(out, e, corner, kept, block, tile):
    """Of a block [kept rows, width] a tile; ``block``: its first class, and width."""
    m = corner.m + tl.arange(0, tile.BM)
    n = corner.n - block[0] + tl.arange(0, tile.BN)
    inside = (m < kept)[:, None] & (n < block[1])[None, :]
    tl.store(out + (m.to(tl.int64) * block[1])[:, None] + n[None, :], e.to(out.dtype.element_ty), mask=inside)


@triton.jit
def exponentials_kernel(
    hidden, weight, bias, listed_rows, listed_classes, labels, bounds, l_n, out, pivots, sums,
    rows, classes, size, first_row, stop_row, first_class, kept, before, block,
    stride_hn, stride_hd, stride_wn, stride_wd, stride_b,
    tile: tl.constexpr,
):  # fmt: skip
    """A tile of rows first_row..stop_row to a program, from first_class on. Forward: pivots and sums, [tiles, these
    rows]. Backward, with l_n [R] for pivots, none of these. Of the ``kept`` first rows E: of a block, or of
    all, which then for each class before it have ``before`` elements."""
    of_rows = tl.cdiv(stop_row - first_row, tile.BM)
    m_first = first_row + tl.program_id(0) % of_rows * tile.BM
    n_first = first_class + tl.program_id(0) // of_rows * tile.BN
    tile_n = (n_first // tile.BN).to(tl.int64)
    corner = Corner(m_first, n_first, tile_n * tl.cdiv(rows, tile.BM) + m_first // tile.BM)
    of_hidden = Matrix(hidden, stride_hn, stride_hd, rows, size)
    s = scores_of(of_hidden, Matrix(weight, stride_wn, stride_wd, classes, size), bias, stride_b, corner, tile)
    s = weigh(s, Cells(listed_rows, listed_classes, labels, bounds), corner, tile)
    m = m_first + tl.arange(0, tile.BM)
    if l_n is None:
        p = tl.minimum(tl.maximum(tl.max(s, axis=1), -FLOAT_MAX), FLOAT_MAX)  # [BM]: no inf - inf
        e = tl.exp2((s - p[:, None]) * LOG2_E + tile.LIFT)
    else:  # of which all scores may be far below: then each digit counts
        p = tl.load(l_n + m, mask=m < stop_row, other=0.0)
        k, e = exp_parts(s - p[:, None])
        e *= tl.exp2(k + tile.LIFT)
    if l_n is None:
        at = tile_n * (stop_row - first_row) + m - first_row
        tl.store(pivots + at, p, mask=m < stop_row)
        tl.store(sums + at, tl.sum(e, axis=1) * 2.0**-tile.LIFT, mask=m < stop_row)
    if out is not None:
        first = n_first // block * block
        width = tl.minimum(block, classes - first)
        if tile.ALIGNED:
            width = tl.multiple_of(width, 16)
        store_exponentials(out + first.to(tl.int64) * before, e, corner, kept, (first, width), tile)


# --- listed cells --------------------------------------------------------------------------------------------------


@triton.jit
def load_listed(positives, j, count, per_row, stride_r, stride_p):
    """Row and class of the listed cells j, as they are given: [R, P]."""
    m = j // per_row
    return m, tl.load(positives + m * stride_r + j % per_row * stride_p, mask=j < count, other=-1)


@triton.jit
def number_kernel(
    positives, numbers, count, per_row, classes, first, ignored, tiles, of_rows, stride_r, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tile of each listed cell [n]; ``tiles`` where none is: padding, listed before, a class of other shards."""
    j = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    m, n = load_listed(positives, j, count, per_row, stride_r, stride_p)
    live = (n != ignored) & (n >= first) & (n - first < classes)
    for before in range(0, per_row):
        earlier = (j < count) & (before < j % per_row)
        at = m * stride_r + tl.cast(before, tl.int64) * stride_p
        live = live & (tl.load(positives + at, mask=earlier, other=-1) != n)  # a live n is at least 0
    number = (n - first) // BN * of_rows + m // BM
    tl.store(numbers + j, tl.where(live, number, tiles), mask=j < count)


@triton.jit
def arrange_kernel(
    positives, given_labels, numbers, order, listed_rows, listed_classes, labels,
    count, per_row, classes, first, tiles, stride_r, stride_p, stride_lr, stride_lp,
    LANES: tl.constexpr,
):  # fmt: skip
    """The listed cells in order: that of their tiles, numbers [n]."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    j = tl.load(order + i, mask=i < count, other=0)
    m, n = load_listed(positives, j, count, per_row, stride_r, stride_p)
    live = tl.load(numbers + i, mask=i < count, other=0) < tiles
    tl.store(listed_rows + i, m, mask=i < count)
    tl.store(listed_classes + i, tl.where(live, n - first, classes), mask=i < count)
    if labels is not None:
        t = tl.load(given_labels + m * stride_lr + j % per_row * stride_lp, mask=i < count, other=0.0)
        tl.store(labels + i, t, mask=i < count)


@triton.jit
def bounds_kernel(
    listed_rows, listed_classes, bounds, count, classes, tiles, of_rows, steps,
    BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Where the listed cells of each tile begin, [tiles + 1]: found by halving, in ``steps``."""
    tile_of = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    low = tl.zeros([LANES], dtype=tl.int64)
    high = low + count
    for _ in range(0, steps):
        i = (low + high) // 2
        m = tl.load(listed_rows + i, mask=low < high, other=0)
        n = tl.load(listed_classes + i, mask=low < high, other=0)
        number = tl.where(n < classes, n // BN * of_rows + m // BM, tiles)
        below = (low < high) & (number < tile_of)
        high = tl.where(below, high, i)
        low = tl.where(below, i + 1, low)
    tl.store(bounds + tile_of, low, mask=tile_of <= tiles)


@triton.jit
def listed_kernel(
    hidden, weight, bias, listed_rows, listed_classes, labels, order, x, by_row, count, classes, size,
    stride_hn, stride_hd, stride_wn, stride_wd, stride_b,
    CELLS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x = log t - s [n] of CELLS listed cells to a program; -inf where there is none, t is not above 0, or s is
    -inf. Also by row, as the cells were given."""
    i = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    m = tl.load(listed_rows + i, mask=i < count, other=0)
    n = tl.load(listed_classes + i, mask=i < count, other=classes)
    here = n < classes
    s = tl.zeros([CELLS], dtype=tl.float32)
    for d_first in range(0, size, BK):
        d = d_first + tl.arange(0, BK).to(tl.int64)
        inside = here[:, None] & (d < size)[None, :]
        h_m = tl.load(hidden + (m * stride_hn)[:, None] + (d * stride_hd)[None, :], mask=inside, other=0.0)
        w_n = tl.load(weight + (n * stride_wn)[:, None] + (d * stride_wd)[None, :], mask=inside, other=0.0)
        s += tl.sum(h_m.to(tl.float32) * w_n.to(tl.float32), axis=1)
    if bias is not None:
        s += tl.load(bias + n * stride_b, mask=here, other=0.0).to(tl.float32)
    here = here & (s != float("-inf"))
    of_cell = -s
    if labels is not None:
        t = tl.load(labels + i, mask=here, other=0.0).to(tl.float32)
        here = here & (t > 0.0)
        of_cell = tl.log(tl.where(here, t, 1.0)) - s
    of_cell = tl.where(here, of_cell, float("-inf"))
    tl.store(x + i, of_cell, mask=i < count)
    tl.store(by_row + tl.load(order + i, mask=i < count, other=0), of_cell, mask=i < count)


@triton.jit
def put_kernel(
    out, listed_rows, listed_classes, labels, x, m_p, ratios, l_n, bounds, first_class, width, of_rows,
    LIFT: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of the listed cells of BN classes to a program, in a block [R, width]: what is there less the positives' part. Of
    a label between 0 and 1 the two may cancel: what was rounded to half precision is computed again. From log t - s it
    gets s to half a digit of log t, so that in float32 it stays what it is."""
    tile_n = first_class // BN + tl.program_id(0)
    stop = tl.load(bounds + (tile_n + 1).to(tl.int64) * of_rows)
    for first in range(tl.load(bounds + tile_n.to(tl.int64) * of_rows), stop, LANES):
        i = first + tl.arange(0, LANES)
        m = tl.load(listed_rows + i, mask=i < stop, other=0)
        n = tl.load(listed_classes + i, mask=i < stop, other=0)
        at = out + m * width + n - first_class
        log_t = tl.load(x + i, mask=i < stop, other=0.0)  # less the score
        positive = tl.exp(log_t - tl.load(m_p + m, mask=i < stop, other=0.0))
        positive *= tl.load(ratios + m, mask=i < stop, other=0.0)
        e = tl.load(at, mask=i < stop, other=0.0).to(tl.float32)
        if (labels is not None) & (out.dtype.element_ty != tl.float32):
            t = tl.load(labels + i, mask=i < stop, other=1.0).to(tl.float32)
            partly = (t > 0.0) & (t < 1.0) & (log_t > float("-inf"))
            log_rest = tl.log(tl.where(partly, t * (1.0 - t), 1.0))
            rest = exp(log_rest - log_t - tl.load(l_n + m, mask=i < stop, other=0.0), True) * 2.0**LIFT
            e = tl.where(partly, rest, e)
        tl.store(at, (e - positive).to(out.dtype.element_ty), mask=i < stop)


@triton.jit
def rescale_kernel(kept, pivots, l_n, out, rows, width, BM: tl.constexpr, BN: tl.constexpr):
    """A block [rows, width] of E, from under pivots [tiles, rows] under l_n [rows]: BM rows of BN classes."""
    of_rows = tl.cdiv(rows, BM)
    m = (tl.program_id(0) % of_rows * BM + tl.arange(0, BM)).to(tl.int64)
    tile_n = tl.program_id(0) // of_rows
    n = tile_n * BN + tl.arange(0, BN)
    p = tl.load(pivots + tile_n.to(tl.int64) * rows + m, mask=m < rows, other=0.0)
    factor = exp(p - tl.load(l_n + m, mask=m < rows, other=0.0), True)
    at = (m * width)[:, None] + n[None, :]
    inside = (m < rows)[:, None] & (n < width)[None, :]
    e = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(out + at, e.to(out.dtype.element_ty), mask=inside)


# --- of each row ---------------------------------------------------------------------------------------------------


@triton.jit
def merge_kernel(
    pivots, partials, x, m_n, S_n, m_p, S_p, tiles, first_row, stop_row, per_row,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Both sums of ROWS rows to a program: of tiles, pivots and partials [tiles, these rows], and of their x [R, P]."""
    m = first_row + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([LANES, ROWS], dtype=tl.float32)
    for t in range(0, tiles, LANES):
        largest = tl.maximum(largest, load_tiles(pivots, m, first_row, stop_row, t, tiles, float("-inf"), LANES))
    top = tl.max(largest, axis=0)
    total = tl.zeros([LANES, ROWS], dtype=tl.float32)
    for t in range(0, tiles, LANES):
        p = load_tiles(pivots, m, first_row, stop_row, t, tiles, float("-inf"), LANES)
        total += tl.exp(p - top[None, :]) * load_tiles(partials, m, first_row, stop_row, t, tiles, 0.0, LANES)
    tl.store(m_n + m, top, mask=m < stop_row)
    tl.store(S_n + m, tl.sum(total, axis=0), mask=m < stop_row)
    largest = tl.zeros([LANES, ROWS], dtype=tl.float32)
    for first in range(0, per_row, LANES):
        largest = tl.maximum(largest, load_exponents(x, m, stop_row, first, per_row, LANES))
    top = tl.minimum(tl.max(largest, axis=0), FLOAT_MAX)
    of_listed = tl.zeros([LANES, ROWS], dtype=tl.float64)  # whose sum, as float32, does not tell the order of a list
    for first in range(0, per_row, LANES):
        of_listed += tl.exp(load_exponents(x, m, stop_row, first, per_row, LANES) - top[None, :]).to(tl.float64)
    tl.store(m_p + m, top, mask=m < stop_row)
    tl.store(S_p + m, tl.sum(of_listed, axis=0).to(tl.float32), mask=m < stop_row)


@triton.jit
def load_tiles(sums, m, first_row, stop_row, first, tiles, other, LANES: tl.constexpr):
    """Of LANES tiles: [LANES, rows], ``other`` where there is none."""
    t = first + tl.arange(0, LANES).to(tl.int64)
    at = (t * (stop_row - first_row))[:, None] + (m - first_row)[None, :]
    return tl.load(sums + at, mask=(t < tiles)[:, None] & (m < stop_row)[None, :], other=other)


@triton.jit
def load_exponents(x, m, stop_row, first, per_row, LANES: tl.constexpr):
    """Of LANES listed cells of each row: [LANES, rows], -inf where there is none."""
    p = first + tl.arange(0, LANES)
    inside = (p < per_row)[:, None] & (m < stop_row)[None, :]
    return tl.load(x + (m * per_row)[None, :] + p[:, None], mask=inside, other=float("-inf"))


@triton.jit
def scales_of_rows(m_n, S_n, m_p, S_p, upstream, stride_u, m, rows, LIFT: tl.constexpr):
    """l_n, as far as float32 tells; c, in units of G; and how many units a positive's exponential under m_p is."""
    pivot = tl.load(m_n + m, mask=m < rows, other=0.0)
    one_n = tl.exp(-pivot) + tl.load(S_n + m, mask=m < rows, other=0.0)  # at least 1
    one_p = tl.exp(-tl.load(m_p + m, mask=m < rows, other=0.0)) + tl.load(S_p + m, mask=m < rows, other=0.0)
    l_n = pivot + tl.log(one_n)
    unit = tl.where(l_n == float("inf"), 1.0, one_n * tl.exp(pivot - l_n)) * 2.0**LIFT  # of what l_n rounds away
    g = tl.load(upstream + m * stride_u, mask=m < rows, other=0.0).to(tl.float32)
    return l_n, g / unit, unit / one_p


@triton.jit
def scales_kernel(
    m_n, S_n, m_p, S_p, upstream, l_n, factors, ratios, parts, unit, rows, stride_u,
    LIFT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of all rows: see Scales. One program, for c in float16 needs a power of two that its largest element sets."""
    largest = tl.zeros([LANES], dtype=tl.float32)
    for first in range(0, rows, LANES):
        m = first + tl.arange(0, LANES).to(tl.int64)
        log_sum, c, ratio = scales_of_rows(m_n, S_n, m_p, S_p, upstream, stride_u, m, rows, LIFT)
        tl.store(l_n + m, log_sum, mask=m < rows)
        tl.store(factors + m, c, mask=m < rows)
        tl.store(ratios + m, ratio, mask=m < rows)
        largest = tl.maximum(largest, tl.where(m < rows, tl.abs(c), 0.0))
    power = 1.0
    if LIFT > 0:
        top = tl.max(largest, axis=0)
        exponent = tl.maximum(tl.floor(tl.log2(tl.where(top > 0.0, top, 1.0))), -100.0) - 14
        power = tl.where(top > 0.0, tl.exp2(exponent), 1.0)
        tl.store(unit, power)
    for first in range(0, rows, LANES):
        m = first + tl.arange(0, LANES).to(tl.int64)
        _, c, _ = scales_of_rows(m_n, S_n, m_p, S_p, upstream, stride_u, m, rows, LIFT)
        c = c / power
        high = c.to(parts.dtype.element_ty)
        tl.store(parts + 2 * m, high, mask=m < rows)
        tl.store(parts + 2 * m + 1, (c - high.to(tl.float32)).to(parts.dtype.element_ty), mask=m < rows)


# --- launchers -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """See Tile."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    stages: int


def plan(even: bool, dtype: torch.dtype, hip: bool) -> Plan:
    """The launch parameters, by rule: the largest tiles that no chip spills, and of which a multiprocessor of an H100
    holds two: one multiplies while the other takes exponentials. tf32x3 multiplies three times, and vectors that are
    not even, of 16 elements, take an address in registers for each element."""
    stages = 2 if hip else 4  # of 64 KiB shared memory
    if dtype == torch.float32 or not even:
        return Plan(128, 64, 32, 8, min(3, stages))
    return Plan(128, 128, 32, 8, stages)


@cache
def tile_of(rule: Plan, size: int, aligned: bool, dtype: torch.dtype) -> Tile:
    lift = 15 if dtype == torch.float16 else 0
    fields = (rule.bm, rule.bn, rule.bk, size % rule.bk == 0, aligned, float32_precision(), lift, rule.stages)
    return Tile(*map(tl.constexpr, fields))


class Layer(NamedTuple):
    """What forward and backward are given alike, and what follows from it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    cells: Listed  # sorted by tile
    bounds: torch.Tensor  # [tiles + 1]: where those of a tile begin
    rule: Plan
    tile: Tile

    @property
    def tiles(self) -> int:
        """Of classes."""
        return -(-len(self.weight) // self.rule.bn)

    @property
    def block(self) -> int:
        """Classes to a block: whole tiles. In float16 dW is made in float32, block by block."""
        rows, size = self.hidden.shape
        most: int = SCRATCH // max(1, rows, size if self.weight.dtype == torch.float16 else 0) // self.rule.bn
        return max(1, min(most, self.tiles)) * self.rule.bn

    @property
    def kept_rows(self) -> int:
        """Whose E and pivots fit the memory of the weight, those of whole tiles if not all do."""
        itemsize, tiles = self.weight.itemsize, self.tiles
        room = self.weight.numel() * itemsize // 4 * 4
        fit: int = room // max(1, len(self.weight) * itemsize + tiles * 4)
        return len(self.hidden) if fit >= len(self.hidden) else fit // self.rule.bm * self.rule.bm

    def pivots(self, kept: torch.Tensor) -> torch.Tensor:
        """[tiles, rows]: the last of the memory of kept."""
        flat, ratio, count = kept.view(-1), 4 // kept.itemsize, self.tiles * self.kept_rows
        floats = flat[: len(flat) // ratio * ratio].view(torch.float32)
        return floats[len(floats) - count :].view(self.tiles, self.kept_rows)


def plan_of(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[Plan, int, int]:
    """And how many tiles there are of rows, and in all."""
    even = all(min(x.stride()) == 1 and max(x.stride()) % 16 == 0 for x in (hidden, weight))
    rule = plan(even, hidden.dtype, torch.version.hip is not None)
    of_rows = -(-len(hidden) // rule.bm)
    return rule, of_rows, of_rows * -(-len(weight) // rule.bn)


def sort_cells(hidden: torch.Tensor, weight: torch.Tensor, lists: Lists) -> tuple[Listed, torch.Tensor]:
    """By tile; those that do not count, at class C, behind all. And which of the given ones they are, [n]."""
    (rule, of_rows, tiles), count, classes = plan_of(hidden, weight), lists.positives.numel(), len(weight)
    per_row, (stride_r, stride_p) = lists.positives.shape[1], lists.positives.stride()
    numbers, order, rows, at = (torch.empty(count, dtype=torch.int64, device=hidden.device) for _ in range(4))
    labels = None if lists.labels is None else lists.labels.new_empty(count)
    if count > 0:
        programs = (-(-count // LANES),)
        number_kernel[programs](
            lists.positives, numbers, count, per_row, classes, lists.first, lists.ignore_index, tiles, of_rows,
            stride_r, stride_p, BM=rule.bm, BN=rule.bn, LANES=LANES, num_warps=4,
        )  # fmt: skip
        numbers, order = numbers.sort(stable=True)
        arrange_kernel[programs](
            lists.positives, lists.labels, numbers, order, rows, at, labels, count, per_row, classes, lists.first,
            tiles, stride_r, stride_p, *strides(lists.labels, 2), LANES=LANES, num_warps=4,
        )  # fmt: skip
    return Listed(rows, at, labels), order


def prepare(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cells: Listed) -> Layer:
    (rule, of_rows, tiles), count, classes = plan_of(hidden, weight), len(cells.rows), len(weight)
    bounds = torch.empty(tiles + 1, dtype=torch.int64, device=hidden.device)
    bounds_kernel[(-(-(tiles + 1) // LANES),)](
        cells.rows, cells.classes, bounds, count, classes, tiles, of_rows, count.bit_length(),
        BM=rule.bm, BN=rule.bn, LANES=LANES, num_warps=4,
    )  # fmt: skip
    tile = tile_of(rule, hidden.shape[1], classes % 16 == 0, hidden.dtype)
    return Layer(hidden, weight, bias, cells, bounds, rule, tile)


def launch_exponentials(
    layer: Layer,
    rows: range,
    classes: range,
    store: tuple[torch.Tensor | None, int, int],
    l_n: torch.Tensor | None = None,
    partials: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> None:
    """See exponentials_kernel; ``store`` are its out, kept, before."""
    hidden, weight, bias, cells, bounds, rule, tile = layer
    tiles = -(-len(rows) // rule.bm) * -(-len(classes) // rule.bn)
    exponentials_kernel[(tiles,)](
        hidden, weight, bias, *cells, bounds, l_n, store[0], *partials,
        len(hidden), len(weight), hidden.shape[1], rows.start, rows.stop, classes.start, *store[1:], layer.block,
        *hidden.stride(), *weight.stride(), *strides(bias, 1), tile,
        num_warps=rule.num_warps, **all_registers(),
    )  # fmt: skip


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lists: Lists, keep: bool
) -> tuple[LogSums, Listed, torch.Tensor, torch.Tensor]:
    """The sums of hidden [R, D], weight [C, D], bias [C]; the listed cells, sorted by tile, and the exponents x [n] of
    the positives; and what backward needs of E in a tensor like weight, contiguous, or with ``keep`` False an empty
    one."""
    rows, classes = len(hidden), len(weight)
    kept = torch.empty(weight.shape if keep else 0, dtype=weight.dtype, device=weight.device)
    new_sums = torch.empty if classes > 0 else torch.zeros
    sums = LogSums(*(new_sums(rows, dtype=torch.float32, device=hidden.device) for _ in LogSums._fields))
    with torch.cuda.device_of(hidden):
        cells, order = sort_cells(hidden, weight, lists)
        layer, count = prepare(hidden, weight, bias, cells), len(order)
        x, by_row = (torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(2))
        if count > 0:
            listed_kernel[(-(-count // LISTED),)](
                hidden, weight, bias, *cells, order, x, by_row, count, classes, hidden.shape[1],
                *hidden.stride(), *weight.stride(), *strides(bias, 1), CELLS=LISTED, BK=128, num_warps=4,
                **all_registers(),
            )  # fmt: skip
        kept_rows, tiles = layer.kept_rows if keep else 0, layer.tiles
        height = max(1, PARTIALS // max(1, tiles) // layer.rule.bm) * layer.rule.bm
        edges = sorted({*range(0, rows, height), kept_rows, rows})
        for first, stop in pairwise(edges if classes > 0 else []):
            pivots, partials = torch.empty((2, tiles, stop - first), dtype=torch.float32, device=hidden.device)
            store = (kept if stop <= kept_rows else None, kept_rows, kept_rows)
            launch_exponentials(layer, range(first, stop), range(classes), store, None, (pivots, partials))
            merge_kernel[(-(-(stop - first) // MERGED),)](
                pivots, partials, by_row, *sums, tiles, first, stop, lists.positives.shape[1],
                ROWS=MERGED, LANES=LANES // MERGED, num_warps=4,
            )  # fmt: skip
            if stop <= kept_rows:
                layer.pivots(kept)[:, first:stop] = pivots
    return sums, cells, x, kept


# --- backward ------------------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """How G is scaled."""

    l_n: torch.Tensor  # [R], as far as float32 tells
    factors: torch.Tensor  # [R]: c, in units of G
    ratios: torch.Tensor  # [R]: so many units is a positive's exponential under m_p
    parts: torch.Tensor  # [R, 2]: c in two parts of the weight's dtype, for what it sums may cancel
    unit: torch.Tensor | None  # of parts, in float16


def scales_of(layer: Layer, sums: LogSums, upstream: torch.Tensor) -> Scales:
    rows, dtype, device = len(layer.hidden), layer.hidden.dtype, layer.hidden.device
    l_n, factors, ratios = torch.empty((3, rows), dtype=torch.float32, device=device)
    parts = torch.empty((rows, 2), dtype=dtype, device=device)
    unit = torch.empty((), dtype=torch.float32, device=device) if dtype == torch.float16 else None
    scales_kernel[(1,)](
        *sums, upstream, l_n, factors, ratios, parts, unit, rows, *upstream.stride(),
        LIFT=layer.tile.LIFT, LANES=LANES, num_warps=8,
    )  # fmt: skip
    return Scales(l_n, factors, ratios, parts, unit)


def fill_block(
    layer: Layer,
    g: torch.Tensor,
    classes: range,
    positives: tuple[torch.Tensor, torch.Tensor],
    scales: Scales,
    kept: torch.Tensor,
    pivots: torch.Tensor,
) -> None:
    """g [R, classes] = G; ``positives`` are x and m_p."""
    (rows, width), rule, cells = g.shape, layer.rule, layer.cells
    kept_rows, tiles = pivots.shape[1], -(-width // rule.bn)
    if kept_rows > 0:
        e = kept.view(-1)[classes.start * kept_rows : classes.stop * kept_rows]
        rescale_kernel[(-(-kept_rows // 32) * tiles,)](
            e, pivots[classes.start // rule.bn :], scales.l_n, g, kept_rows, width, BM=32, BN=rule.bn, num_warps=4
        )
    if kept_rows < rows:
        launch_exponentials(layer, range(kept_rows, rows), classes, (g, rows, 0), scales.l_n)
    if len(cells.rows) > 0:
        put_kernel[(tiles,)](
            g, *cells, *positives, scales.ratios, scales.l_n, layer.bounds, classes.start, width,
            -(-rows // rule.bm), LIFT=layer.tile.LIFT.value, BN=rule.bn, LANES=LANES, num_warps=4,
        )  # fmt: skip


def in_range(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x divided by a power of two, and this one: None, but for what is to be float16."""
    if dtype != torch.float16 or x.numel() == 0:
        return x, None
    largest = x.abs().max()
    unit = torch.where(largest > 0, torch.exp2(largest.log2().floor().clamp(min=-100) - 14), 1.0)
    return x / unit, unit


def product(a: torch.Tensor, b: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    """In float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        out = a.float() @ b.float()
    else:
        out = torch.mm(a, b, out_dtype=torch.float32)
    return out if unit is None else out.mul_(unit)


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The total [rows, columns], float32, if there is one, plus a b."""
    if total is None:
        return product(a, b, None)
    if a.dtype == torch.float32 or not a.is_cuda:
        return total.addmm_(a.float(), b.float())
    return torch.addmm(total, a, b, out_dtype=torch.float32)


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    listed: Listed,
    x: torch.Tensor,
    kept: torch.Tensor,
    sums: LogSums,
    upstream: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    weight_grad: Callable[[int, torch.Tensor], None] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The wanted ones of the gradients of hidden (float32), weight and bias, from what forward returned, its sums
    merged over all ranks, and upstream [R]. That of weight is written over kept, if that is not empty; or given to
    ``weight_grad`` block by block, in float32."""
    (rows, size), classes = hidden.shape, len(weight)
    of_hidden = of_weight = of_bias = None
    if wanted[0] and classes == 0:
        of_hidden = torch.zeros((rows, size), dtype=torch.float32, device=hidden.device)
    if wanted[1] and weight_grad is None:
        of_weight = kept if kept.numel() > 0 else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if wanted[2] and bias is not None:
        of_bias = torch.empty(classes, dtype=bias.dtype, device=bias.device)
    with torch.cuda.device_of(hidden):
        layer = prepare(hidden, weight, bias, listed)
        scales = scales_of(layer, sums, upstream)
        pivots = layer.pivots(kept).clone() if kept.numel() > 0 else kept.new_empty((0, 0), dtype=torch.float32)
        dtype, block = hidden.dtype, layer.block
        if weight_grad is not None:  # which is given blocks in float32
            block = min(block, max(1, SCRATCH // max(1, size) // layer.rule.bn) * layer.rule.bn)
        if of_weight is not None or weight_grad is not None:
            shares, unit = in_range(hidden * scales.factors[:, None], dtype)
            shares = shares.to(dtype)  # c h
        scratch = torch.empty(rows * min(block, classes), dtype=dtype, device=hidden.device)
        blocks = range(0, classes, block)
        for first in blocks if kept.numel() == 0 else reversed(blocks):
            some = range(first, min(first + block, classes))
            g = scratch[: rows * len(some)].view(rows, len(some))
            fill_block(layer, g, some, (x, sums.m_p), scales, kept, pivots)
            if wanted[0]:
                of_hidden = add_product(of_hidden, g, weight[first : some.stop])
            if weight_grad is not None:
                weight_grad(first, product(g.t(), shares, unit))
            elif of_weight is not None and unit is None:
                torch.mm(g.t(), shares, out=of_weight[first : some.stop])
            elif of_weight is not None:
                of_weight[first : some.stop] = product(g.t(), shares, unit)
            if of_bias is not None and dtype == torch.float32:  # whose digits a product over many rows would not keep
                of_bias[first : some.stop] = g.mul_(scales.factors[:, None]).sum(0)
            elif of_bias is not None:
                of_bias[first : some.stop] = product(g.t(), scales.parts, scales.unit).sum(1)
        if of_hidden is not None:
            of_hidden.mul_(scales.factors[:, None])
    return of_hidden, of_weight, of_bias
