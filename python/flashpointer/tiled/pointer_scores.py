"""Scores of all spans, by tiles: ``kernels/pointer_scores.py`` has the mathematics.

A mask is a bias of -inf, the triangle one of the product, and in backward they are factors of 0: on a CPU that is
twenty times as fast as to fill in. Where not all numbers are finite, what is invalid is filled in after all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..problem import Problem
from ._cells import CornerOf, Tile, biases, factors, invalid_cells, penalties, tiles
from ._rotary import turned, turned_back
from ._tiles import TILE, small_on_one_thread

# To a tile, for fewer operations pass over it than over those of a loss.
CELLS = 8 * TILE
# Start tokens to a tile: fewer leave less of it below the triangle, more make fewer calls.
HEIGHT = 64


@small_on_one_thread(lambda q, *rest: len(q) * rest[3] * q.shape[2] ** 2)
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
    scores = torch.full((batch, heads, length, length), -torch.inf, dtype=q.dtype, device=q.device)
    if scores.numel() == 0:
        return scores
    by_group = scores.view(batch * own_heads, heads // own_heads, length, length)
    vectors = turned(q, k, problem)
    q, k = vectors.flatten(1, 2).unbind()
    dropped = _dropped(own_heads, problem)
    biased = start is not None or end is not None or dropped is not None
    of_both = biases(start, end, batch * own_heads, heads, problem, vectors) if biased else None
    finite = _is_finite(q.norm() * k.norm()) and (of_both is None or _below_inf(of_both))
    start, end = (None, None) if of_both is None else of_both.unbind()
    for g, r, c, corner in _tiles(by_group, q, problem, penalties):
        product = torch.bmm(q[g, r], k[g, c].mT).unsqueeze(1)
        if corner is not None:
            product[..., : corner.shape[1]].add_(corner)
        for h in _head_tiles(by_group, product.numel()):
            out = by_group[g, h, r, c]
            if start is None or end is None:
                out.copy_(product)
            else:
                torch.add(product + start[g, h, r].unsqueeze(-1), end[g, h, c].unsqueeze(-2), out=out)
            if not finite:
                out.masked_fill_(_invalid(g, r, c, dropped, problem, q.device), -torch.inf)
    return scores


@small_on_one_thread(lambda grad, *_: grad.numel())
def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    need_start: bool,
    need_end: bool,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``kernels.pointer_scores.backward``."""
    own_heads, dtype, (batch, heads, length, _) = q.shape[1], q.dtype, grad.shape
    vectors = turned(q, k, problem)
    d_vectors = torch.zeros_like(vectors)
    (q, k), (d_q, d_k) = (x.flatten(1, 2).unbind() for x in (vectors, d_vectors))
    by_groups = (len(q), heads // max(1, own_heads), length)
    d_start, d_end = (q.new_zeros(by_groups if needed else 0) for needed in (need_start, need_end))
    if grad.numel() > 0:
        # A view, but of odd strides where heads have their own q and k.
        by_group = grad.reshape(*by_groups, length)
        dropped = _dropped(own_heads, problem)
        for g, r, c, corner in _tiles(by_group, q, problem, factors):
            kept, sums = _kept(g, r, c, corner, dropped, q), []
            for h in _head_tiles(by_group, kept[0].numel() * (g.stop - g.start)):
                upstream = by_group[g, h, r, c] * kept
                of_rows = upstream.sum(-1)
                if not _is_finite(of_rows.sum()):  # 0 * inf: what lies in invalid cells must not leak
                    upstream = by_group[g, h, r, c].to(q.dtype).masked_fill(kept == 0, 0.0)
                    of_rows = upstream.sum(-1)
                if need_start:
                    d_start[g, h, r] = of_rows
                if need_end:
                    d_end[g, h, c].add_(upstream.sum(-2))
                sums.append(upstream.sum(1))
            total = sum(sums[1:], start=sums[0])
            d_q[g, r] = torch.bmm(total, k[g, c])
            d_k[g, c].add_(torch.bmm(total.mT, q[g, r]))
    d_q, d_k = turned_back(d_vectors, problem).to(dtype)
    d_start, d_end = (
        d.view(batch, heads, length) if needed else d for d, needed in ((d_start, need_start), (d_end, need_end))
    )
    # No two of what an op returns are parts of one tensor.
    return d_q, d_k.clone(), d_start.to(dtype), d_end.to(dtype)


def _tiles(by_group: torch.Tensor, q: torch.Tensor, problem: Problem, corner_of: CornerOf) -> Iterator[Tile]:
    groups, heads, length, _ = by_group.shape
    return tiles(groups, length, problem, q, corner_of, height=HEIGHT, cells=max(1, CELLS // heads))


def _head_tiles(by_group: torch.Tensor, cells: int) -> Iterator[slice]:
    """Of heads that have so many cells each."""
    heads, depth = by_group.shape[1], max(1, CELLS // cells)
    for first in range(0, heads, depth):
        yield slice(first, min(first + depth, heads))


def _dropped(own_heads: int, problem: Problem) -> torch.Tensor | None:
    """The tokens [groups, N] that the mask drops."""
    return None if problem.mask is None else ~problem.mask.repeat_interleave(own_heads, 0)


def _invalid(
    g: slice, r: slice, c: slice, dropped: torch.Tensor | None, problem: Problem, device: torch.device
) -> torch.Tensor:
    invalid = invalid_cells(r, c, problem, device)[None, None]
    return invalid if dropped is None else invalid | dropped[g, None, r, None] | dropped[g, None, None, c]


def _kept(
    g: slice, r: slice, c: slice, corner: torch.Tensor | None, dropped: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """1 in valid cells [groups or 1, 1, start tokens, end tokens] and 0 in others."""
    kept = like.new_ones((1, 1, r.stop - r.start, c.stop - c.start))
    if corner is not None:
        kept[..., : corner.shape[1]] = corner
    if dropped is not None and (dropped.device.type != "cpu" or bool(dropped[g, c].any())):
        kept = kept * factors(dropped[g, None, r, None] | dropped[g, None, None, c], like)
    return kept


def _is_finite(x: torch.Tensor) -> bool:
    """Not asked on a GPU, where to look is to wait."""
    return x.device.type == "cpu" and math.isfinite(x)


def _below_inf(x: torch.Tensor) -> bool:
    """As all numbers are but NaN and +inf."""
    return x.device.type == "cpu" and bool(x.amax() < torch.inf)
