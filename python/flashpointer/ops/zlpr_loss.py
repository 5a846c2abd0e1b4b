"""``zlpr_loss``: the ZLPR loss with dense labels."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import reference
from . import _checks, _dtensor, _register, _rows, _shards

OP = "zlpr_loss"


@_dtensor.of_rows("scores", "labels", "mask", by_class=True)
def zlpr_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Zero-bounded log-sum-exp and pairwise rank-based loss: multi-label cross entropy with the threshold at score 0.

    For each row, with labels t in [0, 1]::

        loss = log(1 + sum_i (1 - t_i) exp(s_i)) + log(1 + sum_i t_i exp(-s_i))

    After training a class is predicted where its score is above 0. ``sigmoid(2 * score)`` is its probability if labels
    are soft; if they are hard and classes few, it is too sure of itself (docs/mathematics.md has both).

    Tensors may be DTensors that are sharded by rows or by classes: docs/distributed.md.

    Args:
        scores: ``[..., C]``, float16, bfloat16, float32 or float64: one row of C class scores for each leading index. A
            score of -inf marks an invalid cell, as ``pointer_scores`` does, and leaves both terms whatever its label.
        labels: ``[..., C]``, the shape of scores. bool or integer: hard, 1 for a positive, 0 for a negative. Floating:
            soft, the probability of being positive, in [0, 1]. -100 leaves a cell out of both terms. No gradient.
        mask: bool, broadcastable to the shape of scores: False leaves a cell out of both terms, whatever its score and
            label.
        reduction: ``"none"`` gives ``[...]``; ``"sum"``; ``"mean"`` over the rows. A row with nothing in it has loss 0,
            and so has a mean over no rows.
        group: the process group over whose ranks the classes are sharded. scores, labels and mask are then those of
            this rank's classes, as many as it has, perhaps none; rows are the same on all ranks. Every rank gets the
            loss of all classes, the same bits, and the gradient of its own scores. Forward gathers four numbers a row
            and rank, once; backward communicates nothing, and computes the exponentials again.

    Returns:
        float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value. On a GPU an invalid label
            makes the loss of its row NaN; the environment variable ``FLASHPOINTER_CHECK=1`` makes it an error.
        RuntimeError: for second derivatives, forward mode, and torch.func but vmap.

    References:
        Su et al. 2022, *ZLPR: A Novel Loss for Multi-label Classification*, arXiv:2208.02955. Soft labels:
        https://kexue.fm/archives/9064
    """
    _checks.check_scores(OP, scores)
    _checks.check_tensor(
        OP,
        "labels",
        labels,
        "a bool, integer or floating-point tensor",
        (torch.bool, *_checks.INTEGERS, *_checks.FLOATS),
    )
    if labels.shape != scores.shape:
        raise ValueError(
            f"{OP}: labels must have the shape of scores, {tuple(scores.shape)}; got {_checks.describe(labels)}"
        )
    _checks.check_device(OP, "labels", labels, scores)
    _checks.check_no_grad(OP, "labels", labels, "use labels.detach()")
    mask = _checks.check_mask(OP, mask, scores)
    _checks.check_reduction(OP, reduction)
    ranks = _shards.name_of(OP, group)
    backend = _checks.choose_backend(OP, scores, labels)
    if backend == "reference":
        _shards.refuse_reference(OP, group)
        if not torch.compiler.is_compiling():  # which would have to break the graph to look
            _check_values(scores, labels, mask)
        return reference.zlpr_loss(scores, labels, mask, reduction)
    if group is not None:
        _shards.check_same(OP, {_shards.rows_of("scores"): scores.shape[:-1].numel()}, group, scores.device)
        return _sharded(scores, labels, mask, reduction, ranks, backend)  # type: ignore[no-any-return]
    with_grad = _register.wants_gradient(scores)
    loss: torch.Tensor = _op(scores, labels, mask, reduction, with_grad, backend)[0]
    return loss


def _check_values(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raises ValueError for a label outside [0, 1] that is not -100; on a GPU, where to look is to wait, on demand."""
    if labels.dtype == torch.bool or labels.numel() == 0 or not _checks.can_look(labels):
        return
    least, most = torch.aminmax(labels)
    if least >= 0 and most <= 1:
        return
    wrong = _checks.wrong_labels(labels)
    if mask is not None:
        wrong &= mask
    _checks.refuse(OP, "labels", "0 to 1, or -100 for a cell to leave out", labels, wrong)


_op = _rows.register_with_gradient(OP, "labels", "", _check_values)
_sharded = _rows.register_sharded(OP, "labels", "", _check_values)
