"""RoPE: q and k turned once, before the kernels that sweep them tile by tile.

    (x_2i, x_2i+1) -> (x_2i cos a - x_2i+1 sin a, x_2i+1 cos a + x_2i sin a),   a = position * 10000 ** (-2i / D)

A position of 10^5 leaves float32 two digits of the angle. So angles are fixed-point numbers of turns, in int64, whose
whole turns overflow by themselves and whose quarters only swap and negate cos and sin. What is left, an eighth of a
turn at most, loses nothing in float32 and needs five terms of Taylor's series. Only the frequencies are float64.
There is no table, and nothing else to launch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_BASE = tl.constexpr(math.log2(10000.0))
LOG2_TURN = tl.constexpr(math.log2(2 * math.pi))
TURN = tl.constexpr(2 * math.pi)

# Elements to a program: eight to a thread and each in one thread alone, so that turning in place is no race.
ELEMENTS = 1024


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
def rotation(position, SIZE: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [tokens, HALF] of the angles of tokens at these positions."""
    i = tl.arange(0, HALF).to(tl.float64)
    frequency = tl.exp2(i * (-2.0 / SIZE * LOG2_BASE) - LOG2_TURN) * 2.0**64  # in 2^-64 turns a position
    turns = position.to(tl.int64)[:, None] * frequency.to(tl.int64)[None, :]
    return cos_sin((turns >> 32).to(tl.int32))


@triton.jit
def turn(x, cos, sin):
    """x [tokens, 2 * HALF], its pairs turned."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [x.shape[0], x.shape[1]])


@triton.jit
def turn_vectors(x, out, token, kept, angles, tile):
    """x [N, SIZE] of some tokens, turned, 0 where not kept, into out [padded, VECTOR]."""
    d = tl.arange(0, tile.VECTOR)[None, :]
    at = x.ptr + token.to(tl.int64)[:, None] * x.stride_n + d * x.stride_d
    vectors = tl.load(at, mask=kept[:, None] & (d < tile.SIZE), other=0.0).to(tl.float32)  # [tokens, VECTOR]
    if tile.ROPE:
        vectors = turn(vectors, angles[0], angles[1])
    to = out + token.to(tl.int64)[:, None] * tile.VECTOR + d
    tl.store(to, vectors.to(out.dtype.element_ty))


@triton.jit
def rotate_kernel(
    q, k, mask, positions, out_q, out_k,
    own_heads, length, direction,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mn, stride_pb, stride_pn,
    HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, ROPE: tl.constexpr,
    SIZE: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head of q and of k to a program; out_q and out_k [B, own_heads, length, SIZE], contiguous."""
    tiles = tl.cdiv(length, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    b = plane // own_heads
    h = plane % own_heads
    token = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = token < length
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask + b * stride_mb + token * stride_mn, mask=inside, other=0) != 0)
    cos = tl.full([BLOCK, HALF_BLOCK], 1.0, tl.float32)
    sin = tl.zeros([BLOCK, HALF_BLOCK], tl.float32)
    if ROPE:
        position = token
        if HAS_POSITIONS:
            position = tl.load(positions + b * stride_pb + token * stride_pn, mask=inside, other=0)
        cos, sin = rotation(position, SIZE, HALF_BLOCK)
        sin *= direction
    d = tl.arange(0, 2 * HALF_BLOCK)[None, :].to(tl.int64)
    to = (plane * length + token[:, None]) * SIZE + d
    there = inside[:, None] & (d < SIZE)
    here = kept[:, None] & (d < SIZE)
    at = b * stride_qb + h * stride_qh + token[:, None] * stride_qn + d * stride_qd
    x = turn(tl.load(q + at, mask=here, other=0.0).to(tl.float32), cos, sin)
    tl.store(out_q + to, x.to(out_q.dtype.element_ty), mask=there)
    at = b * stride_kb + h * stride_kh + token[:, None] * stride_kn + d * stride_kd
    x = turn(tl.load(k + at, mask=here, other=0.0).to(tl.float32), cos, sin)
    tl.store(out_k + to, x.to(out_k.dtype.element_ty), mask=there)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    rope: bool,
    direction: float,
) -> None:
    batch, own_heads, length, size = q.shape
    if q.numel() == 0:
        return
    half_block = triton.next_power_of_2(size // 2)
    block = max(1, ELEMENTS // (2 * half_block))
    mask_strides = (0, 0) if mask is None else mask.stride()
    position_strides = (0, 0) if positions is None else (0, *positions.stride())[-2:]
    with torch.cuda.device_of(q):
        rotate_kernel[(batch * own_heads * triton.cdiv(length, block),)](
            q, k, q if mask is None else mask.view(torch.uint8), q if positions is None else positions, out_q, out_k,
            own_heads, length, direction, *q.stride(), *k.stride(), *mask_strides, *position_strides,
            HAS_MASK=mask is not None, HAS_POSITIONS=positions is not None, ROPE=rope,
            SIZE=size, HALF_BLOCK=half_block, BLOCK=block, num_warps=4,
        )  # fmt: skip


def rotate(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """New, contiguous q and k: turned if ``rope``, and 0 for tokens that the mask drops, whatever these hold.

    q, k [B, heads or 1, N, D], D even; mask [B, N] bool; positions [N] or [B, N], integer: 0 to N - 1 if None. Each may
    have any strides.
    """
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, mask, positions, out_q, out_k, rope, 1.0)
    return out_q, out_k


def rotate_back_(d_q: torch.Tensor, d_k: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Turns gradients of what ``rotate`` gave, contiguous, into those of what it took, in place."""
    _launch(d_q, d_k, None, positions, d_q, d_k, True, -1.0)
