"""``pointer_decode``: sizes are sentences x heads x heads with their own q and k (1: shared) x tokens x head size."""

from __future__ import annotations

import numpy as np
import torch

import flashpointer
from flashpointer.agreement import Agreement, cancellation, relative_error, score_terms

from . import pointer_scores
from .suite import Inputs, Op, Shape

SHAPES = (
    Shape((1, 10, 1, 64, 64), "one sentence, as in serving"),
    Shape((16, 9, 1, 128, 64), "Efficient GlobalPointer on a usual batch"),
    Shape((16, 9, 9, 128, 64), "GlobalPointer on a usual batch"),
    Shape((8, 10, 1, 256, 64), "Efficient GlobalPointer on long sentences"),
    Shape((2, 50, 1, 512, 64), "Efficient GlobalPointer, documents and fine types"),
    Shape((1, 100, 1, 1024, 64), "Efficient GlobalPointer, a long document and many types"),
    Shape((32, 50, 1, 512, 64), "many documents and fine types", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """As of a trained model: about two spans of a million cells."""
    inputs = pointer_scores.make_inputs(size, dtype, device)
    return {**inputs, "start": inputs["start"] - 4, "end": inputs["end"] - 4}


def eager(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (flashpointer.reference.pointer_scores(q, k, start, end, mask=mask) > 0).nonzero()


def rival(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor
) -> list[tuple[int, ...]]:
    """the usual head, its scores as a NumPy array, np.where, and a loop over the spans"""
    scores = pointer_scores.rival(q, k, start, end, mask).float().cpu().numpy()
    return [tuple(map(int, span)) for span in zip(*np.where(scores > 0), strict=True)]


def agreement(inputs: Inputs) -> list[Agreement]:
    """Of the scores of what is found; and which share of the spans is not found, or found though it is none, where the
    score is not within the rounding of the dtype from the threshold."""
    spans, scores = flashpointer.pointer_decode(**inputs)
    exact = flashpointer.reference.pointer_scores(**{k: v.double() for k, v in inputs.items()})
    found = torch.zeros_like(exact, dtype=torch.bool)
    found[spans.unbind(1)] = True
    sure = exact.abs() > 100 * torch.finfo(scores.dtype).eps
    wrong = (found != (exact > 0)) & sure
    exact_found, terms = exact[spans.unbind(1)], score_terms(inputs)[spans.unbind(1)]
    epsilon = max(1e-6, torch.finfo(scores.dtype).eps) * cancellation(exact_found, terms)
    return [
        Agreement("spans", float(wrong.sum() / max(1, len(spans))), 0.0, 0.0),
        Agreement("scores", relative_error(scores, exact_found), 0.0, 10 * epsilon),
    ]


def matrix_flops(inputs: Inputs, backward: bool) -> float:
    """q k of each valid pair of tokens, for heads that share them once: bounds spare the scores, not these."""
    kept, own_heads = inputs["mask"].sum(1), 1 if inputs["q"].dim() == 3 else inputs["q"].shape[1]
    return float((kept * (kept + 1)).sum()) * own_heads * inputs["q"].shape[-1]


OP = Op(
    name="pointer_decode",
    shapes=SHAPES,
    quick=((16, 9, 1, 128, 64), (8, 10, 1, 256, 64)),
    make_inputs=make_inputs,
    differentiate=(),
    rival=rival,
    axes=pointer_scores.AXES,
    label=pointer_scores.label,
    eager=eager,
    agreement=agreement,
    matrix_flops=matrix_flops,
)
