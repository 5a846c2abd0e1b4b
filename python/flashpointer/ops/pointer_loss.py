"""``pointer_loss``: the ZLPR loss of all spans, without their scores."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from ..problem import FEW, Problem, shape_per_head
from . import _checks, _dtensor, _pointer, _register, _rows

OP = "pointer_loss"


@_dtensor.of_sentences("q", "k", "spans", "start", "end", "mask", "positions", "span_labels")
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

    Tensors may be DTensors that are sharded by sentences: docs/distributed.md.

    Args:
        q, k, start, end, mask, rope, tril_mask, max_width, scale, positions: as for ``pointer_scores``.
        spans: int64 ``[S, 4]``, rows (batch, head, start, end), end inclusive, in any order: ``flashpointer.spans``
            makes them. Or batch-first ``[B, P, 3]``, rows (head, start, end), where a row with a negative entry is
            padding. Of a span that is listed twice only the first listing counts; one on an invalid cell leaves both
            terms, as its cell does.
        span_labels: floating-point ``[S]``, or ``[B, P]``, in [0, 1]: the labels t of the spans, 1 by default; -100
            leaves the cell of a span out of both terms. All other cells are 0: smoothing the labels of those is not
            offered.
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
    q, k, start, end, problem, heads = _pointer.check(
        OP, q, k, start, end, mask=mask, positions=positions, rope=rope, tril_mask=tril_mask, max_width=max_width,
        scale=scale,
    )  # fmt: skip
    _check_spans(spans, span_labels, q)
    _checks.check_reduction(OP, reduction)
    if _checks.is_batched(q, k, start, end, spans, span_labels, mask, positions):
        raise RuntimeError(f"{OP}: torch.func.vmap is not supported; q and k have a dimension for a batch")
    backend = _checks.choose_backend(OP, q, k, start, end, span_labels)
    if backend == "reference":
        if not torch.compiler.is_compiling():  # which would have to break the graph to look
            _check_values(spans, span_labels, q, heads)
        options: dict[str, Any] = {"span_labels": span_labels, "reduction": reduction}
        return reference.pointer_loss(q, k, spans, start, end, **_pointer.for_reference(OP, problem), **options)
    arguments = (q, k, start, end, spans, span_labels, *problem, heads, reduction)
    # Where one upstream gradient scales them all, forward can compute the gradients: on tiles, which have cells at hand
    # and compute in float32. Kernels keep no cell, and a gradient in float16 underflows before AMP has scaled it.
    at_once = backend == "tiled" and reduction != "none" and _register.wants_gradient(q, k, start, end)
    loss: torch.Tensor = _op_with_gradient(*arguments)[0] if at_once else _op(*arguments, backend)[0]
    return loss


def _check_spans(spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor) -> None:
    _checks.check_spans(OP, spans)
    if spans.dim() == 3 and spans.shape[0] != q.shape[0]:
        takes = f"[{q.shape[0]}, P, 3], for the sentences of q"
        raise ValueError(f"{OP}: spans must be {takes}; got {_checks.describe(spans)}")
    _pointer.check_device(OP, "spans", spans, q)
    if span_labels is None:
        return
    _checks.check_tensor(OP, "span_labels", span_labels, "a floating-point tensor [S] or [B, P]", _checks.FLOATS)
    if span_labels.shape != spans.shape[:-1]:
        takes = f"{tuple(spans.shape[:-1])}, one for each row of spans"
        raise ValueError(f"{OP}: span_labels must be {takes}; got {_checks.describe(span_labels)}")
    _pointer.check_device(OP, "span_labels", span_labels, q)
    _checks.check_no_grad(OP, "span_labels", span_labels, "use span_labels.detach()")


def _check_values(spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor, heads: int) -> None:
    """Raises ValueError for a span or label out of range; on a GPU, where to look is to wait, on demand."""
    if spans.numel() == 0 or not _checks.can_look(spans):
        return
    padded, length = spans.dim() == 3, q.shape[-2]
    sizes: tuple[int, ...] = (heads, length, length) if padded else (q.shape[0], heads, length, length)
    row = "(head, start, end)" if padded else "(batch, head, start, end)"
    least, most = _extremes(spans)
    if (min(least) < 0 and not padded) or any(x >= size for x, size in zip(most, sizes, strict=True)):
        negative, beyond = (spans < 0).any(-1), (spans >= spans.new_tensor(sizes)).any(-1)
        _refuse(spans, "spans", f"rows {row} below {sizes}", beyond & ~negative if padded else beyond | negative)
    if span_labels is not None:
        wrong = ~(((span_labels >= 0) & (span_labels <= 1)) | (span_labels == -100))
        if padded:
            wrong &= (spans >= 0).all(-1)
        _refuse(span_labels, "span_labels", "0 to 1, or -100 for a cell to leave out", wrong)


def _extremes(spans: torch.Tensor) -> tuple[list[int], list[int]]:
    """The least and the largest number of each column."""
    if spans.dim() == 2 and len(spans) <= FEW:
        columns = list(zip(*spans.tolist(), strict=True))
        return list(map(min, columns)), list(map(max, columns))
    least, most = spans.flatten(0, -2).aminmax(dim=0)
    return least.tolist(), most.tolist()


def _refuse(values: torch.Tensor, name: str, takes: str, wrong: torch.Tensor) -> None:
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        got, where = values[at], at[0] if len(at) == 1 else at
        raise ValueError(
            f"{OP}: {name} takes {takes}; got {tuple(got.tolist()) if got.dim() else got.item()} at {where}"
        )


# --- registration --------------------------------------------------------------------------------------------------


def _compute(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, problem: Problem, heads: int, reduction: str, backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    _check_values(spans, span_labels, q, heads)
    forward = backends.implementation(OP, backend).forward
    losses, saved = forward(q, k, start, end, spans, span_labels, heads, problem)
    return _rows.reduce(losses, losses.shape, reduction), list(saved.tensors())


def _fake(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, problem: Problem, heads: int, reduction: str, backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    loss = q.new_empty((q.shape[0], heads) if reduction == "none" else (), dtype=_loss_dtype(q))
    saved = backends.implementation(OP, backend).empty_saved(_shape(q, heads, spans), q)
    return loss, list(saved.tensors())


def _loss_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _shape(q: torch.Tensor, heads: int, spans: torch.Tensor) -> tuple[int, ...]:
    """B, own heads or 1, N, D, H, S: what every size follows from."""
    count = spans.shape[0] if spans.dim() == 2 else spans.shape[0] * spans.shape[1]
    return (*shape_per_head(q.shape), heads, count)


def _save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]
) -> tuple[torch.Tensor | None, ...]:
    q, _, start, end, spans, _, _, heads, ctx.reduction, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1])
    ctx.shape, ctx.of_q, ctx.dtype = _shape(q, heads, spans), q.shape, q.dtype
    return start, end, *output[1]


def _backward(ctx: Any, upstream: torch.Tensor, problem: Problem, saved: list[torch.Tensor]) -> Any:
    _refuse_many(upstream)
    start, end, *tensors = saved
    options = (ctx.shape, ctx.reduction, ctx.dtype, ctx.backend)
    d_q, d_k, d_start, d_end = _op_backward(upstream, tensors, start, end, *problem, *options)
    if d_q.shape != ctx.of_q:
        d_q, d_k = d_q.view(ctx.of_q), d_k.view(ctx.of_q)
    return d_q, d_k, d_start, d_end


def _refuse_many(upstream: torch.Tensor) -> None:
    if _checks.is_batched(upstream):
        raise RuntimeError(f"{OP}: many upstream gradients at once (is_grads_batched, vectorize) are not supported")


def _compute_backward(
    upstream: torch.Tensor, saved: list[torch.Tensor], start: torch.Tensor | None, end: torch.Tensor | None,
    problem: Problem, shape: list[int], reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    module, planes = backends.implementation(OP, backend), torch.Size((shape[0], shape[4]))
    kept, share = module.Saved(*saved, tuple(shape)), _rows.share_of(planes, reduction)
    upstream = upstream if upstream.shape == planes else upstream.expand(planes)
    grads: tuple[torch.Tensor, ...] = module.backward(upstream, share, kept, start, end, dtype, problem)
    return grads


def _fake_backward(
    upstream: torch.Tensor, saved: list[torch.Tensor], start: torch.Tensor | None, end: torch.Tensor | None,
    problem: Problem, shape: list[int], reduction: str, dtype: torch.dtype, backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    batch, own_heads, length, size, heads, _ = shape
    vectors = (batch, own_heads, length, size) if backend == "triton" else saved[0].shape[1:]
    biases = (batch, heads, length)
    return tuple(upstream.new_empty(of, dtype=dtype) for of in (vectors, vectors, biases, biases))


_op_backward = _register.register_pointer_op(
    "pointer_loss_backward(Tensor upstream, Tensor[] saved, Tensor? start, Tensor? end, Problem problem,"
    " SymInt[] shape, str reduction, ScalarType dtype, str backend)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_start, Tensor d_end)",
    _compute_backward,
    _fake_backward,
)
_op = _register.register_pointer_op(
    "pointer_loss(Tensor q, Tensor k, Tensor? start, Tensor? end, Tensor spans, Tensor? span_labels, Problem problem,"
    " SymInt heads, str reduction, str backend) -> (Tensor loss, Tensor[] saved)",
    _compute,
    _fake,
    _save,
    _backward,
)


# --- the loss whose forward computes the gradients -----------------------------------------------------------------


def _compute_with_gradient(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, problem: Problem, heads: int, reduction: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check_values(spans, span_labels, q, heads)
    tiled = backends.implementation(OP, "tiled")
    kept = tiled.Kept(tiled.KEPT)
    losses, saved = tiled.forward(q, k, start, end, spans, span_labels, heads, problem, kept)
    grads = tiled.gradients(None, saved, problem, kept, _rows.share_of(losses.shape, reduction))
    return _rows.reduce(losses, losses.shape, reduction), *grads


def _fake_with_gradient(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, spans: torch.Tensor,
    span_labels: torch.Tensor | None, problem: Problem, heads: int, reduction: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    biases = (q.shape[0], heads, q.shape[-2])
    return tuple(q.new_empty(of, dtype=_loss_dtype(q)) for of in ((), (2, *q.shape), biases, biases))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    return output[1:]


def _scale_gradients(ctx: Any, upstream: torch.Tensor, problem: Problem, saved: list[torch.Tensor]) -> Any:
    _refuse_many(upstream)
    again = _register.wanted_again(ctx, saved[0], upstream)
    if again or upstream.device.type != "cpu" or upstream.item() != 1.0:  # elsewhere to look is to wait
        scale = torch.Tensor.mul if again else torch.Tensor.mul_
        saved = [scale(x, upstream) for x in saved]
    d_vectors, d_start, d_end = (x if x.dtype == ctx.dtype else x.to(ctx.dtype) for x in saved)
    return *d_vectors.unbind(), d_start, d_end


_op_with_gradient = _register.register_pointer_op(
    "pointer_loss_with_gradient(Tensor q, Tensor k, Tensor? start, Tensor? end, Tensor spans, Tensor? span_labels,"
    " Problem problem, SymInt heads, str reduction)"
    " -> (Tensor loss, Tensor d_vectors, Tensor d_start, Tensor d_end)",
    _compute_with_gradient,
    _fake_with_gradient,
    _save_gradients,
    _scale_gradients,
)
