"""The ZLPR loss of each row, and its gradient in the same pass.

A label t_i is a weight inside the exponent, so with a_i = s_i + log(1 - t_i) and b_i = -s_i + log t_i, both -inf where
the cell is left out,

    l_n = log(1 + sum_i exp(a_i))        l_p = log(1 + sum_i exp(b_i))        loss = l_n + l_p
    dloss/ds_i = exp(a_i - l_n) - exp(b_i - l_p)

The 1 inside each logarithm stands for a score of 0, the threshold, so a pivot m = max(0, max_i a_i) is finite even
where every cell is left out, and l = m + log1p(S + expm1(-m)) with S = sum_i exp(a_i - m) keeps a small loss exact: no
digits cancel, for where m > 0 the largest term alone makes S >= 1. (Of a pivot that left out the weights S would be as
small as they are, and S + expm1(-m) as near to -1.) The gradient is exp(a_i - m) / (S + exp(-m)): the sums carry digits
that a large l has rounded away.

A row that fits a block is read once. A longer row is swept twice: log-sums, then gradient. Where such rows are too few
to fill a GPU each is split over several programs, whose partial sums are merged in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def pivot(exponents, axis: tl.constexpr):
    """max(0, max of the exponents), kept below inf: then exp(inf - pivot) is inf, and not the NaN of inf - inf."""
    return tl.minimum(tl.maximum(tl.max(exponents, axis=axis), 0.0), FLOAT_MAX)


@triton.jit
def log_term(m, S):
    """m + log1p(S + expm1(-m)). x * log(1 + x) / ((1 + x) - 1) is log1p to full precision, for want of a native one."""
    x = S + (tl.exp(-m) - 1.0)
    one_plus = 1.0 + x
    shifted = one_plus - 1.0
    large = (shifted == 0.0) | (one_plus == float("inf"))
    log1p = tl.where(
        large, tl.where(shifted == 0.0, x, one_plus), x * (tl.log(one_plus) / tl.where(large, 1.0, shifted))
    )
    return m + log1p


@triton.jit
def inverse_sum(m, S):
    """exp(m - l): what turns exp(s - m) into the gradient."""
    return 1.0 / (S + tl.exp(-m))


@triton.jit
def log_weight(t):
    """log(t) of labels down to the least subnormal, where a native logarithm may take them for 0."""
    tiny = t < 1e-30
    return tl.log(tl.where(tiny, t * 1.8446744073709552e19, t)) - tl.where(tiny, 44.3614195558365, 0.0)  # 2^64


@triton.jit
def load_exponents(
    scores, labels, mask, col, inside, stride_scores, stride_labels, stride_mask,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One tile: the exponents a of the negatives and b of the positives. A cell is left out by a score of -inf, whether
    it came with one, lies beyond the row or is masked; one with a label that is none gets a NaN, which the loss of its
    row shows."""
    s = tl.load(scores + col.to(tl.int64) * stride_scores, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_MASK:
        kept = tl.load(mask + col.to(tl.int64) * stride_mask, mask=inside, other=0)
        s = tl.where(kept != 0, s, float("-inf"))
    if LABELS == "packed":
        word = tl.load(labels + (col // 32) * stride_labels, mask=inside, other=0)
        t = (word >> (col % 32)) & 1
    else:
        t = tl.load(labels + col.to(tl.int64) * stride_labels, mask=inside, other=0)
    if LABELS == "soft":
        t = t.to(tl.float32)
        s = tl.where(t == -100.0, float("-inf"), s)
        s = tl.where((s == float("-inf")) | ((t >= 0.0) & (t <= 1.0)), s, float("nan"))
        a = tl.where((t == 1.0) | (s == float("-inf")), float("-inf"), s + tl.log(1.0 - t))  # inf + log 0 is NaN
        b = log_weight(t) - s
    else:
        if LABELS == "integer":
            s = tl.where(t == -100, float("-inf"), s)
            s = tl.where((s == float("-inf")) | (t == 0) | (t == 1), s, float("nan"))
        a = tl.where(t != 0, float("-inf"), s)
        b = tl.where(t != 0, -s, float("-inf"))
    return a, tl.where(s == float("-inf"), float("-inf"), b)


@triton.jit
def sweep_log_sums(
    scores, labels, mask, start, stop, stride_scores, stride_labels, stride_mask,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online (pivot, sum) of both terms over columns start..stop of one row."""
    m_n = 0.0
    m_p = 0.0
    S_n = tl.zeros([BLOCK], dtype=tl.float32)  # summed over the block once, at the end
    S_p = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, stop, BLOCK):
        col = first + tl.arange(0, BLOCK)
        a, b = load_exponents(
            scores, labels, mask, col, col < stop, stride_scores, stride_labels, stride_mask, LABELS, HAS_MASK
        )
        m = tl.maximum(m_n, pivot(a, 0))
        S_n = S_n * tl.exp(m_n - m) + tl.exp(a - m)
        m_n = m
        m = tl.maximum(m_p, pivot(b, 0))
        S_p = S_p * tl.exp(m_p - m) + tl.exp(b - m)
        m_p = m
    return m_n, tl.sum(S_n, axis=0), m_p, tl.sum(S_p, axis=0)


@triton.jit
def sweep_gradient(
    scores, labels, mask, grad, start, stop, stride_scores, stride_labels, stride_mask,
    m_n, S_n, m_p, S_p, grad_scale,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of columns start..stop of one row, from the (pivot, sum) of both its terms."""
    share_n = inverse_sum(m_n, S_n) * grad_scale
    share_p = inverse_sum(m_p, S_p) * grad_scale
    for first in range(start, stop, BLOCK):
        col = first + tl.arange(0, BLOCK)
        inside = col < stop
        a, b = load_exponents(
            scores, labels, mask, col, inside, stride_scores, stride_labels, stride_mask, LABELS, HAS_MASK
        )
        g = tl.exp(a - m_n) * share_n - tl.exp(b - m_p) * share_p
        tl.store(grad + col, g.to(grad.dtype.element_ty), mask=inside)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def zlpr_block_kernel(
    scores, labels, mask, loss, grad,
    rows, inner, classes, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, WITH_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that fit one block, ROWS of them to a program: one read of scores and labels, one write of the gradient."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    col = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (col < classes)
    o = row // inner
    i = row % inner
    a, b = load_exponents(
        scores + o * stride_so + i * stride_si, labels + o * stride_lo + i * stride_li,
        mask + o * stride_mo + i * stride_mi, col, inside, stride_sc, stride_lc, stride_mc, LABELS, HAS_MASK,
    )  # fmt: skip
    m_n = pivot(a, 1)[:, None]  # [ROWS, 1]
    m_p = pivot(b, 1)[:, None]
    e_n = tl.exp(a - m_n)  # [ROWS, BLOCK]
    e_p = tl.exp(b - m_p)
    S_n = tl.sum(e_n, axis=1)[:, None]
    S_p = tl.sum(e_p, axis=1)[:, None]
    tl.store(loss + row, log_term(m_n, S_n) + log_term(m_p, S_p), mask=row < rows)
    if WITH_GRAD:
        g = e_n * (inverse_sum(m_n, S_n) * grad_scale) - e_p * (inverse_sum(m_p, S_p) * grad_scale)
        tl.store(grad + row * classes + col, g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def zlpr_sweep_kernel(
    scores, labels, mask, loss, grad,
    inner, classes, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A long row to a program: log-sums in a first sweep, gradient in a second, which finds the row in cache."""
    row = tl.program_id(0).to(tl.int64)
    scores += (row // inner) * stride_so + (row % inner) * stride_si
    labels += (row // inner) * stride_lo + (row % inner) * stride_li
    mask += (row // inner) * stride_mo + (row % inner) * stride_mi
    m_n, S_n, m_p, S_p = sweep_log_sums(
        scores, labels, mask, 0, classes, stride_sc, stride_lc, stride_mc, LABELS, HAS_MASK, BLOCK
    )
    tl.store(loss + row, log_term(m_n, S_n) + log_term(m_p, S_p))
    if WITH_GRAD:
        sweep_gradient(
            scores, labels, mask, grad + row * classes, 0, classes, stride_sc, stride_lc, stride_mc,
            m_n, S_n, m_p, S_p, grad_scale, LABELS, HAS_MASK, BLOCK,
        )  # fmt: skip


@triton.jit
def zlpr_partial_kernel(
    scores, labels, mask, partials,
    inner, classes, chunk,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a long row to a program: its (m_n, S_n, m_p, S_p) goes to partials [rows, splits, 4]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    scores += (row // inner) * stride_so + (row % inner) * stride_si
    labels += (row // inner) * stride_lo + (row % inner) * stride_li
    mask += (row // inner) * stride_mo + (row % inner) * stride_mi
    start = split * chunk
    m_n, S_n, m_p, S_p = sweep_log_sums(
        scores, labels, mask, start, tl.minimum(start + chunk, classes), stride_sc, stride_lc, stride_mc,
        LABELS, HAS_MASK, BLOCK,
    )  # fmt: skip
    partials += (row * tl.num_programs(1) + split) * 4
    tl.store(partials, m_n)
    tl.store(partials + 1, S_n)
    tl.store(partials + 2, m_p)
    tl.store(partials + 3, S_p)


@triton.jit
def merge_partials(partials, splits, SPLITS: tl.constexpr):
    """The (pivot, sum) of a row from those of its chunks, all at once and so always in the same order."""
    split = tl.arange(0, SPLITS)
    m = tl.load(partials + split * 4, mask=split < splits, other=0.0)
    S = tl.load(partials + split * 4 + 1, mask=split < splits, other=0.0)
    m_all = tl.max(m, axis=0)
    return m_all, tl.sum(S * tl.exp(m - m_all), axis=0)


@triton.jit
def zlpr_merge_kernel(
    scores, labels, mask, partials, loss, grad,
    inner, classes, chunk, splits, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, HAS_MASK: tl.constexpr, WITH_GRAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program merges its row's partials; the first stores the loss, each writes the gradient of its chunk."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    partials += row * splits * 4
    m_n, S_n = merge_partials(partials, splits, SPLITS)
    m_p, S_p = merge_partials(partials + 2, splits, SPLITS)
    if split == 0:
        tl.store(loss + row, log_term(m_n, S_n) + log_term(m_p, S_p))
    if WITH_GRAD:
        start = split * chunk
        sweep_gradient(
            scores + (row // inner) * stride_so + (row % inner) * stride_si,
            labels + (row // inner) * stride_lo + (row % inner) * stride_li,
            mask + (row // inner) * stride_mo + (row % inner) * stride_mi,
            grad + row * classes, start, tl.minimum(start + chunk, classes), stride_sc, stride_lc, stride_mc,
            m_n, S_n, m_p, S_p, grad_scale, LABELS, HAS_MASK, BLOCK,
        )  # fmt: skip


# --- launcher ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a shape is cut up: ``rows`` of ``block`` columns to a program; splits = 0 where a row fits one block."""

    rows: int
    block: int
    splits: int
    num_warps: int


LONGEST_BLOCK = 8192
SWEEP_BLOCK = 1024
# Enough programs to fill the largest GPU of today several times over, without asking the driver how large this one is.
ENOUGH_PROGRAMS = 2048


def plan(rows: int, classes: int) -> Plan:
    """The launch parameters for a shape, by rule."""
    if classes <= LONGEST_BLOCK:
        block = max(16, triton.next_power_of_2(classes))
        together = max(1, 1024 // block)
        return Plan(together, block, 0, max(4, block // 512))
    blocks = triton.cdiv(classes, SWEEP_BLOCK)
    return Plan(1, SWEEP_BLOCK, min(blocks, max(1, ENOUGH_PROGRAMS // max(1, rows))), 4)


def label_kind(labels: torch.Tensor) -> str:
    if labels.dtype == torch.bool:
        return "bool"
    return "soft" if labels.dtype.is_floating_point else "integer"


def forward(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    labels_kind: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [outer, inner] in float32, and ``grad_scale`` times their gradient in the scores' dtype, contiguous.

    scores [outer, inner, classes]; labels the same, or int32 words of 32 classes each if ``labels_kind`` is "packed";
    mask bool, the same. Without ``with_grad`` the gradient is empty.
    """
    outer, inner, classes = scores.shape
    rows = outer * inner
    loss = torch.empty((outer, inner), dtype=torch.float32, device=scores.device)
    grad = torch.empty(scores.shape if with_grad else 0, dtype=scores.dtype, device=scores.device)
    if rows == 0 or classes == 0:
        return loss.zero_(), grad
    kind = labels_kind or label_kind(labels)
    labels = labels.view(torch.uint8) if kind == "bool" else labels
    visible = scores if mask is None else mask.view(torch.uint8)  # any pointer will do where none is read
    strides = (*scores.stride(), *labels.stride(), *(visible.stride() if mask is not None else (0, 0, 0)))
    rule = plan(rows, classes)
    constants = {"LABELS": kind, "HAS_MASK": mask is not None, "BLOCK": rule.block, "num_warps": rule.num_warps}
    with torch.cuda.device_of(scores):
        if rule.splits == 0:
            zlpr_block_kernel[(triton.cdiv(rows, rule.rows),)](
                scores, labels, visible, loss, grad, rows, inner, classes, grad_scale, *strides,
                WITH_GRAD=with_grad, ROWS=rule.rows, **constants,
            )  # fmt: skip
        elif rule.splits == 1:
            zlpr_sweep_kernel[(rows,)](
                scores, labels, visible, loss, grad, inner, classes, grad_scale, *strides,
                WITH_GRAD=with_grad, **constants,
            )  # fmt: skip
        else:
            chunk = triton.cdiv(triton.cdiv(classes, rule.block), rule.splits) * rule.block
            splits = triton.cdiv(classes, chunk)
            partials = torch.empty((rows, splits, 4), dtype=torch.float32, device=scores.device)
            zlpr_partial_kernel[(rows, splits)](
                scores, labels, visible, partials, inner, classes, chunk, *strides, **constants
            )
            zlpr_merge_kernel[(rows, splits if with_grad else 1)](
                scores, labels, visible, partials, loss, grad, inner, classes, chunk, splits, grad_scale, *strides,
                WITH_GRAD=with_grad, SPLITS=triton.next_power_of_2(splits), **constants,
            )  # fmt: skip
    return loss, grad
