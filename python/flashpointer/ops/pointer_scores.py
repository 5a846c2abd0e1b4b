"""``pointer_scores``: the scores of all spans, materialised."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from . import _checks, _pointer, _rows

OP = "pointer_scores"


def pointer_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    rope: bool = True,
    tril_mask: bool = True,
    max_width: int | None = None,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of all spans (m, n), for each head, as GlobalPointer and Efficient GlobalPointer define them::

        s[b, h, m, n] = scale * <R_m q[b, (h,) m], R_n k[b, (h,) n]> + start[b, h, m] + end[b, h, n]

    with R the rotary embedding over adjacent pairs, theta_i = 10000 ** (-2i / D).

    Args:
        q, k: ``[B, N, D]``, shared by all heads (Efficient GlobalPointer), or ``[B, H, N, D]`` (GlobalPointer):
            float16, bfloat16, float32 or float64, D even and at most 256. Under autocast they and the biases are cast
            as those of a matrix product are.
        start, end: ``[B, H, N]``, the dtype of q: each head's bias of a token as the first and as the last of a span.
        mask: ``[B, N]``, bool or 0 and 1: False for padding. No span starts or ends there. Not an additive one, of 0
            and -inf: on a CPU that is an error; on a GPU, without ``FLASHPOINTER_CHECK=1``, only 1 keeps a token.
        rope: whether q and k are turned.
        tril_mask: whether a span must end where it starts or later.
        max_width: at most so many tokens from first to last, both counted; None for no limit.
        scale: ``D ** -0.5`` by default.
        positions: ``[N]`` or ``[B, N]``, integer: the tokens' positions for RoPE; 0 to N - 1 by default.

    Returns:
        ``[B, H, N, N]`` in the dtype of q, -inf where no span can be. H is 1 if q, k are shared and unbiased.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
        RuntimeError: for second derivatives, forward mode, and torch.func but vmap.

    References:
        Su et al. 2022, *Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition*,
        arXiv:2208.03054; https://kexue.fm/archives/8373 and https://kexue.fm/archives/8877.
    """
    q, k, start, end, mask, heads, scale = _pointer.check(
        OP, q, k, start, end, mask=mask, positions=positions, rope=rope, tril_mask=tril_mask, max_width=max_width,
        scale=scale,
    )  # fmt: skip
    backend = _checks.choose_backend(OP, q, k, start, end)
    if backend == "reference":
        options = {"mask": mask, "rope": rope, "tril_mask": tril_mask, "max_width": max_width, "scale": scale}
        return reference.pointer_scores(q, k, start, end, positions=positions, **options)  # type: ignore[arg-type]
    scores: torch.Tensor = _op(q, k, start, end, mask, positions, rope, tril_mask, max_width, scale, heads, backend)
    return scores


# --- registration --------------------------------------------------------------------------------------------------


def _compute(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, mask: torch.Tensor | None,
    positions: torch.Tensor | None, rope: bool, tril_mask: bool, max_width: int | None, scale: float, heads: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    module = backends.implementation(OP, backend)
    problem = _pointer.Problem(mask, positions, rope, tril_mask, max_width, scale)
    with _pointer.without_autocast(q):
        scores: torch.Tensor = module.forward(*_pointer.per_head(q, k), start, end, heads, problem)
    return scores


def _compute_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None,
    rope: bool, tril_mask: bool, max_width: int | None, scale: float, need_start: bool, need_end: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    module = backends.implementation(OP, backend)
    problem = _pointer.Problem(mask, positions, rope, tril_mask, max_width, scale)
    with _pointer.without_autocast(q):
        d_q, d_k, d_start, d_end = module.backward(grad, *_pointer.per_head(q, k), need_start, need_end, problem)
    return d_q.view(q.shape), d_k.view(k.shape), d_start, d_end


def _fake(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, mask: torch.Tensor | None,
    positions: torch.Tensor | None, rope: bool, tril_mask: bool, max_width: int | None, scale: float, heads: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], heads, q.shape[-2], q.shape[-2]))


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None,
    rope: bool, tril_mask: bool, max_width: int | None, scale: float, need_start: bool, need_end: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    biases = (q.new_empty(grad.shape[:3] if needed else 0) for needed in (need_start, need_end))
    return (q.new_empty(q.shape), k.new_empty(k.shape), *biases)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, _, _, mask, positions, *ctx.options, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, mask, positions)


def _backward(ctx: Any, upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    _rows.refuse_second_derivative(OP)
    if upstream is None:
        return (None,) * 12
    needed = ctx.needs_input_grad[:4]
    grads = _op_backward(upstream, *ctx.saved_tensors, *ctx.options, needed[2], needed[3], ctx.backend)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 8)


_op_backward = _rows.register(
    "pointer_scores_backward(Tensor grad, Tensor q, Tensor k, Tensor? mask, Tensor? positions, bool rope,"
    " bool tril_mask, int? max_width, float scale, bool need_start, bool need_end, str backend)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_start, Tensor d_end)",
    _compute_backward,
    _fake_backward,
)
_op = _rows.register(
    "pointer_scores(Tensor q, Tensor k, Tensor? start, Tensor? end, Tensor? mask, Tensor? positions, bool rope,"
    " bool tril_mask, int? max_width, float scale, SymInt heads, str backend) -> Tensor",
    _compute,
    _fake,
    _setup_context,
    _backward,
)
