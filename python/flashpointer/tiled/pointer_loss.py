"""The ZLPR loss of all spans without their scores: ``kernels/pointer_loss.py`` has the mathematics.

The same algorithm in plain PyTorch, where a call costs as much as thousands of cells: so there are few. What there is
two of (q and k, start and end, the terms of the loss) lies in one tensor. A group is what shares q and k: a sentence,
or one head of it. Matrix products have the heads first, for then their layout is that of the biases and the small
dimension is the fast one. A mask is added, never filled in: that is twenty times as fast.

A tile holds whole rows. So the exponentials of a row are those of a softmax, which PyTorch computes faster than plain
ones: P sums to 1, and the pivot of a row is the log-sum of its products. And the rows that are not for the sweep take
their products from the tile: those with a listed cell, and those of an unsafe bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from ..problem import Problem, flat_rows, shape_per_head
from . import _listed
from ._cells import Tile, biases, part, penalties, shaped, tiles
from ._listed import Cells, Grid, Numbers, Rows
from ._rotary import turned, turned_back
from ._tiles import computing_dtype, small_on_one_thread

# To a tile, at most: 1 MiB in float32, for two such buffers are to stay in cache.
CELLS = 1 << 18
# What forward keeps for a backward that follows at once, at most: 8 MiB in float32, however long the sentences are.
KEPT = 8 * CELLS
# Start tokens to a tile, at least.
HEIGHT = 64
# A term that underflows in a row of this bound is e^37 times smaller than the 1 inside the logarithm.
SAFE_BOUND = 50.0


class Saved(NamedTuple):
    """What forward keeps for backward: nothing larger than the inputs. G groups have H' heads each."""

    vectors: torch.Tensor  # [2, *shape of q]: q and k, turned, and q scaled; 0 for dropped tokens
    biases: torch.Tensor  # [2, G, H', N]: start and end; -inf for dropped tokens
    bounds: torch.Tensor  # [G, H', N]: start + the largest end + the pivot of a row
    values: torch.Tensor  # [G, H', N]: exp(end - the largest end)
    rows: torch.Tensor  # [2, G, H', N]: the log-sums of the negatives of a row, and of its positives
    log_sums: torch.Tensor  # [2, G, H', 1]: the two terms of the loss
    cells: torch.Tensor  # [S]: the listed cells, as _listed saves them
    terms: torch.Tensor  # [2, S]: the exponents that each has among the negatives, and among the positives
    shape: tuple[int, ...]  # B, own heads or 1, N, D, H, S

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:-1]


def empty_saved(shape: tuple[int, ...], like: torch.Tensor) -> Saved:
    """With nothing in it, of the shape, the dtype and the device of q ``like``."""
    batch, own_heads, length, _, heads, count = shape
    new = functools.partial(like.new_empty, dtype=computing_dtype(like.dtype))
    of_heads = (batch * own_heads, heads // own_heads)
    biases, bounds, values, rows = (new((*lead, *of_heads, length)) for lead in ((2,), (), (), (2,)))
    cells = like.new_empty(count, dtype=torch.int64)
    vectors, log_sums, terms = new((2, *like.shape)), new((2, *of_heads, 1)), new((2, count))
    return Saved(vectors, biases, bounds, values, rows, log_sums, cells, terms, shape)


@small_on_one_thread(lambda q, *_: q.shape[:-1].numel() * q.shape[-2])
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
    """As ``kernels.pointer_loss.forward``, but for q and k that may also be [B, N, D]; float64 is computed in float64.
    ``kept`` is filled for backward."""
    kept = Kept(room=0) if kept is None else kept
    spans = flat_rows(spans)
    vectors, shape = turned(q, k, problem), shape_per_head(q.shape)
    both_biases = biases(start, end, shape[0] * shape[1], heads, problem, vectors)
    sweep = kept.sweep = _sweep(vectors, both_biases, problem)
    kept.cells, order = _listed.counted(spans, sweep.grid, problem)
    labels = None if span_labels is None else _logarithms(span_labels.flatten(), order, sweep.keys)
    cells, terms = _listed.saved(kept.cells, len(spans), spans), sweep.keys.new_full((2, len(spans)), -torch.inf)
    rows = sweep.end.new_full((2, *sweep.end.shape), -torch.inf)
    saved = functools.partial(Saved, vectors, both_biases, cells=cells, terms=terms, shape=(*shape, heads, len(spans)))
    if rows.numel() == 0:
        log_sums = rows.new_zeros((*rows.shape[:3], 1))
        nothing = saved(sweep.start.clone(), sweep.end.clone(), rows, log_sums)
        return log_sums.sum(0).view(len(q), heads), nothing
    # Kept finite: rows with an end of inf are far from safe, and of the sweep nothing but 0 may come of them.
    end = _finite(sweep.end)
    largest = end.amax(-1, keepdim=True)
    values, bounds = (end - largest).exp_(), sweep.start + largest
    by_number = rows.view(2, -1)
    for tile in sweep.tiles:
        g, r, c, _ = tile
        bounds_of_tile = part(bounds, g, None, r)
        products, p = _products(sweep, tile)
        largest_bound = float(bounds_of_tile.add_(_pivots(products, p)).amax())
        if math.isnan(largest_bound):
            products, p = _products(sweep, tile, overflown=True)
            torch.add(part(sweep.start, g, None, r), part(largest, g), out=bounds_of_tile).add_(_pivots(products, p))
            bounds_of_tile.masked_fill_(_overflown(products).unsqueeze(1), torch.inf)  # so that such a row is direct
        unsafe = not largest_bound <= SAFE_BOUND  # so that NaN, too, makes us look more closely
        sums = torch.bmm(part(values, g, None, c), p.mT)
        torch.add(sums.log_(), bounds_of_tile, out=part(rows[0], g, None, r))
        kept.room -= p.numel()
        direct, of_direct = sweep.direct(tile, kept.cells, bounds_of_tile if unsafe else None), []
        for some in direct:
            scores = sweep.scores(tile, products, some, unsafe)
            among_positives, positives = _list(scores, terms, some.cells, labels)
            by_number.index_copy_(1, some.numbers, torch.stack((scores.logsumexp(-1), positives)))
            kept.room -= scores.numel()
            if kept.room >= 0:
                of_direct.append((scores, among_positives))
        if kept.room >= 0:
            kept.tiles.append((p, direct, of_direct))
    log_sums = softplus(rows.logsumexp(-1, keepdim=True), threshold=SAFE_BOUND)
    losses = shaped(log_sums.sum((0, 3)), len(q), heads)
    return losses, saved(bounds, values, rows, log_sums)


def backward(
    upstream: torch.Tensor,
    share: float,
    saved: Saved,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    dtype: torch.dtype,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``kernels.pointer_loss.backward``."""
    if upstream.dtype != saved.vectors.dtype or share != 1.0:
        upstream = upstream.to(saved.vectors.dtype) * share
    d_vectors, *d_biases = gradients(upstream, saved, problem)
    # Copies, for no two of what an op returns may be parts of one tensor.
    of_vectors: tuple[torch.Tensor, ...] = torch.unbind_copy(d_vectors)  # type: ignore[assignment, func-returns-value]
    d_q, d_k, d_start, d_end = (x if x.dtype == dtype else x.to(dtype) for x in (*of_vectors, *d_biases))
    return d_q, d_k, d_start, d_end


@small_on_one_thread(lambda _, saved, *rest: saved.shape[0] * saved.shape[1] * saved.shape[2] ** 2)
def gradients(
    upstream: torch.Tensor | None,
    saved: Saved,
    problem: Problem,
    kept: Kept | None = None,
    share: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of q and k [2, *shape of q], of start and of end [B, H, N], in the computing dtype; the losses' upstream
    gradients [B, H] are ``share`` if there are none."""
    batch, own_heads, length, size, heads, _ = saved.shape
    d_vectors, (of_negatives, of_positives) = torch.zeros_like(saved.vectors), saved.log_sums.unbind()
    negatives, positives = (saved.rows - saved.log_sums).exp_().unbind()
    d_start, d_end = negatives - positives, torch.zeros_like(negatives)
    if d_end.numel() == 0:
        return d_vectors, d_start.view(batch, heads, length), d_end.view(batch, heads, length)
    a = (saved.bounds - of_negatives).exp_()
    if upstream is not None:
        upstream = upstream.contiguous().view(of_negatives.shape)
        d_start.mul_(upstream)
        a.mul_(upstream)
        upstream = upstream.view(-1, 1)
    of_negatives, of_positives = of_negatives.view(-1, 1), of_positives.view(-1)
    if kept is None:
        kept = Kept(0, _sweep(saved.vectors, saved.biases, problem), _listed.recalled(saved.cells))
    sweep = kept.sweep
    assert sweep is not None
    d_queries, d_keys = shaped(d_vectors, 2, batch * own_heads, length, size).unbind()
    d_end_of_planes, a_of_rows = d_end.view(-1, length), a.view(-1)
    for i, tile in enumerate(sweep.tiles):
        g, r, c, _ = tile
        p, direct, of_direct = kept.tiles[i] if i < len(kept.tiles) else _again(tile, saved, kept)
        for rows in direct:
            a_of_rows.index_fill_(0, rows.numbers, 0.0)
        a_of_tile, values = part(a, g, None, r), part(saved.values, g, None, c)
        part(d_end, g, None, c).addcmul_(torch.bmm(a_of_tile, p), values)
        d_products = p.mul_(torch.bmm(a_of_tile.mT, values))
        for rows, (scores, among_positives) in zip(direct, of_direct, strict=True):
            weights = scores.sub_(of_negatives.index_select(0, rows.planes)).exp_()
            if rows.cells is not None:
                taken = (among_positives - of_positives.index_select(0, rows.cells.planes)).exp_()
                weights.view(-1).index_add_(0, rows.cells.at, taken, alpha=-1)
            if upstream is not None:
                weights.mul_(upstream.index_select(0, rows.planes))
            part(d_end_of_planes, None, c).index_add_(0, rows.planes, weights)
            d_products.view(-1, weights.shape[1]).index_add_(0, rows.places, weights)
        torch.bmm(d_products, part(sweep.keys, g, c), out=part(d_queries, g, r))
        d_keys_of_tile = part(d_keys, g, c)
        torch.baddbmm(d_keys_of_tile, d_products.mT, part(sweep.queries, g, r), out=d_keys_of_tile)
    d_start, d_end = (shaped(x, batch, heads, length) for x in (d_start, d_end))
    grads = turned_back(d_vectors, problem), d_start, d_end
    if share != 1.0:
        for x in grads:
            x.mul_(share)
    return grads


# --- the sweep -----------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What the tiles are parts of, by triangle and band alone: the mask is in the biases."""

    queries: torch.Tensor  # [G, N, D]
    keys: torch.Tensor  # [G, N, D]
    start: torch.Tensor  # [G, H', N]
    end: torch.Tensor  # [G, H', N]
    start_of_rows: torch.Tensor  # [B * H * N, 1]
    end_of_planes: torch.Tensor  # [B * H, N]
    grid: Grid
    tiles: list[Tile]

    def direct(self, tile: Tile, cells: Numbers, bounds: torch.Tensor | None) -> list[Rows]:
        """The rows of a tile that are not for the sweep: with a listed cell, and if there are bounds [groups, heads of
        a group, start tokens] also the unsafe ones."""
        g, r, c, _ = tile
        width = c.stop - c.start
        listed = _listed.rows_of(cells, tile, self.grid, self.queries)
        found = [] if listed is None else [listed]
        if bounds is not None:
            group, head, m = (bounds > SAFE_BOUND).nonzero().unbind(1)
            planes, places = (group + g.start) * self.grid.of_group + head, group * (r.stop - r.start) + m
            numbers = planes * self.grid.length + m + r.start
            if listed is not None:
                others = ~torch.isin(numbers, listed.numbers)
                numbers, planes, places = numbers[others], planes[others], places[others]
            found.append(Rows(numbers, planes, places))
        return [some for rows in found for some in rows.split(max(1, CELLS // width), width)]

    def scores(self, tile: Tile, products: torch.Tensor, rows: Rows, overflows: bool) -> torch.Tensor:
        """Of some rows of a tile [R, end tokens of the tile]. Where a bias may be inf, an invalid cell with it would be
        NaN."""
        scores = products.view(-1, products.shape[2]).index_select(0, rows.places)
        ends = part(self.end_of_planes, None, tile[2]).index_select(0, rows.planes)
        left_out = (scores == -torch.inf) | (ends == -torch.inf) if overflows else None
        scores.add_(ends).add_(self.start_of_rows.index_select(0, rows.numbers))
        return scores if left_out is None else scores.masked_fill_(left_out, -torch.inf)


def _sweep(vectors: torch.Tensor, of_both: torch.Tensor, problem: Problem) -> Sweep:
    """Of vectors and biases as they are saved."""
    (batch, *_, size), (_, groups, of_group, length) = vectors.shape[1:], of_both.shape
    heads = groups * of_group // max(1, batch)
    queries, keys = shaped(vectors, 2, groups, length, size).unbind()
    start, end = of_both.unbind()
    # The lower a tile, the less of it is below the triangle; but few tiles are few calls.
    height = max(HEIGHT, CELLS // max(1, groups * length) // 16 * 16)
    grid = Grid(batch, heads, of_group, length, height)
    every = tiles(groups, length, problem, queries, penalties, height=height, cells=CELLS) if start.numel() else ()
    of_rows, of_planes = start.view(-1, 1), end.view(batch * heads, length)
    return Sweep(queries, keys, start, end, of_rows, of_planes, grid, list(every))


def _products(sweep: Sweep, tile: Tile, overflown: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """q.k of a tile [groups, start tokens, end tokens], -inf in invalid cells; and P, their softmax.

    Where they may have ``overflown`` an invalid cell is filled with -inf (inf - inf is NaN), and of a row with one of
    inf, or nothing but -inf, P is 0.
    """
    g, r, c, corner = tile
    queries, keys = part(sweep.queries, g, r), part(sweep.keys, g, c).mT
    if corner is not None and corner.shape[1] == c.stop - c.start:
        products = torch.baddbmm(corner, queries, keys)
    else:
        products = torch.bmm(queries, keys)
        if corner is not None:
            products[..., : corner.shape[1]].add_(corner)
    if not overflown:
        return products, products.softmax(-1)
    if corner is not None:
        products[..., : corner.shape[1]].masked_fill_(corner == -torch.inf, -torch.inf)
    return products, products.softmax(-1).masked_fill_(_overflown(products).unsqueeze(-1), 0.0)


def _overflown(products: torch.Tensor) -> torch.Tensor:
    """Which rows [groups, start tokens] have a product of inf, or none but -inf."""
    return products.amax(-1).isinf()


def _pivots(products: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The log-sums of the products of the rows [groups, 1, start tokens]."""
    return products.amax(-1).sub_(p.amax(-1).log_()).unsqueeze(1)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """inf - inf would be NaN."""
    return x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)


# --- what forward keeps ----------------------------------------------------------------------------------------------


KeptTile = tuple[torch.Tensor, list[Rows], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""P, the rows that are not for the sweep, and of each part of these the exponents among the negatives [R, end tokens of
the tile], and those of the listed cells among the positives."""


@dataclass
class Kept:
    """What a forward leaves to the backward that follows at once."""

    room: int  # for so many cells more
    sweep: Sweep | None = None
    cells: Numbers = field(default_factory=list)  # the listed ones
    tiles: list[KeptTile] = field(default_factory=list)  # the first ones


def _again(tile: Tile, saved: Saved, kept: Kept) -> KeptTile:
    """A tile of which forward kept nothing."""
    sweep, bounds = kept.sweep, part(saved.bounds, tile[0], None, tile[1])
    assert sweep is not None
    unsafe = not float(bounds.amax()) <= SAFE_BOUND
    products, p = _products(sweep, tile, overflown=unsafe)
    direct = sweep.direct(tile, kept.cells, bounds if unsafe else None)

    def of_direct() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in direct:
            scores, terms = sweep.scores(tile, products, rows, unsafe), saved.terms
            if rows.cells is not None:
                terms = part(terms, None, rows.cells.listed)
            among_negatives, among_positives = terms.unbind()
            if rows.cells is not None:
                scores.view(-1).index_copy_(0, rows.cells.at, among_negatives)
            yield scores, among_positives

    return p, direct, of_direct()


# --- the listed cells ------------------------------------------------------------------------------------------------


def _logarithms(labels: torch.Tensor, order: Numbers, like: torch.Tensor) -> torch.Tensor:
    """log(1 - label) and log(label) [2, S] of the cells that count, in order; -inf for both leaves a cell out."""
    t = labels.index_select(0, _listed.as_tensor(order, labels)).to(like.dtype)
    return torch.stack((torch.log1p(-t), t.log())).masked_fill_(t == -100, -torch.inf)


def _list(
    scores: torch.Tensor, terms: torch.Tensor, cells: Cells | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some rows: fills in the terms [2, S] of their listed cells, and puts those among the negatives into the
    scores; gives those among the positives, and the log-sums [R] of these."""
    if cells is None:
        nothing = scores.new_full((len(scores),), -torch.inf)
        return nothing, nothing
    among_negatives, among_positives = part(terms, None, cells.listed).unbind()
    flat = scores.view(-1)
    of_cells = flat.index_select(0, cells.at)
    if labels is not None:
        log_rest, log_label = part(labels, None, cells.listed).unbind()
        torch.add(log_rest, of_cells, out=among_negatives).masked_fill_(log_rest == -torch.inf, -torch.inf)
    flat.index_copy_(0, cells.at, among_negatives)
    of_cells.nan_to_num_(torch.nan, torch.inf, torch.inf)  # a cell whose score is -inf leaves both terms
    if labels is None:
        torch.neg(of_cells, out=among_positives)
    else:
        torch.sub(log_label, of_cells, out=among_positives)
    if cells.slots is None:
        return among_positives, among_positives
    of_rows = scores.new_full((len(scores), cells.most), -torch.inf)
    of_rows.view(-1).index_copy_(0, cells.slots, among_positives)
    return among_positives, of_rows.logsumexp(-1)
