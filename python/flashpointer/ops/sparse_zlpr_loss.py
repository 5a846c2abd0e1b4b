"""``sparse_zlpr_loss``: the ZLPR loss with lists of positive classes."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from . import _checks, _rows

OP = "sparse_zlpr_loss"


def sparse_zlpr_loss(
    scores: torch.Tensor,
    positives: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """The ZLPR loss (see ``zlpr_loss``) of hard labels given as lists of the positive classes.

    The negatives are summed themselves. Implementations that get them as the sum over all classes less the positives
    lose every digit once the positives are learned, and then push them down again.

    Args:
        scores: ``[..., C]``, as in ``zlpr_loss``.
        positives: integer, ``[..., P]`` with the leading shape of scores: class indices in any order, padded with any
            negative index or with ``ignore_index``. A class listed twice counts once; one that is masked counts not.
        mask: bool, broadcastable to the shape of scores: False leaves a cell out of both terms.
        reduction: ``"none"`` gives ``[...]``; ``"sum"``; ``"mean"`` over the rows, 0 over no rows.
        ignore_index: an index that pads the lists, besides the negative ones: 0 where class 0 is reserved for that.

    Returns:
        float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value. On a GPU an index beyond the last
            class is dropped; the environment variable ``FLASHPOINTER_CHECK=1`` makes it an error there too.
        RuntimeError: for second derivatives.

    References:
        Su et al. 2022, *ZLPR: A Novel Loss for Multi-label Classification*, arXiv:2208.02955.
    """
    _checks.check_scores(OP, scores)
    _checks.check_tensor(OP, "positives", positives, "an integer tensor of class indices [..., P]", _checks.INTEGERS)
    if positives.shape[:-1] != scores.shape[:-1] or positives.dim() != scores.dim():
        raise ValueError(
            f"{OP}: positives must be [..., P] with the leading shape of scores, {tuple(scores.shape[:-1])};"
            f" got {_checks.describe(positives)}"
        )
    _checks.check_device(OP, "positives", positives, scores)
    mask = _checks.check_mask(OP, mask, scores)
    _checks.check_reduction(OP, reduction)
    if not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index takes an int; got {_checks.describe(ignore_index)}")
    backend = backends.choose(scores)
    if backend == "reference":
        _check_values(positives, scores.shape[-1], ignore_index)
        return reference.sparse_zlpr_loss(scores, positives, mask, reduction, ignore_index)
    with_grad = scores.requires_grad and torch.is_grad_enabled()
    loss: torch.Tensor = _op(scores, positives, mask, reduction, ignore_index, with_grad, backend)[0]
    return loss


@torch.compiler.disable
def _check_values(positives: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for an index beyond the last class; on a GPU, where to look is to wait, if asked to."""
    if positives.numel() == 0 or (positives.device.type != "cpu" and not backends.CHECK_INDICES):
        return
    if positives.max() < classes:
        return
    wrong = (positives >= classes) & (positives != ignore_index)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{OP}: positives takes class indices below {classes}, the classes of scores, or negative ones for padding;"
            f" got {positives[where].item()} at {where}"
        )


def _compute(
    scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, reduction: str, ignore_index: int,
    with_grad: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check_values(positives, scores.shape[-1], ignore_index)
    losses, grad = backends.implementation(OP, backend).forward(
        *_rows.fold(scores, positives, mask), ignore_index, _rows.grad_scales(scores, reduction)[0], with_grad
    )
    return _rows.reduce(losses, scores.shape[:-1], reduction), grad.view(scores.shape) if with_grad else grad


def _fake(
    scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, reduction: str, ignore_index: int,
    with_grad: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _rows.fake_loss(scores, reduction), scores.new_empty(scores.shape if with_grad else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, _, _, reduction, _, _, backend = inputs
    _rows.save_gradient(ctx, scores, reduction, backend, output[1])


def _backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    return _rows.stored_gradient(ctx, OP, upstream), None, None, None, None, None, None


_op = _rows.register(
    "sparse_zlpr_loss(Tensor scores, Tensor positives, Tensor? mask, str reduction, int ignore_index, bool with_grad,"
    " str backend) -> (Tensor loss, Tensor grad)",
    _compute,
    _fake,
    _setup_context,
    _backward,
)
