"""The ZLPR loss of all spans without their scores: ``kernels/pointer_loss.py`` has the mathematics.

The same algorithm in plain PyTorch. A group is what shares q and k: a sentence, or one head of it. Matrix products
have the heads first, for then their layout is that of the biases and the small dimension is the fast one. A mask is
multiplied in, or added, never filled in: on a CPU that is twenty times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import softplus

from ._cells import Tile, factors, tiles
from ._rotary import rotated, rotated_back
from ._tiles import TILE

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
    pivots: torch.Tensor  # [B, own heads or 1, N]: the largest product of a row
    rows: torch.Tensor  # [B, H, N]: the log-sum of the negatives of a row
    log_sums: torch.Tensor  # [2, B, H]: the two terms of the loss
    cells: torch.Tensor  # [S]: ((b * H + h) * N + start) * N + end of the spans that count, sorted; then NOWHERE
    labels: torch.Tensor  # [S]: theirs


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    spans: torch.Tensor,
    span_labels: torch.Tensor | None,
    heads: int,
    problem: Any,
) -> tuple[torch.Tensor, Saved]:
    """As ``kernels.pointer_loss.forward``; float64 is computed in float64."""
    # Copies at least: what an op returns must not be what it was given.
    q, k = (rotated(x if problem.rope else x.clone(), problem) for x in (q, k))
    q.mul_(problem.scale)
    batch, own_heads, length, _ = q.shape
    cells, labels = _listed(spans, span_labels, q, heads, problem)
    start, end = (_masked(bias, q, heads, problem) for bias in (start, end))
    pivots, rows = q.new_zeros((batch, own_heads, length)), torch.zeros_like(start)
    log_sums = q.new_zeros((2, batch, heads))
    if rows.numel() == 0:
        return log_sums.sum(0), Saved(q, k, start.clone(), end.clone(), pivots, rows, log_sums, cells, labels)
    largest = end.amax(-1, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    values, exponents = (end - largest).exp_(), start + largest
    saved = Saved(q, k, exponents, values, pivots, rows, log_sums, cells, labels)

    some_cells, some_labels = _present(saved)
    exponents.view(-1)[some_cells // length] = -torch.inf
    group = _by_group(saved)
    for g, r, c, corner in _tiles(group, problem):
        p = torch.bmm(group.q[g, r], group.k[g, c].mT)
        pivot = p.amax(-1, keepdim=True)
        p = _exp(p.sub_(pivot), corner)
        group.pivots[g, 0, r] = pivot.squeeze(-1)
        group.rows[g, :, r] = torch.bmm(group.values[g, :, c], p.mT)
    bounds = group.exponents + group.pivots
    group.rows.log_().add_(bounds)

    negated = torch.empty_like(some_labels)
    for block in _direct(group, start, end, bounds, some_cells, some_labels, problem):
        rows.view(-1)[block.rows[block.live]] = block.negatives.logsumexp(-1)[block.live]
        negated[block.listed] = block.positives
    log_sums[0] = softplus(rows.logsumexp(-1), threshold=SAFE_BOUND)
    log_sums[1] = _log_one_plus_sums(negated, some_cells // length**2, batch * heads).view(batch, heads)
    return log_sums.sum(0), saved


def backward(
    upstream: torch.Tensor,
    share: float,
    saved: Saved,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    dtype: torch.dtype,
    problem: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``kernels.pointer_loss.backward``."""
    q, k, _, values, _, rows, log_sums, _, _ = saved
    _, heads, length = rows.shape
    d_q, d_k, d_end = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(rows)
    upstream = (upstream.to(q.dtype) * share).contiguous().unsqueeze(-1)
    negative_sums = log_sums[0].unsqueeze(-1)
    d_start = (rows - negative_sums).exp_().mul_(upstream)
    if rows.numel() == 0:
        return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)
    group = _by_group(saved)
    bounds = group.exponents + group.pivots
    a = (bounds - negative_sums.view(*bounds.shape[:2], 1)).exp_().mul_(upstream.view(*bounds.shape[:2], 1))
    if _unsafe(bounds):
        a.masked_fill_(bounds > SAFE_BOUND, 0.0)
    # With the head size first: the sum over the start tokens is then a product with rows of the tile, not columns.
    d_k_heads_first = k.new_zeros(group.k.mT.shape)
    d_q_of_group, d_end_of_group = d_q.view_as(group.q), d_end.view_as(group.rows)
    for g, r, c, corner in _tiles(group, problem):
        p = torch.bmm(group.q[g, r], group.k[g, c].mT)
        p = _exp(p.sub_(group.pivots[g, :, r].mT), corner)
        d_end_of_group[g, :, c] += torch.bmm(a[g, :, r], p)
        d_products = p.mul_(torch.bmm(a[g, :, r].mT, group.values[g, :, c]))
        d_q_of_group[g, r] = torch.bmm(d_products, group.k[g, c])
        d_k_heads_first[g, :, c] += torch.bmm(group.q[g, r].mT, d_products)
    d_end.mul_(values)

    some_cells, some_labels = _present(saved)
    start, end = (_masked(bias, q, heads, problem) for bias in (start, end))
    for block in _direct(group, start, end, bounds, some_cells, some_labels, problem):
        planes, listed_planes = block.rows // length, some_cells[block.listed] // length**2
        shares = upstream.view(-1)[planes].masked_fill_(~block.live, 0.0)
        weights = (block.negatives - log_sums[0].view(-1)[planes].unsqueeze(-1)).exp_().mul_(shares.unsqueeze(-1))
        taken = (block.positives - log_sums[1].view(-1)[listed_planes]).exp_().mul_(upstream.view(-1)[listed_planes])
        weights.view(-1).index_add_(0, block.at, taken, alpha=-1)
        d_start.view(-1).index_add_(0, some_cells[block.listed] // length, taken, alpha=-1)
        d_end.view(-1, length).index_add_(0, planes.flatten(), weights.flatten(0, 1))
        tokens = block.groups.unsqueeze(1) * length + block.rows % length
        d_q.view(-1, d_q.shape[-1]).index_add_(0, tokens.flatten(), torch.bmm(weights, block.k).flatten(0, 1))
        d_k_heads_first.index_add_(0, block.groups, torch.bmm(block.q.mT, weights))
    d_k.view_as(group.k).copy_(d_k_heads_first.mT)
    d_q, d_k = rotated_back(d_q.mul_(problem.scale), problem), rotated_back(d_k, problem)
    return d_q.to(dtype), d_k.to(dtype), d_start.to(dtype), d_end.to(dtype)


# --- the sweep -----------------------------------------------------------------------------------------------------


def _masked(bias: torch.Tensor | None, q: torch.Tensor, heads: int, problem: Any) -> torch.Tensor:
    """A bias [B, H, N] in the computing dtype: 0 for none, -inf for the tokens that the mask drops."""
    x = q.new_zeros((q.shape[0], heads, q.shape[2])) if bias is None else bias.to(q.dtype).contiguous()
    return x if problem.mask is None else torch.where(problem.mask.unsqueeze(1), x, -torch.inf)


def _by_group(saved: Saved) -> Saved:
    """Views with a group first: q and k [G, N, D], the biases [G, heads of a group, N]."""
    q, k, *of_heads = saved[:6]
    groups, length = q.shape[0] * q.shape[1], q.shape[2]
    exponents, values, pivots, rows = (x.view(groups, -1, length) for x in of_heads)
    return saved._replace(
        q=q.flatten(0, 1), k=k.flatten(0, 1), exponents=exponents, values=values, pivots=pivots, rows=rows
    )


def _tiles(group: Saved, problem: Any) -> Iterator[Tile]:
    """By triangle and band alone: the mask is in exponents and values."""
    groups, length, _ = group.q.shape
    return tiles(groups, length, problem, group.q, factors, height=64 if length < 512 else 128, cells=TILE)


def _exp(p: torch.Tensor, corner: torch.Tensor | None) -> torch.Tensor:
    p.exp_()
    if corner is not None:
        p[..., : corner.shape[1]].mul_(corner)
    return p


# --- the rows that are not for the sweep ---------------------------------------------------------------------------


def _listed(
    spans: torch.Tensor, span_labels: torch.Tensor | None, q: torch.Tensor, heads: int, problem: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cells of the spans that count, sorted, and their labels: valid ones, of repeated ones the first."""
    (batch, _, length, _), (b, h, m, n) = q.shape, spans.unbind(1)
    cells, labels = torch.full_like(b, NOWHERE), q.new_zeros(len(spans))
    valid = (spans >= 0).all(1) & (b < batch) & (h < heads) & (m < length) & (n < length)
    if problem.tril_mask:
        valid &= m <= n
    if problem.max_width is not None:
        valid &= n - m < problem.max_width
    if problem.mask is not None:
        valid[valid.clone()] = problem.mask[b[valid], m[valid]] & problem.mask[b[valid], n[valid]]
    some, order = (((b * heads + h) * length + m) * length + n)[valid].sort(stable=True)
    first = torch.ones_like(some, dtype=torch.bool)
    first[1:] = some[1:] != some[:-1]
    count = int(first.sum())
    cells[:count] = some[first]
    labels[:count] = 1.0 if span_labels is None else span_labels[valid][order][first].to(q.dtype)
    return cells, labels


def _present(saved: Saved) -> tuple[torch.Tensor, torch.Tensor]:
    count = int((saved.cells != NOWHERE).sum())
    return saved.cells[:count], saved.labels[:count]


class _Block(NamedTuple):
    """Some direct rows, p of each of g groups at most."""

    groups: torch.Tensor  # [g]
    k: torch.Tensor  # [g, N, D], theirs
    rows: torch.Tensor  # [g, p]: (b * H + h) * N + start
    live: torch.Tensor  # [g, p]: False where a group has fewer rows
    q: torch.Tensor  # [g, p, D]
    negatives: torch.Tensor  # [g, p, N]: scores + log(1 - label), -inf in invalid cells
    at: torch.Tensor  # where in negatives the listed cells of these rows are,
    listed: torch.Tensor  # which of all listed cells these are,
    positives: torch.Tensor  # and log(label) - score of each


def _unsafe(bounds: torch.Tensor) -> bool:
    return not bool(bounds.amax() <= SAFE_BOUND)  # so that NaN, too, makes the caller look more closely


def _direct(
    group: Saved,
    start: torch.Tensor,
    end: torch.Tensor,
    bounds: torch.Tensor,
    cells: torch.Tensor,
    labels: torch.Tensor,
    problem: Any,
) -> Iterator[_Block]:
    """The rows with a listed cell, and those whose bound is unsafe."""
    (groups, heads, length), tokens = bounds.shape, torch.arange(bounds.shape[2], device=cells.device)
    rows = torch.unique_consecutive(cells // length)
    if _unsafe(bounds):
        rows = torch.unique(torch.cat([rows, (bounds.view(-1) > SAFE_BOUND).nonzero().squeeze(1)]))
    if len(rows) == 0:
        return
    counts = torch.bincount(rows // (heads * length), minlength=groups)
    firsts = counts.cumsum(0) - counts
    most = int(counts.max())
    row_of_cell = torch.searchsorted(rows, cells // length)
    group_of_cell = cells // (heads * length**2)
    rank_of_cell = row_of_cell - firsts[group_of_cell]
    width = max(1, TILE // (int((counts > 0).sum()) * length))
    for p in range(0, most, width):
        g = (counts > p).nonzero().squeeze(1)
        slots = firsts[g].unsqueeze(1) + torch.arange(p, min(p + width, most), device=g.device)
        live = slots < (firsts + counts)[g].unsqueeze(1)
        row = rows[torch.minimum(slots, (firsts + counts - 1)[g].unsqueeze(1))]  # the last one in the place of none
        m = row % length
        q = group.q[g.unsqueeze(1), m]
        k = group.k if len(g) == groups else group.k[g]
        scores = torch.bmm(q, k.mT).add_(start.view(-1)[row].unsqueeze(-1)).add_(end.view(-1, length)[row // length])
        if problem.tril_mask:
            scores.masked_fill_(tokens < m.unsqueeze(-1), -torch.inf)
        if problem.max_width is not None:
            scores.masked_fill_(tokens - m.unsqueeze(-1) >= problem.max_width, -torch.inf)
        listed = ((rank_of_cell >= p) & (rank_of_cell < p + width)).nonzero().squeeze(1)
        place = torch.searchsorted(g, group_of_cell[listed]) * slots.shape[1] + rank_of_cell[listed] - p
        at = place * length + cells[listed] % length
        own, t = scores.view(-1)[at], labels[listed]
        scores.view(-1)[at] += torch.log1p(-t)
        positives = (torch.log(t) - own).masked_fill_(own == -torch.inf, -torch.inf)  # such a cell leaves both terms
        yield _Block(g, k, row, live, q, scores, at, listed, positives)


def _log_one_plus_sums(x: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """log(1 + the sum of exp(x) over each index)."""
    pivots = x.new_zeros(size).scatter_reduce_(0, index, x, "amax")
    return torch.expm1(-pivots).index_add_(0, index, (x - pivots[index]).exp_()).log1p_().add_(pivots)
