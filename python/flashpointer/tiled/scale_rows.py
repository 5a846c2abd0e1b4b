"""Multiply the rows of a stored gradient by their upstream scalars, in place."""

from __future__ import annotations

import torch

from ._tiles import row_tiles


def scale_(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    """grad [rows, classes] times ``factor * upstream`` [rows]; on a CPU, which can look, not if all factors are 1."""
    scale = upstream.to(torch.promote_types(grad.dtype, torch.float32)).mul(factor).unsqueeze(-1)
    if grad.device.type == "cpu" and bool((scale == 1).all()):
        return
    for _, rows in row_tiles(1, *grad.shape):  # by tiles, for PyTorch multiplies a half through a float32 copy
        grad[rows].mul_(scale[rows])
