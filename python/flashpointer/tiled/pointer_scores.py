"""Scores of all spans, by tiles of start tokens: ``kernels/pointer_scores.py`` has the mathematics."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..ops._pointer import Problem
from ._rotary import kept, rotated, rotated_back
from ._tiles import TILE

# To a tile, for fewer operations pass over it than over those of a loss.
CELLS = 2 * TILE


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
    q, k = rotated(q, problem), rotated(k, problem).transpose(-1, -2)
    start, end = (None if bias is None else kept(bias, problem).to(q.dtype) for bias in (start, end))
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
    q, k = rotated(q, problem), rotated(k, problem)
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
    d_q, d_k = (rotated_back(d.mul_(problem.scale), problem) for d in (d_q, d_k))
    return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)


def _row_tiles(
    batch: int, heads: int, length: int, problem: Problem, device: torch.device
) -> Iterator[tuple[slice, slice, slice, torch.Tensor]]:
    """(sentences, start tokens, the end tokens that any of these has, which cells [sentences or 1, 1, starts, ends]
    are invalid): several whole sentences if they are short, a part of one if it is long."""
    height = min(length, max(1, CELLS // max(1, length * min(heads, 16))))
    depth = max(1, CELLS // max(1, heads * length * length))
    for b in (slice(first, min(first + depth, batch)) for first in range(0, batch, depth)):
        for first in range(0, length, max(1, height)):
            rows = slice(first, min(first + height, length))
            stop = length if problem.max_width is None else min(length, rows.stop - 1 + problem.max_width)
            columns = slice(first if problem.tril_mask else 0, stop)
            invalid = invalid_cells(rows, columns, problem, device)[None, None]
            if problem.mask is not None:
                kept = problem.mask[b, None]
                invalid = invalid | ~(kept[..., rows, None] & kept[..., None, columns])
            yield b, rows, columns, invalid


def invalid_cells(rows: slice, columns: slice, problem: Problem, device: torch.device) -> torch.Tensor:
    """Which cells [rows, columns] triangle and band rule out."""
    m, n = (torch.arange(tokens.start, tokens.stop, device=device) for tokens in (rows, columns))
    m = m.unsqueeze(1)
    invalid = (m > n) if problem.tril_mask else torch.zeros_like(m > n)
    if problem.max_width is not None:
        invalid |= n - m >= problem.max_width
    return invalid


def _head_tiles(heads: int, invalid: torch.Tensor) -> Iterator[slice]:
    depth = max(1, CELLS // max(1, invalid.numel()))
    for first in range(0, heads, depth):
        yield slice(first, min(first + depth, heads))


def _finite(*tensors: torch.Tensor | None) -> bool:
    """Whether all numbers are finite; not asked on a GPU, where to look is to wait."""
    return all(x is None or (x.device.type == "cpu" and bool(x.isfinite().all())) for x in tensors)
