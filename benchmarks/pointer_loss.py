"""``pointer_loss``: sizes are sentences x heads x heads with their own q and k (1: shared) x tokens x head size."""

from __future__ import annotations

import torch

from . import pointer_scores
from .suite import Inputs, Op, Shape

SHAPES = (
    Shape((16, 10, 1, 64, 64), "Efficient GlobalPointer on a batch of short sentences"),
    Shape((4, 10, 1, 128, 64), "a small batch: the calls are most of it"),
    Shape((16, 9, 1, 128, 64), "Efficient GlobalPointer on a usual batch"),
    Shape((16, 9, 9, 128, 64), "GlobalPointer on a usual batch"),
    Shape((8, 10, 1, 256, 64), "Efficient GlobalPointer on long sentences"),
    Shape((2, 50, 1, 512, 64), "Efficient GlobalPointer, documents and fine types"),
    Shape((1, 100, 1, 1024, 64), "Efficient GlobalPointer, a long document and many types"),
    Shape((16, 50, 1, 512, 64), "many documents and fine types", devices=("cuda",)),
    Shape((8, 100, 1, 1024, 64), "eager takes 35 GB", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """As of a model that has begun to learn: scores around -4, and a short span for every 15 tokens."""
    batch, heads, _, length, _ = size
    inputs = pointer_scores.make_inputs(size, dtype, device)
    del inputs["mask"]  # full sentences: the numbers are those of the whole triangle
    count = max(1, batch * length // 15)
    spans = torch.stack([torch.randint(limit, (count,), device=device) for limit in (batch, heads, length, 8)], dim=1)
    spans[:, 3] = (spans[:, 2] + spans[:, 3]).clamp(max=length - 1)
    return {**inputs, "start": inputs["start"] - 2, "end": inputs["end"] - 2, "spans": spans}


def rival(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, spans: torch.Tensor, listed: torch.Tensor
) -> torch.Tensor:
    """the usual head with the sparse loss: all scores, the positives subtracted from the sum (wrong once they learn)"""
    scores = pointer_scores.rival(q, k, start, end, q.new_ones(q.shape[0], q.shape[-2])).flatten(2).float()
    zero, largest = torch.zeros_like(scores[..., :1]), torch.finfo(scores.dtype).max
    positives = torch.cat([scores.gather(2, listed.clamp(min=0)), zero], dim=2)
    present = torch.cat([listed >= 0, torch.ones_like(listed[..., :1], dtype=torch.bool)], dim=2)
    whole = torch.logsumexp(torch.cat([scores, zero], dim=2), dim=2)
    of_positives = torch.logsumexp(positives[..., :-1].masked_fill(~present[..., :-1], -largest), dim=2)
    rest = whole + torch.log((1 - torch.exp(of_positives - whole)).clamp(min=1e-7))
    return (rest + torch.logsumexp((-positives).masked_fill(~present, -largest), dim=2)).mean()


def rival_inputs(inputs: Inputs) -> Inputs:
    """With lists of the positive cells of each plane, as the usual sparse labels are, padded with -1."""
    batch, heads, length = inputs["start"].shape
    b, h, m, n = inputs["spans"].unique(dim=0).unbind(1)
    planes = b * heads + h
    rank = torch.arange(len(planes), device=planes.device) - torch.searchsorted(planes, planes)
    listed = planes.new_full((batch * heads, int(rank.max()) + 1), -1)
    listed[planes, rank] = m * length + n
    return {**inputs, "listed": listed.view(batch, heads, -1)}


def matrix_flops(inputs: Inputs, backward: bool) -> float:
    """For each valid pair of tokens: q k and P V forward, backward four products with vectors and two with heads."""
    (batch, heads, length), size = inputs["start"].shape, inputs["q"].shape[-1]
    groups = batch * (1 if inputs["q"].dim() == 3 else heads)
    of_group = batch * heads // groups
    pairs = groups * length * (length + 1) / 2
    return 2 * pairs * (4 * size + 3 * of_group if backward else size + of_group)


OP = Op(
    name="pointer_loss",
    shapes=SHAPES,
    quick=((16, 9, 1, 128, 64), (8, 10, 1, 256, 64)),
    make_inputs=make_inputs,
    differentiate=("q", "k", "start", "end"),
    rival=rival,
    axes=pointer_scores.AXES,
    label=pointer_scores.label,
    rival_inputs=rival_inputs,
    matrix_flops=matrix_flops,
)
