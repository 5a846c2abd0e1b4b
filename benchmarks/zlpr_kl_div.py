"""``zlpr_kl_div`` of two score vectors that are both differentiated, as R-Drop does."""

from __future__ import annotations

import torch

from .suite import Inputs, Op, Shape


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    scores = torch.randn(size, dtype=dtype, device=device) * 3
    # The second pass of R-Drop differs from the first by its dropout alone.
    return {"scores": scores, "other": scores + torch.randn(size, dtype=dtype, device=device)}


def rival(scores: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """the formula written out as it stands, in the dtype of the scores and without masks"""
    return ((torch.sigmoid(scores) - torch.sigmoid(other)) * (scores - other)).sum(-1).mean()


OP = Op(
    name="zlpr_kl_div",
    shapes=(
        Shape((16, 28), "a training batch of GoEmotions: nothing but the cost of the call"),
        Shape((1024, 983), "a large batch of a medium tag set: some megabytes, in or near the cache"),
        Shape((256, 30938), "extreme classification (Wiki10-31K): rows longer than one block"),
    ),
    quick=((1024, 983),),
    make_inputs=make_inputs,
    differentiate=("scores", "other"),
    rival=rival,
)
