"""``zlpr_loss`` on bool labels of which about 1 % are positive, at least one in each row."""

from __future__ import annotations

import torch

from .suite import Inputs, Op, Shape

SHAPES = (
    Shape((16, 28), "a training batch of GoEmotions: nothing but the cost of the call"),
    Shape((4096, 28), "an evaluation of all of GoEmotions at once: still bound by launches on a GPU"),
    Shape((1024, 983), "a large batch of a medium tag set: some megabytes, in or near the cache"),
    Shape((256, 30938), "extreme classification (Wiki10-31K): rows longer than one block"),
    Shape((8, 1_000_000), "a few very long rows: split among programs on a GPU, cut into column tiles on a CPU"),
    Shape((2048, 8192), "memory bandwidth: far past any cache of a CPU", devices=("cpu",)),
    Shape((8192, 8192), "memory bandwidth: far past any cache of a GPU", devices=("cuda",)),
    Shape((64, 1_000_000), "long rows that fill a GPU by their number alone", devices=("cuda",)),
)


def make_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    labels = torch.rand(size, device=device) < 0.01
    labels.scatter_(-1, torch.randint(size[-1], (*size[:-1], 1), device=device), True)
    return {"scores": torch.randn(size, dtype=dtype, device=device) * 3, "labels": labels}


def float_labels(inputs: Inputs) -> Inputs:
    return {**inputs, "labels": inputs["labels"].to(inputs["scores"].dtype)}


def rival(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """the idiom brought over from Keras: float labels, and 1e12 taken from what a term leaves out

    The labels are float before the clock starts and count as inputs, not as memory of its own: in its favour.
    """
    y = (1 - 2 * labels) * scores
    zero = torch.zeros_like(y[..., :1])
    negatives = torch.logsumexp(torch.cat([y - labels * 1e12, zero], dim=-1), dim=-1)
    positives = torch.logsumexp(torch.cat([y - (1 - labels) * 1e12, zero], dim=-1), dim=-1)
    return (negatives + positives).mean()


OP = Op(
    name="zlpr_loss",
    shapes=SHAPES,
    quick=((16, 28), (1024, 983), (256, 30938)),
    make_inputs=make_inputs,
    differentiate=("scores",),
    rival=rival,
    rival_inputs=float_labels,
)
