"""The checks that the ops on a linear layer share."""

from __future__ import annotations

import torch

from . import _checks


def check(op: str, hidden: object, weight: object, bias: object) -> None:
    """Raises TypeError or ValueError unless they are a layer's input [..., D], weight [C, D] and bias [C] or None."""
    _checks.check_tensor(op, "hidden", hidden, "a floating-point tensor [..., D]", _checks.FLOATS)
    assert isinstance(hidden, torch.Tensor)
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden takes at least one dimension, D; got {_checks.describe(hidden)}")
    _check_parameter(op, "weight", weight, hidden, "[C, D]")
    assert isinstance(weight, torch.Tensor)
    size = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != size:
        takes = f"[C, {size}], to fit hidden of shape {tuple(hidden.shape)}"
        raise ValueError(f"{op}: weight must be {takes}; got {_checks.describe(weight)}")
    if bias is None:
        return
    _check_parameter(op, "bias", bias, hidden, "[C]")
    assert isinstance(bias, torch.Tensor)
    if bias.shape != weight.shape[:1]:
        takes = f"[{weight.shape[0]}], to fit weight of shape {tuple(weight.shape)}"
        raise ValueError(f"{op}: bias must be {takes}; got {_checks.describe(bias)}")


def _check_parameter(op: str, name: str, value: object, hidden: torch.Tensor, shape: str) -> None:
    _checks.check_tensor(op, name, value, f"a floating-point tensor {shape}", _checks.FLOATS)
    assert isinstance(value, torch.Tensor)
    _checks.check_device(op, name, value, hidden, "hidden")
    if value.dtype != hidden.dtype and not _checks.in_autocast(hidden):
        takes = f"{hidden.dtype}, as hidden is, or autocast"
        raise ValueError(f"{op}: {name} takes {takes}; got {_checks.describe(value)}")
