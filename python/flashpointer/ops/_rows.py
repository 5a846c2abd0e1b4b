"""What the ops on rows of scores share: shapes, reductions, stored gradients, and shards of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import backends
from ..problem import LogSums
from ..tiled._tiles import one_tile
from . import _shards
from ._register import refuse_second_derivative, register, wanted_again


def fold(*tensors: torch.Tensor | None) -> list[Any]:
    """Tensors [..., C] of one leading shape as [outer, inner, C], views wherever their strides allow.

    Two leading dimensions suffice for what is usual, a mask or labels broadcast along one of them, to need no copy.
    """
    present = [t for t in tensors if t is not None]
    lead = present[0].shape[:-1]
    for split in range(len(lead) + 1):
        try:
            return [None if t is None else t.view(*_fold_shape(t, split)) for t in tensors]
        except RuntimeError:
            continue
    return [None if t is None else t.reshape(_fold_shape(t, 0)) for t in tensors]


def _fold_shape(t: torch.Tensor, split: int) -> tuple[int, int, int]:
    return math.prod(t.shape[:split]), math.prod(t.shape[split:-1]), t.shape[-1]


def reduce(losses: torch.Tensor, lead: torch.Size, reduction: str) -> torch.Tensor:
    """losses [outer, inner] under the reduction; the mean over no rows is 0, as is the sum."""
    if reduction == "none":
        return losses if losses.shape == lead else losses.view(lead)
    return losses.mean() if reduction == "mean" and losses.numel() > 0 else losses.sum()


def fake_loss(scores: torch.Tensor, reduction: str) -> torch.Tensor:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(scores.shape[:-1] if reduction == "none" else (), dtype=dtype)


def share_of(lead: torch.Size, reduction: str) -> float:
    """What each of the losses [*lead] counts for in the reduced one."""
    return 1.0 / max(1, math.prod(lead)) if reduction == "mean" else 1.0


# A cell of a ZLPR gradient is between -1 and 1: so many times of it float16 can store, which has nothing below 2^-24.
LIFT = 2.0**15


def grad_scales(scores: torch.Tensor, reduction: str) -> tuple[float, float]:
    """How the mean's 1 / rows is split: (into the stored gradient, into backward).

    Into the stored gradient, so that backward after a plain mean has nothing left to do; but not in float16. There the
    gradient is lifted instead, or what is small in it would be lost before the loss scale of AMP can lift it.
    """
    share = share_of(scores.shape[:-1], reduction)
    return (LIFT, share / LIFT) if scores.dtype == torch.float16 else (share, 1.0)


# --- losses whose forward computes the gradient --------------------------------------------------------------------


def register_with_gradient(op: str, labels: str, extra: str, check: Callable[..., None]) -> Any:
    """Registers a loss of rows whose gradient is linear in one upstream scalar a row, so that forward can store it.

    ``labels`` names the second argument and ``extra`` the schema of what follows the common ones; ``check`` looks at
    the values of (scores, labels, mask, *extra). The op returns the reduced loss and the gradient, which is backward's
    alone: it is scaled in place. An op asked for no gradient returns an empty one.
    """

    def compute(
        scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, reduction: str, with_grad: bool,
        backend: str, *extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        check(scores, labels, mask, *extra)
        forward, as_it_is = backends.implementation(op, backend).forward, backend == "tiled" and one_tile(scores, mask)
        rows = (scores, labels, mask) if as_it_is else fold(scores, labels, mask)
        losses, grad = forward(*rows, grad_scales(scores, reduction)[0], with_grad, *extra)
        if with_grad and grad.shape != scores.shape:
            grad = grad.view(scores.shape)
        return reduce(losses, scores.shape[:-1], reduction), grad

    def fake(
        scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, reduction: str, with_grad: bool,
        backend: str, *extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return fake_loss(scores, reduction), scores.new_empty(scores.shape if with_grad else 0)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, reduction, backend = inputs[0], inputs[3], inputs[5]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.factor, ctx.backend, ctx.arguments = grad_scales(scores, reduction)[1], backend, len(inputs)

    def backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative(op)
        grad = None if upstream is None else scaled(ctx, ctx.saved_tensors[0], upstream, ctx.factor, ctx.backend)
        return (grad, *[None] * (ctx.arguments - 1))

    schema = f"Tensor scores, Tensor {labels}, Tensor? mask, str reduction, bool with_grad, str backend{extra}"
    return register(f"{op}({schema}) -> (Tensor loss, Tensor grad)", compute, fake, setup_context, backward)


def scaled(ctx: Any, grad: torch.Tensor, upstream: torch.Tensor, factor: float, backend: str) -> torch.Tensor:
    """A saved gradient times the upstream one: in place, not at all where that is 1, if nobody asks for it again."""
    if wanted_again(ctx, grad, upstream):
        product: torch.Tensor = grad * (upstream * factor).unsqueeze(-1)
        return product.to(grad.dtype)
    backends.implementation("scale_rows", backend).scale_(grad, upstream, factor)
    return grad


# --- losses of classes that are sharded over ranks -----------------------------------------------------------------


def register_sharded(op: str, labels: str, extra: str, check: Callable[..., None]) -> Any:
    """Registers the loss of rows whose classes are sharded over the ranks of a process group, as three ops: the
    log-sums of all classes, which is the one that communicates; the loss, whose log-sums are known; its backward, in
    which a rank computes the gradient of its own scores from these.

    Arguments as for ``register_with_gradient``. Returns what is called with (scores, labels, mask, reduction, group,
    backend, *extra), group the name of one.
    """
    inputs = f"Tensor scores, Tensor {labels}, Tensor? mask"

    def compute_sums(
        scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, group: str, backend: str, *extra: Any
    ) -> torch.Tensor:
        check(scores, labels, mask, *extra)
        parts = backends.implementation(op, backend).shard_log_sums(*fold(scores, labels, mask), *extra)
        return torch.stack(_shards.merge(_shards.merged(parts), group))

    def fake_sums(scores: torch.Tensor, *_: Any) -> torch.Tensor:
        return fake_loss(scores, "none").new_empty((4, math.prod(scores.shape[:-1])))

    def compute(
        scores: torch.Tensor, labels: torch.Tensor, mask: Any, sums: torch.Tensor, reduction: str, *_: Any
    ) -> Any:
        return reduce(_shards.value(LogSums(*sums)), scores.shape[:-1], reduction)

    def fake(scores: torch.Tensor, labels: torch.Tensor, mask: Any, sums: torch.Tensor, reduction: str, *_: Any) -> Any:
        return fake_loss(scores, reduction)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    def backward(ctx: Any, upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative(op)
        grad = None if upstream is None else gradient(*ctx.saved_tensors, upstream, *ctx.options)
        return (grad, *[None] * (3 + len(ctx.options)))

    def compute_gradient(
        scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, sums: torch.Tensor,
        upstream: torch.Tensor, reduction: str, backend: str, *extra: Any,
    ) -> torch.Tensor:  # fmt: skip
        share, factor = grad_scales(scores, reduction)
        grad: torch.Tensor = backends.implementation(op, backend).shard_gradient(
            *fold(scores, labels, mask), sums, share, *extra
        )
        grad = grad.view(scores.shape)
        backends.implementation("scale_rows", backend).scale_(grad, upstream, factor)
        return grad

    sums_of = register(f"{op}_log_sums({inputs}, str group, str backend{extra}) -> Tensor", compute_sums, fake_sums)
    gradient = register(
        f"{op}_sharded_backward({inputs}, Tensor sums, Tensor upstream, str reduction, str backend{extra}) -> Tensor",
        compute_gradient,
        lambda scores, *_: scores.new_empty(scores.shape),
    )
    loss_of = register(
        f"{op}_sharded({inputs}, Tensor sums, str reduction, str backend{extra}) -> Tensor",
        compute,
        fake,
        setup_context,
        backward,
    )

    def call(
        scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, reduction: str, group: str,
        backend: str, *extra: Any,
    ) -> torch.Tensor:  # fmt: skip
        sums = sums_of(scores.detach(), labels, mask, group, backend, *extra)
        loss: torch.Tensor = loss_of(scores, labels, mask, sums, reduction, backend, *extra)
        return loss

    return call
