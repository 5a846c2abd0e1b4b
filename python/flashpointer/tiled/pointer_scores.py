"""Scores of all spans, by tiles of start tokens: ``kernels/pointer_scores.py`` has the mathematics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._tiles import TILE, computing_dtype

# To a tile, for fewer operations pass over it than over those of a loss.
CELLS = 2 * TILE


class Problem(NamedTuple):
    """As ``kernels.pointer_scores.Problem``."""

    mask: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    tril_mask: bool
    max_width: int | None
    scale: float


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Problem,
) -> torch.Tensor:
    """As ``kernels.pointer_scores.forward``; float64 is computed in float64."""
    batch, own_heads, length, _ = q.shape
    scores = torch.empty((batch, heads, length, length), dtype=q.dtype, device=q.device)
    q, k = _rotated(q, problem), _rotated(k, problem).transpose(-1, -2)
    start, end = (None if bias is None else _kept(bias, problem).to(q.dtype) for bias in (start, end))
    product = q.new_empty(0)
    finite = _finite(q, k, start, end)
    for b, rows, columns, invalid in _row_tiles(batch, heads, length, problem, q.device):
        scores[b, :, rows, : columns.start] = -torch.inf
        scores[b, :, rows, columns.stop :] = -torch.inf
        # Added to finite scores this masks them, at a twentieth of the cost of masked_fill.
        penalty = torch.zeros(invalid.shape, dtype=q.dtype, device=q.device).masked_fill_(invalid, -torch.inf)
        if own_heads == 1:
            product = torch.matmul(q[b, :, rows], k[b, :, :, columns]).mul_(problem.scale).add_(penalty)
        for some in _head_tiles(heads, invalid):
            if own_heads > 1:
                product = torch.matmul(q[b, some, rows], k[b, some, :, columns]).mul_(problem.scale).add_(penalty)
            tile = product.expand(-1, some.stop - some.start, -1, -1)
            if start is not None:
                tile = tile + start[b, some, rows].unsqueeze(-1)
            if end is not None:
                tile = tile + end[b, some, columns].unsqueeze(-2)
            scores[b, some, rows, columns] = tile if finite else tile.masked_fill(invalid, -torch.inf)
    return scores


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    need_start: bool,
    need_end: bool,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``kernels.pointer_scores.backward``."""
    batch, own_heads, length, _ = q.shape
    heads, dtype = grad.shape[1], q.dtype
    q, k = _rotated(q, problem), _rotated(k, problem)
    d_q, d_k = torch.zeros_like(q), torch.zeros_like(k)
    d_start, d_end = (q.new_zeros((batch, heads, length) if needed else 0) for needed in (need_start, need_end))
    for b, rows, columns, invalid in _row_tiles(batch, heads, length, problem, q.device):
        total = q.new_zeros((b.stop - b.start, 1, *invalid.shape[-2:]))
        kept = (~invalid).to(q.dtype)
        for some in _head_tiles(heads, invalid):
            upstream = grad[b, some, rows, columns].to(q.dtype)
            g = upstream * kept
            if not _finite(g.sum((-1, -2))):  # 0 * inf: what lies in invalid cells must not leak
                g = upstream.masked_fill(invalid, 0.0)
            if need_start:
                d_start[b, some, rows] = g.sum(-1)
            if need_end:
                d_end[b, some, columns] += g.sum(-2)
            if own_heads > 1:
                d_q[b, some, rows] = torch.matmul(g, k[b, some, columns])
                d_k[b, some, columns] += torch.matmul(g.transpose(-1, -2), q[b, some, rows])
            else:
                total += g.sum(1, keepdim=True)
        if own_heads == 1:
            d_q[b, :, rows] = torch.matmul(total, k[b, :, columns])
            d_k[b, :, columns] += torch.matmul(total.transpose(-1, -2), q[b, :, rows])
    d_q, d_k = (_rotated_back(d.mul_(problem.scale), problem) for d in (d_q, d_k))
    return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)


def _row_tiles(
    batch: int, heads: int, length: int, problem: Problem, device: torch.device
) -> Iterator[tuple[slice, slice, slice, torch.Tensor]]:
    """(sentences, start tokens, the end tokens that any of these has, which cells [sentences or 1, 1, starts, ends]
    are invalid): several whole sentences if they are short, a part of one if it is long."""
    tokens = torch.arange(length, device=device)
    height = min(length, max(1, CELLS // max(1, length * min(heads, 16))))
    depth = max(1, CELLS // max(1, heads * length * length))
    for b in (slice(first, min(first + depth, batch)) for first in range(0, batch, depth)):
        for first in range(0, length, max(1, height)):
            rows = slice(first, min(first + height, length))
            stop = length if problem.max_width is None else min(length, rows.stop - 1 + problem.max_width)
            columns = slice(first if problem.tril_mask else 0, stop)
            m, n = tokens[None, None, rows, None], tokens[None, None, None, columns]
            invalid = (m > n) if problem.tril_mask else torch.zeros_like(m > n)
            if problem.max_width is not None:
                invalid |= n - m >= problem.max_width
            if problem.mask is not None:
                kept = problem.mask[b, None]
                invalid = invalid | ~(kept[..., rows, None] & kept[..., None, columns])
            yield b, rows, columns, invalid


def _head_tiles(heads: int, invalid: torch.Tensor) -> Iterator[slice]:
    depth = max(1, CELLS // max(1, invalid.numel()))
    for first in range(0, heads, depth):
        yield slice(first, min(first + depth, heads))


def _finite(*tensors: torch.Tensor | None) -> bool:
    """Whether all numbers are finite; not asked on a GPU, where to look is to wait."""
    return all(x is None or (x.device.type == "cpu" and bool(x.isfinite().all())) for x in tensors)


def _kept(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """x [B, heads, N] or [B, heads, N, D] with 0 for the tokens that the mask drops."""
    if problem.mask is None:
        return x
    dropped = ~problem.mask.unsqueeze(1)
    return x.masked_fill(dropped if x.dim() == 3 else dropped.unsqueeze(-1), 0.0)


def _rotated(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """x in the computing dtype, turned; its even elements first, then its odd ones, which no product minds. 0 for
    tokens that the mask drops: what they hold must not reach a product with the zeros of their gradient."""
    x = _kept(x, problem).to(computing_dtype(x.dtype))
    if problem.cos is None or problem.sin is None:
        return x
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], problem.cos.unsqueeze(1), problem.sin.unsqueeze(1)
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def _rotated_back(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    if problem.cos is None or problem.sin is None:
        return x
    (even, odd), cos, sin = x.chunk(2, dim=-1), problem.cos.unsqueeze(1), problem.sin.unsqueeze(1)
    return torch.stack([even * cos + odd * sin, odd * cos - even * sin], dim=-1).flatten(-2)
