"""Multiply the rows of a stored gradient by their upstream scalars, in place.

A forward that computes its gradient leaves to backward one factor a row. It lives on the device, so the programs look
for themselves whether it is 1, which it is after a plain ``loss.backward()``, and then return without touching the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import block_of, tile_of_program


@triton.jit
def scale_rows_kernel(grad, upstream, rows, classes, chunks, factor, stride_upstream, BLOCK: tl.constexpr):
    tile = tile_of_program(rows, classes, chunks, 1, BLOCK)
    row = tl.program_id(0).to(tl.int64) // chunks
    scale = tl.load(upstream + row * stride_upstream).to(tl.float32) * factor
    if scale != 1.0:
        at = grad + tile.row * classes + tile.first + tile.col  # [1, BLOCK]
        g = tl.load(at, mask=tile.inside).to(tl.float32)
        tl.store(at, (g * scale).to(grad.dtype.element_ty), mask=tile.inside)


def scale_(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    """grad [..., classes], contiguous, times ``factor * upstream``, a scalar or [...] of any strides."""
    if grad.numel() == 0:
        return
    rows, classes = grad.shape[:-1].numel(), grad.shape[-1]
    upstream = upstream.expand(grad.shape[:-1]).reshape(-1)
    if upstream.stride(0) == 0:  # one scalar for all: the rows are one long row
        rows, classes = 1, rows * classes
    _, block, num_warps = block_of(classes, 32, longest=4096)  # of one row alone: none may be scaled twice
    chunks = -(-classes // block)
    with torch.cuda.device_of(grad):
        scale_rows_kernel[(rows * chunks,)](
            grad, upstream, rows, classes, chunks, factor, upstream.stride(0), BLOCK=block, num_warps=num_warps
        )
