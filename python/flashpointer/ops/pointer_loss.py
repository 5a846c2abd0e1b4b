"""``pointer_loss``: the ZLPR loss of all spans, without their scores."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from . import _checks, _pointer, _rows

OP = "pointer_loss"


def pointer_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    spans: torch.Tensor,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    rope: bool = True,
    tril_mask: bool = True,
    max_width: int | None = None,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
    span_labels: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The ZLPR loss of the scores that ``pointer_scores`` gives, with the labels as a list of spans.

    For each sentence b and head h, over its valid cells (start, end) with scores s and labels t, which are 0 but for
    the listed spans::

        L[b, h] = log(1 + sum (1 - t) exp(s)) + log(1 + sum t exp(-s))

    Neither the scores nor the labels are ever stored: memory is linear in the length of a sentence, forward and
    backward, and where the heads share q and k, the time hardly depends on their number.

    Args:
        q, k, start, end, mask, rope, tril_mask, max_width, scale, positions: as for ``pointer_scores``.
        spans: int64 ``[S, 4]``, rows (batch, head, start, end), end inclusive, in any order: ``flashpointer.spans``
            makes them. Of one that is listed twice only the first listing counts; one on an invalid cell leaves both
            terms, as its cell does.
        span_labels: floating-point ``[S]``, in [0, 1]: the labels t of the spans, 1 by default; -100 leaves the cell of
            a span out of both terms. All other cells are 0: smoothing the labels of those is not offered.
        reduction: ``"none"`` gives ``[B, H]``; ``"sum"``; ``"mean"`` over ``B * H``, 0 over none.

    Returns:
        float32, or float64 for float64 q. A sentence without a valid cell has loss 0 and gradient 0; NaN in a sentence
        makes its own losses NaN.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value. On a GPU a span outside
            ``[B, H, N, N]`` is dropped; the environment variable ``FLASHPOINTER_CHECK=1`` makes it an error there too.
        RuntimeError: for second derivatives, forward mode, and torch.func but vmap.

    References:
        Su et al. 2022, *ZLPR: A Novel Loss for Multi-label Classification*, arXiv:2208.02955; *Global Pointer: Novel
        Efficient Span-based Approach for Named Entity Recognition*, arXiv:2208.03054.
    """
    q, k, start, end, mask, heads, scale = _pointer.check(
        OP, q, k, start, end, mask=mask, positions=positions, rope=rope, tril_mask=tril_mask, max_width=max_width,
        scale=scale,
    )  # fmt: skip
    _check_spans(spans, span_labels, q)
    _checks.check_reduction(OP, reduction)
    backend = _checks.choose_backend(OP, q, k, start, end)
    if backend == "reference":
        if not torch.compiler.is_compiling():  # which would have to break the graph to look
            _check_values(spans, span_labels, q, heads)
        return reference.pointer_loss(
            q, k, spans, start, end, mask=mask, rope=rope, tril_mask=tril_mask, max_width=max_width, scale=scale,
            positions=positions, span_labels=span_labels, reduction=reduction,
        )  # fmt: skip
    arguments = (
        q, k, start, end, spans, span_labels, mask, positions, rope, tril_mask, max_width, scale, heads, reduction,
    )  # fmt: skip
    loss: torch.Tensor
    # Where one upstream gradient scales them all, forward can compute the gradients: on tiles, which have cells at hand
    # and compute in float32. Kernels keep no cell, and a gradient in float16 underflows before AMP has scaled it.
    if backend == "tiled" and reduction != "none" and _rows.wants_gradient(q, k, start, end):
        loss = _op_with_gradient(*arguments)[0]
    else:
        loss = _op(*arguments, backend)[0]
    return loss


def _check_spans(spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor) -> None:
    _checks.check_tensor(OP, "spans", spans, "an int64 tensor [S, 4]", [torch.int64])
    if spans.dim() != 2 or spans.shape[1] != 4:
        raise ValueError(f"{OP}: spans must be [S, 4]; got {_checks.describe(spans)}")
    _pointer.check_device(OP, "spans", spans, q)
    if span_labels is None:
        return
    _checks.check_tensor(OP, "span_labels", span_labels, "a floating-point tensor [S]", _checks.FLOATS)
    if span_labels.shape != spans.shape[:1]:
        takes = f"[S], one for each of the {spans.shape[0]} spans"
        raise ValueError(f"{OP}: span_labels must be {takes}; got {_checks.describe(span_labels)}")
    _pointer.check_device(OP, "span_labels", span_labels, q)
    _checks.check_no_grad(OP, "span_labels", span_labels, "use span_labels.detach()")


def _check_values(spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor, heads: int) -> None:
    """Raises ValueError for a span or label out of range; on a GPU, where to look is to wait, on demand."""
    if spans.numel() == 0 or not _checks.can_look(spans):
        return
    sizes = (q.shape[0], heads, q.shape[-2], q.shape[-2])
    least, most = (x.tolist() for x in spans.aminmax(dim=0))
    if min(least) < 0 or any(x >= size for x, size in zip(most, sizes, strict=True)):
        where = int(((spans < 0) | (spans >= spans.new_tensor(sizes))).any(1).nonzero()[0])
        raise ValueError(
            f"{OP}: spans takes rows (batch, head, start, end) below {sizes}; got {tuple(spans[where].tolist())} "
            f"at {where}"
        )
    if span_labels is not None:
        wrong = ~(((span_labels >= 0) & (span_labels <= 1)) | (span_labels == -100))
        if wrong.any():
            where = int(wrong.nonzero()[0])
            takes = "0 to 1, or -100 for a cell to leave out"
            raise ValueError(f"{OP}: span_labels takes {takes}; got {span_labels[where].item()} at {where}")


# --- registration --------------------------------------------------------------------------------------------------


def _compute(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool,
    tril_mask: bool, max_width: int | None, scale: float, heads: int, reduction: str, backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    _check_values(spans, span_labels, q, heads)
    problem = _pointer.Problem(mask, positions, rope, tril_mask, max_width, scale)
    module = backends.implementation(OP, backend)
    with _pointer.without_autocast(q):
        losses, saved = module.forward(*_pointer.per_head(q, k), start, end, spans, span_labels, heads, problem)
    return _rows.reduce(losses, losses.shape, reduction), list(saved[:1] if backend == "triton" else saved)


def _fake(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool,
    tril_mask: bool, max_width: int | None, scale: float, heads: int, reduction: str, backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    batch, own_heads, length, size = _pointer.per_head(q)[0].shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    loss = q.new_empty((batch, heads) if reduction == "none" else (), dtype=dtype)
    if backend == "triton":
        shape = (batch, own_heads, length, size, heads, spans.shape[0])
        workspace = backends.implementation(OP, backend).saved_shape(shape, q.dtype)
        return loss, [q.new_empty(workspace, dtype=torch.uint8)]
    vectors, of_heads, listed = (
        ((batch, own_heads, length, size), dtype),
        ((batch, heads, length), dtype),
        spans.shape[:1],
    )
    saved = {
        "q": vectors,
        "k": vectors,
        "exponents": of_heads,
        "values": of_heads,
        "pivots": ((batch, own_heads, length), dtype),
        "rows": of_heads,
        "log_sums": ((2, batch, heads), dtype),
        "cells": (listed, torch.int64),
        "labels": ((2, *listed), dtype),
    }
    return loss, [q.new_empty(shape, dtype=dtype) for shape, dtype in saved.values()]


def _share(reduction: str, planes: torch.Size) -> float:
    return 1.0 / max(1, planes.numel()) if reduction == "mean" else 1.0


def _compute_backward(
    upstream: torch.Tensor, saved: list[torch.Tensor], start: torch.Tensor | None, end: torch.Tensor | None,
    mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool, tril_mask: bool, max_width: int | None,
    scale: float, shape: list[int], reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = _pointer.Problem(mask, positions, rope, tril_mask, max_width, scale)
    module = backends.implementation(OP, backend)
    planes = torch.Size((shape[0], shape[4]))
    kept = module.Saved(*saved, tuple(shape)) if backend == "triton" else module.Saved(*saved)
    with _pointer.without_autocast(upstream):
        grads = module.backward(upstream.expand(planes), _share(reduction, planes), kept, start, end, dtype, problem)
    d_q, d_k, d_start, d_end = grads
    return d_q, d_k, d_start, d_end


def _fake_backward(
    upstream: torch.Tensor, saved: list[torch.Tensor], start: torch.Tensor | None, end: torch.Tensor | None,
    mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool, tril_mask: bool, max_width: int | None,
    scale: float, shape: list[int], reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, own_heads, length, size, heads, _ = shape
    d_q, d_k = (upstream.new_empty((batch, own_heads, length, size), dtype=dtype) for _ in range(2))
    d_start, d_end = (upstream.new_empty((batch, heads, length), dtype=dtype) for _ in range(2))
    return d_q, d_k, d_start, d_end


def _refuse(upstream: torch.Tensor | None) -> None:
    _rows.refuse_second_derivative(OP)
    if upstream is not None and _checks.is_batched(upstream):
        raise RuntimeError(f"{OP}: many upstream gradients at once (is_grads_batched, vectorize) are not supported")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    q, _, start, end, spans, _, mask, positions, *options = inputs
    *problem, heads, reduction, backend = options
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(start, end, mask, positions, *output[1])
    shape = [*_pointer.per_head(q)[0].shape, heads, spans.shape[0]]
    ctx.shared, ctx.options = q.dim() == 3, (*problem, shape, reduction, q.dtype, backend)


def _backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    _refuse(upstream)
    if upstream is None:
        return (None,) * 15
    start, end, mask, positions, *saved = ctx.saved_tensors
    grads = _op_backward(upstream, saved, start, end, mask, positions, *ctx.options)
    d_q, d_k = (x.squeeze(1) if ctx.shared else x for x in grads[:2])
    needed = zip((d_q, d_k, *grads[2:]), ctx.needs_input_grad[:4], strict=True)
    return (*(grad if need else None for grad, need in needed), *(None,) * 11)


_op_backward = _rows.register(
    "pointer_loss_backward(Tensor upstream, Tensor[] saved, Tensor? start, Tensor? end, Tensor? mask,"
    " Tensor? positions, bool rope, bool tril_mask, int? max_width, float scale, SymInt[] shape, str reduction,"
    " ScalarType dtype, str backend) -> (Tensor d_q, Tensor d_k, Tensor d_start, Tensor d_end)",
    _compute_backward,
    _fake_backward,
)
_op = _rows.register(
    "pointer_loss(Tensor q, Tensor k, Tensor? start, Tensor? end, Tensor spans, Tensor? span_labels, Tensor? mask,"
    " Tensor? positions, bool rope, bool tril_mask, int? max_width, float scale, SymInt heads, str reduction,"
    " str backend) -> (Tensor loss, Tensor[] saved)",
    _compute,
    _fake,
    _setup_context,
    _backward,
)


# --- the loss whose forward computes the gradients -----------------------------------------------------------------


def _compute_with_gradient(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool,
    tril_mask: bool, max_width: int | None, scale: float, heads: int, reduction: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check_values(spans, span_labels, q, heads)
    problem = _pointer.Problem(mask, positions, rope, tril_mask, max_width, scale)
    tiled = backends.implementation(OP, "tiled")
    kept = tiled.Kept(tiled.KEPT)
    with _pointer.without_autocast(q):
        losses, saved = tiled.forward(*_pointer.per_head(q, k), start, end, spans, span_labels, heads, problem, kept)
        upstream, share = losses.new_ones(()).expand_as(losses), _share(reduction, losses.shape)
        d_q, d_k, d_start, d_end = tiled.backward(upstream, share, saved, start, end, losses.dtype, problem, kept)
    return _rows.reduce(losses, losses.shape, reduction), d_q.view(q.shape), d_k.view(q.shape), d_start, d_end


def _fake_with_gradient(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, mask: torch.Tensor | None, positions: torch.Tensor | None, rope: bool,
    tril_mask: bool, max_width: int | None, scale: float, heads: int, reduction: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    of_heads = (len(q), heads, q.shape[-2])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return tuple(q.new_empty(shape, dtype=dtype) for shape in ((), q.shape, q.shape, of_heads, of_heads))


def _setup_context_with_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype


def _backward_with_gradient(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    _refuse(upstream)
    if upstream is None:
        return (None,) * 14
    grads = ctx.saved_tensors
    scale = torch.Tensor.mul if _rows.wanted_again(grads[0], upstream) else torch.Tensor.mul_
    needed = zip(grads, ctx.needs_input_grad[:4], strict=True)
    return (*(scale(grad, upstream).to(ctx.dtype) if need else None for grad, need in needed), *(None,) * 10)


_op_with_gradient = _rows.register(
    "pointer_loss_with_gradient(Tensor q, Tensor k, Tensor? start, Tensor? end, Tensor spans, Tensor? span_labels,"
    " Tensor? mask, Tensor? positions, bool rope, bool tril_mask, int? max_width, float scale, SymInt heads,"
    " str reduction) -> (Tensor loss, Tensor d_q, Tensor d_k, Tensor d_start, Tensor d_end)",
    _compute_with_gradient,
    _fake_with_gradient,
    _setup_context_with_gradient,
    _backward_with_gradient,
)
