"""The ZLPR loss of each row, and its gradient in the same pass.

With scores s_i and labels t_i in [0, 1]

    l_n = log(1 + sum_i (1 - t_i) exp(s_i))      l_p = log(1 + sum_i t_i exp(-s_i))      loss = l_n + l_p
    dloss/ds_i = (1 - t_i) exp(s_i - l_n) - t_i exp(-s_i - l_p)

Each sum is taken under a pivot m, as S = sum_i (1 - t_i) exp(s_i - m). The 1 inside the logarithm stands for a score
of 0, the threshold: with u = max(m, 0) and x = S exp(m - u) + expm1(-u) the term is l = u + log1p(x), which keeps a
small loss exact, and exp(m - u) / (1 + x) = exp(m - l) turns the summed exponentials into the gradient, with digits
that a large l has rounded away. The two terms take one logarithm, for (1 + x) (1 + y) is 1 + x (1 + y) + y.

The largest term must make S >= 1, or S - 1 would cancel where m > 0. So the weight is part of the pivot: m is the
largest s_i + log(1 - t_i), or a little less, as far as the bits of 1 - t_i tell its logarithm.

A row that fits a block is read once. A longer row is swept twice: log-sums, then gradient. Where such rows are too few
to fill a GPU each is split over several programs, whose partial sums are merged in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import power_of_two
from .rows import (
    FLOAT_MAX,
    LN_2,
    LOG2_E,
    LONGEST_BLOCK,
    NEGATIVE,
    Strided,
    block_of,
    exp,
    exp_parts,
    load,
    strides,
    tile_of_program,
)

SCALE = tl.constexpr(2.0**24)  # makes the least label, a subnormal number, a normal one

# --- what belongs together -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The inputs, and where one row of them is, two int64; or rows, i [ROWS, 1]. A tuple with a mask of None is passed
    as it was made: before Triton 3.7 no function can return it."""

    scores: Any
    labels: Any
    mask: Any
    o: Any
    i: Any


class Columns(NamedTuple):
    """Columns start..stop of a row whose gradient begins at grad."""

    grad: Any
    start: Any
    stop: Any


class Hard(NamedTuple):
    """Cells with hard labels."""

    n: Any  # scores of the negatives, -inf in the other cells
    p: Any  # scores of the positives, +inf in the other cells


class Soft(NamedTuple):
    """Cells with soft labels."""

    s: Any  # scores, -inf in cells left out
    t: Any  # labels times SCALE, 0 in cells left out


class Terms(NamedTuple):
    """Something of each of the two terms of the loss: of the negatives, of the positives."""

    n: Any
    p: Any


class LogSum(NamedTuple):
    """A term l = u + log1p(x), and f / (1 + x) = exp(m - l)."""

    u: Any
    x: Any
    f: Any


# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def pivot(exponents, axis: tl.constexpr):
    """The largest of the exponents, in whole sixteenths, so that less is rounded of what it is taken from; but finite:
    exp(inf - pivot) is inf, exp(-inf - pivot) is 0, and neither is a NaN."""
    largest = tl.floor(tl.max(exponents, axis=axis) * 16.0) / 16.0
    return tl.minimum(tl.maximum(largest, -FLOAT_MAX), FLOAT_MAX)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 to full precision, for want of a native one: of 1 + x, and of what its rounding took."""
    one_plus = 1.0 + x
    return tl.where(one_plus == float("inf"), one_plus, tl.log(one_plus) + (x - (one_plus - 1.0)) / one_plus)


@triton.jit
def log_sum(m, S):
    f = exp(-tl.abs(m), True)
    return LogSum(tl.maximum(m, 0.0), tl.where(m > 0, S + (f - 1.0), S * f), tl.where(m > 0, 1.0, f))


@triton.jit
def log_term(m, S):
    l = log_sum(m, S)
    return l.u + log1p(l.x)


@triton.jit
def log_sums(m, S):
    return Terms(log_sum(m.n, S.n), log_sum(m.p, S.p))


@triton.jit
def total_loss(l):
    loss = l.n.u + l.p.u + log1p(l.n.x * (1.0 + l.p.x) + l.p.x)
    return tl.where(tl.maximum(l.n.u, l.p.u) < FLOAT_MAX, loss, loss + float("inf"))  # of a score of inf; NaN stays one


@triton.jit
def shares(l, grad_scale):
    """grad_scale * exp(m - l): what turns exponentials into the gradient."""
    return Terms(l.n.f / (1.0 + l.n.x) * grad_scale, l.p.f / (1.0 + l.p.x) * grad_scale)


@triton.jit
def log_from_below(w, power: tl.constexpr):
    """log(2^power w) of a normal w > 0, or up to 0.06 less: the bits of a float, as an integer, are
    2^23 (127 + log2 w), but for the mantissa, which they count linearly."""
    return w.to(tl.int32, bitcast=True).to(tl.float32) * (LN_2 / 8388608.0) + (power - 127.0) * LN_2


# --- a tile --------------------------------------------------------------------------------------------------------


@triton.jit
def load_labels(row, col, stop, LABELS: tl.constexpr):
    if LABELS == "packed":  # without a mask, so that the 8 cells of a byte share a load
        byte = load(row.labels, row.o, row.i, tl.minimum(col >> 3, (stop - 1) >> 3), None, None)
        return byte & (1 << (col & 7))
    else:
        return load(row.labels, row.o, row.i, col, col < stop, 0)


@triton.jit
def load_cells(row, col, stop, LABELS: tl.constexpr):
    """A cell is left out by a score of -inf, whether it came so, lies beyond the row or is masked; one whose label
    is none gets a NaN, which the loss of its row shows."""
    s = load(row.scores, row.o, row.i, col, col < stop, float("-inf")).to(tl.float32)
    if row.mask.ptr is not None:
        kept = load(row.mask, row.o, row.i, col, col < stop, 0) != 0
        s = tl.where(kept, s, float("-inf"))
    t = load_labels(row, col, stop, LABELS)
    if LABELS == "soft":
        t = t.to(tl.float32) * SCALE
        left_out = (s == float("-inf")) | (t == -100.0 * SCALE)
        s = tl.where(left_out, float("-inf"), tl.where((t >= 0.0) & (t <= SCALE), s, float("nan")))
        return Soft(s, tl.where(left_out, 0.0, t))
    else:
        if LABELS == "integer":
            if t.dtype != tl.uint8:  # in which there is no -100
                s = tl.where(t == -100, float("-inf"), s)
            s = tl.where((s == float("-inf")) | (t == 0) | (t == 1), s, float("nan"))
        positive = (t != 0) & (s > float("-inf"))
        return Hard(tl.where(positive, float("-inf"), s), tl.where(positive, s, float("inf")))


@triton.jit
def pivots(x, axis: tl.constexpr, LABELS: tl.constexpr):
    if LABELS == "soft":
        n = tl.where(x.t == SCALE, float("-inf"), log_from_below(1.0 - x.t * (1 / SCALE), 0) + x.s)
        p = tl.where(x.t == 0.0, float("-inf"), log_from_below(x.t, -24) - x.s)
        return Terms(pivot(n, axis), pivot(p, axis))
    else:
        return Terms(pivot(x.n, axis), pivot(x.p * NEGATIVE, axis))


@triton.jit
def exponentials(x, m, LABELS: tl.constexpr):
    """Weights and all, by exp2: one instruction, which makes 0 of what is below 2^-126. The exponent s - m is exact, as
    s log2(e) - m log2(e) would not be."""
    if LABELS == "soft":  # t - 1: the 1 - t of the pivot would be kept in a register. Where t = 1, 0 * inf would be NaN
        n = tl.where(x.t < SCALE, (x.t * (1 / SCALE) - 1.0) * (tl.exp2((x.s - m.n) * LOG2_E) * NEGATIVE), 0.0)
        k, e = exp_parts(x.s * NEGATIVE - m.p)
        return Terms(n, e * x.t * tl.exp2(k - 24.0))
    else:
        return Terms(tl.exp2((x.n - m.n) * LOG2_E), tl.exp2((x.p + m.p) * -LOG2_E))


@triton.jit
def sums(e, axis: tl.constexpr):
    return Terms(tl.sum(e.n, axis=axis), tl.sum(e.p, axis=axis))


@triton.jit
def gradient(e, share):
    return e.n * share.n - e.p * share.p


# --- sweeps over the tiles of a row --------------------------------------------------------------------------------


@triton.jit
def sweep_log_sums(row, start, stop, LABELS: tl.constexpr, BLOCK: tl.constexpr):
    """Pivots and sums over columns start..stop of a row."""
    m_n = -FLOAT_MAX
    m_p = -FLOAT_MAX
    S_n = 0.0
    S_p = 0.0
    for first in range(start, stop, BLOCK):
        col = first + tl.arange(0, BLOCK)  # [BLOCK]
        cells = load_cells(row, col, stop, LABELS)
        of_tile = pivots(cells, 0, LABELS)
        m = Terms(tl.maximum(m_n, of_tile.n), tl.maximum(m_p, of_tile.p))
        S = sums(exponentials(cells, m, LABELS), 0)
        S_n = S_n * tl.exp(m_n - m.n) + S.n
        S_p = S_p * tl.exp(m_p - m.p) + S.p
        m_n = m.n
        m_p = m.p
    return Terms(m_n, m_p), Terms(S_n, S_p)


@triton.jit
def sweep_gradient(row, columns, m, share, LABELS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of some columns of a row."""
    for first in range(columns.start, columns.stop, BLOCK):
        col = first + tl.arange(0, BLOCK)  # [BLOCK]
        g = gradient(exponentials(load_cells(row, col, columns.stop, LABELS), m, LABELS), share)
        tl.store(columns.grad + col, g.to(columns.grad.dtype.element_ty), mask=col < columns.stop)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def column(x):
    """[ROWS, 1] of [ROWS]."""
    return Terms(x.n[:, None], x.p[:, None])


@triton.jit
def zlpr_block_kernel(
    scores, labels, mask, loss, grad,
    inner, classes, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, WITH_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that fit one block, ROWS of them to a program: one read of scores and labels, one write of the gradient."""
    tile = tile_of_program(inner, classes, 1, ROWS, BLOCK)
    row = Row(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(labels, stride_lo, stride_li, stride_lc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        tile.o,
        tile.i,
    )
    cells = load_cells(row, tile.col, classes, LABELS)  # [ROWS, BLOCK]
    m = column(pivots(cells, 1, LABELS))  # [ROWS, 1]
    e = exponentials(cells, m, LABELS)  # [ROWS, BLOCK]
    l = log_sums(m, column(sums(e, 1)))  # [ROWS, 1]
    tl.store(loss + tile.row, total_loss(l))
    if WITH_GRAD:
        g = gradient(e, shares(l, grad_scale))
        tl.store(grad + tile.row * classes + tile.col, g.to(grad.dtype.element_ty), mask=tile.inside)


@triton.jit
def row_of_program(inner):
    row = tl.program_id(0)
    return (row // inner).to(tl.int64), (row % inner).to(tl.int64)


@triton.jit
def zlpr_sweep_kernel(
    scores, labels, mask, loss, grad,
    inner, classes, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A long row to a program: log-sums in a first sweep, gradient in a second, which finds the row in cache."""
    o, i = row_of_program(inner)
    row = Row(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(labels, stride_lo, stride_li, stride_lc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        o,
        i,
    )
    m, S = sweep_log_sums(row, 0, classes, LABELS, BLOCK)
    l = log_sums(m, S)
    tl.store(loss + o * inner + i, total_loss(l))
    if WITH_GRAD:
        columns = Columns(grad + (o * inner + i) * classes, 0, classes)
        sweep_gradient(row, columns, m, shares(l, grad_scale), LABELS, BLOCK)


@triton.jit
def zlpr_partial_kernel(
    scores, labels, mask, partials,
    inner, classes, chunk,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a long row to a program: its m_n, S_n, m_p, S_p go to partials [rows, splits, 4]."""
    o, i = row_of_program(inner)
    row = Row(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(labels, stride_lo, stride_li, stride_lc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        o,
        i,
    )
    start = tl.program_id(1) * chunk
    m, S = sweep_log_sums(row, start, tl.minimum(start + chunk, classes), LABELS, BLOCK)
    partials += ((o * inner + i) * tl.num_programs(1) + tl.program_id(1)) * 4
    tl.store(partials, m.n)
    tl.store(partials + 1, S.n)
    tl.store(partials + 2, m.p)
    tl.store(partials + 3, S.p)


@triton.jit
def merge_partials(partials, splits, SPLITS: tl.constexpr):
    """The pivot and the sum of a row from those of its chunks, all at once and so always in the same order."""
    split = tl.arange(0, SPLITS)
    m = tl.load(partials + split * 4, mask=split < splits, other=-FLOAT_MAX)  # [SPLITS]
    S = tl.load(partials + split * 4 + 1, mask=split < splits, other=0.0)
    m_all = tl.max(m, axis=0)
    return m_all, tl.sum(S * tl.exp(m - m_all), axis=0)


@triton.jit
def zlpr_merge_kernel(
    scores, labels, mask, partials, loss, grad,
    inner, classes, chunk, splits, grad_scale,
    stride_so, stride_si, stride_sc, stride_lo, stride_li, stride_lc, stride_mo, stride_mi, stride_mc,
    LABELS: tl.constexpr, WITH_GRAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program merges its row's partials; the first stores the loss, each writes the gradient of its chunk."""
    o, i = row_of_program(inner)
    row = Row(
        Strided(scores, stride_so, stride_si, stride_sc),
        Strided(labels, stride_lo, stride_li, stride_lc),
        Strided(mask, stride_mo, stride_mi, stride_mc),
        o,
        i,
    )
    partials += (o * inner + i) * splits * 4
    m_n, S_n = merge_partials(partials, splits, SPLITS)
    m_p, S_p = merge_partials(partials + 2, splits, SPLITS)
    m = Terms(m_n, m_p)
    l = log_sums(m, Terms(S_n, S_p))
    if tl.program_id(1) == 0:
        tl.store(loss + o * inner + i, total_loss(l))
    if WITH_GRAD:
        start = tl.program_id(1) * chunk
        columns = Columns(grad + (o * inner + i) * classes, start, tl.minimum(start + chunk, classes))
        sweep_gradient(row, columns, m, shares(l, grad_scale), LABELS, BLOCK)


# --- launcher ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a shape is cut up: ``rows`` of ``block`` columns to a program; splits = 0 where a row fits one block."""

    rows: int
    block: int
    splits: int
    num_warps: int


SWEEP_BLOCK = 2048
# Enough programs to fill the largest GPU of today several times over, without asking the driver how large this one is.
ENOUGH_PROGRAMS = 2048


def plan(rows: int, classes: int, kind: str = "bool") -> Plan:
    """The launch parameters for a shape and a kind of labels, by rule.

    The more cells a thread has, the less of its work is what a row costs once, until they take too many registers: in
    the longest block soft and integer labels do. Where no 16 bytes divide a row each cell is a load of its own, and in
    rows so short that several share a program has a predicate of its own, too.
    """
    if classes > LONGEST_BLOCK:
        return sweep_plan(rows, classes)
    cells = 64 if classes > LONGEST_BLOCK // 2 and kind in ("bool", "packed") else 32
    if classes % 16 != 0:
        cells = 8 if classes <= 64 else 32
    together, block, num_warps = block_of(classes, cells)
    return Plan(together, block, 0, num_warps)


def sweep_plan(rows: int, classes: int) -> Plan:
    """Of rows that are swept, however short."""
    blocks = -(-classes // SWEEP_BLOCK)
    return Plan(1, SWEEP_BLOCK, min(blocks, max(1, ENOUGH_PROGRAMS // max(1, rows))), 4)


def chunks_of(classes: int, block: int, splits: int) -> tuple[int, int]:
    """How many columns a split has, whole blocks, and how many splits then have any."""
    chunk = -(-classes // (block * splits)) * block
    return chunk, -(-classes // chunk)


def label_kind(labels: torch.Tensor) -> str:
    if labels.dtype == torch.bool:
        return "bool"
    return "soft" if labels.dtype.is_floating_point else "integer"


def _as_bytes(
    labels: torch.Tensor, mask: torch.Tensor | None, labels_kind: str | None
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    kind = labels_kind or label_kind(labels)
    labels = labels.view(torch.uint8) if kind == "bool" else labels
    return labels, None if mask is None else mask.view(torch.uint8), kind


def forward(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    labels_kind: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [outer, inner] in float32, and ``grad_scale`` times their gradient in the scores' dtype, contiguous.

    scores [outer, inner, classes]; labels the same, or bytes of 8 classes each, uint8, if ``labels_kind`` is "packed";
    mask bool, the same. Without ``with_grad`` the gradient is empty.
    """
    outer, inner, classes = scores.shape
    rows = outer * inner
    loss = torch.empty((outer, inner), dtype=torch.float32, device=scores.device)
    grad = torch.empty(scores.shape if with_grad else 0, dtype=scores.dtype, device=scores.device)
    if rows == 0 or classes == 0:
        return loss.zero_(), grad
    labels, mask, kind = _as_bytes(labels, mask, labels_kind)
    of_inputs = strides(scores, labels, mask)
    together, block, splits, num_warps = plan(rows, classes, kind)
    constants = {"LABELS": kind, "BLOCK": block, "num_warps": num_warps}
    with torch.cuda.device_of(scores):
        if splits == 0:
            zlpr_block_kernel[(outer * -(-inner // together),)](
                scores, labels, mask, loss, grad, inner, classes, grad_scale, *of_inputs,
                WITH_GRAD=with_grad, ROWS=together, **constants,
            )  # fmt: skip
        elif splits == 1:
            zlpr_sweep_kernel[(rows,)](
                scores, labels, mask, loss, grad, inner, classes, grad_scale, *of_inputs,
                WITH_GRAD=with_grad, **constants,
            )  # fmt: skip
        else:
            chunk, splits = chunks_of(classes, block, splits)
            partials = torch.empty((rows, splits, 4), dtype=torch.float32, device=scores.device)
            zlpr_partial_kernel[(rows, splits)](
                scores, labels, mask, partials, inner, classes, chunk, *of_inputs, **constants
            )
            zlpr_merge_kernel[(rows, splits if with_grad else 1)](
                scores, labels, mask, partials, loss, grad, inner, classes, chunk, splits, grad_scale, *of_inputs,
                WITH_GRAD=with_grad, SPLITS=power_of_two(splits), **constants,
            )  # fmt: skip
    return loss, grad


# --- of a shard of the classes ---------------------------------------------------------------------------------------


def shard_log_sums(
    scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, labels_kind: str | None = None
) -> torch.Tensor:
    """m_n, S_n, m_p and S_p of parts of each row [parts, 4, rows], in float32; m may be below 0. Inputs as for
    ``forward``."""
    outer, inner, classes = scores.shape
    rows = outer * inner
    if rows == 0 or classes == 0:
        return torch.zeros((1, 4, rows), dtype=torch.float32, device=scores.device)
    labels, mask, kind = _as_bytes(labels, mask, labels_kind)
    _, block, splits, num_warps = sweep_plan(rows, classes)
    chunk, splits = chunks_of(classes, block, splits)
    partials = torch.empty((rows, splits, 4), dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        zlpr_partial_kernel[(rows, splits)](
            scores, labels, mask, partials, inner, classes, chunk, *strides(scores, labels, mask),
            LABELS=kind, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return partials.permute(1, 2, 0)


def shard_gradient(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor,
    grad_scale: float,
    labels_kind: str | None = None,
) -> torch.Tensor:
    """``grad_scale`` times the gradient of the loss whose log-sums over all classes, these and others, are ``sums``
    [4, rows]; contiguous, in the scores' dtype. Inputs as for ``forward``."""
    outer, inner, classes = scores.shape
    rows = outer * inner
    grad = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if grad.numel() == 0:
        return grad
    labels, mask, kind = _as_bytes(labels, mask, labels_kind)
    _, block, splits, num_warps = sweep_plan(rows, classes)
    chunk, splits = chunks_of(classes, block, splits)
    loss = torch.empty(rows, dtype=torch.float32, device=scores.device)  # once more, for nobody
    with torch.cuda.device_of(scores):
        zlpr_merge_kernel[(rows, splits)](
            scores, labels, mask, _own_pivots(sums), loss, grad, inner, classes, chunk, 1, grad_scale,
            *strides(scores, labels, mask),
            LABELS=kind, WITH_GRAD=True, SPLITS=1, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return grad


def _own_pivots(sums: torch.Tensor) -> torch.Tensor:
    """The sums [4, rows] as partials [rows, 4]. A pivot of 0 above a sum below 1 becomes the logarithm of that sum: far
    below 0 an exponential loses digits with its distance from the pivot."""
    m, S = sums[::2], sums[1::2]
    least = S.clamp(min=torch.finfo(S.dtype).tiny)
    low = (m == 0.0) & (S < 1.0)
    pairs = torch.where(low, least.log(), m), torch.where(low, S / least, S)
    return torch.stack(pairs, dim=-1).transpose(0, 1).reshape(-1, 4)
