"""``linear_topk``: sizes are rows x size of the hidden states x classes; the best 5 of each row."""

from __future__ import annotations

import torch

import flashpointer
from flashpointer.agreement import Agreement, relative_error

from . import linear_zlpr_loss
from .suite import Inputs, Op, Shape

K, CHUNK = 5, 8192
SHAPES = (
    Shape((1, 768, 670_000), "one text, as in serving"),
    Shape((32, 384, 31_000), "a batch and the labels of EUR-Lex or Wiki10"),
    Shape((64, 128, 100_000), "codes of diagnoses, a small encoder"),
    Shape((256, 256, 100_000), "to evaluate many texts"),
    Shape((64, 768, 670_000), "the products of Amazon-670K"),
    Shape((4096, 768, 500_000), "a large batch", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, width, classes = size
    hidden, weight = torch.randn(rows, width, device=device), torch.randn(classes, width, device=device)
    return {"hidden": hidden.to(dtype), "weight": (weight * width**-0.5).to(dtype)}


def eager(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, classes = (hidden @ weight.T).topk(k)
    return scores, classes


def rival(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk of 8,192 classes at a time, and of what these give"""
    parts = [(hidden @ w.T).topk(k) for w in weight.split(CHUNK)]
    scores, order = torch.cat([scores for scores, _ in parts], 1).topk(k)
    classes = torch.cat([of + i * CHUNK for i, (_, of) in enumerate(parts)], 1)
    return scores, classes.gather(1, order)


def agreement(inputs: Inputs) -> list[Agreement]:
    """Of the scores in each place, and of those that the classes found there really have."""
    scores, classes = flashpointer.linear_topk(**inputs, k=K)
    exact = inputs["hidden"].double() @ inputs["weight"].double().T
    return [
        Agreement("scores", relative_error(scores, exact.topk(K).values), 0.0, 1e-6),
        Agreement("classes", relative_error(scores, exact.gather(1, classes)), 0.0, 1e-6),
    ]


OP = Op(
    name="linear_topk",
    shapes=SHAPES,
    quick=((32, 384, 31_000), (64, 128, 100_000)),
    make_inputs=make_inputs,
    differentiate=(),
    options=(("k", K),),
    rival=rival,
    axes=linear_zlpr_loss.AXES,
    outputs=lambda size: 3 * K * size[0],  # a class takes two of them
    matrix_flops=lambda inputs, backward: 2.0 * inputs["hidden"].numel() * len(inputs["weight"]),
    eager=eager,
    agreement=agreement,
)
