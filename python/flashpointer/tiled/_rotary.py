"""RoPE on whole tensors, and zeros for the tokens that the mask drops.

A pair of elements is a complex number, and to turn it is to multiply it by cos a + i sin a: one pass over the tensor.
"""

from __future__ import annotations

import functools

import torch

from ..problem import Problem
from ._tiles import computing_dtype


def rotated(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """x [B, heads, N, D] in the computing dtype, turned. 0 for tokens that the mask drops: what they hold must not
    reach a product with the zeros of their gradient."""
    if problem.mask is not None:
        x = x.masked_fill(~problem.mask[:, None, :, None], 0.0)
    x = x.to(computing_dtype(x.dtype))
    return _turned(x, _directions(x, problem)) if problem.rope else x


def rotated_back(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """A gradient of what ``rotated`` gave as one of what it took."""
    return _turned(x, _directions(x, problem, back=True)) if problem.rope else x


def _turned(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * directions).flatten(-2)


def _directions(x: torch.Tensor, problem: Problem, back: bool = False) -> torch.Tensor:
    """cos + i sin [B or 1, 1, N, D / 2] of the tokens' angles, or of the negative ones, in the precision of x."""
    length, size = x.shape[-2:]
    if problem.positions is not None:
        return _cos_sin(problem.positions.reshape(-1 if length else 1, 1, length, 1), size, x.dtype, back)
    # On a GPU what one CUDA graph made cannot serve outside it, and what tracing makes (a subclass) holds no numbers.
    if x.device.type != "cpu" or type(x) is not torch.Tensor:
        return _cos_sin(torch.arange(length, device=x.device).unsqueeze(-1), size, x.dtype, back)
    return _table(1 << max(0, length - 1).bit_length(), size, x.dtype, back)[:length]


@functools.lru_cache(maxsize=8)
def _table(length: int, size: int, dtype: torch.dtype, back: bool) -> torch.Tensor:
    """Of positions 0 to length - 1: float64's cos costs more than all else that turns. Lengths are powers of two."""
    with torch.inference_mode(False):
        return _cos_sin(torch.arange(length, device="cpu").unsqueeze(-1), size, dtype, back)


def _cos_sin(positions: torch.Tensor, size: int, dtype: torch.dtype, back: bool) -> torch.Tensor:
    """Of the angles of positions [..., 1], by way of float64: 10^5 radians leave float32 two digits."""
    theta = 10000.0 ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size)
    angle = positions * (-theta if back else theta)
    return torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())
