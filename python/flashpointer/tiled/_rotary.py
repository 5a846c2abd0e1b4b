"""RoPE on whole tensors, and zeros for the tokens that the mask drops.

A pair of elements is a complex number, and to turn it is to multiply it by cos a + i sin a: one pass over the tensor.
"""

from __future__ import annotations

import functools

import torch

from ..problem import Problem
from ._cells import part
from ._tiles import computing


def turned(q: torch.Tensor, k: torch.Tensor, problem: Problem) -> torch.Tensor:
    """q and k [B, N, D] or [B, heads, N, D] as one [2, B, ..., N, D] in the computing dtype, turned, and q scaled. 0
    for tokens that the mask drops: what they hold must not reach a product with the zeros of their gradient."""
    x = computing(torch.stack((q, k)))
    if problem.mask is not None:
        x.masked_fill_(_of_tokens(~problem.mask, x), 0.0)
    return _turn(x, problem)


def turned_back(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """A gradient of what ``turned`` gave as one of what it took, in its place."""
    return _turn(x, problem, back=True)


def _turn(x: torch.Tensor, problem: Problem, back: bool = False) -> torch.Tensor:
    if problem.rope:
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], x.shape[-1] // 2, 2))
        pairs.mul_(_factors(x, problem, back))
    else:
        x[0].mul_(problem.scale)
    return x


def _of_tokens(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x [B or 1, N] as [B or 1, ..., N, 1], of as many dimensions as ``like`` less the first."""
    return x.view(len(x), *[1] * (like.dim() - 4), x.shape[1], 1)


def _factors(x: torch.Tensor, problem: Problem, back: bool) -> torch.Tensor:
    """[2, B or 1, ..., N, D / 2] in the precision of x: cos + i sin of the tokens' angles, or of the negative ones, and
    for q the scale times them."""
    length = x.shape[-2]
    if problem.positions is not None:
        positions = _of_tokens(problem.positions.reshape(-1 if length else 1, length), x)
        return _of_both(positions, x.shape[-1], x.dtype, problem.scale, back)
    # On a GPU what one CUDA graph made cannot serve outside it, and what tracing makes (a subclass) holds no numbers.
    if x.device.type != "cpu" or type(x) is not torch.Tensor:
        positions = _of_tokens(torch.arange(length, device=x.device).unsqueeze(0), x)
        return _of_both(positions, x.shape[-1], x.dtype, problem.scale, back)
    table = _table(1 << max(0, length - 1).bit_length(), x.shape[-1], x.dtype, problem.scale, back, x.dim())
    return part(table, *[None] * (x.dim() - 2), slice(0, length))


@functools.lru_cache(maxsize=8)
def _table(length: int, size: int, dtype: torch.dtype, scale: float, back: bool, dim: int) -> torch.Tensor:
    """Of positions 0 to length - 1: float64's cos costs more than all else that turns. Lengths are powers of two."""
    with torch.inference_mode(False):
        positions = torch.arange(length, device="cpu").view(*[1] * (dim - 3), length, 1)
        return _of_both(positions, size, dtype, scale, back)


def _of_both(positions: torch.Tensor, size: int, dtype: torch.dtype, scale: float, back: bool) -> torch.Tensor:
    """Of positions [..., 1], by way of float64: 10^5 radians leave float32 two digits."""
    theta = 10000.0 ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size)
    angle = positions * (-theta if back else theta)
    return torch.stack([torch.polar(torch.full_like(angle, x), angle) for x in (scale, 1.0)]).to(dtype.to_complex())
