"""The ZLPR loss from lists of positive classes.

The lists become one bit a class (1/16 of bfloat16 scores), which the dense kernels read as labels. The negatives are
so summed themselves, never got by subtracting the positives from a sum over all, which cancels catastrophically.
A bit is set once however often its class is listed, and no index, however wrong, is ever used as an address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import zlpr_loss


@triton.jit
def pack_positives_kernel(
    positives, words, rows, inner, listed, classes, width, ignore_index,
    stride_po, stride_pi, stride_pp,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bit c % 32 of words[row, c // 32] is set if class c is listed: ROWS rows of BLOCK words to a program."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    lists = positives + (row // inner) * stride_po + (row % inner) * stride_pi
    packed = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for _ in range(listed):
        c = tl.load(lists, mask=row < rows, other=-1).to(tl.int64)  # [ROWS, 1]
        listed_here = (c >= 0) & (c < classes) & (c != ignore_index) & (c // 32 == col)
        packed = packed | tl.where(listed_here, 1 << (c % 32).to(tl.int32), 0)
        lists += stride_pp
    tl.store(words + row * width + col, packed, mask=(row < rows) & (col < width))


def forward(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``zlpr_loss.forward``, with positives [outer, inner, listed] in place of labels."""
    outer, inner, classes = scores.shape
    rows, listed = outer * inner, positives.shape[-1]
    width = -(-classes // 32)
    words = torch.empty((outer, inner, width), dtype=torch.int32, device=scores.device)
    if words.numel() > 0:
        block = min(256, zlpr_loss.power_of_2(width))
        together = 256 // block
        with torch.cuda.device_of(scores):
            pack_positives_kernel[(-(-rows // together), -(-width // block))](
                positives, words, rows, inner, listed, classes, width, ignore_index, *positives.stride(),
                ROWS=together, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return zlpr_loss.forward(scores, words, mask, grad_scale, with_grad, labels_kind="packed")
