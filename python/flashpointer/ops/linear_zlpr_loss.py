"""``linear_zlpr_loss``: a linear layer of very many classes and its ZLPR loss in one, without the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .. import backends, reference
from ..problem import Listed, Lists, LogSums
from . import _checks, _dtensor, _linear, _register, _rows, _shards

OP = "linear_zlpr_loss"

WeightGrad = Callable[[int, torch.Tensor], object]


@_dtensor.of_layer("hidden", "weight", "positives", "bias", "positive_labels")
def linear_zlpr_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    positives: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    positive_labels: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    first_class: int | None = None,
    weight_grad: WeightGrad | None = None,
) -> torch.Tensor:
    """The ZLPR loss of the scores ``hidden @ weight.T + bias``, for 10^5 to 10^6 classes: neither the scores nor dense
    labels are ever stored.

    For each row, with scores s, and labels t that are 0 but for the listed classes::

        loss = log(1 + sum_i (1 - t_i) exp(s_i)) + log(1 + sum_listed t_i exp(-s_i))

    Besides its arguments and their gradients it takes a few tiles. Forward keeps exp(s) of as many rows as fit, D in
    float32, in the memory of the gradient of weight, so that up to D rows take three matrix products, as many as a
    linear layer does, and none is repeated. Where that is not to be had (a frozen weight, ``torch.compile``,
    ``retain_graph``), backward computes the scores again.

    Tensors may be DTensors that are sharded by rows or by classes: docs/distributed.md.

    Args:
        hidden: ``[..., D]``, float16, bfloat16, float32 or float64: one row for each leading index.
        weight: ``[C, D]``, in the dtype of hidden; under autocast both are cast, as those of a linear layer are.
        positives: integer, ``[..., P]`` with the leading shape of hidden: class indices in any order, padded with any
            negative index or with ``ignore_index``. Of a class that a row lists twice the first counts.
        bias: ``[C]``, in the dtype of hidden. One of -inf takes its class out of both terms.
        positive_labels: floating-point, of the shape of positives, in [0, 1]: the labels t of the listed classes, 1 by
            default; -100 leaves a cell out of both terms. No gradient.
        reduction: ``"none"`` gives ``[...]``; ``"sum"``; ``"mean"`` over the rows, 0 over no rows.
        ignore_index: an index that pads the lists, besides the negative ones.
        group: a process group over whose ranks the classes are sharded: each has the same hidden and positives, and its
            own rows of weight and bias, perhaps none. All ranks get the bits of one loss. Backward is local but for the
            gradient of hidden, which is summed over the ranks, so that all of them must take part in it, or none.
        first_class: the first class of this rank's shard; rank * C by default, for shards of one size. Checked on a
            CPU, and on a GPU with ``FLASHPOINTER_CHECK=1``.
        weight_grad: takes the gradient of weight in place of ``weight.grad``, which stays as it is: called in backward
            as ``weight_grad(first, gradient)``, with ascending first, and gradient ``[n, D]`` that of
            ``weight[first : first + n]`` in float32 (float64 for float64), in memory that the next call overwrites. An
            optimiser's step in it, on those rows, saves the memory of the whole gradient. It is the gradient of this
            call's rows: whoever splits a batch over ranks adds it up over them there. Not for DTensors whose rows are
            sharded; where their classes are, ``first`` counts those of this rank.

    Returns:
        float32, or float64 for float64 hidden.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value. On a GPU an index beyond the last
            class is dropped, and a label that is none makes the loss of its row NaN; the environment variable
            ``FLASHPOINTER_CHECK=1`` makes both errors there too.
        RuntimeError: for second derivatives, forward mode, torch.func; for weight_grad under torch.compile.

    References:
        Su et al. 2022, *ZLPR: A Novel Loss for Multi-label Classification*, arXiv:2208.02955. Soft labels:
        https://kexue.fm/archives/9064
    """
    _linear.check(OP, hidden, weight, bias)
    _checks.check_lists(OP, positives, ignore_index, hidden, "hidden")
    _check_labels(positive_labels, positives, hidden)
    _checks.check_reduction(OP, reduction)
    if weight_grad is not None and not callable(weight_grad):
        raise TypeError(f"{OP}: weight_grad takes a function, or None; got {_checks.describe(weight_grad)}")
    positives = positives.long()  # their dtype may be too small for the number of classes, or for ignore_index
    tensors = (hidden, weight, bias, positives, positive_labels)
    if _checks.is_batched(*tensors):
        raise RuntimeError(f"{OP}: torch.func.vmap is not supported; hidden may have any leading dimensions")
    summed = not isinstance(group, _shards.Apart)
    if isinstance(group, _shards.Apart):
        group = group.group
    ranks = _shards.name_of(OP, group, first_class)
    backend = _checks.choose_backend(OP, hidden, weight, bias, positive_labels)
    if hidden.dtype != torch.float64 and _checks.in_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))  # type: ignore[assignment]
    if backend == "reference":
        _shards.refuse_reference(OP, group)
        if weight_grad is not None:
            raise ValueError(f"{OP}: weight_grad takes None under the reference backend, whose gradients are PyTorch's")
        if not torch.compiler.is_compiling():  # which would have to break the graph to look
            _check_values(positives, positive_labels, ignore_index, len(weight))
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
        with _checks.without_autocast(hidden):
            return reference.linear_zlpr_loss(
                hidden, weight, positives, bias, positive_labels=positive_labels, **options
            )
    shard = _shards.Shard(0, len(weight))
    if group is not None:
        same = {_shards.rows_of("hidden"): hidden.shape[:-1].numel()}
        if summed:
            same_wish = "hidden must require a gradient on all ranks of the group or on none; got"
            same[same_wish] = _register.wants_gradient(hidden)
        _shards.check_same(OP, same, group, hidden.device)
        shard = _shards.shard_of(OP, first_class, len(weight), group, hidden.device)
    plain = _register._is_plain(tensors)
    if weight_grad is not None and not plain:
        raise RuntimeError(
            f"{OP}: weight_grad is a function, which torch.compile, tracers, modes, transforms and tensor subclasses "
            "cannot hand on; use weight.grad there"
        )
    # What an op of PyTorch's returned, its backward may not write into.
    keep = plain and weight_grad is None and _register.wants_gradient(weight)
    arguments = (hidden, weight, positives, bias, positive_labels, reduction, ignore_index, ranks, summed, *shard)
    loss: torch.Tensor = _op(*arguments, keep, backend, *([] if weight_grad is None else [weight_grad]))[0]
    return loss


def _check_labels(labels: object, positives: torch.Tensor, hidden: torch.Tensor) -> None:
    if labels is None:
        return
    _checks.check_tensor(OP, "positive_labels", labels, "a floating-point tensor [..., P]", _checks.FLOATS)
    assert isinstance(labels, torch.Tensor)
    if labels.shape != positives.shape:
        takes = f"of the shape of positives, {tuple(positives.shape)}"
        raise ValueError(f"{OP}: positive_labels must be {takes}; got {_checks.describe(labels)}")
    _checks.check_device(OP, "positive_labels", labels, hidden, "hidden")
    _checks.check_no_grad(OP, "positive_labels", labels, "use positive_labels.detach()")


def _check_values(positives: torch.Tensor, labels: torch.Tensor | None, ignore_index: int, classes: int | None) -> None:
    """Raises ValueError for an index beyond the last of the classes, where their number is known, or a label that is
    none; on a GPU, where to look is to wait, on demand."""
    if classes is not None:
        _checks.check_indices(OP, positives, ignore_index, classes, "weight")
    if labels is not None and _checks.can_look(labels):
        wrong = _wrong_labels(positives, labels, ignore_index)
        _checks.refuse(OP, "positive_labels", "0 to 1, or -100 for a cell to leave out", labels, wrong)


def _wrong_labels(positives: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return _checks.wrong_labels(labels) & (positives >= 0) & (positives != ignore_index)


# --- registration --------------------------------------------------------------------------------------------------


def _compute(
    hidden: torch.Tensor, weight: torch.Tensor, positives: torch.Tensor, bias: torch.Tensor | None,
    labels: torch.Tensor | None, reduction: str, ignore_index: int, group: str | None, summed: bool, first: int,
    classes: int | None, keep: bool, backend: str, weight_grad: WeightGrad | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """The loss, and what backward takes: the listed cells, their exponents, the sums, and E."""
    _check_values(positives, labels, ignore_index, classes)
    lead, lists = hidden.shape[:-1], (hidden.shape[:-1].numel(), positives.shape[-1])
    with _checks.without_autocast(hidden):
        given = Lists(positives.reshape(lists), None if labels is None else labels.reshape(lists), ignore_index, first)
        sums, listed, x, kept = backends.implementation(OP, backend).forward(
            _rows_of(hidden), weight, bias, given, keep
        )
        if group is not None:
            sums = _shards.merge(sums, group)
        if labels is not None and not _checks.can_look(labels):
            wrong = _wrong_labels(positives, labels, ignore_index).any(-1).view(lists[:1])
            sums = sums._replace(S_p=sums.S_p.masked_fill(wrong, torch.nan))
        loss = _rows.reduce(_shards.value(sums), lead, reduction)
    listed_labels = x.new_empty(0) if listed.labels is None else listed.labels
    return loss, [listed.rows, listed.classes, listed_labels, x, *sums, kept]


def _rows_of(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, positives: torch.Tensor, bias: torch.Tensor | None,
    labels: torch.Tensor | None, reduction: str, ignore_index: int, group: str | None, summed: bool, first: int,
    classes: int | None, keep: bool, backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    loss = _rows.fake_loss(hidden, reduction)
    rows, listed = math.prod(hidden.shape[:-1]), positives.numel()  # Size.numel would make one graph for each size
    listed_labels = loss.new_empty(0) if labels is None else labels.new_empty(listed)
    cells = [positives.new_empty(listed, dtype=torch.int64) for _ in range(2)]
    sums = [loss.new_empty(rows) for _ in LogSums._fields]
    kept = weight.new_empty(weight.shape if keep else 0)
    return loss, [*cells, listed_labels, loss.new_empty(listed), *sums, kept]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    hidden, weight, _, bias, labels, ctx.reduction, _, group, summed, _, _, _, ctx.backend, *weight_grad = inputs
    ctx.sums_over = group if summed else None
    ctx.soft, ctx.weight_grad, ctx.arguments = labels is not None, (*weight_grad, None)[0], len(inputs)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, *output[1])


def _backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    _register.refuse_second_derivative(OP)
    grads: list[torch.Tensor | None] = [None] * ctx.arguments
    if upstream is None:
        return tuple(grads)
    if _checks.is_batched(upstream):
        raise RuntimeError(f"{OP}: many upstream gradients at once (is_grads_batched, vectorize) are not supported")
    hidden, weight, bias, *saved, kept = ctx.saved_tensors
    places = (0, 1, 3)  # of hidden, weight and bias
    wanted = [ctx.needs_input_grad[place] for place in places]
    arguments = (upstream, hidden, weight, bias, saved, ctx.soft, ctx.reduction, ctx.sums_over, wanted, ctx.backend)
    overwrite = kept.numel() > 0 and not _register.wanted_again(ctx, kept, upstream)
    if overwrite or ctx.weight_grad is not None:  # neither of which an op of PyTorch's can
        computed = _compute_backward(*arguments, kept if overwrite else None, ctx.weight_grad)
    else:
        computed = _op_backward(*arguments)
    for place, want, grad in zip(places, wanted, computed, strict=True):
        grads[place] = grad if want and not (place == 1 and ctx.weight_grad is not None) else None
    return tuple(grads)


def _compute_backward(
    upstream: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    saved: list[torch.Tensor], soft: bool, reduction: str, sums_over: str | None, wanted: list[bool], backend: str,
    kept: torch.Tensor | None = None, weight_grad: WeightGrad | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    rows, classes, labels, x, *sums = saved
    lead = hidden.shape[:-1]
    share = _rows.share_of(lead, reduction)
    with _checks.without_autocast(hidden):
        grad_hidden, grad_weight, grad_bias = backends.implementation(OP, backend).backward(
            _rows_of(hidden), weight, bias, Listed(rows, classes, labels if soft else None), x,
            weight.new_empty(0) if kept is None else kept, LogSums(*sums), upstream.expand(lead).reshape(-1) * share,
            tuple(wanted), weight_grad,
        )  # fmt: skip
    if grad_hidden is not None:
        if sums_over is not None:
            grad_hidden = _shards.add_up(grad_hidden, sums_over)
        grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (grad_hidden, grad_weight, grad_bias))


def _fake_backward(
    upstream: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    saved: list[torch.Tensor], soft: bool, reduction: str, sums_over: str | None, wanted: list[bool], backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(
        of.new_empty(of.shape) if want and of is not None else saved[3].new_empty(0)
        for of, want in zip((hidden, weight, bias), wanted, strict=True)
    )


_op_backward = _register.register(
    "linear_zlpr_loss_backward(Tensor upstream, Tensor hidden, Tensor weight, Tensor? bias, Tensor[] saved, bool soft,"
    " str reduction, str? sums_over, bool[] wanted, str backend)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _compute_backward,
    _fake_backward,
)
_op = _register.register(
    "linear_zlpr_loss(Tensor hidden, Tensor weight, Tensor positives, Tensor? bias, Tensor? labels, str reduction,"
    " int ignore_index, str? group, bool summed, SymInt first, SymInt? classes, bool keep, str backend)"
    " -> (Tensor loss, Tensor[] saved)",
    _compute,
    _fake,
    _setup_context,
    _backward,
)
