"""Which cells (start token m, end token n) may be spans, how they are cut into tiles, and what tells of their tokens.

The twin of ``tiled/_cells.py``. What belongs together travels together: a kernel has plain pointers and numbers for
arguments, builds tuples of them once, and passes these to its helpers. A pointer that is None stands for what is
absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

PAD = tl.constexpr(64)  # inner tensors are padded to a multiple of so many tokens, which every tile's height divides
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
if TRITON < (3, 4):
    from .triton_3_3 import mend

    mend()


constant = dataclass(frozen=True, eq=False)
"""A class of tl.constexpr fields whose objects are one constant each. Triton finds a compiled kernel by its constants,
which it hashes at each launch: these are the same by identity, as a cached ``tile_of`` makes one of a kind."""


class Shape(NamedTuple):
    """Of a problem. A group is what shares q and k: a sentence, or one head of it."""

    groups: Any
    heads: Any  # of a group
    length: Any
    padded_heads: Any
    padded: Any  # length
    max_width: Any  # None: no band


class Bias(NamedTuple):
    """[heads, N] of a group."""

    ptr: Any
    first: Any  # offset
    stride_h: Any
    stride_n: Any


class Tokens(NamedTuple):
    """[N] of a sentence: its mask, or its positions."""

    ptr: Any
    first: Any  # offset
    stride_n: Any


class Vectors(NamedTuple):
    """Of some tokens. What takes them in chunks leaves x unread, which then costs nothing."""

    ptr: Any
    at: Any  # [tokens, 1]: where each begins
    x: Any  # [tokens, VECTOR]


class Strided(NamedTuple):
    """[N, D]: the vectors of a group, as they are given."""

    ptr: Any
    stride_n: Any
    stride_d: Any


# --- tokens ----------------------------------------------------------------------------------------------------------


@triton.jit
def up_to(x, multiple):
    """The least multiple that is at least x."""
    return (x + multiple - 1) // multiple * multiple


@triton.jit
def offset(b, h, stride_b, stride_h):
    """Where sentence b, from its head h on, begins."""
    return tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@triton.jit
def load_kept(mask, token, length):
    kept = token < length
    if mask.ptr is not None:
        kept = kept & (tl.load(mask.ptr + mask.first + token.to(tl.int64) * mask.stride_n, mask=kept, other=0) != 0)
    return kept


@triton.jit
def load_positions(positions, token, length):
    """0 to N - 1 where there are none."""
    position = token.to(tl.int64)
    if positions.ptr is not None:
        at = positions.ptr + positions.first + position * positions.stride_n
        position = tl.load(at, mask=token < length, other=0).to(tl.int64)
    return position


@triton.jit
def load_bias(bias, here, h, token):
    """In float32: 0 where there is none, -inf where it is not here."""
    x = tl.where(here, 0.0, float("-inf"))
    if bias.ptr is not None:
        at = bias.ptr + bias.first + tl.cast(h, tl.int64) * bias.stride_h + token.to(tl.int64) * bias.stride_n
        x = tl.load(at, mask=here, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def load_vectors(x, first, TOKENS: tl.constexpr, VECTOR: tl.constexpr):
    """Of x [padded, VECTOR] those of TOKENS tokens."""
    x += tl.cast(first, tl.int64) * VECTOR
    at = tl.arange(0, TOKENS)[:, None] * VECTOR
    return Vectors(x, at, tl.load(x + at + tl.arange(0, VECTOR)[None, :]))


@triton.jit
def gather_vectors(x, token, VECTOR: tl.constexpr):
    """Of x [padded, VECTOR] those of some tokens."""
    at = token.to(tl.int64)[:, None] * VECTOR
    return Vectors(x, at, tl.load(x + at + tl.arange(0, VECTOR)[None, :]))


@triton.jit
def multiply(a, b, tile):
    """<a, b>: [tokens of a, tokens of b]."""
    if tile.CHUNK == tile.VECTOR:
        product = tl.dot(a.x, tl.trans(b.x), input_precision=tile.PRECISION)
    else:
        product = tl.zeros([a.at.shape[0], b.at.shape[0]], dtype=tl.float32)
        for first in range(0, tile.VECTOR, tile.CHUNK):
            d = first + tl.arange(0, tile.CHUNK)[None, :]
            a_d = tl.load(a.ptr + a.at + d)  # [tokens of a, CHUNK]
            b_d = tl.load(b.ptr + b.at + d)  # [tokens of b, CHUNK]
            product = tl.dot(a_d, tl.trans(b_d), acc=product, input_precision=tile.PRECISION)
    return product


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def keep_valid(x, m, n, fill, max_width, TRIL: tl.constexpr):
    """x where triangle and band leave a cell, else fill; m and n broadcast against each other."""
    if TRIL:
        x = tl.where(m <= n, x, fill)
    if max_width is not None:
        x = tl.where(n - m < max_width, x, fill)
    return x


@triton.jit
def columns_of(m_first, m_last, extent, shape, tile):
    """Where the columns of these rows begin, at a tile, and stop. Behind the extent of a sentence it has no token."""
    first = 0
    stop = extent
    if tile.TRIL:
        first = m_first // tile.BN * tile.BN
    if shape.max_width is not None:
        stop = tl.minimum(extent, m_last + shape.max_width)
    return first, tl.where(m_first < extent, stop, 0)


@triton.jit
def rows_of(n_first, extent, shape, tile):
    """Where the rows of a tile of BN columns begin, at a tile, and stop."""
    first = 0
    stop = extent
    if tile.TRIL:
        stop = tl.minimum(extent, n_first + tile.BN)
    if shape.max_width is not None:
        first = tl.maximum(0, n_first - shape.max_width + 1) // tile.BACK_BM * tile.BACK_BM
    return first, tl.where(n_first < extent, stop, 0)


# --- launching -------------------------------------------------------------------------------------------------------


def power_of_two(least: int) -> int:
    """In plain integers: Triton's own, called from Python, costs as much as an argument of a launch."""
    return 1 << (least - 1).bit_length() if least > 1 else 1


def strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """A dimension that is missing is broadcast."""
    return (0,) * dims if x is None else (0, *x.stride())[-dims:]


def strides_per_head(x: torch.Tensor) -> tuple[int, ...]:
    """Of [B, N, D] as of [B, 1, N, D]."""
    of = x.stride()
    return of if len(of) == 4 else (of[0], 0, *of[1:])


def float32_precision() -> str:
    """Three tf32 products on NVIDIA's tensor cores are as good as float32; AMD's matrix cores have float32 itself."""
    return "tf32x3" if torch.version.hip is None else "ieee"


def all_registers() -> dict[str, int]:
    """Left to itself, NVIDIA's assembler would rather spill a little than let fewer programs run at once."""
    return {"maxnreg": 255} if torch.version.hip is None else {}
