"""The spans whose score is above the threshold, without storing the scores.

A program owns the rows of some heads, and sweeps the columns twice: first it only counts, row by row, then the sums of
the counts before it tell each row where its spans belong, and it writes them there. So they come out sorted by (batch,
head, start, end), and in between the host learns how many there are. Both sweeps are one compiled kernel, for they must
find the same: it counts by writing up to a limit of 0.

x_mn = scale * <R_m q_m, R_n k_n> is the same for all heads that share q and k, and the largest x of a tile, plus the
largest start of its rows, plus the largest end of its columns, bounds the scores of the tile. Rounding is monotone and
the terms are added in one order, so no bound falls below a score: where it does not exceed the threshold, the head, and
mostly the tile, is done.

A group is what shares q and k: a sentence, or one head of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cells import all_registers, float32_precision
from .pointer_scores import (
    Plan,
    load_bias,
    load_kept,
    masking,
    may_be_valid,
    tile_product,
    valid_cells,
)
from .rotate import rotate


@triton.jit
def load_number(bias, kept, h, token, stride_h, stride_n, HAS_BIAS: tl.constexpr):
    """``load_bias``, but -inf for NaN: the score would be above no threshold, and no bound must be NaN."""
    x = load_bias(bias, kept, h, token, stride_h, stride_n, HAS_BIAS)
    return tl.where(x == x, x, float("-inf"))


@triton.jit(do_not_specialize=["limit"])
def pointer_decode_kernel(
    q, k, start, end, mask, cursors, ends, scores,
    groups_of_sentence, heads, length, max_width, scale, threshold, limit,
    stride_sb, stride_sh, stride_sn, stride_eb, stride_eh, stride_en, stride_mb, stride_mn,
    SIZE: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_MASK: tl.constexpr, TRIL: tl.constexpr, BANDED: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of HEADS heads of a group to a program.

    It moves the cursors [B, all heads, length] of its rows past the spans it finds, and of the spans that a cursor
    passes below the limit it writes the end and the score.
    """
    tiles = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    m_first = tl.program_id(0) % tiles * BLOCK
    m = m_first + tl.arange(0, BLOCK)
    b = group // groups_of_sentence
    first_head = group % groups_of_sentence * heads
    h_first = first_head + tl.program_id(1) * HEADS
    h_stop = tl.minimum(h_first + HEADS, first_head + heads)
    some_heads = h_first + tl.arange(0, HEADS)[:, None]
    start += b * stride_sb
    end += b * stride_eb
    mask += b * stride_mb
    q += group * length * SIZE
    k += group * length * SIZE
    kept_m = load_kept(mask, m, length, stride_mn, HAS_MASK)
    if tl.max(kept_m.to(tl.int32), axis=0) > 0:
        some_kept_m = (some_heads < h_stop) & kept_m[None, :]
        starts = load_number(start, some_kept_m, some_heads, m[None, :], stride_sh, stride_sn, HAS_START)
        most_start = tl.max(starts, axis=1)
        for n_first in range(0, length, BLOCK):
            if may_be_valid(m_first, n_first, max_width, TRIL, BANDED, BLOCK, BLOCK):
                n = n_first + tl.arange(0, BLOCK)
                kept_n = load_kept(mask, n, length, stride_mn, HAS_MASK)
                valid = valid_cells(m[:, None], n[None, :], kept_m[:, None], kept_n[None, :], max_width, TRIL, BANDED)
                x = tile_product(q, k, m, n, length, SIZE, CHUNK, PRECISION) * scale
                x = tl.where(valid & (x == x), x, float("-inf"))
                largest = tl.max(x)
                some_kept_n = (some_heads < h_stop) & kept_n[None, :]
                some_ends = load_number(end, some_kept_n, some_heads, n[None, :], stride_eh, stride_en, HAS_END)
                bounds = largest + most_start + tl.max(some_ends, axis=1)
                if tl.max((bounds > threshold).to(tl.int32), axis=0) > 0:
                    for i in range(h_first, h_stop):
                        h = tl.cast(i, tl.int64)
                        s_m = load_number(start, kept_m, h, m, stride_sh, stride_sn, HAS_START)
                        e_n = load_number(end, kept_n, h, n, stride_eh, stride_en, HAS_END)
                        if largest + tl.max(s_m, axis=0) + tl.max(e_n, axis=0) > threshold:
                            s = x + s_m[:, None] + e_n[None, :]
                            found = (s > threshold).to(tl.int32)
                            row = ((b * groups_of_sentence * heads + h) * length) + m
                            at = tl.load(cursors + row, mask=m < length, other=0)
                            tl.debug_barrier()  # a thread may read what another one writes
                            tl.store(cursors + row, at + tl.sum(found, axis=1), mask=m < length)
                            tl.debug_barrier()
                            if limit > 0:
                                to = at[:, None] + tl.cumsum(found, axis=1) - 1
                                write = (found > 0) & (to < limit)
                                tl.store(ends + to, n[None, :], mask=write)
                                tl.store(scores + to, s, mask=write)


def plan(heads_of_group: int, head_size: int, dtype: torch.dtype) -> Plan:
    """The launch parameters, by rule: small tiles, for the bounds of those are tight."""
    chunk = 16 if dtype == torch.float32 or head_size <= 16 else 32
    return Plan(32, chunk, 1 if heads_of_group == 1 else 16, 4)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Any,
    threshold: float,
    max_spans: int | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The cells ((b * heads + h) * N + start) * N + end whose score is above the threshold, sorted, and their scores in
    float32, [S] each; the first max_spans of them, and how many there are. It waits for the device once, to learn that.

    q, k, start, end and problem as for ``pointer_scores.forward``.
    """
    batch, own_heads, length, size = q.shape
    cursors = torch.zeros((batch, heads, length), dtype=torch.int64, device=q.device)
    ends, scores = (torch.empty(0, dtype=dtype, device=q.device) for dtype in (torch.int32, torch.float32))
    if cursors.numel() == 0:
        return cursors.view(-1), scores, 0
    of_group = heads // own_heads
    rule = plan(of_group, size, q.dtype)
    q, k = rotate(q, k, problem.mask, problem.positions, problem.rope)
    mask, mask_strides, constants = masking(problem, q)
    bias_strides = [(0, 0, 0) if bias is None else bias.stride() for bias in (start, end)]

    def sweep(limit: int) -> None:
        grid = (batch * own_heads * triton.cdiv(length, rule.block), triton.cdiv(of_group, rule.heads))
        pointer_decode_kernel[grid](
            q, k, q if start is None else start, q if end is None else end, mask, cursors, ends, scores,
            own_heads, of_group, length, problem.max_width or 0, problem.scale, threshold, limit,
            *bias_strides[0], *bias_strides[1], *mask_strides,
            SIZE=size, HAS_START=start is not None, HAS_END=end is not None, PRECISION=float32_precision(),
            CHUNK=rule.chunk, BLOCK=rule.block, HEADS=rule.heads, num_warps=rule.num_warps, num_stages=2,
            **constants, **all_registers(),
        )  # fmt: skip

    with torch.cuda.device_of(q):
        sweep(0)
        behind = cursors.view(-1).cumsum(0)
        count = int(behind[-1])
        some = count if max_spans is None else min(count, max_spans)
        if some > 0:
            ends, scores = ends.new_empty(some), scores.new_empty(some)
            torch.sub(behind, cursors.view(-1), out=cursors.view(-1))
            sweep(some)
    rows = torch.searchsorted(behind, torch.arange(some, device=q.device), right=True)
    return rows * length + ends, scores, count
