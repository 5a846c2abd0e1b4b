"""``zlpr_kl_div``: the symmetric KL divergence between two score vectors."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from ..tiled._tiles import one_tile
from . import _checks, _dtensor, _register, _rows

OP = "zlpr_kl_div"


@_dtensor.of_rows("scores", "other", "mask")
def zlpr_kl_div(
    scores: torch.Tensor,
    other: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Symmetric KL divergence between two score vectors of multi-label classifiers, for R-Drop and distillation.

    For each row, with f = sigmoid::

        D(s, t) = sum_i (f(s_i) - f(t_i)) (s_i - t_i)

    Tensors may be DTensors that are sharded by rows: docs/distributed.md.

    Args:
        scores: ``[..., C]``, float16, bfloat16, float32 or float64.
        other: the same shape and dtype. Gradients flow to both, where they require any.
        mask: bool, broadcastable to the shape of scores: False leaves a cell out, whatever it holds. A cell where both
            scores are -inf, invalid in both, is left out too.
        reduction: ``"none"`` gives ``[...]``; ``"sum"``; ``"mean"`` over the rows, 0 over no rows.

    Returns:
        float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
        RuntimeError: for second derivatives, forward mode, and torch.func but vmap.

    References:
        https://kexue.fm/archives/9039
    """
    _checks.check_scores(OP, scores)
    _checks.check_scores(OP, other, "other")
    if other.shape != scores.shape or other.dtype != scores.dtype:
        takes = f"the shape and dtype of scores, {_checks.describe(scores)}"
        raise ValueError(f"{OP}: other must have {takes}; got {_checks.describe(other)}")
    _checks.check_device(OP, "other", other, scores)
    mask = _checks.check_mask(OP, mask, scores)
    _checks.check_reduction(OP, reduction)
    backend = _checks.choose_backend(OP, scores, other)
    if backend == "reference":
        return reference.zlpr_kl_div(scores, other, mask, reduction)
    needed = _register.wants_gradient(scores), _register.wants_gradient(other)
    # On tiles one sweep makes losses and gradients. Kernels make gradients in registers and store none, nor do tiles in
    # float16: small ones would be lost before the loss scale of AMP can lift them, and large ones cannot be lifted.
    at_once = backend == "tiled" and any(needed) and scores.dtype != torch.float16
    loss: torch.Tensor = (
        _op_with_gradient(scores, other, mask, reduction, *needed)[0]
        if at_once
        else _op(scores, other, mask, reduction, backend)
    )
    return loss


def _compute(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, reduction: str, backend: str
) -> torch.Tensor:
    as_it_is = backend == "tiled" and one_tile(scores, mask)
    rows = (scores, other, mask) if as_it_is else _rows.fold(scores, other, mask)
    losses = backends.implementation(OP, backend).forward(*rows)
    return _rows.reduce(losses, scores.shape[:-1], reduction)


def _compute_backward(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, upstream: torch.Tensor, reduction: str,
    need_scores: bool, need_other: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    lead = scores.shape[:-1]
    upstream, share = upstream.expand(lead).reshape(-1), _rows.share_of(lead, reduction)
    grads = backends.implementation(OP, backend).backward(
        *_rows.fold(scores, other, mask), upstream, share, need_scores, need_other
    )
    return tuple(
        grad.view(scores.shape) if needed else grad
        for grad, needed in zip(grads, (need_scores, need_other), strict=True)
    )


def _fake_backward(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, upstream: torch.Tensor, reduction: str,
    need_scores: bool, need_other: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return scores.new_empty(scores.shape if need_scores else 0), other.new_empty(other.shape if need_other else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    scores, other, mask, ctx.reduction, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, other, mask)


def _backward(ctx: Any, upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    _register.refuse_second_derivative(OP)
    need_scores, need_other = ctx.needs_input_grad[:2]
    if upstream is None:
        return None, None, None, None, None
    grad_scores, grad_other = _op_backward(
        *ctx.saved_tensors, upstream, ctx.reduction, need_scores, need_other, ctx.backend
    )
    return grad_scores if need_scores else None, grad_other if need_other else None, None, None, None


_op_backward = _register.register(
    "zlpr_kl_div_backward(Tensor scores, Tensor other, Tensor? mask, Tensor upstream, str reduction, bool need_scores,"
    " bool need_other, str backend) -> (Tensor grad_scores, Tensor grad_other)",
    _compute_backward,
    _fake_backward,
)
_op = _register.register(
    "zlpr_kl_div(Tensor scores, Tensor other, Tensor? mask, str reduction, str backend) -> Tensor",
    _compute,
    lambda scores, other, mask, reduction, backend: _rows.fake_loss(scores, reduction),
    _setup_context,
    _backward,
)


# --- the loss whose forward computes the gradients -----------------------------------------------------------------


def _compute_with_gradient(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, reduction: str, need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    rows = (scores, other, mask) if one_tile(scores, mask) else _rows.fold(scores, other, mask)
    share = _rows.share_of(scores.shape[:-1], reduction)
    losses, *grads = backends.implementation(OP, "tiled").forward_with_gradients(*rows, share, need_scores, need_other)
    return _rows.reduce(losses, scores.shape[:-1], reduction), *(
        grad.view(scores.shape) if needed and grad.shape != scores.shape else grad
        for grad, needed in zip(grads, (need_scores, need_other), strict=True)
    )


def _fake_with_gradient(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, reduction: str, need_scores: bool,
    need_other: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    grads = _fake_backward(scores, other, mask, scores, reduction, need_scores, need_other, "tiled")
    return _rows.fake_loss(scores, reduction), *grads


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    _register.refuse_second_derivative(OP)
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    grads = [
        _rows.scaled(ctx, grad, upstream, 1.0, "tiled") if need and upstream is not None else None
        for grad, need in needed
    ]
    return *grads, None, None, None, None


_op_with_gradient = _register.register(
    "zlpr_kl_div_with_gradient(Tensor scores, Tensor other, Tensor? mask, str reduction, bool need_scores,"
    " bool need_other) -> (Tensor loss, Tensor grad_scores, Tensor grad_other)",
    _compute_with_gradient,
    _fake_with_gradient,
    _save_gradients,
    _scale_gradients,
)
