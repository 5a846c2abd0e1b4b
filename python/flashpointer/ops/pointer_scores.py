"""``pointer_scores``: the scores of all spans, materialised."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, reference
from . import _checks, _rows

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
        mask: ``[B, N]``, bool or 0 and 1: False for padding. No span starts or ends there.
        rope: whether q and k are turned.
        tril_mask: whether a span must end where it starts or later.
        max_width: at most so many tokens from first to last, both counted; None for no limit.
        scale: ``D ** -0.5`` by default.
        positions: ``[N]`` or ``[B, N]``, integer: the tokens' positions for RoPE; 0 to N - 1 by default.

    Returns:
        ``[B, H, N, N]`` in the dtype of q, -inf where no span can be. H is 1 if q, k are shared and unbiased.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
        RuntimeError: for second derivatives.

    References:
        Su et al. 2022, *Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition*,
        arXiv:2208.03054; https://kexue.fm/archives/8373 and https://kexue.fm/archives/8877.
    """
    _checks.check_tensor(OP, "q", q, "a floating-point tensor [B, N, D] or [B, H, N, D]", _checks.FLOATS)
    _checks.check_tensor(OP, "k", k, "a floating-point tensor like q", _checks.FLOATS)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, start, end = (None if x is None else x.to(dtype) for x in (q, k, start, end))  # type: ignore[assignment]
    heads = _check_shapes(q, k, start, end)
    mask = _check_mask(mask, q)
    _check_positions(positions, q)
    if max_width is not None and (not isinstance(max_width, int) or max_width < 1):
        raise ValueError(f"{OP}: max_width takes an int of at least 1, or None; got {_checks.describe(max_width)}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"{OP}: scale takes a number, or None; got {_checks.describe(scale)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = backends.choose(q)
    if backend == "reference":
        options = {"mask": mask, "rope": rope, "tril_mask": tril_mask, "max_width": max_width, "scale": scale}
        return reference.pointer_scores(q, k, start, end, positions=positions, **options)  # type: ignore[arg-type]
    scores: torch.Tensor = _op(
        q, k, start, end, mask, positions, rope, tril_mask, max_width, float(scale), heads, backend
    )
    return scores


def _check_shapes(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None) -> int:
    """The number of heads."""
    if q.dim() not in (3, 4) or q.shape[-1] % 2 or not 2 <= q.shape[-1] <= 256:
        raise ValueError(
            f"{OP}: q must be [B, N, D] or [B, H, N, D] with an even D of at most 256; got {_checks.describe(q)}"
        )
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(
            f"{OP}: k must have the shape and dtype of q, {_checks.describe(q)}; got {_checks.describe(k)}"
        )
    _check_device("k", k, q)
    heads = q.shape[1] if q.dim() == 4 else None
    for name, bias in (("start", start), ("end", end)):
        if bias is None:
            continue
        _checks.check_tensor(OP, name, bias, f"a {q.dtype} tensor [B, H, N], as q is", [q.dtype])
        if bias.dim() != 3 or bias.shape[0] != q.shape[0] or bias.shape[2] != q.shape[-2]:
            takes = f"[{q.shape[0]}, H, {q.shape[-2]}], to fit q of shape {tuple(q.shape)}"
            raise ValueError(f"{OP}: {name} must be {takes}; got {_checks.describe(bias)}")
        if heads is not None and bias.shape[1] != heads:
            raise ValueError(f"{OP}: {name} must have {heads} heads, as q or start has; got {_checks.describe(bias)}")
        _check_device(name, bias, q)
        heads = bias.shape[1]
    return 1 if heads is None else heads


def _check_device(name: str, value: torch.Tensor, q: torch.Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"{OP}: {name} must be on {q.device}, where q is; got {_checks.describe(value)}")


def _check_mask(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    takes = "a bool tensor [B, N], or one of 0 and 1"
    _checks.check_tensor(OP, "mask", mask, takes, (torch.bool, *_checks.INTEGERS, *_checks.FLOATS))
    if mask.shape != (q.shape[0], q.shape[-2]):
        takes = f"[B, N] = {(q.shape[0], q.shape[-2])}, to fit q of shape {tuple(q.shape)}"
        raise ValueError(f"{OP}: mask must be {takes}; got {_checks.describe(mask)}")
    _check_device("mask", mask, q)
    return mask if mask.dtype == torch.bool else mask != 0


def _check_positions(positions: torch.Tensor | None, q: torch.Tensor) -> None:
    if positions is None:
        return
    _checks.check_tensor(OP, "positions", positions, "an integer tensor [N] or [B, N]", _checks.INTEGERS)
    if positions.shape not in ((q.shape[-2],), (q.shape[0], q.shape[-2])):
        takes = f"[N] or [B, N], to fit q of shape {tuple(q.shape)}"
        raise ValueError(f"{OP}: positions must be {takes}; got {_checks.describe(positions)}")
    _check_device("positions", positions, q)


# --- registration --------------------------------------------------------------------------------------------------


def _angles(
    q: torch.Tensor, positions: torch.Tensor | None, rope: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin [B or 1, N, D / 2] of the tokens' angles, from float64: 10^5 radians leave float32 two digits."""
    if not rope:
        return None, None
    length, size = q.shape[-2:]
    theta = 10000.0 ** (-torch.arange(0, size, 2, device=q.device, dtype=torch.float64) / size)
    positions = torch.arange(length, device=q.device) if positions is None else positions
    angle = positions.reshape(-1 if length else 1, length, 1) * theta
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)


def _compute(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, mask: torch.Tensor | None,
    positions: torch.Tensor | None, rope: bool, tril_mask: bool, max_width: int | None, scale: float, heads: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    module = backends.implementation(OP, backend)
    problem = module.Problem(mask, *_angles(q, positions, rope), tril_mask, max_width, scale)
    with torch.autocast(q.device.type, enabled=False):  # which would round what the tiles compute in float32
        scores: torch.Tensor = module.forward(*_per_head(q, k), start, end, heads, problem)
    return scores


def _compute_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None,
    rope: bool, tril_mask: bool, max_width: int | None, scale: float, need_start: bool, need_end: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    module = backends.implementation(OP, backend)
    problem = module.Problem(mask, *_angles(q, positions, rope), tril_mask, max_width, scale)
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_start, d_end = module.backward(grad, *_per_head(q, k), need_start, need_end, problem)
    return d_q.view(q.shape), d_k.view(k.shape), d_start, d_end


def _per_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, N, D] as [B, 1, N, D]."""
    return [x.unsqueeze(1) if x.dim() == 3 else x for x in tensors]


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
