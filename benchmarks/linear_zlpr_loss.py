"""``linear_zlpr_loss``: sizes are rows x size of the hidden states x classes, with lists of 1 to 16 positives."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from flashpointer.agreement import Agreement, compare

from .suite import Inputs, Op, Shape

LAYER = ("hidden", "weight", "bias")
MOST = 16  # positives of a row
AXES = "rows x hidden size x classes"
# Of as many the whole is checked: more do not fit into memory in float64.
CHECKED = 100_000
SHAPES = (
    Shape((32, 384, 31_000), "a batch and the labels of EUR-Lex or Wiki10, a small encoder"),
    Shape((64, 128, 100_000), "codes of diagnoses: so few numbers a class that the exponentials count"),
    Shape((256, 256, 100_000), "a large batch: as many rows as numbers a class, all of which are kept"),
    Shape((64, 768, 670_000), "the products of Amazon-670K: the gradient of weight is 2 GB"),
    Shape((4096, 768, 500_000), "a large batch: more rows than numbers a class", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, width, classes = size
    layer = {"hidden": torch.randn(rows, width, device=device), "bias": torch.randn(classes, device=device)}
    layer["weight"] = torch.randn(classes, width, device=device) * width**-0.5
    positives = torch.randint(classes, (rows, MOST), device=device)
    positives[torch.arange(MOST, device=device) >= torch.randint(1, MOST + 1, (rows, 1), device=device)] = -1
    return {**{name: layer[name].to(dtype) for name in LAYER}, "positives": positives}


def agreement(inputs: Inputs) -> list[Agreement]:
    part = {name: x.detach()[:CHECKED] if name in ("weight", "bias") else x.detach() for name, x in inputs.items()}
    part["positives"] = inputs["positives"] % len(part["weight"])  # also of padding: as many more
    return compare("linear_zlpr_loss", part, differentiate=LAYER)


def rival(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """all scores, without dense labels: the positives are read, then set to -inf"""
    scores, padding = linear(hidden, weight, bias).float(), positives < 0
    listed = scores.gather(1, positives.clamp(min=0)).masked_fill(padding, torch.inf)
    # The 1 of the sum, and a column for the padding.
    more = scores.new_tensor([0.0, -torch.inf]).expand(len(scores), 2)
    at = torch.where(padding, scores.shape[1] + 1, positives)
    negatives = torch.cat([scores, more], dim=1).scatter(1, at, -torch.inf)
    return (torch.logsumexp(negatives, 1) + torch.logsumexp(torch.cat([-listed, more[:, :1]], dim=1), 1)).mean()


OP = Op(
    name="linear_zlpr_loss",
    shapes=SHAPES,
    quick=((32, 384, 31_000),),
    make_inputs=make_inputs,
    differentiate=LAYER,
    rival=rival,
    axes=AXES,
    matrix_flops=lambda inputs, backward: (6.0 if backward else 2.0) * inputs["hidden"].numel() * len(inputs["weight"]),
    agreement=agreement,
)
