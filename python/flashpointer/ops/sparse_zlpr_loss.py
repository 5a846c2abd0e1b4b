"""``sparse_zlpr_loss``: the ZLPR loss with lists of positive classes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import reference
from . import _checks, _dtensor, _register, _rows, _shards

OP = "sparse_zlpr_loss"


@_dtensor.of_rows("scores", "positives", "mask", by_class=True)
def sparse_zlpr_loss(
    scores: torch.Tensor,
    positives: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    first_class: int | None = None,
) -> torch.Tensor:
    """The ZLPR loss (see ``zlpr_loss``) of hard labels given as lists of the positive classes.

    The negatives are summed themselves. Implementations that get them as the sum over all classes less the positives
    lose every digit once the positives are learned, and then push them down again.

    Tensors may be DTensors that are sharded by rows or by classes: docs/distributed.md.

    Args:
        scores: ``[..., C]``, as in ``zlpr_loss``.
        positives: integer, ``[..., P]`` with the leading shape of scores: class indices in any order, padded with any
            negative index or with ``ignore_index``. A class listed twice counts once; one that is masked counts not.
        mask: bool, broadcastable to the shape of scores: False leaves a cell out of both terms.
        reduction: ``"none"`` gives ``[...]``; ``"sum"``; ``"mean"`` over the rows, 0 over no rows.
        ignore_index: an index that pads the lists, besides the negative ones: 0 where class 0 is reserved for that.
        group: the process group over whose ranks the classes are sharded, as in ``zlpr_loss``: scores and mask are
            those of this rank's classes. positives are the same on all ranks, indices into all classes.
        first_class: the index of this rank's first class, by default rank * C, which is right where all ranks have
            equally many. On a CPU, and elsewhere under ``FLASHPOINTER_CHECK=1`` on all ranks, shards that leave a gap
            or overlap are an error on all ranks.

    Returns:
        float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value. On a GPU an index beyond the last
            class is dropped; the environment variable ``FLASHPOINTER_CHECK=1`` makes it an error there too.
        RuntimeError: for second derivatives, forward mode, and torch.func but vmap.

    References:
        Su et al. 2022, *ZLPR: A Novel Loss for Multi-label Classification*, arXiv:2208.02955.
    """
    _checks.check_scores(OP, scores)
    _checks.check_lists(OP, positives, ignore_index, scores, "scores")
    mask = _checks.check_mask(OP, mask, scores)
    _checks.check_reduction(OP, reduction)
    ranks = _shards.name_of(OP, group, first_class)
    backend = _checks.choose_backend(OP, scores)
    if backend == "reference":
        _shards.refuse_reference(OP, group)
        if not torch.compiler.is_compiling():  # which would have to break the graph to look
            _check_values(scores, positives, mask, ignore_index)
        return reference.sparse_zlpr_loss(scores, positives, mask, reduction, ignore_index)
    if group is not None:
        _shards.check_same(OP, {_shards.rows_of("scores"): scores.shape[:-1].numel()}, group, scores.device)
        shard = _shards.shard_of(OP, first_class, scores.shape[-1], group, scores.device)
        if shard.total is not None:
            _checks.check_indices(OP, positives, ignore_index, shard.total, "scores")
        listed = positives.to(torch.int64)
        listed = torch.where((listed < 0) | (listed == ignore_index), -1, listed - shard.first)
        listed = torch.where(listed < scores.shape[-1], listed, -1)  # of the shards behind
        return _sharded(scores, listed, mask, reduction, ranks, backend, -1)  # type: ignore[no-any-return]
    with_grad = _register.wants_gradient(scores)
    loss: torch.Tensor = _op(scores, positives, mask, reduction, with_grad, backend, ignore_index)[0]
    return loss


def _check_values(scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor | None, ignore_index: int) -> None:
    _checks.check_indices(OP, positives, ignore_index, scores.shape[-1], "scores")


_op = _rows.register_with_gradient(OP, "positives", ", int ignore_index", _check_values)
_sharded = _rows.register_sharded(OP, "positives", ", int ignore_index", _check_values)
