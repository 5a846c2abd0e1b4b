"""Errors that name the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

REDUCTIONS = ("none", "sum", "mean")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(value: object) -> str:
    """What an error says of an argument it refuses."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(op: str, name: str, value: object, takes: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless ``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} takes {takes}; got {describe(value)}")


def check_scores(op: str, scores: object, name: str = "scores") -> None:
    check_tensor(op, name, scores, "a floating-point tensor [..., classes]", FLOATS)
    assert isinstance(scores, torch.Tensor)
    if scores.dim() == 0:
        raise ValueError(f"{op}: {name} takes at least one dimension, the classes; got {describe(scores)}")


def check_device(op: str, name: str, value: torch.Tensor, scores: torch.Tensor) -> None:
    if value.device != scores.device:
        raise ValueError(f"{op}: {name} must be on {scores.device}, where scores is; got {describe(value)}")


def check_no_grad(op: str, name: str, value: torch.Tensor, instead: str) -> None:
    if value.requires_grad:
        raise ValueError(f"{op}: {name} takes no gradient, but got a tensor that requires one; {instead}")


def check_mask(op: str, mask: object, scores: torch.Tensor) -> torch.Tensor | None:
    """The mask expanded to the shape of the scores."""
    if mask is None:
        return None
    check_tensor(
        op, "mask", mask, "a bool tensor, False where a cell is left out (of 0 and 1 use .bool())", [torch.bool]
    )
    assert isinstance(mask, torch.Tensor)
    check_device(op, "mask", mask, scores)
    lead = scores.dim() - mask.dim()
    if lead < 0 or any(m not in (1, s) for m, s in zip(mask.shape, scores.shape[lead:], strict=True)):
        raise ValueError(
            f"{op}: mask must broadcast to the shape of scores, {tuple(scores.shape)}; got {describe(mask)}"
        )
    return mask.expand(scores.shape)


def check_reduction(op: str, reduction: object) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction takes one of {', '.join(map(repr, REDUCTIONS))}; got {describe(reduction)}")
