"""What the row kernels share: how rows of cells lie in memory, how they are dealt out to programs, and exponentials.

A kernel has plain pointers and numbers for arguments, builds tuples of what belongs together, and passes these on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import power_of_two

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE = tl.constexpr(-1.0)  # as a factor: a sign is a subtraction from 0 to Triton, an instruction of its own
LONGEST_BLOCK = 8192


class Strided(NamedTuple):
    """A tensor [outer, inner, classes]."""

    ptr: Any  # None for a tensor that is not there
    stride_o: Any
    stride_i: Any
    stride_c: Any


class Tile(NamedTuple):
    """Columns of some rows."""

    o: Any  # int64
    i: Any  # [ROWS, 1], int64
    row: Any  # [ROWS, 1], int64: of all rows
    first: Any  # column, int64
    col: Any  # [1, BLOCK], from the first one on
    inside: Any  # [1, BLOCK]


# --- where cells lie -----------------------------------------------------------------------------------------------


@triton.jit
def load(x, o, i, col, inside, other):
    """Columns of the row at (o, i), two int64; or of rows, i [ROWS, 1]."""
    return tl.load(x.ptr + o * x.stride_o + i * x.stride_i + col.to(tl.int64) * x.stride_c, mask=inside, other=other)


@triton.jit
def load_tile(x, tile, other):
    from_first = Strided(x.ptr + tile.first * x.stride_c, x.stride_o, x.stride_i, x.stride_c)
    return load(from_first, tile.o, tile.i, tile.col, tile.inside, other)


@triton.jit
def tile_of_program(inner, classes, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of ROWS rows of the same o one of the chunks, BLOCK columns. Past the last row it is that one again, and no cell
    needs a mask for its row."""
    groups = tl.cdiv(inner, ROWS)
    group = tl.program_id(0) // chunks
    o = (group // groups).to(tl.int64)
    i = tl.minimum(group % groups * ROWS + tl.arange(0, ROWS)[:, None], inner - 1).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    col = tl.arange(0, BLOCK)[None, :]
    return Tile(o, i, o * inner + i, first, col, col < tl.minimum(classes - first, BLOCK).to(tl.int32))


# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def exp_parts(x):
    """A whole k, and e near 1: exp(x) = 2^k e to full precision, but bounded. As x log2(e) is rounded, its exp2 alone
    is off by some 1e-7 |x|; log 2 in two parts makes up for that."""
    x = tl.clamp(x, -150.0, 104.0, propagate_nan=tl.PropagateNan.ALL)
    k = x * LOG2_E + 12582912.0 - 12582912.0  # 1.5 2^23, which leaves no digit for a fraction
    return k, tl.exp2((x - k * 0.693359375 + k * 2.12194440054690583e-4) * LOG2_E)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    if EXACT:
        k, e = exp_parts(x)
        return tl.exp2(k) * e
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """1 / x of x >= 1, in two instructions where a division, which heeds small x, takes eight."""
    root = tl.rsqrt(x)
    return root * root


# --- launching -----------------------------------------------------------------------------------------------------


def strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Those of [outer, inner, classes] each, 0 for what is not there."""
    return tuple(stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()))


class Block(NamedTuple):
    """What a program has."""

    rows: int
    columns: int
    num_warps: int


def block_of(classes: int, cells: int, longest: int = LONGEST_BLOCK) -> Block:
    """As few warps as leave each thread ``cells``, but one: the more it has, the less of its work is what a row costs
    once."""
    columns = min(longest, max(16, power_of_two(classes)))
    return Block(max(1, 32 * cells // columns), columns, max(1, columns // (32 * cells)))
