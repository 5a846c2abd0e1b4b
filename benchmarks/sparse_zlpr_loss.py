"""``sparse_zlpr_loss`` on lists of 5 to 16 distinct positives, padded to 16 with -1, at the shapes of ``zlpr_loss``."""

from __future__ import annotations

import torch

from . import zlpr_loss
from .suite import Inputs, Op

FEWEST, MOST = 5, 16


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    positives = torch.rand(size, device=device).topk(MOST).indices
    listed = torch.randint(FEWEST, MOST + 1, (*size[:-1], 1), device=device)
    positives[torch.arange(MOST, device=device) >= listed] = -1
    return {"scores": torch.randn(size, dtype=dtype, device=device) * 3, "positives": positives}


def rival(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """the common sparse implementation: the negatives as all classes less the positives

    It is wrong, loss and gradient, once the positives are learned: the difference then cancels to the clip. On these
    random scores it still is right, so its time is a fair one.
    """
    padding = positives < 0
    zero = torch.zeros_like(scores[..., :1])
    listed = scores.gather(-1, positives.clamp(min=0))
    of_positives = torch.logsumexp(torch.cat([-listed.masked_fill(padding, torch.inf), zero], dim=-1), dim=-1)
    of_all = torch.logsumexp(torch.cat([scores, zero], dim=-1), dim=-1)
    of_listed = torch.logsumexp(listed.masked_fill(padding, -torch.inf), dim=-1)
    of_negatives = of_all + torch.log(torch.clip(1 - torch.exp(of_listed - of_all), 1e-7, 1))
    return (of_positives + of_negatives).mean()


OP = Op(
    name="sparse_zlpr_loss",
    shapes=zlpr_loss.SHAPES,
    quick=((1024, 983),),
    make_inputs=make_inputs,
    differentiate=("scores",),
    rival=rival,
)
