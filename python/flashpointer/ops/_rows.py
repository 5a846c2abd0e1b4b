"""What the ops on rows of scores share: their shapes, their reductions, their stored gradient, their registration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import backends

_library = torch.library.Library("flashpointer", "FRAGMENT")


def register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Registers ``flashpointer::<schema>`` for every device, and returns it.

    This is the low-level interface of torch.library, at half the cost of a call of ``custom_op``: CONTRIBUTING.md has
    the measured table.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashpointer::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"flashpointer::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.flashpointer, name).default


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
        return losses.view(lead)
    return losses.mean() if reduction == "mean" and losses.numel() > 0 else losses.sum()


def fake_loss(scores: torch.Tensor, reduction: str) -> torch.Tensor:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(scores.shape[:-1] if reduction == "none" else (), dtype=dtype)


def grad_scales(scores: torch.Tensor, reduction: str) -> tuple[float, float]:
    """How the mean's 1 / rows is split: (into the stored gradient, into backward).

    Into the stored gradient, so that backward after a plain mean has nothing left to do; but not in float16, where it
    would underflow before the loss scale of AMP can lift it.
    """
    share = 1.0 / max(1, scores.shape[:-1].numel()) if reduction == "mean" else 1.0
    return (1.0, share) if scores.dtype == torch.float16 else (share, 1.0)


# --- the stored gradient -------------------------------------------------------------------------------------------


def refuse_second_derivative(op: str) -> None:
    """Called in backward, where gradients are recorded only if somebody means to differentiate them again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: second derivatives are not supported (create_graph=True); "
            "flashpointer.use_backend('reference') has them"
        )


def save_gradient(ctx: Any, scores: torch.Tensor, reduction: str, backend: str, grad: torch.Tensor) -> None:
    """What a forward that computed its gradient leaves to ``stored_gradient``."""
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)
    ctx.factor, ctx.backend = grad_scales(scores, reduction)[1], backend


def stored_gradient(ctx: Any, op: str, upstream: torch.Tensor | None) -> torch.Tensor | None:
    """The saved gradient times the upstream one: in place, and at once where that is 1, if nobody can ask for it again."""
    refuse_second_derivative(op)
    if upstream is None:
        return None
    grad: torch.Tensor = ctx.saved_tensors[0]
    traced = type(grad) is not torch.Tensor  # by AOTAutograd, which takes no mutation here and fuses the product
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * (upstream * ctx.factor).unsqueeze(-1)).to(grad.dtype)
    rows = grad.shape[:-1]
    backends.implementation("scale_rows", ctx.backend).scale_(
        grad.view(rows.numel(), grad.shape[-1]), upstream.expand(rows).reshape(-1), ctx.factor
    )
    return grad
