"""The ZLPR loss of all spans without their scores: ``kernels/pointer_loss.py`` has the mathematics.

The same algorithm in plain PyTorch, where a call costs as much as thousands of cells: so there are few. A group is what
shares q and k: a sentence, or one head of it. Matrix products have the heads first, for then their layout is that of
the biases and the small dimension is the fast one. A mask is added, never filled in: that is twenty times as fast.

A tile holds whole rows. So the exponentials of a row are those of a softmax, which PyTorch computes faster than plain
ones: P sums to 1, and the pivot of a row is the log-sum of its products. And the rows that are not for the sweep take
their products from the tile.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from ..problem import Problem, flat_rows
from ._cells import Tile, biases, penalties, tiles
from ._rotary import rotated, rotated_back
from ._tiles import computing_dtype

# To a tile, at most: 1 MiB in float32, for two such buffers are to stay in cache.
CELLS = 1 << 18
# What forward keeps for a backward that follows at once, at most: 8 MiB in float32, however long the sentences are.
KEPT = 8 * CELLS
# Start tokens to a tile, at least.
HEIGHT = 64
# A term that underflows in a row of this bound is e^37 times smaller than the 1 inside the logarithm.
SAFE_BOUND = 50.0
# Sorts behind every cell, and says that there is none.
NOWHERE = torch.iinfo(torch.int64).max


class Saved(NamedTuple):
    """What forward keeps for backward: nothing larger than the inputs."""

    q: torch.Tensor  # [B, own heads or 1, N, D], turned and scaled; 0 for dropped tokens, as k is
    k: torch.Tensor  # [B, own heads or 1, N, D], turned
    exponents: torch.Tensor  # [B, H, N]: start + the largest end; -inf where a row is not for the sweep
    values: torch.Tensor  # [B, H, N]: exp(end - the largest end)
    pivots: torch.Tensor  # [B, own heads or 1, N]: the log-sum of the products of a row
    rows: torch.Tensor  # [B, H, N]: the log-sum of the negatives of a row
    log_sums: torch.Tensor  # [2, B, H]: the two terms of the loss
    cells: torch.Tensor  # [S]: the numbers of the spans that count, see _listed, sorted; then NOWHERE
    labels: torch.Tensor  # [2, S]: log(1 - label), and log(label) - score; -inf for both leaves a cell out
    shape: tuple[int, ...]  # B, own heads or 1, N, D, H, S

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:-1]


def empty_saved(shape: tuple[int, ...], like: torch.Tensor) -> Saved:
    """With nothing in it, of the device of ``like``, whose dtype is that of the inputs."""
    batch, own_heads, length, size, heads, count = shape
    new = functools.partial(like.new_empty, dtype=computing_dtype(like.dtype))
    q, k = (new((batch, own_heads, length, size)) for _ in range(2))
    exponents, values, rows = (new((batch, heads, length)) for _ in range(3))
    pivots, log_sums = new((batch, own_heads, length)), new((2, batch, heads))
    cells = like.new_empty(count, dtype=torch.int64)
    return Saved(q, k, exponents, values, pivots, rows, log_sums, cells, new((2, count)), shape)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    spans: torch.Tensor,
    span_labels: torch.Tensor | None,
    heads: int,
    problem: Problem,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, Saved]:
    """As ``kernels.pointer_loss.forward``; float64 is computed in float64. ``kept`` is filled for backward."""
    kept = Kept(room=0) if kept is None else kept
    spans = flat_rows(spans)
    # Copies at least: what an op returns must not be what it was given.
    q, k = (rotated(x if problem.rope else x.clone(), problem) for x in (q, k))
    q.mul_(problem.scale)
    batch, own_heads, length, _ = q.shape
    shape = (*q.shape, heads, len(spans))
    cells, labels = _listed(spans, span_labels, q, heads, problem)
    start, end = (biases(bias, batch, heads, length, problem, q) for bias in (start, end))
    pivots, rows = q.new_zeros((batch, own_heads, length)), torch.full_like(start, -torch.inf)
    log_sums = q.new_zeros((2, batch, heads))
    if rows.numel() == 0:
        return log_sums.sum(0), Saved(q, k, start.clone(), end.clone(), pivots, rows, log_sums, cells, labels, shape)
    # Kept finite: rows with an end of inf are far from safe, and of the sweep nothing but 0 may come of them.
    largest = _finite(end.amax(-1, keepdim=True))
    exponents, values = start + largest, (end - largest).clamp_(max=0.0).exp_()
    saved = Saved(q, k, exponents, values, pivots, rows, log_sums, cells, labels, shape)

    group, direct = _by_group(saved), _direct(saved, start, end)
    exponents.view(-1).index_fill_(0, direct.rows, -torch.inf)
    scores, kept.direct = torch.empty_like(direct.log_rest), direct
    for tile in _tiles(group, problem):
        g, r, c, _ = tile
        products, p, pivot = _products(group, tile)
        bounds = group.exponents[g, :, r] + pivot.unsqueeze(1)
        largest_bound = float(bounds.amax())
        if math.isnan(largest_bound):
            kept.overflown = True
            products, p, pivot = _products(group, tile, overflown=True)
            bounds = group.exponents[g, :, r] + pivot.unsqueeze(1)
        unsafe = not largest_bound <= SAFE_BOUND  # so that NaN, too, makes the blocks look more closely
        group.pivots[g, 0, r] = pivot
        group.rows[g, :, r] = torch.bmm(group.values[g, :, c], p.mT).log_().add_(bounds)
        kept.room -= p.numel()
        blocks = []
        for block in direct.blocks(tile, products, bounds if unsafe else None):
            scores[block.listed] = block.scores.view(-1).index_select(0, block.at)
            rows.view(-1).index_copy_(0, block.rows, direct.negatives(block).scores.logsumexp(-1))
            kept.room -= block.scores.numel()
            if kept.room >= 0:
                blocks.append(block)
        if kept.room >= 0:
            kept.tiles.append((p, blocks))
    log_sums[0] = softplus(rows.logsumexp(-1), threshold=SAFE_BOUND)
    positives = labels[1, : len(scores)]
    # A score of -inf is that of a cell which leaves both terms.
    positives.sub_(scores).masked_fill_(scores == -torch.inf, -torch.inf)
    log_sums[1] = _log_one_plus_sums(positives, direct.planes, batch * heads).view(batch, heads)
    return log_sums.sum(0), saved


def backward(
    upstream: torch.Tensor,
    share: float,
    saved: Saved,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    dtype: torch.dtype,
    problem: Problem,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``kernels.pointer_loss.backward``."""
    q, k, rows, log_sums, labels = saved.q, saved.k, saved.rows, saved.log_sums, saved.labels
    batch, heads, length = rows.shape
    d_q, d_k, d_end = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(rows)
    upstream = (upstream.to(q.dtype) * share).contiguous().unsqueeze(-1)
    negative_sums = log_sums[0].unsqueeze(-1)
    d_start = (rows - negative_sums).exp_().mul_(upstream)
    if rows.numel() == 0:
        return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)
    kept = Kept(room=0) if kept is None else kept
    if kept.direct is None:
        start, end = (biases(bias, batch, heads, length, problem, q) for bias in (start, end))
        kept.direct, kept.overflown = _direct(saved, start, end), not math.isfinite(q.norm() * k.norm())
    group, direct = _by_group(saved), kept.direct
    bounds = group.exponents + group.pivots  # -inf, or inf, of a row whose products overflow
    of_group = (*bounds.shape[:2], 1)
    a = (bounds - negative_sums.view(of_group)).exp_().mul_(upstream.view(of_group))
    unsafe = not bool(bounds.amax() <= SAFE_BOUND)
    if unsafe:
        a.masked_fill_(bounds > SAFE_BOUND, 0.0)
    negative_sums, upstream = negative_sums.view(-1, 1), upstream.view(-1, 1)
    taken = labels[1, : len(direct.planes)] - log_sums[1].view(-1).index_select(0, direct.planes)
    taken.exp_().mul_(upstream.view(-1).index_select(0, direct.planes))
    d_start.view(-1).index_add_(0, direct.rows.index_select(0, direct.ranks), taken, alpha=-1)
    d_q_by_group, d_k_by_group, d_end_by_group = d_q.view_as(group.q), d_k.view_as(group.k), d_end.view_as(group.rows)
    for i, tile in enumerate(_tiles(group, problem)):
        g, r, c, _ = tile
        p, blocks = kept.tiles[i] if i < len(kept.tiles) else _again(group, kept, tile, bounds if unsafe else None)
        a_of_tile, values_of_tile = a[g, :, r], group.values[g, :, c]
        d_end_by_group[g, :, c].add_(torch.bmm(a_of_tile, p).mul_(values_of_tile))
        d_products = p.mul_(torch.bmm(a_of_tile.mT, values_of_tile))
        for block in blocks:
            weights = block.scores.sub_(negative_sums.index_select(0, block.planes)).exp_()
            weights.mul_(upstream.index_select(0, block.planes))
            weights.view(-1).index_add_(0, block.at, taken[block.listed], alpha=-1)
            d_end.view(-1, length)[:, c].index_add_(0, block.planes, weights)
            d_products.view(-1, weights.shape[1]).index_add_(0, block.places, weights)
        d_q_by_group[g, r] = torch.bmm(d_products, group.k[g, c])
        d_k_by_group[g, c].add_(torch.bmm(d_products.mT, group.q[g, r]))
    d_q, d_k = rotated_back(d_q.mul_(problem.scale), problem), rotated_back(d_k, problem)
    return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)


# --- the sweep -----------------------------------------------------------------------------------------------------


def _by_group(saved: Saved) -> Saved:
    """Views with a group first: q and k [G, N, D], the biases [G, heads of a group, N]."""
    q, k, *of_heads = saved[:6]
    groups, length = q.shape[0] * q.shape[1], q.shape[2]
    exponents, values, pivots, rows = (x.view(groups, -1, length) for x in of_heads)
    return saved._replace(
        q=q.flatten(0, 1), k=k.flatten(0, 1), exponents=exponents, values=values, pivots=pivots, rows=rows
    )


def _height(groups: int, length: int) -> int:
    """Start tokens of a tile: the lower, the less of it is below the triangle; but few tiles are few calls."""
    return max(HEIGHT, CELLS // max(1, groups * length) // 16 * 16)


def _tiles(group: Saved, problem: Problem) -> Iterator[Tile]:
    """By triangle and band alone: the mask is in exponents and values."""
    groups, length, _ = group.q.shape
    return tiles(groups, length, problem, group.q, penalties, height=_height(groups, length), cells=CELLS)


def _products(group: Saved, tile: Tile, overflown: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q.k of a tile [groups, start tokens, end tokens], -inf in invalid cells; P, their softmax; and the pivots.

    Where they may have ``overflown`` an invalid cell is filled with -inf (inf - inf is NaN), and of a row with one of
    inf, or nothing but -inf, P is 0 and the pivot finite: its bound, too, makes it direct or nothing.
    """
    g, r, c, corner = tile
    products = torch.bmm(group.q[g, r], group.k[g, c].mT)
    if corner is not None:
        products[..., : corner.shape[1]].add_(corner)
        if overflown:
            products[..., : corner.shape[1]].masked_fill_(corner == -torch.inf, -torch.inf)
    p, largest = products.softmax(-1), products.amax(-1)
    if overflown:
        infinite = largest.isinf()
        p.masked_fill_(infinite.unsqueeze(-1), 0.0)
        return products, p, torch.where(infinite, _finite(largest), largest - p.amax(-1).log())
    return products, p, largest.sub_(p.amax(-1).log_())


# --- the rows that are not for the sweep ---------------------------------------------------------------------------


def _listed(
    spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor, heads: int, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the spans that count, sorted, and log(1 - label) and log(label) of each: of valid cells, of
    repeated ones the first.

    A number has the digits tile, sentence, head, start, end; the tile is which one from the top.
    """
    batch, own_heads, length, _ = q.shape
    sizes = spans.new_tensor([batch, heads, length, length])
    valid = ((spans >= 0) & (spans < sizes)).all(1)
    b, _, m, n = spans.unbind(1)
    if problem.tril_mask:
        valid &= m <= n
    if problem.max_width is not None:
        valid &= n - m < problem.max_width
    if problem.mask is not None:
        valid[valid.clone()] = problem.mask[b[valid], m[valid]] & problem.mask[b[valid], n[valid]]
    numbers = (spans * spans.new_tensor([heads * length**2, length**2, length, 1])).sum(1)
    numbers.add_(m // _height(batch * own_heads, length), alpha=batch * heads * length**2)
    numbers, order = numbers.masked_fill_(~valid, NOWHERE).sort(stable=True)
    repeated = numbers[1:] == numbers[:-1]
    if repeated.any() and repeated.logical_and_(numbers[1:] != NOWHERE).any():
        numbers[1:].masked_fill_(repeated, NOWHERE)
        numbers, again = numbers.sort(stable=True)
        order = order[again]
    labels = q.new_zeros((2, len(spans)))
    if span_labels is None:
        labels[0] = -torch.inf
    else:
        t = span_labels.flatten()[order].to(q.dtype)
        torch.stack([torch.log1p(-t), t.log()], out=labels).masked_fill_(t == -100, -torch.inf)
    return numbers, labels


def _finite(x: torch.Tensor) -> torch.Tensor:
    """In place; inf - inf would be NaN."""
    return x.clamp_(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)


class _Block(NamedTuple):
    """Some direct rows of a tile."""

    rows: torch.Tensor  # [R]: (b * H + h) * N + start
    planes: torch.Tensor  # [R]: b * H + h
    places: torch.Tensor  # [R]: which of the tile's rows have their products
    scores: torch.Tensor  # [R, end tokens of the tile]
    listed: slice  # which of the listed cells are theirs,
    at: torch.Tensor  # and where in scores


class _Direct(NamedTuple):
    """The rows that hold a listed cell, and these cells, both in the order of the tiles."""

    start: torch.Tensor  # [B * H * N]
    end: torch.Tensor  # [B * H, N]
    groups: int
    rows: torch.Tensor  # [R]: (b * H + h) * N + start
    tiles: list[int]  # [R]: which tile from the top * G + which group
    ranks: torch.Tensor  # [S]: which of the rows
    rank_list: list[int]  # the same
    planes: torch.Tensor  # [S]: b * H + h
    ends: torch.Tensor  # [S]
    log_rest: torch.Tensor  # [S]: log(1 - label),
    hard: bool  # and whether all of these are -inf
    overflows: bool  # whether a bias is inf, and an invalid cell with it NaN

    def blocks(self, tile: Tile, products: torch.Tensor, bounds: torch.Tensor | None) -> Iterator[_Block]:
        """Those of the tile, and with bounds [groups, heads of a group, start tokens] also the rows of unsafe ones."""
        (g, r, c, _), (_, height, width), length = tile, products.shape, self.end.shape[1]
        of_group, depth = len(self.end) // self.groups, max(1, CELLS // width)
        first = r.start // _height(self.groups, length) * self.groups
        i, j = (bisect_left(self.tiles, first + group) for group in (g.start, g.stop))
        chunks = [(rank, self.rows[rank : min(rank + depth, j)]) for rank in range(i, j, depth)]
        if bounds is not None:
            group, head, m = (bounds > SAFE_BOUND).nonzero().unbind(1)
            unsafe = ((group + g.start) * of_group + head) * length + m + r.start
            chunks += [(len(self.rows), rows) for rows in unsafe.split(depth)]
        for rank, rows in chunks:
            planes = rows // length
            places = torch.add(rows % length, planes // of_group, alpha=height).sub_(r.start + g.start * height)
            scores = products.view(-1, width).index_select(0, places)
            end = self.end[:, c].index_select(0, planes)
            left_out = (scores == -torch.inf) | (end == -torch.inf) if self.overflows else None
            scores.add_(end).add_(self.start.index_select(0, rows).unsqueeze(1))
            if left_out is not None:
                scores.masked_fill_(left_out, -torch.inf)
            listed = slice(*(bisect_left(self.rank_list, x) for x in (rank, rank + len(rows))))
            at = torch.add(self.ends[listed], self.ranks[listed], alpha=width).sub_(c.start + rank * width)
            yield _Block(rows, planes, places, scores, listed, at)

    def negatives(self, block: _Block) -> _Block:
        """With scores + log(1 - label) in the place of its scores."""
        scores, rest = block.scores.view(-1), self.log_rest[block.listed]
        if not self.hard:  # inf - inf would be NaN
            rest = torch.where(rest == -torch.inf, rest, rest + scores.index_select(0, block.at))
        scores.index_copy_(0, block.at, rest)
        return block


@dataclass
class Kept:
    """What a forward leaves to the backward that follows at once."""

    room: int  # for so many cells more
    direct: _Direct | None = None
    overflown: bool = False  # whether a product of q and k may have
    # of the first tiles P, and the blocks with their negatives
    tiles: list[tuple[torch.Tensor, Iterable[_Block]]] = field(default_factory=list)


def _again(group: Saved, kept: Kept, tile: Tile, bounds: torch.Tensor | None) -> tuple[torch.Tensor, Iterable[_Block]]:
    """P of a tile, and its blocks with their negatives."""
    assert kept.direct is not None
    (g, r, _, _), direct = tile, kept.direct
    products, p, _ = _products(group, tile, kept.overflown)
    return p, map(direct.negatives, direct.blocks(tile, products, None if bounds is None else bounds[g, :, r]))


def _direct(saved: Saved, start: torch.Tensor, end: torch.Tensor) -> _Direct:
    (batch, heads, length), groups = saved.rows.shape, saved.q.shape[0] * saved.q.shape[1]
    count = int((saved.cells != NOWHERE).sum())
    numbers = saved.cells[:count]
    rows, ranks = torch.unique_consecutive(numbers // length, return_inverse=True)
    log_rest = saved.labels[0, :count]
    return _Direct(
        start=start.view(-1),
        end=end.view(batch * heads, length),
        groups=groups,
        rows=rows % (batch * heads * length),
        tiles=(rows // (batch * heads // groups * length)).tolist(),
        ranks=ranks,
        rank_list=ranks.tolist(),
        planes=numbers // length**2 % (batch * heads),
        ends=numbers % length,
        log_rest=log_rest,
        hard=count == 0 or float(log_rest.amax()) == -torch.inf,
        overflows=not (float(start.amax()) < torch.inf and float(end.amax()) < torch.inf),
    )


def _log_one_plus_sums(x: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """log(1 + the sum of exp(x) over each index)."""
    pivots = x.new_zeros(size).scatter_reduce_(0, index, x, "amax")
    return torch.expm1(-pivots).index_add_(0, index, (x - pivots[index]).exp_()).log1p_().add_(pivots)
