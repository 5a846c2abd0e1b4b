"""Multiply the rows of a stored gradient by their upstream scalars, in place."""

from __future__ import annotations

import torch

from ._tiles import row_tiles


def scale_(grad: torch.Tensor, upstream: torch.Tensor, factor: float) -> None:
    """As ``kernels.scale_rows.scale_``; on a CPU, which can look, at once if all factors are 1."""
    if upstream.dim() == 0 and grad.device.type == "cpu":
        scalar = float(upstream) * factor
        if scalar != 1.0:
            grad.mul_(scalar)
        return
    scale = upstream * factor
    if grad.device.type == "cpu" and bool((scale == 1).all()):
        return
    rows = grad.shape[:-1]
    flat, scale = grad.view(rows.numel(), grad.shape[-1]), scale.expand(rows).reshape(-1, 1)
    for _, part in row_tiles(1, *flat.shape):  # by tiles, for PyTorch multiplies a half through a float32 copy
        flat[part].mul_(scale[part])
