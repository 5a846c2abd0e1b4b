"""Rows of ``pointer_loss`` that are computed cell by cell, and the listed spans that they are for.

Sorted, each listed span answers for the columns from it to the next one in its row, and the first one for those before
it too: no row is summed twice, and no span waits for another. An unsafe row has no listed span; it answers for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cells import columns_of, gather_vectors, keep_valid, load_vectors, multiply
from .rows import FLOAT_MAX

NOWHERE = tl.constexpr(2**63 - 1)  # the key of a span on no valid cell: behind all others
GATHERED = tl.constexpr(16)  # direct rows at a time: the least that a matrix unit takes
LANES = tl.constexpr(128)  # of searches and scans of the sorted spans


class Rows(NamedTuple):
    """GATHERED direct rows, each for a listed span, or an unsafe row as a whole."""

    h: Any
    m: Any
    live: Any
    own: Any  # the column of the listed span, -1 for none
    left_out: Any  # its cell was listed before, or its label is -100
    opens: Any  # it is the first of its row
    following: Any  # column of the next one in its row, or one beyond all
    label: Any
    q: Any  # Vectors
    start: Any


class Terms(NamedTuple):
    """Of the heads of GATHERED rows."""

    l_n: Any
    l_p: Any
    g: Any  # upstream gradient


@triton.jit
def safe(x):
    """A pivot that is -inf where nothing is valid yet."""
    return tl.where(x == float("-inf"), 0.0, x)


# --- sorting ---------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The spans as they came, and what tells whether they are valid: of padding an entry is negative."""

    ptr: Any  # [count, 4], or where they are padded [count, 3], without the sentence
    stride_s: Any
    stride_c: Any
    per_sentence: Any  # so many, padding too, if they are padded; else None
    labels: Any  # [count], or None
    stride_l: Any
    mask: Any  # [B, N], or None
    stride_mb: Any
    stride_mn: Any
    own_heads: Any


@triton.jit
def load_key(listing, i, spans, shape, tile):
    """Of spans i, unsorted."""
    at = listing.ptr + i.to(tl.int64) * listing.stride_s
    here = i < spans.count
    if listing.per_sentence is None:
        b = tl.load(at, mask=here, other=-1)
        at += listing.stride_c
    else:
        b = (i // listing.per_sentence).to(tl.int64)
    head = tl.load(at, mask=here, other=-1)
    m = tl.load(at + listing.stride_c, mask=here, other=-1)
    n = tl.load(at + 2 * listing.stride_c, mask=here, other=-1)
    valid = (b >= 0) & (b < shape.groups // listing.own_heads) & (head >= 0)
    valid = valid & (head < listing.own_heads * shape.heads)
    valid = valid & (m >= 0) & (m < shape.length) & (n >= 0) & (n < shape.length)
    if listing.mask is not None:
        of_sentence = listing.mask + b * listing.stride_mb
        valid = valid & (tl.load(of_sentence + m * listing.stride_mn, mask=valid, other=0) != 0)
        valid = valid & (tl.load(of_sentence + n * listing.stride_mn, mask=valid, other=0) != 0)
    valid = keep_valid(valid, m, n, False, shape.max_width, tile.TRIL)
    head = head.to(tl.int32)
    key = (b * listing.own_heads + head // shape.heads) << spans.n_bits | m
    key = key << spans.h_bits | head % shape.heads
    return tl.where(valid, key << spans.n_bits | n, NOWHERE)


@triton.jit
def sort_spans(listing, first, spans, shape, tile, MINE: tl.constexpr):
    """The place of each of MINE spans is the number of those before it: the sort is stable, so the first listing of a
    cell stays the first."""
    i = first + tl.arange(0, MINE)
    here = i < spans.count
    key = load_key(listing, i, spans, shape, tile)
    place = tl.zeros([MINE], dtype=tl.int32)
    for others in range(0, spans.count, LANES):
        j = others + tl.arange(0, LANES)
        other = load_key(listing, j, spans, shape, tile)
        before = (other[None, :] < key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum((before & (j < spans.count)[None, :]).to(tl.int32), axis=1)
    label = tl.full([MINE], 1.0, dtype=tl.float32)
    if listing.labels is not None:
        label = tl.load(listing.labels + i.to(tl.int64) * listing.stride_l, mask=here, other=1.0).to(tl.float32)
    tl.store(spans.keys + place, key, mask=here)
    tl.store(spans.labels + place, label, mask=here)


@triton.jit
def store_keys(listing, first, spans, shape, tile, MINE: tl.constexpr):
    """Unsorted."""
    i = first + tl.arange(0, MINE)
    tl.store(spans.keys + i, load_key(listing, i, spans, shape, tile), mask=i < spans.count)


@triton.jit
def first_key(spans, least):
    """Where the first sorted key that is at least this stands: one step up to LANES spans, two up to their square."""
    low = 0
    size = spans.count
    while size > 0:
        stride = (size + LANES - 1) // LANES
        i = tl.arange(0, LANES) * stride
        key = tl.load(spans.keys + low + i, mask=i < size, other=NOWHERE)
        less = tl.sum((key < least).to(tl.int32), axis=0)
        skipped = tl.where(less > 0, (less - 1) * stride + 1, 0)
        size = tl.where(less > 0, tl.minimum(stride - 1, size - skipped), 0)
        low += skipped
    return low


@triton.jit
def spans_of(group, count):
    """Where the spans of a group stand among the sorted ones: first, stop."""
    first = tl.load(group.spans, mask=count > 0, other=0)
    return first, tl.load(group.spans + 1, mask=count > 0, other=0)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_start(group, h, m, live, shape):
    at = group.starts + h.to(tl.int64) * shape.padded + m
    return tl.load(at, mask=live, other=float("-inf"))


@triton.jit
def load_rows(group, spans, p, stop, shape, tile):
    """Of the sorted spans p below stop."""
    live = p < stop
    key = tl.load(spans.keys + p, mask=live, other=0)
    before = tl.load(spans.keys + p - 1, mask=live & (p > 0), other=-1)
    after = tl.load(spans.keys + p + 1, mask=live & (p + 1 < spans.count), other=NOWHERE)
    label = tl.load(spans.labels + p, mask=live, other=1.0)
    beyond = tl.full([], 1, tl.int64) << spans.n_bits
    row = key >> spans.n_bits
    h = (row & ((tl.full([], 1, tl.int64) << spans.h_bits) - 1)).to(tl.int32)
    m = (row >> spans.h_bits & (beyond - 1)).to(tl.int32)
    n = (key & (beyond - 1)).to(tl.int32)
    following = tl.where(after >> spans.n_bits == row, after & (beyond - 1), beyond).to(tl.int32)
    start = load_start(group, h, m, live, shape)
    q = gather_vectors(group.q, m, tile.VECTOR)
    left_out = (before == key) | (label == -100.0)
    return Rows(h, m, live, n, left_out, before >> spans.n_bits != row, following, label, q, start)


@triton.jit
def load_unsafe(group, h, i, count, shape, tile):
    """Of the count unsafe rows of a head those at i: each answers for all of its columns."""
    live = i < count
    m = tl.load(group.unsafe + tl.cast(h, tl.int64) * shape.padded + i, mask=live, other=0)
    nothing = tl.full([GATHERED], -1, dtype=tl.int32)
    start = load_start(group, nothing + 1 + h, m, live, shape)
    label = tl.full([GATHERED], 1.0, dtype=tl.float32)
    q = gather_vectors(group.q, m, tile.VECTOR)
    return Rows(
        nothing + 1 + h, m, live, nothing, nothing > 0, nothing > 0, nothing + 2147483647, label, q, start
    )  # fmt: skip


@triton.jit
def only(rows, live):
    return Rows(
        rows.h, rows.m, live, rows.own, rows.left_out, rows.opens, rows.following, rows.label, rows.q, rows.start
    )  # fmt: skip


@triton.jit
def answers_for(n, rows):
    """Which columns n [columns] are the rows': [GATHERED, columns]."""
    mine = (n[None, :] > rows.own[:, None]) & (n[None, :] < rows.following[:, None])
    return mine | (rows.opens[:, None] & (n[None, :] < rows.own[:, None]))


@triton.jit
def direct_scores(k_n, n, rows, group, shape, tile):
    """[GATHERED, columns], -inf in invalid cells."""
    s = multiply(rows.q, k_n, tile) * group.scale
    end = tl.load(group.ends + rows.h.to(tl.int64)[:, None] * shape.padded + n[None, :])
    s += rows.start[:, None] + end
    s = tl.where(s >= FLOAT_MAX, float("inf"), s)
    return keep_valid(s, rows.m[:, None], n[None, :], float("-inf"), shape.max_width, tile.TRIL)


@triton.jit
def columns_of_rows(rows, group, shape, tile):
    m_first = tl.min(tl.where(rows.live, rows.m, shape.padded), axis=0)
    m_last = tl.max(tl.where(rows.live, rows.m, -1), axis=0)
    return columns_of(m_first, m_last, tl.load(group.extent), shape, tile)


@triton.jit
def direct_log_sums(rows, group, shape, tile, BN: tl.constexpr, STAGES: tl.constexpr):
    """The log-sum of the negatives that rows answer for, and the listed scores; BN columns at a time."""
    largest = tl.full([GATHERED, BN], float("-inf"), dtype=tl.float32)  # one pivot and sum for every BN-th column
    total = tl.zeros([GATHERED, BN], dtype=tl.float32)
    listed = tl.zeros([GATHERED, BN], dtype=tl.float32)
    first, stop = columns_of_rows(rows, group, shape, tile)
    for n_first in tl.range(first, stop, BN, num_stages=STAGES):
        n = n_first + tl.arange(0, BN)
        k_n = load_vectors(group.k, n_first, BN, tile.VECTOR)
        s = direct_scores(k_n, n, rows, group, shape, tile)  # [GATHERED, BN]
        listed += tl.where(n[None, :] == rows.own[:, None], s, 0.0)
        s = tl.where(answers_for(n, rows), s, float("-inf"))
        s = tl.where(s > FLOAT_MAX, FLOAT_MAX, s)  # for inf - inf is NaN
        less = tl.exp(-tl.abs(s - safe(largest)))  # of the two, relative to the larger one
        total = tl.where(s > largest, total * less + 1.0, total + less)
        largest = tl.maximum(largest, s)
    top = safe(tl.max(largest, axis=1))
    log_sums = top + tl.log(tl.sum(total * tl.exp(largest - top[:, None]), axis=1))
    return tl.where(top == FLOAT_MAX, float("inf"), log_sums), tl.sum(listed, axis=1)


@triton.jit
def log_rest(score, label):
    """score + log(1 - label); a label of 1 leaves nothing, whatever the score."""
    return tl.where(label == 1.0, float("-inf"), score + tl.log(1 - label))


@triton.jit
def direct_weights(s, n, rows, terms):
    """The gradient by the scores s [GATHERED, columns]."""
    negative = tl.where(answers_for(n, rows), tl.exp(s - terms.l_n[:, None]), 0.0)
    counts = (n[None, :] == rows.own[:, None]) & (s != float("-inf")) & (rows.left_out == 0)[:, None]
    rest = tl.where((rows.label == 1.0)[:, None], float("-inf"), s + tl.log(1 - rows.label)[:, None])
    of_listed = tl.exp(rest - terms.l_n[:, None]) - tl.exp((tl.log(rows.label) - terms.l_p)[:, None] - s)
    return terms.g[:, None] * tl.where(counts, of_listed, negative)


@triton.jit
def direct_vectors(rows, terms, group, shape, tile, BN: tl.constexpr):
    """dx R k of rows: [GATHERED, VECTOR]; BN columns at a time."""
    d = tl.zeros([GATHERED, tile.VECTOR], dtype=tl.float32)
    first, stop = columns_of_rows(rows, group, shape, tile)
    for n_first in tl.range(first, stop, BN, num_stages=2):
        n = n_first + tl.arange(0, BN)
        k_n = load_vectors(group.k, n_first, BN, tile.VECTOR)
        dx = direct_weights(direct_scores(k_n, n, rows, group, shape, tile), n, rows, terms)  # [GATHERED, BN]
        d = tl.dot(dx.to(tile.TABLE), k_n.x.to(tile.TABLE), acc=d, input_precision=tile.PRECISION)
    return d
