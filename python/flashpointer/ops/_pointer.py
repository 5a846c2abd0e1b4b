"""What the pointer ops share: the checks of their arguments, and one layout for both kinds of heads."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import Problem
from . import _checks

Bias = torch.Tensor | None


def check(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    start: Bias,
    end: Bias,
    *,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    rope: bool,
    tril_mask: bool,
    max_width: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, Bias, Bias, Problem, int]:
    """q, k, start and end in the dtype of autocast, the problem with the mask as given, and the number of heads.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
    """
    _checks.check_tensor(op, "q", q, "a floating-point tensor [B, N, D] or [B, H, N, D]", _checks.FLOATS)
    _checks.check_tensor(op, "k", k, "a floating-point tensor like q", _checks.FLOATS)
    for name, flag in (("rope", rope), ("tril_mask", tril_mask)):
        _checks.check_flag(op, name, flag)
    if q.dtype != torch.float64 and _checks.in_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, start, end = (None if x is None else x.to(dtype) for x in (q, k, start, end))  # type: ignore[assignment]
    heads = _check_shapes(op, q, k, start, end)
    _check_mask(op, mask, q)
    _check_positions(op, positions, q)
    if max_width is not None and not _checks.is_int(max_width, 1):
        raise ValueError(f"{op}: max_width takes an int of at least 1, or None; got {_checks.describe(max_width)}")
    if scale is not None and not _checks.is_number(scale):
        raise TypeError(f"{op}: scale takes a number, or None; got {_checks.describe(scale)}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return q, k, start, end, Problem(mask, positions, rope, tril_mask, max_width, scale), heads


def _check_shapes(
    op: str, q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None
) -> int:
    """The number of heads."""
    if q.dim() not in (3, 4) or q.shape[-1] % 2 or not 2 <= q.shape[-1] <= 256:
        raise ValueError(
            f"{op}: q must be [B, N, D] or [B, H, N, D] with an even D of at most 256; got {_checks.describe(q)}"
        )
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(
            f"{op}: k must have the shape and dtype of q, {_checks.describe(q)}; got {_checks.describe(k)}"
        )
    check_device(op, "k", k, q)
    heads = q.shape[1] if q.dim() == 4 else None
    for name, bias in (("start", start), ("end", end)):
        if bias is None:
            continue
        _checks.check_tensor(op, name, bias, f"a {q.dtype} tensor [B, H, N], as q is", [q.dtype])
        if bias.dim() != 3 or bias.shape[0] != q.shape[0] or bias.shape[2] != q.shape[-2]:
            takes = f"[{q.shape[0]}, H, {q.shape[-2]}], to fit q of shape {tuple(q.shape)}"
            raise ValueError(f"{op}: {name} must be {takes}; got {_checks.describe(bias)}")
        if heads is not None and bias.shape[1] != heads:
            raise ValueError(f"{op}: {name} must have {heads} heads, as q or start has; got {_checks.describe(bias)}")
        check_device(op, name, bias, q)
        heads = bias.shape[1]
    return 1 if heads is None else heads


def check_device(op: str, name: str, value: torch.Tensor, q: torch.Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, where q is; got {_checks.describe(value)}")


def _check_mask(op: str, mask: torch.Tensor | None, q: torch.Tensor) -> None:
    if mask is None:
        return
    takes = "a bool tensor [B, N], or one of 0 and 1"
    _checks.check_tensor(op, "mask", mask, takes, (torch.bool, *_checks.INTEGERS, *_checks.FLOATS))
    if mask.shape != (q.shape[0], q.shape[-2]):
        takes = f"[B, N] = {(q.shape[0], q.shape[-2])}, to fit q of shape {tuple(q.shape)}"
        raise ValueError(f"{op}: mask must be {takes}; got {_checks.describe(mask)}")
    check_device(op, "mask", mask, q)


def _check_positions(op: str, positions: torch.Tensor | None, q: torch.Tensor) -> None:
    if positions is None:
        return
    _checks.check_tensor(op, "positions", positions, "an integer tensor [N] or [B, N]", _checks.INTEGERS)
    if positions.shape not in ((q.shape[-2],), (q.shape[0], q.shape[-2])):
        takes = f"[N] or [B, N], to fit q of shape {tuple(q.shape)}"
        raise ValueError(f"{op}: positions must be {takes}; got {_checks.describe(positions)}")
    check_device(op, "positions", positions, q)


def kept_tokens(op: str, mask: torch.Tensor | None, *, look: bool) -> torch.Tensor | None:
    """A mask as bool: where it is 1, and nowhere else, for of an additive mask what is not 0 is the padding. None for
    one that keeps all, if ``look`` and to look costs nothing.

    Raises:
        ValueError: for one of other numbers than 0 and 1, if ``look`` and to look costs nothing.
    """
    if mask is None:
        return None
    kept = mask if mask.dtype == torch.bool else mask == 1
    look = look and _checks.can_look(mask)
    if look and kept.all():
        return None
    if look and mask.dtype != torch.bool:
        wrong = ~(kept | (mask == 0))
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: mask takes 1 (or True) for a token to keep and 0 (or False) for padding; got "
                f"{mask[where].item()} at {where}. Of an additive mask, 0 for a token to keep, mask == 0 makes one"
            )
    return kept


def for_reference(op: str, problem: Problem) -> dict[str, Any]:
    """The problem as the eager formulas take it; to look would break a graph."""
    return problem._replace(mask=kept_tokens(op, problem.mask, look=not torch.compiler.is_compiling()))._asdict()


def per_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, N, D] as [B, 1, N, D]."""
    return [x.unsqueeze(1) if x.dim() == 3 else x for x in tensors]
