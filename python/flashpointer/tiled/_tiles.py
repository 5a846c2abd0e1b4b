"""How rows are cut into tiles that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# 768 KiB in float32: a few such buffers stay in cache, and each operation still outweighs its own call. Larger is a
# little faster, but three buffers should be small beside the gradient even of a million scores.
TILE = 3 << 16


def row_tiles(outer: int, inner: int, classes: int) -> Iterator[tuple[int, slice]]:
    """(outer index, rows of the inner index) whose tiles hold about TILE cells."""
    height = max(1, TILE // max(1, classes))
    for o in range(outer):
        for first in range(0, inner, height):
            yield o, slice(first, min(first + height, inner))


def column_tiles(classes: int) -> list[slice]:
    return [slice(first, min(first + TILE, classes)) for first in range(0, classes, TILE)]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_tile(scores: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether rows of scores go the short way, as they are: on a CPU, which can look, without a mask, in one tile."""
    return mask is None and scores.device.type == "cpu" and 0 < scores.numel() <= TILE


def computing(x: torch.Tensor) -> torch.Tensor:
    """x in its computing dtype; itself where it is, for to() is a call even then."""
    dtype = computing_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)
