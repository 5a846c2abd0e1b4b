"""Multiply the rows of a stored gradient by their upstream scalars, in place.

A forward that computes its gradient leaves to backward one factor a row. It lives on the device, so the programs look
for themselves whether it is 1, which it is after a plain ``loss.backward()``, and then return without touching the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
CHUNK = 8192


@triton.jit
def scale_rows_kernel(grad, upstream, classes, factor, stride_upstream, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    chunks = tl.cdiv(classes, CHUNK)
    row = tl.program_id(0).to(tl.int64) // chunks
    scale = tl.load(upstream + row * stride_upstream).to(tl.float32) * factor
    if scale != 1.0:
        start = tl.program_id(0).to(tl.int64) % chunks * CHUNK
        for first in range(start, tl.minimum(start + CHUNK, classes), BLOCK):
            col = first + tl.arange(0, BLOCK)
            g = tl.load(grad + row * classes + col, mask=col < classes).to(tl.float32)
            tl.store(grad + row * classes + col, (g * scale).to(grad.dtype.element_ty), mask=col < classes)


def scale_(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    """grad [..., classes], contiguous, times ``factor * upstream``, a scalar or [...] of any strides."""
    if grad.numel() == 0:
        return
    rows, classes = grad.shape[:-1].numel(), grad.shape[-1]
    upstream = upstream.expand(grad.shape[:-1]).reshape(-1)
    if upstream.stride(0) == 0:  # one scalar for all: the rows are one long row
        rows, classes = 1, rows * classes
    with torch.cuda.device_of(grad):
        scale_rows_kernel[(rows * triton.cdiv(classes, CHUNK),)](
            grad, upstream, classes, factor, upstream.stride(0), BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4
        )
