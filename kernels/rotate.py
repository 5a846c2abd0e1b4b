"""RoPE: q and k turned once, before the kernels that sweep them tile by tile.

    (x_2i, x_2i+1) -> (x_2i cos a - x_2i+1 sin a, x_2i+1 cos a + x_2i sin a),   a = position * 10000 ** (-2i / D)

A position of 10^5 leaves float32 two digits of the angle. So angles are fixed-point numbers of turns, in int64, whose
whole turns overflow by themselves and whose quarters only swap and negate cos and sin. What is left, an eighth of a
turn at most, loses nothing in float32 and needs five terms of Taylor's series. Only the frequencies are float64.
There is no table, and nothing else to launch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import PAD, Strided, Tokens, load_kept, load_positions, offset, strides, up_to

LOG2_BASE = tl.constexpr(math.log2(10000.0))
LOG2_TURN = tl.constexpr(math.log2(2 * math.pi))
TURN = tl.constexpr(2 * math.pi)

ELEMENTS = 2048  # of q and of k to a program


@triton.jit
def cos_sin(turns):
    """In float32, of an angle given in 2^-32 turns, as int32: within 1e-7."""
    quarter = (turns + 536870912) >> 30
    x = (turns - (quarter << 30)).to(tl.float32) * (TURN / 4294967296)
    y = x * x
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    s = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    swapped = (quarter & 1) == 1
    cos = tl.where(swapped, s, c)
    sin = tl.where(swapped, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def rotation(position, SIZE: tl.constexpr, HALF: tl.constexpr, first=0):
    """cos and sin [tokens, HALF] of the angles of tokens at these positions, from the first pair on."""
    i = (first + tl.arange(0, HALF)).to(tl.float64)
    frequency = tl.exp2(i * (-2.0 / SIZE * LOG2_BASE) - LOG2_TURN) * 2.0**64  # in 2^-64 turns a position
    turns = position.to(tl.int64)[:, None] * frequency.to(tl.int64)[None, :]
    return cos_sin((turns >> 32).to(tl.int32))


@triton.jit
def turn(x, cos, sin):
    """x [tokens, 2 * HALF], its pairs turned."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [x.shape[0], x.shape[1]])


class Source(NamedTuple):
    """What of a group is to be turned."""

    q: Any  # Strided
    k: Any  # Strided
    mask: Any  # Tokens
    positions: Any  # Tokens
    length: Any


@triton.jit
def turn_vectors(x, out, token, kept, angles, factor, tile):
    """x [N, SIZE] of some tokens, turned, times the factor, 0 where not kept, into out [padded, VECTOR]."""
    d = tl.arange(0, tile.VECTOR)[None, :]
    at = x.ptr + token.to(tl.int64)[:, None] * x.stride_n + d * x.stride_d
    vectors = tl.load(at, mask=kept[:, None] & (d < tile.SIZE), other=0.0).to(tl.float32) * factor  # [tokens, VECTOR]
    if tile.ROPE:
        vectors = turn(vectors, angles[0], angles[1])
    to = out + token.to(tl.int64)[:, None] * tile.VECTOR + d
    tl.store(to, vectors.to(out.dtype.element_ty))


@triton.jit
def turn_tokens(source, out_q, out_k, token, factor, tile):
    """The factor is that of q."""
    kept = load_kept(source.mask, token, source.length)
    angles = (0.0, 0.0)
    if tile.ROPE:
        angles = rotation(load_positions(source.positions, token, source.length), tile.SIZE, tile.VECTOR // 2)
    turn_vectors(source.q, out_q, token, kept, angles, factor, tile)
    turn_vectors(source.k, out_k, token, kept, angles, 1.0, tile)


@triton.jit
def store_turned_back(out, x, token, first, angles, length, tile):
    """x [tokens, some of VECTOR from the first on], turned back, into out [N, SIZE]."""
    if tile.ROPE:
        x = turn(x, angles[0], -angles[1])
    d = first + tl.arange(0, x.shape[1])[None, :]
    at = out + token.to(tl.int64)[:, None] * tile.SIZE + d
    tl.store(at, x.to(out.dtype.element_ty), mask=(token < length)[:, None] & (d < tile.SIZE))


@triton.jit(do_not_specialize=["groups", "length"])
def turn_kernel(
    q, k, mask, positions, vectors,
    own_heads, groups, length,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mn, stride_pb, stride_pn,
    tile: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of a group to a program."""
    i = tl.program_id(0) % groups
    token = tl.program_id(0) // groups * TOKENS + tl.arange(0, TOKENS)
    b = i // own_heads
    h = i % own_heads
    source = Source(
        Strided(q + offset(b, h, stride_qb, stride_qh), stride_qn, stride_qd),
        Strided(k + offset(b, h, stride_kb, stride_kh), stride_kn, stride_kd),
        Tokens(mask, offset(b, 0, stride_mb, 0), stride_mn),
        Tokens(positions, offset(b, 0, stride_pb, 0), stride_pn),
        length,
    )
    plane = tl.cast(up_to(length, PAD), tl.int64) * tile.VECTOR
    turn_tokens(source, vectors + i * plane, vectors + (groups + i) * plane, token, 1.0, tile)


def turned(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, tile: Any
) -> torch.Tensor:
    """Vectors [2, B * own heads, padded N, VECTOR], contiguous: q and k, turned if ``tile.ROPE``, and 0 for tokens that
    the mask drops, whatever these hold, and in the padding.

    q, k [B, heads or 1, N, D], D even; mask [B, N] uint8; positions [N] or [B, N], integer: 0 to N - 1 if None. Each
    may have any strides.
    """
    batch, own_heads, length, _ = q.shape
    padded, vector = (length + PAD.value - 1) // PAD.value * PAD.value, tile.VECTOR.value
    vectors = torch.empty((2, batch * own_heads, padded, vector), dtype=q.dtype, device=q.device)
    positions = positions if tile.ROPE.value else None
    tokens = max(1, min(PAD.value, ELEMENTS // vector))
    turn_kernel[(batch * own_heads * (padded // tokens),)](
        q, k, mask, positions, vectors, own_heads, batch * own_heads, length,
        *q.stride(), *k.stride(), *strides(mask, 2), *strides(positions, 2), tile, TOKENS=tokens, num_warps=4,
    )  # fmt: skip
    return vectors
