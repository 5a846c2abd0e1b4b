"""``pointer_scores``: sizes are sentences x heads x heads with their own q and k (1: shared) x tokens x head size."""

from __future__ import annotations

import torch

import flashpointer

from .suite import Inputs, Op, Shape

SHAPES = (
    Shape((16, 9, 1, 64, 64), "Efficient GlobalPointer on a batch of short sentences"),
    Shape((16, 9, 1, 128, 64), "Efficient GlobalPointer on a usual batch"),
    Shape((16, 9, 9, 128, 64), "GlobalPointer on a usual batch"),
    Shape((8, 10, 1, 256, 64), "Efficient GlobalPointer on long sentences"),
    Shape((8, 10, 10, 256, 64), "GlobalPointer on long sentences"),
    Shape((2, 50, 1, 512, 64), "Efficient GlobalPointer, documents and fine types"),
    Shape((1, 12, 1, 2048, 64), "Efficient GlobalPointer on a long document"),
    Shape((1, 1000, 1, 256, 64), "Efficient GlobalPointer with very many types"),
    Shape((16, 50, 1, 512, 64), "write bandwidth of a GPU", devices=("cuda",)),
)

AXES = "sentences x heads x tokens"


def label(size: tuple[int, ...]) -> str:
    batch, heads, own_heads, length, _ = size
    return f"{batch} x {heads:,} x {length:,}" + (", own q and k" if own_heads > 1 else "")


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, heads, own, length, head_size = size
    vectors = (batch, length, head_size) if own == 1 else (batch, own, length, head_size)
    inputs = {name: torch.randn(vectors, dtype=dtype, device=device) for name in ("q", "k")}
    inputs |= {name: torch.randn((batch, heads, length), dtype=dtype, device=device) for name in ("start", "end")}
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=device)
    return {**inputs, "mask": torch.arange(length, device=device) < lengths}


def rival(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """the usual head: RoPE, product, biases, and 1e12 taken off at padding and off the triangle (3e4 in float16)"""
    large = 3e4 if q.dtype == torch.float16 else 1e12
    length, head_size = q.shape[-2:]
    positions = torch.arange(length, device=q.device)
    q, k = (flashpointer.reference.rotate(x, positions) for x in (q, k))
    scores = torch.einsum("...md,...nd->...mn", q, k) / head_size**0.5
    scores = (scores.unsqueeze(1) if scores.dim() == 3 else scores) + start.unsqueeze(-1) + end.unsqueeze(-2)
    for kept in (mask[:, None, None, :].to(q.dtype), mask[:, None, :, None].to(q.dtype)):
        scores = scores * kept - large * (1 - kept)
    return scores - torch.tril(torch.ones_like(scores), -1) * large


OP = Op(
    name="pointer_scores",
    shapes=SHAPES,
    quick=((16, 9, 1, 128, 64), (8, 10, 1, 256, 64)),
    make_inputs=make_inputs,
    differentiate=("q", "k", "start", "end"),
    rival=rival,
    axes=AXES,
    label=label,
    outputs=lambda size: size[0] * size[1] * size[3] ** 2,
)
