"""The ZLPR loss of all spans, without their scores.

Where heads share q and k, the score of a span (m, n) is x_mn + start_hm + end_hn, with x_mn = scale * <R q_m, R k_n>:
heads differ by what depends on m or on n alone. With rho_m = max_n x_mn and C_h = max_n end_hn, the sum over a row is

    sum_n exp(s_hmn) = exp(start_hm + C_h + rho_m) * sum_n P_mn V_hn,    P = exp(x - rho),   V = exp(end - C)

one exponential for all heads, and a matrix product with the heads as columns: flash attention, unnormalised. The loss
of a head is l_n + l_p, l_n = log(1 + sum_m of these). Backward, with g the upstream gradient, goes the same way:

    A_hm = g_h exp(start_hm + C_h + rho_m - l_n)        T = A^T V        dx = P * T        (T sums over the heads)
    dq = scale * R^T (dx R k)     dk = scale * R^T (dx^T R q)     dstart_hm = g_h exp(row's log-sum - l_n)
    dend = V * (A P)

A mask is a bias of -inf, in start + C and in V, so that the sweeps know only triangle and band. rho may be too large:
it is taken over columns that V then drops. All that matters is the bound start + C + rho of a row: a term is lost to
underflow below exp(bound - 87), which beside the 1 in the logarithm is nothing while the bound is below 50.

Some rows of a head are therefore taken out, start + C = -inf, and computed directly, gathered 16 at a time: those whose
bound is above 50, and those with a listed span, where the span must not be among the negatives, and to subtract it
afterwards would cost every digit. Listed spans are sorted, so each answers for the columns from it to the next one in
its row, and the first one for those before it too: no row is summed twice, and no span waits for another.

A group is what shares q and k: a sentence, or a head of it. Inner tensors are [groups, heads of a group, N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .pointer_scores import (
    all_registers,
    float32_precision,
    load_bias,
    load_kept,
    load_vectors,
    masking,
    may_be_valid,
    tile_product,
    valid_cells,
)
from .rotate import rotate, rotate_back_
from .zlpr_loss import log_term, pivot

SAFE_BOUND = tl.constexpr(50.0)
NOWHERE = tl.constexpr(2**63 - 1)  # sorts behind every cell, and says that there is none
GATHERED = tl.constexpr(16)  # rows: the least that a matrix unit takes


# --- what depends on the tokens alone --------------------------------------------------------------------------------


@triton.jit
def load_cell(
    spans, mask, i, count, batch, heads, length, max_width, stride_s, stride_c, stride_mb, stride_mn,
    HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """((b * heads + h) * length + m) * length + n of spans i, or NOWHERE for one outside or on an invalid cell."""
    at = spans + i.to(tl.int64) * stride_s
    b = tl.load(at, mask=i < count, other=-1)
    h = tl.load(at + stride_c, mask=i < count, other=-1)
    m = tl.load(at + 2 * stride_c, mask=i < count, other=-1)
    n = tl.load(at + 3 * stride_c, mask=i < count, other=-1)
    inside = (b >= 0) & (b < batch) & (h >= 0) & (h < heads) & (m >= 0) & (m < length) & (n >= 0) & (n < length)
    kept_m = inside
    kept_n = inside
    if HAS_MASK:
        kept_m = tl.load(mask + b * stride_mb + m * stride_mn, mask=inside, other=0) != 0
        kept_n = tl.load(mask + b * stride_mb + n * stride_mn, mask=inside, other=0) != 0
    valid = valid_cells(m, n, inside & kept_m, kept_n, max_width, TRIL, BANDED)
    return tl.where(valid, ((b * heads + h) * length + m) * length + n, NOWHERE)


@triton.jit
def sort_spans_kernel(
    spans, span_labels, mask, cells, labels,
    count, batch, heads, length, max_width,
    stride_s, stride_c, stride_l, stride_mb, stride_mn,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    MINE: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The place of each of MINE spans is the number of those before it: the sort is stable, so the first listing of a
    cell stays the first."""
    i = tl.program_id(0) * MINE + tl.arange(0, MINE)
    cell = load_cell(
        spans, mask, i, count, batch, heads, length, max_width, stride_s, stride_c, stride_mb, stride_mn,
        HAS_MASK, TRIL, BANDED,
    )  # fmt: skip
    place = tl.zeros([MINE], dtype=tl.int32)
    for first in range(0, count, OTHERS):
        j = first + tl.arange(0, OTHERS)
        other = load_cell(
            spans, mask, j, count, batch, heads, length, max_width, stride_s, stride_c, stride_mb, stride_mn,
            HAS_MASK, TRIL, BANDED,
        )  # fmt: skip
        before = (other[None, :] < cell[:, None]) | ((other[None, :] == cell[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum((before & (j < count)[None, :]).to(tl.int32), axis=1)
    t = tl.full([MINE], 1.0, dtype=tl.float32)
    if HAS_LABELS:
        t = tl.load(span_labels + i.to(tl.int64) * stride_l, mask=i < count, other=0.0).to(tl.float32)
    tl.store(cells + place, cell, mask=i < count)
    tl.store(labels + place, t, mask=i < count)


@triton.jit
def prepare_kernel(
    start, end, mask, cells, exponents, values,
    count, heads, length,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of a sentence to a program: start + C, -inf for dropped tokens and rows with a listed span, and V."""
    plane = tl.program_id(0).to(tl.int64)
    b = plane // heads
    h = plane % heads
    start += b * stride_sb
    end += b * stride_eb
    mask += b * stride_mb
    largest = float("-inf")
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = load_kept(mask, token, length, stride_mn, HAS_MASK)
        e = load_bias(end, kept, h, token, stride_eh, stride_en, HAS_END)
        largest = tl.maximum(largest, tl.max(e, axis=0))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = load_kept(mask, token, length, stride_mn, HAS_MASK)
        e = load_bias(end, kept, h, token, stride_eh, stride_en, HAS_END)
        s = load_bias(start, kept, h, token, stride_sh, stride_sn, HAS_START)
        tl.store(values + plane * length + token, tl.exp(e - largest), mask=token < length)
        tl.store(exponents + plane * length + token, s + largest, mask=token < length)
    tl.debug_barrier()  # before other threads write over some of it
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        row = tl.load(cells + p, mask=p < count, other=NOWHERE) // length
        tl.store(exponents + row, float("-inf"), mask=(p < count) & (row // length == plane))


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def operand(x, like):
    """For a matrix product: bfloat16 has the range of float32, but float16 holds neither P, V, A nor their products."""
    return x.to(tl.bfloat16) if like.dtype.element_ty == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def load_heads(x, h_first, heads, token, length, other, HEADS: tl.constexpr):
    """x [heads, length] of one group, at HEADS heads and some tokens: [BLOCK, HEADS]."""
    h = h_first + tl.arange(0, HEADS)
    at = x + h.to(tl.int64)[None, :] * length + token[:, None]
    return tl.load(at, mask=(token < length)[:, None] & (h < heads)[None, :], other=other)


@triton.jit
def load_of_planes(x, h_first, heads, stride, other, HEADS: tl.constexpr):
    """x [heads] of one group at HEADS heads."""
    h = h_first + tl.arange(0, HEADS)
    return tl.load(x + h.to(tl.int64) * stride, mask=h < heads, other=other).to(tl.float32)


@triton.jit
def safe(x):
    """A pivot that is -inf where nothing is valid yet."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def find_spans(cells, count, least, most, BLOCK: tl.constexpr):
    """Where the sorted cells from least to most (excluded) stand: first, stop."""
    first = 0
    stop = 0
    for at in range(0, count, BLOCK):
        p = at + tl.arange(0, BLOCK)
        cell = tl.load(cells + p, mask=p < count, other=NOWHERE)
        first += tl.sum((cell < least).to(tl.int32), axis=0)
        stop += tl.sum((cell < most).to(tl.int32), axis=0)
    return first, stop


@triton.jit
def load_listed(cells, p, stop, count, heads, length):
    """Of sorted spans p below stop: the head in its group, start and end, whether it is there, whether its cell came
    before, whether it is the first of its row, and the end of the next one in the row, or the length."""
    here = p < stop
    cell = tl.load(cells + p, mask=here, other=0)
    before = tl.load(cells + p - 1, mask=here & (p > 0), other=-1)
    after = tl.load(cells + p + 1, mask=here & (p + 1 < count), other=NOWHERE)
    row = cell // length
    following = tl.where(after // length == row, after % length, length)
    m = (row % length).to(tl.int32)
    n = (cell % length).to(tl.int32)
    repeated = before == cell
    opens = (before < 0) | (before // length != row)
    return (row // length % heads).to(tl.int32), m, n, here, repeated, opens, following.to(tl.int32)


@triton.jit
def load_part(x, token, length, SIZE: tl.constexpr, PART: tl.constexpr):
    """That part of the tokens' vectors whose gradient is this program's: [BLOCK, PART], to multiply with weights."""
    return operand(load_vectors(x, token, tl.program_id(2) * PART, length, SIZE, PART), x)


@triton.jit
def keep_valid(x, m, n, length, max_width, TRIL: tl.constexpr, BANDED: tl.constexpr):
    """x where triangle, band and length leave a cell, else -inf; m and n broadcast against each other."""
    return tl.where(valid_cells(m, n, m < length, n < length, max_width, TRIL, BANDED), x, float("-inf"))


@triton.jit
def gathered_scores(
    q, k, start, end, mask, h, m, n, live, length, max_width, scale,
    stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores [GATHERED, BLOCK] of rows (h, m) with end tokens n, -inf in invalid cells."""
    s = tile_product(q, k, m, n, length, SIZE, CHUNK, PRECISION) * scale
    kept_n = load_kept(mask, n, length, stride_mn, HAS_MASK)
    s += load_bias(start, live, h, m, stride_sh, stride_sn, HAS_START)[:, None]
    s += load_bias(end, kept_n[None, :], h[:, None], n[None, :], stride_eh, stride_en, HAS_END)
    valid = valid_cells(m[:, None], n[None, :], live[:, None], kept_n[None, :], max_width, TRIL, BANDED)
    return tl.where(valid, s, float("-inf"))


@triton.jit
def answers_for(n, own, opens, following):
    """The columns n that a listed span, which ends at own, answers for. A row without one has own -1: all of them."""
    mine = (n[None, :] > own[:, None]) & (n[None, :] < following[:, None])
    return mine | (opens[:, None] & (n[None, :] < own[:, None]))


@triton.jit
def direct_log_sums(
    q, k, start, end, mask, h, m, live, own, opens, following, m_first, length, max_width, scale,
    stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of gathered rows in the tile from m_first: the log-sum of the negatives they answer for; the listed scores."""
    largest = tl.full([GATHERED], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GATHERED], dtype=tl.float32)
    listed = tl.zeros([GATHERED], dtype=tl.float32)
    for n_first in range(0, length, BLOCK):
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            n = n_first + tl.arange(0, BLOCK)
            s = gathered_scores(
                q, k, start, end, mask, h, m, n, live, length, max_width, scale,
                stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
                HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK,
            )  # fmt: skip
            listed += tl.sum(tl.where(n[None, :] == own[:, None], s, 0.0), axis=1)
            s = tl.where(answers_for(n, own, opens, following), s, float("-inf"))
            new = tl.maximum(largest, tl.max(s, axis=1))
            total = total * tl.exp(largest - safe(new)) + tl.sum(tl.exp(s - safe(new)[:, None]), axis=1)
            largest = new
    return safe(largest) + tl.log(total), listed


@triton.jit
def direct_weights(s, n, own, repeated, opens, following, t, g, l_n, l_p):
    """The gradient by the scores s of gathered rows: [GATHERED, BLOCK]."""
    negative = tl.where(answers_for(n, own, opens, following), tl.exp(s - l_n[:, None]), 0.0)
    counts = (n[None, :] == own[:, None]) & (s != float("-inf")) & (repeated == 0)[:, None]
    listed = tl.exp(s + (tl.log(1 - t) - l_n)[:, None]) - tl.exp((tl.log(t) - l_p)[:, None] - s)
    return g[:, None] * tl.where(counts, listed, negative)


@triton.jit
def unsafe_rows(exponents, pivots, h, m, heads, length):
    """Which rows (h, m), with these pivots, have a bound that is too large for the sweep."""
    inside = (h < heads) & (m < length)
    exponent = tl.load(exponents + h.to(tl.int64) * length + m, mask=inside, other=float("-inf"))
    return exponent + pivots > SAFE_BOUND


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def pointer_loss_kernel(
    q, k, start, end, mask, exponents, values, cells, labels, pivots, rows, negatives, positives,
    count, groups_of_sentence, heads, length, max_width, scale,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Log-sums of BLOCK rows of HEADS heads of a group to a program, and those of the listed spans among them."""
    tiles = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    m_first = tl.program_id(0) % tiles * BLOCK
    m = m_first + tl.arange(0, BLOCK)
    h_first = tl.program_id(1) * HEADS
    b = group // groups_of_sentence
    first_head = group % groups_of_sentence * heads
    start += b * stride_sb + first_head * stride_sh
    end += b * stride_eb + first_head * stride_eh
    mask += b * stride_mb
    q += group * length * SIZE
    k += group * length * SIZE
    of_group = group * heads * length
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK, HEADS], dtype=tl.float32)
    for n_first in range(0, length, BLOCK):
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            n = n_first + tl.arange(0, BLOCK)
            x = tile_product(q, k, m, n, length, SIZE, CHUNK, PRECISION) * scale
            x = keep_valid(x, m[:, None], n[None, :], length, max_width, TRIL, BANDED)
            new = tl.maximum(largest, tl.max(x, axis=1))
            p = tl.exp(x - safe(new)[:, None])
            v = load_heads(values + of_group, h_first, heads, n, length, 0.0, HEADS)
            sums *= tl.exp(largest - safe(new))[:, None]
            sums = tl.dot(operand(p, q), operand(v, q), acc=sums, input_precision=PRECISION)
            largest = new
    largest = safe(largest)
    if tl.program_id(1) == 0:
        tl.store(pivots + group * length + m, largest, mask=m < length)
    bounds = load_heads(exponents + of_group, h_first, heads, m, length, float("-inf"), HEADS) + largest[:, None]
    unsafe = bounds > SAFE_BOUND
    h = h_first + tl.arange(0, HEADS)
    at = rows + of_group + h.to(tl.int64)[None, :] * length + m[:, None]
    tl.store(at, bounds + tl.log(sums), mask=(m < length)[:, None] & (h < heads)[None, :] & (unsafe == 0))

    if tl.max(tl.max(unsafe.to(tl.int32), axis=1), axis=0) > 0:
        for i in range(h_first, h_first + HEADS):
            for m_i_first in range(m_first, m_first + BLOCK, GATHERED):
                h_i = tl.full([GATHERED], i, dtype=tl.int32)
                m_i = m_i_first + tl.arange(0, GATHERED)
                pivot_i = tl.sum(tl.where(m[None, :] == m_i[:, None], largest[None, :], 0.0), axis=1)
                live = unsafe_rows(exponents + of_group, pivot_i, h_i, m_i, heads, length)
                if tl.max(live.to(tl.int32), axis=0) > 0:
                    nothing = tl.full([GATHERED], -1, dtype=tl.int32)
                    log_sums, _ = direct_log_sums(
                        q, k, start, end, mask, h_i, m_i, live, nothing, nothing > 0, nothing + 1 + length,
                        m_first, length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
                        HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, BLOCK,
                    )  # fmt: skip
                    tl.store(rows + of_group + h_i.to(tl.int64) * length + m_i, log_sums, mask=live)

    plane_cells = tl.cast(length, tl.int64) * length
    first, stop = find_spans(cells, count, group * heads * plane_cells, (group + 1) * heads * plane_cells, 1024)
    for p_first in range(first, stop, GATHERED):
        p_i = p_first + tl.arange(0, GATHERED)
        h_i, m_i, own, here, repeated, opens, following = load_listed(cells, p_i, stop, count, heads, length)
        live = here & (m_i >= m_first) & (m_i < m_first + BLOCK) & (h_i >= h_first) & (h_i < h_first + HEADS)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            log_sums, listed = direct_log_sums(
                q, k, start, end, mask, h_i, m_i, live, own, opens, following,
                m_first, length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
                HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, BLOCK,
            )  # fmt: skip
            t = tl.load(labels + p_i, mask=here, other=1.0)
            counts = (repeated == 0) & (listed != float("-inf"))
            own_negative = tl.where(counts, listed + tl.log(1 - t), float("-inf"))
            either = safe(tl.maximum(log_sums, own_negative))
            tl.store(
                negatives + p_i, either + tl.log(tl.exp(log_sums - either) + tl.exp(own_negative - either)), mask=live
            )
            tl.store(positives + p_i, tl.where(counts, tl.log(t) - listed, float("-inf")), mask=live)


@triton.jit
def combine_kernel(
    rows, cells, negatives, positives, losses, log_sums, count, planes, length, HAS_SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one head of a sentence to a program: l_n and l_p of what its rows and listed spans have summed."""
    plane = tl.program_id(0).to(tl.int64)
    m_n = 0.0
    m_p = 0.0
    S_n = tl.zeros([BLOCK], dtype=tl.float32)
    S_p = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        a = tl.load(rows + plane * length + token, mask=token < length, other=float("-inf"))
        m = tl.maximum(m_n, pivot(a, 0))
        S_n = S_n * tl.exp(m_n - m) + tl.exp(a - m)
        m_n = m
    if HAS_SPANS:
        for first in range(0, count, BLOCK):
            p = first + tl.arange(0, BLOCK)
            cell = tl.load(cells + p, mask=p < count, other=NOWHERE)
            mine = (p < count) & (cell // length // length == plane)
            a = tl.load(negatives + p, mask=mine, other=float("-inf"))
            c = tl.load(positives + p, mask=mine, other=float("-inf"))
            m = tl.maximum(m_n, pivot(a, 0))
            S_n = S_n * tl.exp(m_n - m) + tl.exp(a - m)
            m_n = m
            m = tl.maximum(m_p, pivot(c, 0))
            S_p = S_p * tl.exp(m_p - m) + tl.exp(c - m)
            m_p = m
    l_n = log_term(m_n, tl.sum(S_n, axis=0))
    l_p = log_term(m_p, tl.sum(S_p, axis=0))
    tl.store(log_sums + plane, l_n)
    tl.store(log_sums + planes + plane, l_p)
    tl.store(losses + plane, l_n + l_p)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def weigh_gathered(
    q, k, start, end, mask, upstream, log_sums, share, planes, h, m, n, live, own, repeated, opens, following, t,
    length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient by the scores of gathered rows (h, m) in columns n; upstream and log_sums are the group's."""
    s = gathered_scores(
        q, k, start, end, mask, h, m, n, live, length, max_width, scale,
        stride_sh, stride_sn, stride_eh, stride_en, stride_mn,
        HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK,
    )  # fmt: skip
    g = tl.load(upstream + h.to(tl.int64) * stride_uh, mask=live, other=0.0).to(tl.float32) * share
    l_n = tl.load(log_sums + h, mask=live, other=0.0)
    l_p = tl.load(log_sums + planes + h, mask=live, other=0.0)
    return direct_weights(s, n, own, repeated, opens, following, t, g, l_n, l_p)


@triton.jit
def pointer_loss_rows_kernel(
    q, k, start, end, mask, exponents, values, cells, labels, pivots, rows, log_sums, upstream, a, d_q, d_start,
    count, groups_of_sentence, heads, length, planes, max_width, scale, share,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn, stride_ub, stride_uh,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A, d(start) and the share of HEADS heads in R dq, of BLOCK rows to a program, and PART elements of R dq."""
    tiles = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    m_first = tl.program_id(0) % tiles * BLOCK
    m = m_first + tl.arange(0, BLOCK)
    h_first = tl.program_id(1) * HEADS
    h = h_first + tl.arange(0, HEADS)
    b = group // groups_of_sentence
    first_head = group % groups_of_sentence * heads
    start += b * stride_sb + first_head * stride_sh
    end += b * stride_eb + first_head * stride_eh
    mask += b * stride_mb
    upstream += b * stride_ub + first_head * stride_uh
    log_sums += group * heads
    q += group * length * SIZE
    k += group * length * SIZE
    pivots += group * length
    of_group = group * heads * length

    g = load_of_planes(upstream, h_first, heads, stride_uh, 0.0, HEADS) * share
    l_n = load_of_planes(log_sums, h_first, heads, 1, 0.0, HEADS)
    pivot_m = tl.load(pivots + m, mask=m < length, other=0.0)
    bounds = load_heads(exponents + of_group, h_first, heads, m, length, float("-inf"), HEADS) + pivot_m[:, None]
    unsafe = bounds > SAFE_BOUND
    a_m = g[None, :] * tl.exp(tl.where(unsafe, float("-inf"), bounds) - l_n[None, :])
    here = (m < length)[:, None] & (h < heads)[None, :]
    at = of_group + h.to(tl.int64)[None, :] * length + m[:, None]
    if tl.program_id(2) == 0:
        tl.store(a + at, a_m, mask=here)
    a_m = operand(a_m, q)
    row_sums = tl.load(rows + at, mask=here, other=float("-inf"))
    d_s = g[None, :] * tl.exp(row_sums - l_n[None, :])

    d = tl.zeros([BLOCK, PART], dtype=tl.float32)
    for n_first in range(0, length, BLOCK):
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            n = n_first + tl.arange(0, BLOCK)
            x = tile_product(q, k, m, n, length, SIZE, CHUNK, PRECISION) * scale
            x = keep_valid(x, m[:, None], n[None, :], length, max_width, TRIL, BANDED)
            v = load_heads(values + of_group, h_first, heads, n, length, 0.0, HEADS)
            weights = tl.exp(x - pivot_m[:, None]) * tl.dot(a_m, tl.trans(operand(v, q)), input_precision=PRECISION)
            k_n = load_part(k, n, length, SIZE, PART)
            d = tl.dot(operand(weights, q), k_n, acc=d, input_precision=PRECISION)

    if tl.max(tl.max(unsafe.to(tl.int32), axis=1), axis=0) > 0:
        for i in range(h_first, h_first + HEADS):
            for m_i_first in range(m_first, m_first + BLOCK, GATHERED):
                h_i = tl.full([GATHERED], i, dtype=tl.int32)
                m_i = m_i_first + tl.arange(0, GATHERED)
                pivot_i = tl.load(pivots + m_i, mask=m_i < length, other=0.0)
                live = unsafe_rows(exponents + of_group, pivot_i, h_i, m_i, heads, length)
                if tl.max(live.to(tl.int32), axis=0) > 0:
                    nothing = tl.full([GATHERED], -1, dtype=tl.int32)
                    d, _ = add_gathered_rows(
                        d, d_s, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, m, live,
                        nothing, nothing > 0, nothing > 0, nothing + 1 + length,
                        tl.full([GATHERED], 1.0, dtype=tl.float32),
                        m_first, length, max_width, scale,
                        stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
                        HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, PART, BLOCK,
                    )  # fmt: skip

    plane_cells = tl.cast(length, tl.int64) * length
    first, stop = find_spans(cells, count, group * heads * plane_cells, (group + 1) * heads * plane_cells, 1024)
    for p_first in range(first, stop, GATHERED):
        p_i = p_first + tl.arange(0, GATHERED)
        h_i, m_i, own, listed, repeated, opens, following = load_listed(cells, p_i, stop, count, heads, length)
        live = listed & (m_i >= m_first) & (m_i < m_first + BLOCK) & (h_i >= h_first) & (h_i < h_first + HEADS)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            t = tl.load(labels + p_i, mask=listed, other=1.0)
            d, d_s = add_gathered_rows(
                d, d_s, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, m, live, own,
                repeated, opens, following, t, m_first, length, max_width, scale,
                stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
                HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, PART, BLOCK,
            )  # fmt: skip
    if tl.program_id(2) == 0:
        tl.store(d_start + at, d_s.to(d_start.dtype.element_ty), mask=here)
    store_part(d_q, d * scale, group, m, length, SIZE, PART)


@triton.jit
def add_gathered_rows(
    d, d_s, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, m, live, own, repeated, opens,
    following, t, m_first, length, max_width, scale,
    stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to d [BLOCK, PART] of tokens m, and to d_s [BLOCK, HEADS], what gathered rows (h_i, m_i) give."""
    d_i = tl.zeros([GATHERED, PART], dtype=tl.float32)
    sums = tl.zeros([GATHERED], dtype=tl.float32)
    for n_first in range(0, length, BLOCK):
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            n = n_first + tl.arange(0, BLOCK)
            weights = weigh_gathered(
                q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, n, live, own, repeated, opens,
                following, t, length, max_width, scale,
                stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
                HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK,
            )  # fmt: skip
            k_n = load_part(k, n, length, SIZE, PART)
            d_i = tl.dot(operand(weights, q), k_n, acc=d_i, input_precision=PRECISION)
            sums += tl.sum(weights, axis=1)
    places = ((m[:, None] == m_i[None, :]) & live[None, :]).to(tl.float32)
    d = tl.dot(places, d_i, acc=d, input_precision=PRECISION)
    at_heads = tl.where(h_i[:, None] == h[None, :], sums[:, None], 0.0)
    return d, tl.dot(places, at_heads, acc=d_s, input_precision=PRECISION)


@triton.jit
def store_part(out, x, group, token, length, SIZE: tl.constexpr, PART: tl.constexpr):
    """x [BLOCK, PART] into out [shares, groups, length, SIZE], the share of this program's heads."""
    groups = tl.num_programs(0) // tl.cdiv(length, x.shape[0])
    d = tl.program_id(2) * PART + tl.arange(0, PART)[None, :]
    at = out + ((tl.program_id(1) * groups + group) * length + token.to(tl.int64)[:, None]) * SIZE + d
    tl.store(at, x.to(out.dtype.element_ty), mask=(token < length)[:, None] & (d < SIZE))


@triton.jit
def pointer_loss_columns_kernel(
    q, k, start, end, mask, exponents, values, cells, labels, pivots, log_sums, upstream, a, d_k, d_end,
    count, groups_of_sentence, heads, length, planes, max_width, scale, share,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn, stride_ub, stride_uh,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """d(end), and the share of HEADS heads in R dk, of BLOCK columns to a program, and PART elements of R dk. Tiles are
    transposed: [n, m]."""
    tiles = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    n_first = tl.program_id(0) % tiles * BLOCK
    n = n_first + tl.arange(0, BLOCK)
    h_first = tl.program_id(1) * HEADS
    h = h_first + tl.arange(0, HEADS)
    b = group // groups_of_sentence
    first_head = group % groups_of_sentence * heads
    start += b * stride_sb + first_head * stride_sh
    end += b * stride_eb + first_head * stride_eh
    mask += b * stride_mb
    upstream += b * stride_ub + first_head * stride_uh
    log_sums += group * heads
    q += group * length * SIZE
    k += group * length * SIZE
    pivots += group * length
    of_group = group * heads * length

    d = tl.zeros([BLOCK, PART], dtype=tl.float32)
    d_e = tl.zeros([BLOCK, HEADS], dtype=tl.float32)
    for m_first in range(0, length, BLOCK):
        if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
            m = m_first + tl.arange(0, BLOCK)
            pivot_m = tl.load(pivots + m, mask=m < length, other=0.0)
            x = tile_product(k, q, n, m, length, SIZE, CHUNK, PRECISION) * scale
            x = keep_valid(x, m[None, :], n[:, None], length, max_width, TRIL, BANDED)
            p = tl.exp(x - pivot_m[None, :])
            a_m = operand(load_heads(a + of_group, h_first, heads, m, length, 0.0, HEADS), q)
            v_n = operand(load_heads(values + of_group, h_first, heads, n, length, 0.0, HEADS), q)  # not for long
            weights = p * tl.dot(v_n, tl.trans(a_m), input_precision=PRECISION)
            q_m = load_part(q, m, length, SIZE, PART)
            d = tl.dot(operand(weights, q), q_m, acc=d, input_precision=PRECISION)
            d_e = tl.dot(operand(p, q), a_m, acc=d_e, input_precision=PRECISION)
    d_e *= load_heads(values + of_group, h_first, heads, n, length, 0.0, HEADS)

    any_unsafe = 0
    for m_first in range(0, length, BLOCK):
        m = m_first + tl.arange(0, BLOCK)
        bounds = load_heads(exponents + of_group, h_first, heads, m, length, float("-inf"), HEADS)
        unsafe = bounds + tl.load(pivots + m, mask=m < length, other=0.0)[:, None] > SAFE_BOUND
        any_unsafe = tl.maximum(any_unsafe, tl.max(tl.max(unsafe.to(tl.int32), axis=1), axis=0))
    if any_unsafe > 0:
        for i in range(h_first, h_first + HEADS):
            for m_i_first in range(0, length, GATHERED):
                h_i = tl.full([GATHERED], i, dtype=tl.int32)
                m_i = m_i_first + tl.arange(0, GATHERED)
                pivot_i = tl.load(pivots + m_i, mask=m_i < length, other=0.0)
                live = unsafe_rows(exponents + of_group, pivot_i, h_i, m_i, heads, length)
                if tl.max(live.to(tl.int32), axis=0) > 0:
                    nothing = tl.full([GATHERED], -1, dtype=tl.int32)
                    d, d_e = add_gathered_columns(
                        d, d_e, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, n, live,
                        nothing, nothing > 0, nothing > 0, nothing + 1 + length,
                        tl.full([GATHERED], 1.0, dtype=tl.float32),
                        length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
                        HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, PART,
                    )  # fmt: skip

    plane_cells = tl.cast(length, tl.int64) * length
    first, stop = find_spans(cells, count, group * heads * plane_cells, (group + 1) * heads * plane_cells, 1024)
    for p_first in range(first, stop, GATHERED):
        p_i = p_first + tl.arange(0, GATHERED)
        h_i, m_i, own, listed, repeated, opens, following = load_listed(cells, p_i, stop, count, heads, length)
        live = listed & (h_i >= h_first) & (h_i < h_first + HEADS)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            t = tl.load(labels + p_i, mask=listed, other=1.0)
            d, d_e = add_gathered_columns(
                d, d_e, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, n, live, own,
                repeated, opens, following, t, length, max_width, scale,
                stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
                HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK, PART,
            )  # fmt: skip
    at = d_end + of_group + h.to(tl.int64)[None, :] * length + n[:, None]
    if tl.program_id(2) == 0:
        tl.store(at, d_e.to(d_end.dtype.element_ty), mask=(n < length)[:, None] & (h < heads)[None, :])
    store_part(d_k, d * scale, group, n, length, SIZE, PART)


@triton.jit
def add_gathered_columns(
    d, d_e, q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, h, n, live, own, repeated, opens,
    following, t, length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds to d [BLOCK, PART] and d_e [BLOCK, HEADS] of tokens n what gathered rows (h_i, m_i) give."""
    weights = weigh_gathered(
        q, k, start, end, mask, upstream, log_sums, share, planes, h_i, m_i, n, live, own, repeated, opens,
        following, t, length, max_width, scale, stride_sh, stride_sn, stride_eh, stride_en, stride_mn, stride_uh,
        HAS_START, HAS_END, HAS_MASK, TRIL, BANDED, PRECISION, SIZE, CHUNK,
    )  # fmt: skip
    weights = tl.trans(operand(weights, q))
    q_m = load_part(q, m_i, length, SIZE, PART)
    d = tl.dot(weights, q_m, acc=d, input_precision=PRECISION)
    at_heads = operand(((h_i[:, None] == h[None, :]) & live[:, None]).to(tl.float32), q)
    return d, tl.dot(weights, at_heads, acc=d_e, input_precision=PRECISION)


# --- launchers -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """To a program ``block`` tokens, in tiles of ``block`` x ``block`` cells made of ``chunk`` elements at a time, and
    ``heads`` heads; backward, ``part`` elements of the vectors' gradients."""

    block: int
    heads: int
    chunk: int
    part: int
    num_warps: int


# What no chip spills: float32 is three operands where tf32x3 multiplies it, and float16 is float32 but for q k^T. Short
# vectors leave eight warps too little to share, and long ones are many parts.
PLANS = {
    torch.bfloat16: Plan(64, 16, 32, 64, 8),
    torch.float16: Plan(32, 32, 32, 64, 4),
    torch.float32: Plan(16, 32, 16, 64, 4),
}


def plan(head_size: int, dtype: torch.dtype) -> Plan:
    """The launch parameters, by rule."""
    vector = max(16, triton.next_power_of_2(head_size))
    rule = PLANS[torch.float32 if vector > 64 else torch.float16 if vector < 64 and dtype != torch.float32 else dtype]
    return rule._replace(chunk=min(rule.chunk, vector), part=min(rule.part, vector))


class Saved(NamedTuple):
    """What forward keeps for backward: nothing larger than the inputs."""

    q: torch.Tensor  # [B, own heads or 1, N, D], turned; 0 for dropped tokens, as k is
    k: torch.Tensor  # [B, own heads or 1, N, D]
    exponents: torch.Tensor  # [B, H, N], float32 as all that follow: start + C
    values: torch.Tensor  # [B, H, N]: V
    pivots: torch.Tensor  # [B, own heads or 1, N]: rho
    rows: torch.Tensor  # [B, H, N]: log-sums of rows
    log_sums: torch.Tensor  # [2, B, H]: l_n, l_p
    cells: torch.Tensor  # [S]: ((b * H + h) * N + start) * N + end of each listed span, int64, sorted; last NOWHERE
    labels: torch.Tensor  # [S]: theirs


def _bias_strides(*biases: torch.Tensor | None) -> list[int]:
    return [stride for bias in biases for stride in ((0, 0, 0) if bias is None else bias.stride())]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    spans: torch.Tensor,
    span_labels: torch.Tensor | None,
    heads: int,
    problem: Any,
) -> tuple[torch.Tensor, Saved]:
    """Losses [B, heads] in float32, and what backward needs.

    q, k [B, heads or 1, N, D]; start, end [B, heads, N]; spans [S, 4], int64; span_labels [S]; ``problem`` as for
    ``pointer_scores.forward``.
    """
    batch, own_heads, length, size = q.shape
    count = len(spans)
    new = {"dtype": torch.float32, "device": q.device}
    exponents, values, rows = (torch.empty((batch, heads, length), **new) for _ in range(3))
    pivots = torch.empty((batch, own_heads, length), **new)
    losses, log_sums = torch.empty((batch, heads), **new), torch.empty((2, batch, heads), **new)
    cells, labels = torch.empty(count, dtype=torch.int64, device=q.device), torch.empty(count, **new)
    q, k = rotate(q, k, problem.mask, problem.positions, problem.rope)
    saved = Saved(q, k, exponents, values, pivots, rows, log_sums, cells, labels)
    if rows.numel() == 0:
        cells.fill_(NOWHERE.value), labels.zero_(), pivots.zero_(), log_sums.zero_()
        return losses.zero_(), saved
    negatives, positives = torch.empty((2, count), **new)
    mask, mask_strides, constants = masking(problem, q)
    biases = (q if start is None else start, q if end is None else end)
    has_biases = {"HAS_START": start is not None, "HAS_END": end is not None}
    heads_of_group = heads // own_heads
    rule = plan(size, q.dtype)
    width = problem.max_width or 0
    with torch.cuda.device_of(q):
        if count > 0:
            sort_spans_kernel[(triton.cdiv(count, 32),)](
                spans, labels if span_labels is None else span_labels, mask, cells, labels,
                count, batch, heads, length, width,
                *spans.stride(), 0 if span_labels is None else span_labels.stride(0), *mask_strides,
                HAS_LABELS=span_labels is not None, MINE=32, OTHERS=64, num_warps=4, **constants,
            )  # fmt: skip
        prepare_kernel[(batch * heads,)](
            *biases, mask, cells, exponents, values, count, heads, length,
            *_bias_strides(start, end), *mask_strides, **has_biases, HAS_MASK=constants["HAS_MASK"],
            BLOCK=min(1024, max(128, triton.next_power_of_2(length))), num_warps=4,
        )  # fmt: skip
        pointer_loss_kernel[_grid(q, heads_of_group, rule)](
            q, k, *biases, mask, exponents, values, cells, labels, pivots, rows, negatives, positives,
            count, own_heads, heads_of_group, length, width, problem.scale,
            *_bias_strides(start, end), *mask_strides, **has_biases, **constants, **_constants(q, rule),
        )  # fmt: skip
        combine_kernel[(batch * heads,)](
            rows, cells, negatives, positives, losses, log_sums, count, batch * heads, length,
            HAS_SPANS=count > 0, BLOCK=min(1024, max(128, triton.next_power_of_2(length))), num_warps=4,
        )  # fmt: skip
    return losses, saved


def _grid(q: torch.Tensor, heads_of_group: int, rule: Plan) -> tuple[int, int]:
    return q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], rule.block), triton.cdiv(heads_of_group, rule.heads)


def _constants(q: torch.Tensor, rule: Plan) -> dict[str, Any]:
    precision = float32_precision()
    if q.dtype == torch.float16 and precision == "tf32x3":
        precision = "tf32"  # which has all the digits of float16
    return {
        "PRECISION": precision, "SIZE": q.shape[-1], "CHUNK": rule.chunk,
        "BLOCK": rule.block, "HEADS": rule.heads, "num_warps": rule.num_warps, "num_stages": 2,
        **all_registers(),
    }  # fmt: skip


def backward(
    upstream: torch.Tensor,
    share: float,
    saved: Saved,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    dtype: torch.dtype,
    problem: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k [B, heads or 1, N, D], start and end [B, heads, N] in ``dtype``, contiguous, from those of the
    losses, upstream [B, heads] times ``share``."""
    q, k, exponents, values, pivots, rows, log_sums, cells, labels = saved
    (batch, own_heads, length, size), heads = q.shape, rows.shape[1]
    d_start, d_end = (torch.empty(rows.shape, dtype=dtype, device=q.device) for _ in range(2))
    if rows.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), d_start, d_end
    heads_of_group = heads // own_heads
    rule = plan(size, q.dtype)
    grid = (*_grid(q, heads_of_group, rule), triton.cdiv(size, rule.part))
    share_dtype = dtype if grid[1] == 1 else torch.float32
    shares_q, shares_k = (torch.empty((grid[1], *q.shape), dtype=share_dtype, device=q.device) for _ in range(2))
    a = torch.empty_like(rows)
    mask, mask_strides, constants = masking(problem, q)
    inputs = (q, k, q if start is None else start, q if end is None else end, mask, exponents, values, cells, labels)
    sizes = (
        len(cells), own_heads, heads_of_group, length, batch * heads, problem.max_width or 0, problem.scale, share,
        *_bias_strides(start, end), *mask_strides, *upstream.stride(),
    )  # fmt: skip
    constants = {
        "HAS_START": start is not None, "HAS_END": end is not None, **constants, **_constants(q, rule),
        "PART": rule.part,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        pointer_loss_rows_kernel[grid](
            *inputs, pivots, rows, log_sums, upstream, a, shares_q, d_start, *sizes, **constants
        )
        pointer_loss_columns_kernel[grid](*inputs, pivots, log_sums, upstream, a, shares_k, d_end, *sizes, **constants)
        d_q, d_k = (x.squeeze(0) if grid[1] == 1 else x.sum(0).to(dtype) for x in (shares_q, shares_k))
        if problem.rope:
            rotate_back_(d_q, d_k, problem.positions)
    return d_q, d_k, d_start, d_end
