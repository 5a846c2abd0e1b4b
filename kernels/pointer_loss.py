"""The ZLPR loss of all spans, without their scores.

Where heads share q and k, the score of a span (m, n) is x_mn + start_hm + end_hn, with x_mn = scale * <R q_m, R k_n>:
heads differ by what depends on m or on n alone. With rho_m = max_n x_mn and C_h = max_n end_hn, the sum over a row is

    sum_n exp(s_hmn) = exp(bound_hm) (P V^T)_mh     bound_hm = start_hm + C_h + rho_m
    P = exp(x - rho)        V = exp(end - C)

one exponential for all heads, and a matrix product with the heads as columns: flash attention, unnormalised. The loss
of a head is l_n + l_p, l_n = log(1 + sum_m of these). Backward, with g the upstream gradient and A = exp(bound - l_n):

    T = (g A)^T V           dx = P * T                          dstart_hm = g_h A_hm (P V^T)_mh
    dq = scale R^T dx R k   dk = scale R^T dx^T R q             dend_hn   = g_h V_hn (A P)_hn

A mask is a bias of -inf, in start and in V, so that the sweeps know only triangle, band and the last kept token. rho
may be too large: it is taken over columns that V then drops. All that matters is the bound of a row: a term is lost to
underflow below exp(bound - 87), which beside the 1 in the logarithm is nothing while the bound is below 50. It may not
be too small: x - rho is one fma, so that of a large x it leaves what the rounding of rho lost, and exp makes inf of
that. rho is a little above its maximum, and never far below 0.

DIRECT ROWS are those whose bound is above 50, the unsafe ones, and those with a listed span, where the span must not be
among the negatives, and to subtract it afterwards would cost every digit. Their A is 0, and they are computed cell by
cell, gathered 16 at a time: see direct_rows.py. C and rho stay below inf, so that a row with a score of inf is unsafe,
and its loss inf; its gradient is NaN in the cells that are inf, as the eager formula's is.

    1  prepare     q, k turned, 0 where dropped; biases, -inf there; V and C; the last kept token; spans sorted
    2  sweep       P V^T and rho of all rows;  beside it the log-sums of listed spans, which need no other row
    3  combine     a head of a group to a program: its unsafe rows, l_n, l_p, A, each row's part in the loss
    4  sweep back  dq along the rows;  dk, dend along the columns;  beside them dq of listed spans
    5  turn back   adds what direct rows give to dk and dend, and their dq; turns dq, dk back; dstart, each row's part
                   in the loss times g

Whatever is summed is summed by one program in one order. A listed span costs no launch its critical path: 2 and 4
compute it in programs of its own, started first, while others sweep, longest rows and columns first; 5 only gathers it.
Exponents are base e but for those of the sweeps, as exp2 is one instruction.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashpointer.problem import Problem, shape_per_head

from .cells import (
    PAD,
    Bias,
    Shape,
    Strided,
    Tokens,
    all_registers,
    columns_of,
    keep_valid,
    load_bias,
    load_kept,
    load_positions,
    load_vectors,
    multiply,
    offset,
    rows_of,
    strides,
    strides_per_head,
    up_to,
)
from .direct_rows import (
    GATHERED,
    LANES,
    NOWHERE,
    Listing,
    Terms,
    direct_log_sums,
    direct_scores,
    direct_vectors,
    direct_weights,
    first_key,
    load_rows,
    load_unsafe,
    log_rest,
    only,
    safe,
    sort_spans,
    spans_of,
    store_keys,
)
from .rotate import Source, rotation, store_turned_back, turn_tokens
from .rows import FLOAT_MAX
from .workspace import (
    add_product,
    at_heads,
    load_heads,
    multiply_heads,
    open_group,
    open_spans,
    padded_heads,
    tile_of,
    workspace_bytes,
)
from .zlpr_loss import log_term, pivot

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
SAFE_BOUND = tl.constexpr(50.0)
LEAST_RHO = tl.constexpr(-(2.0**20))  # in base 2: half a digit of it, lost where it is rounded, is no exponent yet
ABOVE = tl.constexpr(1 + 2.0**-22)
MARK = tl.constexpr(2.0**120)
COUNTED = 4096  # more spans are sorted by PyTorch, not by counting, whose time grows with their square
SORTED = tl.constexpr(4)  # spans to a program that counts
TURNED = 2048  # elements of q and of k to a program
# What a kernel is not compiled anew for.
PER_BATCH = ["groups", "length", "count", "per_sentence", "n_bits", "max_width", "listers"]


# --- launch 1: prepare -----------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Of one sentence, from the first head of a group on."""

    start: Any  # Bias
    end: Any  # Bias
    mask: Any  # Tokens


@triton.jit
def below_inf(x):
    """Direct rows take it back: but FLOAT_MAX - inf is -inf, and inf - inf would be NaN."""
    return tl.where(x == float("inf"), FLOAT_MAX, x)


@triton.jit
def prepare_head(group, inputs, h, shape, tile, BLOCK: tl.constexpr):
    """Biases, V and C of a head, and the extent of its group. Of the heads that only pad it leaves each heads-th one
    V and A = 0; A of others is written by combine."""
    row = tl.cast(h, tl.int64) * shape.padded
    largest = float("-inf")
    extent = 0
    for first in range(0, shape.padded, BLOCK):
        token = first + tl.arange(0, BLOCK)
        kept = load_kept(inputs.mask, token, shape.length)
        extent = tl.maximum(extent, tl.max(tl.where(kept, token + 1, 0), axis=0))
        end = load_bias(inputs.end, token < shape.length, h, token)  # does not wait for the mask
        largest = tl.maximum(largest, tl.max(tl.where(kept, below_inf(end), float("-inf")), axis=0))
    largest = safe(largest)
    nothing = tl.zeros([BLOCK], dtype=tile.TABLE)
    for first in range(0, shape.padded, BLOCK):
        token = first + tl.arange(0, BLOCK)
        there = token < shape.padded
        kept = load_kept(inputs.mask, token, shape.length)
        end = below_inf(load_bias(inputs.end, kept, h, token))
        value = tl.where(end == FLOAT_MAX, 0.0, tl.exp(end - largest))  # whose rows are all direct
        tl.store(group.exp_ends + row + token, value.to(tile.TABLE), mask=there)
        tl.store(group.ends + row + token, end, mask=there)
        tl.store(group.starts + row + token, below_inf(load_bias(inputs.start, kept, h, token)), mask=there)
        for pad in range(h + shape.heads, shape.padded_heads, shape.heads):
            at = tl.cast(pad, tl.int64) * shape.padded + token
            tl.store(group.exp_ends + at, nothing, mask=there)
            tl.store(group.weights + at, nothing, mask=there)
    tl.store(group.largest_ends + h, largest)
    tl.store(group.extent, extent, mask=h == 0)


@triton.jit(do_not_specialize=PER_BATCH)
def prepare_kernel(
    q, k, start, end, mask, positions, spans, span_labels, workspace,
    own_heads, groups, heads, length, count, n_bits, h_bits, max_width, padded_heads, sign, sorters, per_sentence,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn, stride_pb, stride_pn,
    stride_ls, stride_lc, stride_t,
    tile: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, COUNTING: tl.constexpr,
):  # fmt: skip
    """SORTED spans to a program, or LANES left unsorted; or TOKENS tokens of q and of k; or a head of a group."""
    shape = Shape(groups, heads, length, padded_heads, up_to(length, PAD), max_width)
    at = tl.program_id(0) - sorters
    tiles = shape.padded // TOKENS
    head = at - groups * tiles
    i = tl.where(head < 0, at // tiles, head // heads)
    group = open_group(workspace, count, i, 1.0, shape, tile)
    b = i // own_heads
    h = i % own_heads
    kept = Tokens(mask, offset(b, 0, stride_mb, 0), stride_mn)
    if at < 0:
        listing = Listing(
            spans, stride_ls, stride_lc, per_sentence, span_labels, stride_t, mask, stride_mb, stride_mn, own_heads
        )  # fmt: skip
        to = open_spans(workspace, count, n_bits, h_bits)
        if COUNTING:
            sort_spans(listing, tl.program_id(0) * SORTED, to, shape, tile, SORTED)
        else:
            store_keys(listing, tl.program_id(0) * LANES, to, shape, tile, LANES)
    elif head < 0:
        source = Source(
            Strided(q + offset(b, h, stride_qb, stride_qh), stride_qn, stride_qd),
            Strided(k + offset(b, h, stride_kb, stride_kh), stride_kn, stride_kd),
            kept,
            Tokens(positions, offset(b, 0, stride_pb, 0), stride_pn),
            length,
        )
        turn_tokens(source, group.q, group.k, at % tiles * TOKENS + tl.arange(0, TOKENS), sign, tile)
    else:
        of_start = Bias(start, offset(b, h * heads, stride_sb, stride_sh), stride_sh, stride_sn)
        of_end = Bias(end, offset(b, h * heads, stride_eb, stride_eh), stride_eh, stride_en)
        prepare_head(group, Inputs(of_start, of_end, kept), head % heads, shape, tile, BLOCK)


# --- launch 2: the sweep, and listed spans beside it -----------------------------------------------------------------


@triton.jit
def sweep_rows(group, m_first, h_first, shape, tile):
    """sums and pivots of BM rows, sums of HEADS heads."""
    m = m_first + tl.arange(0, tile.BM)
    factor = group.scale * LOG2E
    q_m = load_vectors(group.q, m_first, tile.BM, tile.VECTOR)
    largest = tl.full([tile.BM], LEAST_RHO, dtype=tl.float32)
    sums = tl.zeros([tile.BM, tile.HEADS], dtype=tl.float32)
    first, stop = columns_of(m_first, m_first + tile.BM - 1, tl.load(group.extent), shape, tile)
    for n_first in tl.range(first, stop, tile.BN, num_stages=tile.STAGES):
        n = n_first + tl.arange(0, tile.BN)
        k_n = load_vectors(group.k, n_first, tile.BN, tile.VECTOR)
        v_n = load_heads(group.exp_ends, h_first, n_first, tile.HEADS, tile.BN, shape.padded)
        x = multiply(q_m, k_n, tile)  # [BM, BN]
        x = keep_valid(x, m[:, None], n[None, :], float("-inf"), shape.max_width, tile.TRIL)
        new = tl.minimum(tl.maximum(largest, tl.max(x, axis=1) * (factor * ABOVE)), FLOAT_MAX)
        p = tl.exp2(x * factor - new[:, None])  # [BM, BN]
        sums = add_product(sums * tl.exp2(largest - new)[:, None], p, v_n, tile)  # [BM, HEADS]
        largest = new
    tl.store(group.pivots + m, largest, mask=(m >= 0) & (h_first == 0))
    tl.store(at_heads(group.sums, h_first, m_first, tile.HEADS, tile.BM, shape.padded), sums)


@triton.jit
def sum_listed(group, spans, within, shape, tile):
    """negatives and positives of the spans within (first, stop, step)."""
    for p_first in range(within[0], within[1], within[2]):
        p = p_first + tl.arange(0, GATHERED)
        rows = load_rows(group, spans, p, within[1], shape, tile)
        log_sums, listed = direct_log_sums(rows, group, shape, tile, tile.BN, tile.STAGES)
        counts = (rows.left_out == 0) & (listed != float("-inf"))
        own = tl.where(counts, log_rest(listed, rows.label), float("-inf"))
        either = tl.minimum(safe(tl.maximum(log_sums, own)), FLOAT_MAX)
        negatives = either + tl.log(tl.exp(log_sums - either) + tl.exp(own - either))
        tl.store(spans.negatives + p, negatives, mask=rows.live)
        tl.store(spans.positives + p, tl.where(counts, tl.log(rows.label) - listed, float("-inf")), mask=rows.live)


@triton.jit(do_not_specialize=PER_BATCH)
def sweep_kernel(
    workspace, groups, heads, length, count, n_bits, h_bits, max_width, scale, listers, tile: tl.constexpr
):  # fmt: skip
    """Of a group to a program: every listers-th batch of its spans, or BM rows of HEADS heads."""
    shape = Shape(groups, heads, length, up_to(heads, tile.BACK_HEADS), up_to(length, PAD), max_width)
    i = tl.program_id(0) % groups
    turn_of = tl.program_id(0) // groups
    group = open_group(workspace, count, i, scale, shape, tile)
    if turn_of < listers:
        spans = open_spans(workspace, count, n_bits, h_bits)
        first = first_key(spans, tl.cast(i, tl.int64) << (2 * n_bits + h_bits))
        stop = first_key(spans, tl.cast(i + 1, tl.int64) << (2 * n_bits + h_bits))
        tl.store(group.spans, first, mask=turn_of == 0)
        tl.store(group.spans + 1, stop, mask=turn_of == 0)
        sum_listed(group, spans, (first + turn_of * GATHERED, stop, listers * GATHERED), shape, tile)
    else:
        blocks = shape.padded_heads // tile.HEADS
        at = turn_of - listers
        sweep_rows(group, at // blocks * tile.BM, at % blocks * tile.HEADS, shape, tile)


# --- launch 3: combine -----------------------------------------------------------------------------------------------


@triton.jit
def add_exponents(m, S, x):
    """m, S with exp(m) S = the sum so far, m at least 0, and the exponents x added."""
    new = tl.maximum(m, pivot(x, 0))
    return new, S * tl.exp(m - new) + tl.sum(tl.exp(x - new), axis=0)


@triton.jit
def sum_spans(group, spans, within, h, shape):
    """m_n, S_n, m_p, S_p of the listed spans of a head; in place of the sums of their rows -inf."""
    m_n, S_n, m_p, S_p = 0.0, 0.0, 0.0, 0.0
    fields = tl.full([], 1, tl.int64)
    for p_first in range(within[0], within[1], LANES):
        p = p_first + tl.arange(0, LANES)
        row = tl.load(spans.keys + p, mask=p < within[1], other=0) >> spans.n_bits
        mine = (p < within[1]) & ((row & ((fields << spans.h_bits) - 1)) == h)
        m_n, S_n = add_exponents(m_n, S_n, tl.load(spans.negatives + p, mask=mine, other=float("-inf")))
        m_p, S_p = add_exponents(m_p, S_p, tl.load(spans.positives + p, mask=mine, other=float("-inf")))
        m = row >> spans.h_bits & ((fields << spans.n_bits) - 1)
        tl.store(group.sums + tl.cast(h, tl.int64) * shape.padded + m, float("-inf"), mask=mine)
    return m_n, S_n, m_p, S_p


@triton.jit
def load_sums(group, h, m, shape):
    """Of rows m of a head: bound, sum, whether the bound is too large; below extremes, bound -inf for listed rows."""
    inside = m < shape.padded
    row = tl.cast(h, tl.int64) * shape.padded
    total = tl.load(group.sums + row + m, mask=inside, other=0.0)
    bound = tl.load(group.starts + row + m, mask=inside, other=float("-inf")) + tl.load(group.largest_ends + h)
    bound += tl.load(group.pivots + m, mask=inside, other=0.0) * LN2
    listed = total == float("-inf")
    bound = tl.where(listed, float("-inf"), bound)
    return bound, tl.where(listed, 0.0, total), bound > SAFE_BOUND


@triton.jit
def sum_safe(group, h, shape, BLOCK: tl.constexpr):
    """The sum of the rows that the sweep has summed, which needs no pivot; the number of those it may not: a list."""
    S_n = 0.0
    count = 0
    for first in range(0, shape.length, BLOCK):
        m = first + tl.arange(0, BLOCK)
        bound, total, unsafe = load_sums(group, h, m, shape)
        S_n += tl.sum(tl.exp(tl.where(unsafe, float("-inf"), bound)) * tl.where(unsafe, 0.0, total), axis=0)
        more = tl.sum(unsafe.to(tl.int32), axis=0)
        if more > 0:
            place = count + tl.cumsum(unsafe.to(tl.int32), axis=0) - 1
            tl.store(group.unsafe + tl.cast(h, tl.int64) * shape.padded + place, m, mask=unsafe)
        count += more
    tl.store(group.unsafe_counts + h, count)
    return S_n, count


@triton.jit
def sum_unsafe(group, h, count, shape, tile):
    """m_n, S_n of the unsafe rows of a head; in place of their sums, their log-sums."""
    m_n, S_n = 0.0, 0.0
    tl.debug_barrier()  # before other threads read the list
    for first in range(0, count, GATHERED):
        rows = load_unsafe(group, h, first + tl.arange(0, GATHERED), count, shape, tile)
        log_sums, _ = direct_log_sums(rows, group, shape, tile, tile.FEW, 1)
        at = group.sums + tl.cast(h, tl.int64) * shape.padded + rows.m
        tl.store(at, tl.where(log_sums == float("-inf"), -FLOAT_MAX, log_sums), mask=rows.live)  # -inf says listed
        m_n, S_n = add_exponents(m_n, S_n, tl.where(rows.live, log_sums, float("-inf")))
    tl.debug_barrier()
    return m_n, S_n


@triton.jit
def share_rows(group, h, l_n, shape, tile, BLOCK: tl.constexpr):
    """A of a head; in place of sums, each row's part in the loss."""
    row = tl.cast(h, tl.int64) * shape.padded
    for first in range(0, shape.padded, BLOCK):
        m = first + tl.arange(0, BLOCK)
        bound, total, unsafe = load_sums(group, h, m, shape)
        a = tl.exp(tl.where(unsafe, float("-inf"), bound) - l_n)
        part = tl.where(unsafe, tl.exp(total - l_n), a * total)
        tl.store(group.sums + row + m, part, mask=m < shape.padded)
        tl.store(group.weights + row + m, a.to(tile.TABLE), mask=m < shape.padded)


@triton.jit
def share_listed(group, spans, within, h, l_n, l_p, shape):
    """The part of each listed row of a head: its first span sums over the others, one after another."""
    fields = tl.full([], 1, tl.int64)
    for p_first in range(within[0], within[1], LANES):
        p = p_first + tl.arange(0, LANES)
        row = tl.load(spans.keys + p, mask=p < within[1], other=NOWHERE) >> spans.n_bits
        before = tl.load(spans.keys + p - 1, mask=(p < within[1]) & (p > 0), other=-1) >> spans.n_bits
        opens = (p < within[1]) & (before != row) & ((row & ((fields << spans.h_bits) - 1)) == h)
        more = opens
        part = tl.zeros([LANES], dtype=tl.float32)
        while tl.max(more.to(tl.int32), axis=0) > 0:
            part += tl.exp(tl.load(spans.negatives + p, mask=more, other=float("-inf")) - l_n)
            part -= tl.exp(tl.load(spans.positives + p, mask=more, other=float("-inf")) - l_p)
            p += 1
            following = tl.load(spans.keys + p, mask=more & (p < within[1]), other=NOWHERE) >> spans.n_bits
            more = more & (following == row)
        m = row >> spans.h_bits & ((fields << spans.n_bits) - 1)
        tl.store(group.sums + tl.cast(h, tl.int64) * shape.padded + m, part, mask=opens)


@triton.jit(do_not_specialize=PER_BATCH)
def combine_kernel(
    workspace, losses, groups, heads, length, count, n_bits, h_bits, max_width, padded_heads, scale,
    tile: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A head of a group to a program; losses [groups, heads]."""
    shape = Shape(groups, heads, length, padded_heads, up_to(length, PAD), max_width)
    h = tl.program_id(0) % heads
    group = open_group(workspace, count, tl.program_id(0) // heads, scale, shape, tile)
    spans = open_spans(workspace, count, n_bits, h_bits)
    within = spans_of(group, count)
    m_n, S_n, m_p, S_p = sum_spans(group, spans, within, h, shape)
    tl.debug_barrier()  # before other threads read these sums
    S_safe, unsafe = sum_safe(group, h, shape, BLOCK)
    S_n += S_safe * tl.exp(-m_n)
    if unsafe > 0:
        m_unsafe, S_unsafe = sum_unsafe(group, h, unsafe, shape, tile)
        most = tl.maximum(m_n, m_unsafe)
        S_n = S_n * tl.exp(m_n - most) + S_unsafe * tl.exp(m_unsafe - most)
        m_n = most
    l_n = log_term(m_n, S_n)
    l_p = log_term(m_p, S_p)
    tl.store(group.l_n + h, l_n)
    tl.store(group.l_p + h, l_p)
    tl.store(losses + tl.program_id(0), l_n + l_p)
    share_rows(group, h, l_n, shape, tile, BLOCK)
    tl.debug_barrier()  # before other threads write over some of it
    share_listed(group, spans, within, h, l_n, l_p, shape)


# --- launch 4: the sweeps back, and listed spans beside them ---------------------------------------------------------


class Upstream(NamedTuple):
    """[heads] of a group, to be multiplied by a share."""

    ptr: Any
    stride_h: Any
    share: Any


class Gradients(NamedTuple):
    """In float32, what launch 4 leaves of a group."""

    d_q: Any  # [padded, VECTOR] of the first share of heads: dx R k
    d_k: Any  # dx^T R q
    d_ends: Any  # [padded heads, padded]
    d_listed: Any  # [count, VECTOR], of all groups: dx R k of listed spans
    share: Any  # how far one share of heads is from the next


@triton.jit
def open_upstream(upstream, share, i, own_heads, heads, strides):
    b = tl.cast(i // own_heads, tl.int64)
    h = tl.cast(i % own_heads * heads, tl.int64)
    return Upstream(upstream + b * strides[0] + h * strides[1], strides[1], share)


@triton.jit
def load_upstream(upstream, h, shape):
    x = tl.load(upstream.ptr + h.to(tl.int64) * upstream.stride_h, mask=h < shape.heads, other=0.0)
    return x.to(tl.float32) * upstream.share


@triton.jit
def load_terms(group, upstream, rows, shape):
    l_n = tl.load(group.l_n + rows.h, mask=rows.live, other=0.0)
    l_p = tl.load(group.l_p + rows.h, mask=rows.live, other=0.0)
    return Terms(l_n, l_p, load_upstream(upstream, rows.h, shape))


@triton.jit
def open_gradients(gradients, count, i, shape, tile):
    groups = tl.cast(shape.groups, tl.int64)
    at = tl.cast(i, tl.int64)
    tokens = shape.padded * tile.VECTOR
    d_ends = gradients + tl.cast(count, tl.int64) * tile.VECTOR
    vectors = d_ends + groups * shape.padded_heads * shape.padded
    return Gradients(
        vectors + at * tokens,
        vectors + (groups + at) * tokens,
        d_ends + at * shape.padded_heads * shape.padded,
        gradients,
        2 * groups * tokens,
    )


@triton.jit
def sweep_back_rows(group, upstream, m_first, h_first, shape, tile):
    """dx R k of BM rows, of BACK_HEADS heads."""
    m = m_first + tl.arange(0, tile.BM)
    h = h_first + tl.arange(0, tile.BACK_HEADS)
    a_m = load_heads(group.weights, h_first, m_first, tile.BACK_HEADS, tile.BM, shape.padded)
    a_m = tl.trans((a_m * load_upstream(upstream, h, shape)[:, None]).to(tile.TABLE))  # [BM, BACK_HEADS], g A
    q_m = load_vectors(group.q, m_first, tile.BM, tile.VECTOR)
    pivot_m = tl.load(group.pivots + m)
    d_q = tl.zeros([tile.BM, tile.VECTOR], dtype=tl.float32)
    factor = group.scale * LOG2E
    first, stop = columns_of(m_first, m_first + tile.BM - 1, tl.load(group.extent), shape, tile)
    for n_first in tl.range(first, stop, tile.BN, num_stages=tile.STAGES):
        n = n_first + tl.arange(0, tile.BN)
        k_n = load_vectors(group.k, n_first, tile.BN, tile.VECTOR)
        v_n = load_heads(group.exp_ends, h_first, n_first, tile.BACK_HEADS, tile.BN, shape.padded)
        x = multiply(q_m, k_n, tile)  # [BM, BN]
        dx = tl.exp2(x * factor - pivot_m[:, None]) * multiply_heads(a_m, v_n, tile)
        dx = keep_valid(dx, m[:, None], n[None, :], 0.0, shape.max_width, tile.TRIL)
        d_q = tl.dot(dx.to(tile.TABLE), k_n.x.to(tile.TABLE), acc=d_q, input_precision=tile.PRECISION)
    return tl.where(pivot_m[:, None] == FLOAT_MAX, 0.0, d_q)  # a product was inf: the row is direct, and inf * 0 NaN


@triton.jit
def sweep_back_columns(group, upstream, n_first, h_first, shape, tile):
    """dx^T R q and dend of BN columns, of BACK_HEADS heads. Tiles are transposed."""
    n = n_first + tl.arange(0, tile.BN)
    h = h_first + tl.arange(0, tile.BACK_HEADS)
    k_n = load_vectors(group.k, n_first, tile.BN, tile.VECTOR)
    v_n = load_heads(group.exp_ends, h_first, n_first, tile.BACK_HEADS, tile.BN, shape.padded)
    v_n = tl.trans((v_n * load_upstream(upstream, h, shape)[:, None]).to(tile.TABLE))  # [BN, BACK_HEADS], g V
    d_k = tl.zeros([tile.BN, tile.VECTOR], dtype=tl.float32)
    d_end = tl.zeros([tile.BN, tile.BACK_HEADS], dtype=tl.float32)
    factor = group.scale * LOG2E
    first, stop = rows_of(n_first, tl.load(group.extent), shape, tile)
    for m_first in tl.range(first, stop, tile.BACK_BM, num_stages=tile.STAGES):
        m = m_first + tl.arange(0, tile.BACK_BM)
        q_m = load_vectors(group.q, m_first, tile.BACK_BM, tile.VECTOR)
        a_m = load_heads(group.weights, h_first, m_first, tile.BACK_HEADS, tile.BACK_BM, shape.padded)
        x = multiply(k_n, q_m, tile)  # [BN, BACK_BM]
        # At most 1, so that of a product of inf, whose row is direct, A = 0 leaves nothing.
        p = tl.minimum(tl.exp2(x * factor - tl.load(group.pivots + m)[None, :]), 1.0)
        p = keep_valid(p, m[None, :], n[:, None], 0.0, shape.max_width, tile.TRIL)
        dx = (p * multiply_heads(v_n, a_m, tile)).to(tile.TABLE)
        d_k = tl.dot(dx, q_m.x.to(tile.TABLE), acc=d_k, input_precision=tile.PRECISION)
        d_end = add_product(d_end, p, a_m, tile)
    v_n = tl.load(at_heads(group.exp_ends, h_first, n_first, tile.BACK_HEADS, tile.BN, shape.padded))
    return d_k, d_end * v_n.to(tl.float32) * load_upstream(upstream, h, shape)[None, :]


@triton.jit
def list_vectors(group, spans, within, upstream, d_listed, shape, tile):
    """dx R k of the listed spans within (first, stop, step)."""
    d = tl.arange(0, tile.VECTOR)[None, :]
    for p_first in range(within[0], within[1], within[2]):
        p = p_first + tl.arange(0, GATHERED)
        rows = load_rows(group, spans, p, within[1], shape, tile)
        d_q = direct_vectors(rows, load_terms(group, upstream, rows, shape), group, shape, tile, tile.BN)
        tl.store(d_listed + p.to(tl.int64)[:, None] * tile.VECTOR + d, d_q, mask=rows.live[:, None])


@triton.jit(do_not_specialize=PER_BATCH)
def sweep_back_kernel(
    workspace, gradients, upstream,
    own_heads, groups, heads, length, count, n_bits, h_bits, max_width, scale, share, listers, stride_ub, stride_uh,
    tile: tl.constexpr,
):  # fmt: skip
    """Of a group to a program: every listers-th batch of its spans, or BM rows, or BN columns of BACK_HEADS heads."""
    shape = Shape(groups, heads, length, up_to(heads, tile.BACK_HEADS), up_to(length, PAD), max_width)
    i = tl.program_id(0) % groups
    turn_of = tl.program_id(0) // groups
    group = open_group(workspace, count, i, scale, shape, tile)
    out = open_gradients(gradients, count, i, shape, tile)
    upstream = open_upstream(upstream, share, i, own_heads, heads, (stride_ub, stride_uh))
    if turn_of < listers:
        spans = open_spans(workspace, count, n_bits, h_bits)
        first, stop = spans_of(group, count)
        within = (first + turn_of * GATHERED, stop, listers * GATHERED)
        list_vectors(group, spans, within, upstream, out.d_listed, shape, tile)
    else:
        blocks = shape.padded_heads // tile.BACK_HEADS
        at = (turn_of - listers) // 2
        h_first = at % blocks * tile.BACK_HEADS
        first = at // blocks * tile.BM
        d = tl.arange(0, tile.VECTOR)[None, :]
        if (turn_of - listers) % 2 == 0:
            d_q = sweep_back_rows(group, upstream, first, h_first, shape, tile)
            to = out.d_q + at % blocks * out.share + tl.cast(first, tl.int64) * tile.VECTOR
            tl.store(to + tl.arange(0, tile.BM)[:, None] * tile.VECTOR + d, d_q)
        else:
            first = shape.padded - tile.BN - first
            d_k, d_end = sweep_back_columns(group, upstream, first, h_first, shape, tile)
            to = out.d_k + at % blocks * out.share + tl.cast(first, tl.int64) * tile.VECTOR
            tl.store(to + tl.arange(0, tile.BN)[:, None] * tile.VECTOR + d, d_k)
            tl.store(at_heads(out.d_ends, h_first, first, tile.BACK_HEADS, tile.BN, shape.padded), d_end)


# --- launch 5: direct rows, and turning back -------------------------------------------------------------------------


@triton.jit
def mark(x):
    """NaN as a number: to be multiplied by 0 without a trace, and found again in a sum of what is not that large."""
    return tl.where(x == x, x, MARK)


@triton.jit
def unmark(x):
    return tl.where(tl.abs(x) < MARK, x, float("nan"))


@triton.jit
def weigh(k, first, rows, terms, group, shape, tile):
    """The gradient by the scores of direct rows at TOKENS tokens: [GATHERED, TOKENS]."""
    token = first + tl.arange(0, tile.TOKENS)
    return direct_weights(direct_scores(k, token, rows, group, shape, tile), token, rows, terms)


@triton.jit
def add_to_keys(d_k, rows, dx, tile):
    """d_k [TOKENS, VECTOR], with what direct rows give, whose weights are dx."""
    weights = tl.trans(dx.to(tile.TABLE))  # [TOKENS, GATHERED]
    return tl.dot(weights, rows.q.x.to(tile.TABLE), acc=d_k, input_precision=tile.PRECISION)


@triton.jit
def add_to_rows(d_q, first, rows, d_rows, tile):
    """d_q [TOKENS, VECTOR], with the dq of direct rows, d_rows."""
    token = first + tl.arange(0, tile.TOKENS)
    places = ((token[:, None] == rows.m[None, :]) & rows.live[None, :]).to(tl.float32)  # [TOKENS, GATHERED]
    precision: tl.constexpr = "ieee" if tile.PRECISION == "ieee" else "tf32x3"
    return tl.dot(places, mark(d_rows), acc=d_q, input_precision=precision)


@triton.jit
def add_ends(d_end, h_first, rows, dx, tile):
    """d_end [BACK_HEADS, TOKENS], with what direct rows give, whose weights are dx."""
    dx = mark(tl.where(rows.live[:, None], dx, 0.0))
    if tile.BACK_HEADS == 1:
        d_end += tl.sum(dx, axis=0)[None, :]
    else:
        h = h_first + tl.arange(0, tile.BACK_HEADS)
        theirs = (h[:, None] == rows.h[None, :]).to(tile.TABLE)  # [BACK_HEADS, GATHERED]
        d_end = tl.dot(theirs, dx.to(tile.TABLE), acc=d_end, input_precision=tile.PRECISION)
    return d_end


@triton.jit
def most_unsafe(group, shape):
    """The largest number of unsafe rows of a head."""
    at = tl.arange(0, LANES)
    most = 0
    for first in range(0, shape.heads, LANES):
        counts = tl.load(group.unsafe_counts + first + at, mask=first + at < shape.heads, other=0)
        most = tl.maximum(most, tl.max(counts, axis=0))
    return most


@triton.jit
def vectors_of_tokens(group, left, spans, upstream, first, shape, tile, BLOCKS: tl.constexpr):
    """dx R k and dx^T R q of TOKENS tokens: what launch 4 has left, summed over blocks of heads, and direct rows."""
    d_q = load_vectors(left.d_q, first, tile.TOKENS, tile.VECTOR).x
    d_k = load_vectors(left.d_k, first, tile.TOKENS, tile.VECTOR).x
    for block in tl.static_range(1, BLOCKS):
        d_q += load_vectors(left.d_q + block * left.share, first, tile.TOKENS, tile.VECTOR).x
        d_k += load_vectors(left.d_k + block * left.share, first, tile.TOKENS, tile.VECTOR).x
    k = load_vectors(group.k, first, tile.TOKENS, tile.VECTOR)
    d = tl.arange(0, tile.VECTOR)[None, :]
    listed, stop = spans_of(group, spans.count)
    for p_first in range(listed, stop, GATHERED):
        p = p_first + tl.arange(0, GATHERED)
        rows = load_rows(group, spans, p, stop, shape, tile)
        at = left.d_listed + p.to(tl.int64)[:, None] * tile.VECTOR + d
        d_rows = tl.load(at, mask=rows.live[:, None], other=0.0)  # [GATHERED, VECTOR]
        dx = weigh(k, first, rows, load_terms(group, upstream, rows, shape), group, shape, tile)
        d_k = add_to_keys(d_k, rows, dx, tile)
        d_q = add_to_rows(d_q, first, rows, d_rows, tile)
    for h in range(0, tl.where(most_unsafe(group, shape) > 0, shape.heads, 0)):
        count = tl.load(group.unsafe_counts + h)
        for i in range(0, count, GATHERED):
            rows = load_unsafe(group, h, i + tl.arange(0, GATHERED), count, shape, tile)
            terms = load_terms(group, upstream, rows, shape)
            dx = weigh(k, first, rows, terms, group, shape, tile)
            d_k = add_to_keys(d_k, rows, dx, tile)  # before d_rows takes registers
            here = rows.live & (rows.m >= first) & (rows.m < first + tile.TOKENS)
            d_rows = direct_vectors(only(rows, here), terms, group, shape, tile, GATHERED)  # the others are 0
            d_q = add_to_rows(d_q, first, rows, d_rows, tile)
    return unmark(d_q), d_k


@triton.jit
def ends_of_tokens(group, left, spans, upstream, first, h_first, shape, tile):
    """dend of TOKENS tokens and BACK_HEADS heads: what launch 4 has left, and direct rows."""
    d_end = load_heads(left.d_ends, h_first, first, tile.BACK_HEADS, tile.TOKENS, shape.padded)
    k = load_vectors(group.k, first, tile.TOKENS, tile.VECTOR)
    listed, stop = spans_of(group, spans.count)
    for p_first in range(listed, stop, GATHERED):
        rows = load_rows(group, spans, p_first + tl.arange(0, GATHERED), stop, shape, tile)
        dx = weigh(k, first, rows, load_terms(group, upstream, rows, shape), group, shape, tile)
        d_end = add_ends(d_end, h_first, rows, dx, tile)
    last = tl.minimum(h_first + tile.BACK_HEADS, shape.heads)
    for h in range(h_first, tl.where(most_unsafe(group, shape) > 0, last, h_first)):
        count = tl.load(group.unsafe_counts + h)
        for i in range(0, count, GATHERED):
            rows = load_unsafe(group, h, i + tl.arange(0, GATHERED), count, shape, tile)
            dx = weigh(k, first, rows, load_terms(group, upstream, rows, shape), group, shape, tile)
            d_end = add_ends(d_end, h_first, rows, dx, tile)
    return unmark(d_end)


@triton.jit
def angles_of(positions, token, length, tile):
    """cos and sin [TOKENS, VECTOR / 2]; without RoPE nothing reads them."""
    angles = (0.0, 0.0)
    if tile.ROPE:
        angles = rotation(load_positions(positions, token, length), tile.SIZE, tile.VECTOR // 2)
    return angles


@triton.jit(do_not_specialize=PER_BATCH)
def turn_back_kernel(
    workspace, gradients, upstream, positions, d_q, d_k, d_start, d_end,
    own_heads, groups, heads, length, count, n_bits, h_bits, max_width, scale, share, sign,
    stride_ub, stride_uh, stride_pb, stride_pn,
    tile: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of a group to a program: their vectors, or the biases of BACK_HEADS heads, so that neither has too
    many registers. d_q, d_k [groups, N, SIZE]; d_start, d_end [groups, heads, N]: contiguous."""
    shape = Shape(groups, heads, length, up_to(heads, tile.BACK_HEADS), up_to(length, PAD), max_width)
    i = tl.program_id(0) % groups
    first = tl.program_id(0) // groups * tile.TOKENS
    group = open_group(workspace, count, i, scale, shape, tile)
    spans = open_spans(workspace, count, n_bits, h_bits)
    left = open_gradients(gradients, count, i, shape, tile)
    upstream = open_upstream(upstream, share, i, own_heads, heads, (stride_ub, stride_uh))
    token = first + tl.arange(0, tile.TOKENS)
    if tl.program_id(1) == 0:
        places = Tokens(positions, offset(i // own_heads, 0, stride_pb, 0), stride_pn)
        # Where there are registers for them, while loads are still on their way.
        EARLY: tl.constexpr = tile.VECTOR <= 128
        if EARLY:
            angles = angles_of(places, token, length, tile)
        of_q, of_k = vectors_of_tokens(group, left, spans, upstream, first, shape, tile, BLOCKS)
        if not EARLY:
            angles = angles_of(places, token, length, tile)
        of_group = tl.cast(i, tl.int64) * length * tile.SIZE
        store_turned_back(d_q + of_group, of_q * (scale * sign), token, 0, angles, length, tile)
        store_turned_back(d_k + of_group, of_k * scale, token, 0, angles, length, tile)
    else:
        h_first = (tl.program_id(1) - 1) * tile.BACK_HEADS
        h = h_first + tl.arange(0, tile.BACK_HEADS)
        of_end = ends_of_tokens(group, left, spans, upstream, first, h_first, shape, tile)
        of_start = load_heads(group.sums, h_first, first, tile.BACK_HEADS, tile.TOKENS, shape.padded)
        of_start *= load_upstream(upstream, h, shape)[:, None]  # [BACK_HEADS, TOKENS]
        at = (h - h_first)[:, None] * length + tl.arange(0, tile.TOKENS)[None, :]
        d_start += (tl.cast(i, tl.int64) * heads + h_first) * length + first
        d_end += (tl.cast(i, tl.int64) * heads + h_first) * length + first
        here = (h < heads)[:, None] & (token < length)[None, :]
        tl.store(d_start + at, of_start.to(d_start.dtype.element_ty), mask=here)
        tl.store(d_end + at, of_end.to(d_end.dtype.element_ty), mask=here)


# --- launchers -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a problem, as the kernels take them."""

    own_heads: int
    groups: int
    heads: int  # of a group
    length: int
    span_count: int
    n_bits: int
    h_bits: int
    max_width: int | None


class Saved(NamedTuple):
    """What forward keeps for backward: linear in N."""

    workspace: torch.Tensor  # [bytes]
    shape: tuple[int, ...]  # B, own heads or 1, N, D, H, S

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:-1]


def empty_saved(shape: tuple[int, ...], like: torch.Tensor) -> Saved:
    """With nothing in it, of the device of ``like``, whose dtype is that of the inputs. Sizes may be symbolic."""
    batch, own_heads, length, size, heads, count = shape
    of_group = int(heads) // int(own_heads)
    _, tile = tile_of(int(size), of_group, like.dtype, True, True, torch.version.hip is not None)
    bytes_needed = workspace_bytes(batch * own_heads, of_group, length, count, tile)
    return Saved(like.new_empty(bytes_needed, dtype=torch.uint8), shape)


def _sizes(shape: tuple[int, ...], problem: Problem) -> Sizes:
    batch, own_heads, length, _, heads, count = shape
    of_group = heads // own_heads
    width = None if problem.max_width is None else min(problem.max_width, length)
    n_bits, h_bits = max(1, (length - 1).bit_length()), (of_group - 1).bit_length()
    return Sizes(own_heads, batch * own_heads, of_group, length, count, n_bits, h_bits, width)


def _scale(problem: Problem) -> tuple[float, float]:
    """Its size, which is a factor of -inf, and its sign, which goes into q."""
    return max(abs(problem.scale), 1e-37), -1.0 if problem.scale < 0 else 1.0


def _listers(sizes: Sizes) -> int:
    """Programs of a group for listed spans: enough where they are spread evenly."""
    batch: int = GATHERED.value * sizes.groups
    return (sizes.span_count + batch - 1) // batch


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    spans: torch.Tensor,
    span_labels: torch.Tensor | None,
    heads: int,
    problem: Problem,
) -> tuple[torch.Tensor, Saved]:
    """Losses [B, heads] in float32, and what backward needs.

    q, k [B, N, D] or [B, heads, N, D]; start, end [B, heads, N]; spans [S, 4] or [B, P, 3], int64; span_labels [S] or
    [B, P]; ``problem`` as for ``pointer_scores.forward``.
    """
    per_sentence = spans.shape[1] if spans.dim() == 3 else None
    if per_sentence is not None:
        spans, span_labels = spans.flatten(0, 1), None if span_labels is None else span_labels.flatten()
    shape = (*shape_per_head(q.shape), heads, len(spans))
    saved = empty_saved(shape, q)
    losses = torch.empty((q.shape[0], heads), dtype=torch.float32, device=q.device)
    if losses.numel() * q.shape[-2] == 0:
        return losses.zero_(), Saved(saved.workspace.zero_(), shape)
    workspace, sizes, (scale, sign) = saved.workspace, _sizes(shape, problem), _scale(problem)
    _, groups, of_group, length, count, *_ = sizes
    kind = q.dtype, problem.tril_mask, problem.rope, torch.version.hip is not None
    rule, tile = tile_of(q.shape[-1], of_group, *kind)
    # For launches that take one head at a time: so they are compiled once for all numbers of heads.
    _, tile_of_one = tile_of(q.shape[-1], 1, *kind)
    padded = (length + PAD.value - 1) // PAD.value * PAD.value
    planes = padded_heads(of_group, rule.back_heads)
    mask = None if problem.mask is None else problem.mask.view(torch.uint8)
    positions = problem.positions if problem.rope else None
    block = 128 if length <= 128 else 256 * rule.combine_warps  # rows at a time, of which a thread has 8
    tokens = max(1, min(PAD.value, TURNED // tile.VECTOR.value))
    each = SORTED.value if count <= COUNTED else LANES.value
    sorters, listers = (count + each - 1) // each, _listers(sizes)
    registers = all_registers()
    with torch.cuda.device_of(q):
        prepare_kernel[(sorters + groups * (padded // tokens + of_group),)](
            q, k, start, end, mask, positions, spans, span_labels, workspace,
            *sizes, planes, sign, sorters, per_sentence, *strides_per_head(q), *strides_per_head(k),
            *strides(start, 3), *strides(end, 3), *strides(mask, 2), *strides(positions, 2),
            *spans.stride(), *strides(span_labels, 1), tile_of_one,
            BLOCK=block, TOKENS=tokens, COUNTING=count <= COUNTED, num_warps=2, **registers,
        )  # fmt: skip
        if count > COUNTED:
            _sort(workspace, span_labels, count)
        sweep_kernel[(groups * (listers + padded // rule.bm * (planes // rule.heads)),)](
            workspace, *sizes[1:], scale, listers, tile,
            num_warps=rule.num_warps, num_stages=rule.stages, **registers,
        )  # fmt: skip
        combine_kernel[(groups * of_group,)](
            workspace, losses, *sizes[1:], planes, scale, tile_of_one,
            BLOCK=block, num_warps=1 if block == 128 else rule.combine_warps, **registers,
        )  # fmt: skip
    return losses, saved


def _sort(workspace: torch.Tensor, span_labels: torch.Tensor | None, count: int) -> None:
    """The keys and labels of count spans, in place."""
    keys = workspace[: 8 * count].view(torch.int64)
    labels = workspace[8 * count : 12 * count].view(torch.float32)
    in_order, order = keys.sort(stable=True)
    keys.copy_(in_order)
    if span_labels is None:
        labels.fill_(1.0)
    else:
        labels.copy_(span_labels[order])


def backward(
    upstream: torch.Tensor,
    share: float,
    saved: Saved,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    dtype: torch.dtype,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k [B, heads or 1, N, D], start and end [B, heads, N] in ``dtype``, that of these, contiguous,
    from those of the losses, upstream [B, heads] times ``share``."""
    workspace, shape = saved
    batch, _, length, size, heads, count = shape
    d_q, d_k = (torch.empty(shape[:4], dtype=dtype, device=workspace.device) for _ in range(2))
    d_start, d_end = (torch.empty((batch, heads, length), dtype=dtype, device=workspace.device) for _ in range(2))
    if d_start.numel() == 0:
        return d_q.zero_(), d_k.zero_(), d_start, d_end
    sizes, (scale, sign) = _sizes(shape, problem), _scale(problem)
    rule, tile = tile_of(size, sizes.heads, dtype, problem.tril_mask, problem.rope, torch.version.hip is not None)
    padded = (length + PAD.value - 1) // PAD.value * PAD.value
    planes = padded_heads(sizes.heads, rule.back_heads)
    blocks, listers, vector = planes // rule.back_heads, _listers(sizes), tile.VECTOR.value
    elements = count * vector + sizes.groups * padded * (planes + 2 * blocks * vector)
    gradients = torch.empty(elements, dtype=torch.float32, device=workspace.device)
    positions = problem.positions if problem.rope else None
    registers = all_registers()
    with torch.cuda.device_of(workspace):
        sweep_back_kernel[(sizes.groups * (listers + 2 * blocks * (padded // rule.bm)),)](
            workspace, gradients, upstream, *sizes, scale, share, listers, *upstream.stride(), tile,
            num_warps=rule.back_warps, num_stages=rule.stages, **registers,
        )  # fmt: skip
        # One stage: its loops mostly pass once, and copies that run ahead cost registers.
        turn_back_kernel[(sizes.groups * ((length + rule.tokens - 1) // rule.tokens), 1 + blocks)](
            workspace, gradients, upstream, positions, d_q, d_k, d_start, d_end, *sizes, scale, share, sign,
            *upstream.stride(), *strides(positions, 2), tile, BLOCKS=blocks,
            num_warps=rule.direct_warps, num_stages=1, **registers,
        )  # fmt: skip
    return d_q, d_k, d_start, d_end
