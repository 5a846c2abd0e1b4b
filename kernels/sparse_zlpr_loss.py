"""The ZLPR loss from lists of positive classes.

The lists become one bit a class (1/16 of bfloat16 scores), which the dense kernels read as labels. The negatives are
so summed themselves, never got by subtracting the positives from a sum over all, which cancels catastrophically.
A bit is set once however often its class is listed, and in whatever order: an atomic or is exact. No index out of range
is ever used as an address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import zlpr_loss


@triton.jit
def pack_positives_kernel(
    positives, words, cells, inner, listed, classes, width, ignore_index, stride_po, stride_pi, stride_pp,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets bit c % 32 of words[row, c // 32] for each class c listed: BLOCK cells of the lists to a program."""
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = cell // listed
    at = row // inner * stride_po + row % inner * stride_pi + cell % listed * stride_pp
    c = tl.load(positives + at, mask=cell < cells, other=-1).to(tl.int64)
    bit = tl.full([BLOCK], 1, tl.int32) << (c % 32).to(tl.int32)
    tl.atomic_or(words + row * width + c // 32, bit, mask=(c >= 0) & (c < classes) & (c != ignore_index), sem="relaxed")


def packed(scores: torch.Tensor, positives: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The lists [outer, inner, listed] as bytes of 8 classes each, of scores [outer, inner, classes]."""
    outer, inner, classes = scores.shape
    listed, width = positives.shape[-1], -(-classes // 32)
    words = torch.zeros((outer, inner, width), dtype=torch.int32, device=scores.device)
    if positives.numel() > 0 and classes > 0:
        with torch.cuda.device_of(scores):
            pack_positives_kernel[(-(-positives.numel() // 256),)](
                positives, words, positives.numel(), inner, listed, classes, width, ignore_index, *positives.stride(),
                BLOCK=256, num_warps=4,
            )  # fmt: skip
    return words.view(torch.uint8)


def forward(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    grad_scale: float,
    with_grad: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``zlpr_loss.forward``, with positives [outer, inner, listed] in place of labels."""
    bits = packed(scores, positives, ignore_index)
    return zlpr_loss.forward(scores, bits, mask, grad_scale, with_grad, labels_kind="packed")


def shard_log_sums(
    scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    bits = packed(scores, positives, ignore_index)
    sums: torch.Tensor = zlpr_loss.shard_log_sums(scores, bits, mask, labels_kind="packed")
    return sums


def shard_gradient(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor,
    grad_scale: float,
    ignore_index: int,
) -> torch.Tensor:
    bits = packed(scores, positives, ignore_index)
    grad: torch.Tensor = zlpr_loss.shard_gradient(scores, bits, mask, sums, grad_scale, labels_kind="packed")
    return grad
