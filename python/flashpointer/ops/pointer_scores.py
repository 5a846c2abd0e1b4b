"""``pointer_scores``: the scores of all spans, materialised."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from ..problem import Problem
from . import _checks, _dtensor, _pointer, _register

OP = "pointer_scores"


@_dtensor.of_sentences("q", "k", "start", "end", "mask", "positions")
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

    Tensors may be DTensors that are sharded by sentences: docs/distributed.md.

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
    q, k, start, end, problem, heads = _pointer.check(
        OP, q, k, start, end, mask=mask, positions=positions, rope=rope, tril_mask=tril_mask, max_width=max_width,
        scale=scale,
    )  # fmt: skip
    backend = _checks.choose_backend(OP, q, k, start, end)
    if backend == "reference":
        return reference.pointer_scores(q, k, start, end, **_pointer.for_reference(OP, problem))
    scores: torch.Tensor = _op(q, k, start, end, *problem, heads, backend)
    return scores


# --- registration --------------------------------------------------------------------------------------------------


def _compute(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, backend: str,
) -> torch.Tensor:  # fmt: skip
    scores: torch.Tensor = backends.implementation(OP, backend).forward(
        *_pointer.per_head(q, k), start, end, heads, problem
    )
    return scores


def _fake(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, backend: str,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], heads, q.shape[-2], q.shape[-2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, *_, ctx.backend = inputs
    return q, k


def _backward(ctx: Any, upstream: torch.Tensor, problem: Problem, saved: list[torch.Tensor]) -> Any:
    _, _, need_start, need_end, *_ = ctx.needs_input_grad
    return _op_backward(upstream, *saved, *problem, need_start, need_end, ctx.backend)


def _compute_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, problem: Problem, need_start: bool, need_end: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    d_q, d_k, d_start, d_end = backends.implementation(OP, backend).backward(
        grad, *_pointer.per_head(q, k), need_start, need_end, problem
    )
    return d_q.view(q.shape), d_k.view(k.shape), d_start, d_end


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, problem: Problem, need_start: bool, need_end: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    biases = (q.new_empty(grad.shape[:3] if needed else 0) for needed in (need_start, need_end))
    return q.new_empty(q.shape), k.new_empty(k.shape), *biases


_op_backward = _register.register_pointer_op(
    "pointer_scores_backward(Tensor grad, Tensor q, Tensor k, Problem problem, bool need_start, bool need_end,"
    " str backend) -> (Tensor d_q, Tensor d_k, Tensor d_start, Tensor d_end)",
    _compute_backward,
    _fake_backward,
)
_op = _register.register_pointer_op(
    "pointer_scores(Tensor q, Tensor k, Tensor? start, Tensor? end, Problem problem, SymInt heads, str backend)"
    " -> Tensor",
    _compute,
    _fake,
    _save,
    _backward,
)
