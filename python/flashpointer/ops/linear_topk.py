"""``linear_topk``: the best classes of each row, without the scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import backends, reference
from . import _checks, _dtensor, _linear, _register, _shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_topk"


class TopK(NamedTuple):
    """The best classes of each row, the best first."""

    scores: torch.Tensor
    """``[..., k]``, float32, or float64 for float64."""
    classes: torch.Tensor
    """int64 ``[..., k]``."""


@_dtensor.of_layer("hidden", "weight", "bias")
def linear_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    k: int,
    threshold: float | None = None,
    group: ProcessGroup | None = None,
    first_class: int | None = None,
) -> TopK:
    """The k best classes of each row by ``hidden @ weight.T + bias``, and their scores.

    The scores of all classes are not stored: a tile of them at a time, and of each row the best so far. What is given
    in float16 or bfloat16 is multiplied and summed in float32, whatever autocast says. A GPU is not waited for.

    Tensors may be DTensors that are sharded by rows or by classes: docs/distributed.md.

    Args:
        hidden: ``[..., D]``, float16, bfloat16, float32 or float64.
        weight: ``[C, D]``, on the device and, outside of autocast, in the dtype of hidden. C may be 0.
        bias: ``[C]``, likewise.
        k: how many, at least 1.
        threshold: only classes whose score is above it, as a NaN is not: 0 is where ``linear_zlpr_loss`` puts it.
        group: a process group over whose ranks the classes are sharded: each has the same hidden and k, and its own
            rows of weight and bias, perhaps none. All ranks get the best of all, with their classes among all.
        first_class: the first class of this rank's shard; rank * C by default, for shards of one size. Checked on a
            CPU, and on a GPU with ``FLASHPOINTER_CHECK=1``.

    Returns:
        ``TopK(scores, classes)``, sorted by falling score; of equal scores the lower class is the better one, and a NaN
        is above all, as in ``torch.topk``. Where fewer than k classes are there, or above the threshold, class -1 with
        a score of -inf stands behind them. Neither has a gradient.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
        RuntimeError: for forward mode, and torch.func but vmap.
    """
    _linear.check(OP, hidden, weight, bias)
    if not _checks.is_int(k, 1):
        raise ValueError(f"{OP}: k takes an int of at least 1; got {_checks.describe(k)}")
    if threshold is not None and not _checks.is_number(threshold):
        raise ValueError(f"{OP}: threshold takes a number, or None; got {_checks.describe(threshold)}")
    group_name, first = _shards.name_of(OP, group, first_class), 0
    backend = _checks.choose_backend(OP, hidden, weight, bias)
    if backend == "reference":
        _shards.refuse_reference(OP, group)
    elif group is not None:
        rows = hidden.shape[:-1].numel()
        same_k = "k must be the same on all ranks of the group; got"
        _shards.check_same(OP, {_shards.rows_of("hidden"): rows, same_k: k}, group, hidden.device)
        first = _shards.shard_of(OP, first_class, len(weight), group, hidden.device).first
    hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))  # type: ignore[assignment]
    with torch.no_grad(), _checks.without_autocast(hidden):
        if backend == "reference":
            scores, classes = reference.linear_topk(hidden, weight, bias, k)
        else:
            scores, classes = _op(hidden, weight, bias, k, group_name, first)
        if threshold is not None:
            above = scores > threshold
            # Sorted again: a NaN, which stood in front, is not above it.
            scores, order = torch.where(above, scores, -torch.inf).sort(dim=-1, descending=True, stable=True)
            classes = torch.where(above, classes, -1).gather(-1, order)
    return TopK(scores, classes)


def _compute(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int, group: str | None, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By tiles on every device: their products are as fast as any, and the rest is small."""
    *lead, size = hidden.shape
    rows = hidden.reshape(math.prod(lead), size)
    scores, classes = backends.implementation(OP, "tiled").forward(rows, weight, bias, k)
    if group is not None:
        scores, classes = _best_of_ranks(scores, classes, k, group, first)
    return scores.view(*lead, k), classes.view(*lead, k)


def _best_of_ranks(
    scores: torch.Tensor, classes: torch.Tensor, k: int, group: str, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best [R, k] of those of each rank, whose shards may be in any order: by class, then, stably, by score."""
    last = torch.iinfo(torch.int64).max
    classes = torch.where(classes < 0, last, classes + first)
    scores, classes = (_shards.gather(x, group).transpose(0, 1).flatten(1) for x in (scores, classes))
    classes, order = classes.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)
    return scores[:, :k].contiguous(), torch.where(classes == last, -1, classes)[:, :k].contiguous()


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int, group: str | None, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = (*hidden.shape[:-1], k), torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=torch.int64)


_op = _register.register(
    "linear_topk(Tensor hidden, Tensor weight, Tensor? bias, int k, str? group, SymInt first)"
    " -> (Tensor scores, Tensor classes)",
    _compute,
    _fake,
)
