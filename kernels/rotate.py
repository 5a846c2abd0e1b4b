"""RoPE: q and k turned once, before the kernels that sweep them tile by tile.

    (x_2i, x_2i+1) -> (x_2i cos a - x_2i+1 sin a, x_2i+1 cos a + x_2i sin a),   a = position * 10000 ** (-2i / D)

A position of 10^5 leaves float32 two digits of the angle. So the angle is float64, as a number of turns, whose whole
quarters only swap and negate cos and sin. What is left, an eighth of a turn at most, loses nothing in float32 and needs
five terms of Taylor's series. There is no table, and nothing else to launch.
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
    """In float32, of an angle given as a float64 number of turns: within 1e-7."""
    quarters = tl.floor(4 * turns + 0.5)
    x = ((turns - 0.25 * quarters) * TURN).to(tl.float32)
    y = x * x
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    s = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    quarter = quarters.to(tl.int64) & 3
    swapped = (quarter & 1) == 1
    cos = tl.where(swapped, s, c)
    sin = tl.where(swapped, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def turn(x, out, at, here, to, there, cos, sin, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Loads [BLOCK, 2 * HALF_BLOCK] at x + at, 0 unless here, and stores its pairs turned at out + to, where there."""
    pairs = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(pairs, [BLOCK, HALF_BLOCK, 2]))
    turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [BLOCK, 2 * HALF_BLOCK])
    tl.store(out + to, turned.to(out.dtype.element_ty), mask=there)


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
        i = tl.arange(0, HALF_BLOCK).to(tl.float64)
        turns = position.to(tl.float64)[:, None] * tl.exp2(i * (-2.0 / SIZE * LOG2_BASE) - LOG2_TURN)[None, :]
        cos, sin = cos_sin(turns)
        sin *= direction
    d = tl.arange(0, 2 * HALF_BLOCK)[None, :].to(tl.int64)
    to = (plane * length + token[:, None]) * SIZE + d
    there = inside[:, None] & (d < SIZE)
    here = kept[:, None] & (d < SIZE)
    at = b * stride_qb + h * stride_qh + token[:, None] * stride_qn + d * stride_qd
    turn(q, out_q, at, here, to, there, cos, sin, BLOCK, HALF_BLOCK)
    at = b * stride_kb + h * stride_kh + token[:, None] * stride_kn + d * stride_kd
    turn(k, out_k, at, here, to, there, cos, sin, BLOCK, HALF_BLOCK)


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
