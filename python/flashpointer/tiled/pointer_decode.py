"""The spans whose score is above the threshold, found by bounds, without most of the scores.

A score is x_mn + start_hm + end_hn, where only the biases depend on the head. So the largest x of a block of cells,
plus the largest start of its rows, plus the largest end of its columns, bounds the block's scores, for all heads that
share q and k at once. A block is looked into where that exceeds the threshold: first its columns, each with the largest
x of its own, then the cells of the columns that are left. Rounding is monotone, and the terms are added in one order:
no bound falls below a score. Where a tile has few scores, they are all looked at.

A group is what shares q and k: a sentence, or one head of it. Inner tensors are [groups, heads of a group, N].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from ..problem import Problem
from ._cells import biases, corner, penalties, shaped, tiles
from ._rotary import turned
from ._tiles import TILE, small_on_one_thread

# Tokens to the side of a block: few enough blocks to compare the bounds of all, for every head.
BLOCK = 32
# Start tokens to a tile: fewer leave less of it below the triangle, more make a faster product.
HEIGHT = 128
# Scores of a tile that take less time to look at, all of them, than it takes to rule some out.
FEW = TILE

Found = tuple[torch.Tensor, torch.Tensor]
"""Cells ((b * H + h) * N + start) * N + end, and their scores."""


@small_on_one_thread(lambda q, *_: q.shape[:-1].numel() * q.shape[-2])
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    heads: int,
    problem: Problem,
    threshold: list[float],
    max_spans: int | None,
    top_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """As ``kernels.pointer_decode.decode``, in float64 for float64, with a threshold for all heads or one for each; and
    of each head of a sentence only the top_k best spans, of equal ones the first. Neither limit lets more gather than
    twice what it leaves, and a tile. q and k may also be [B, N, D]."""
    vectors = turned(q, k, problem)
    batch, length, size = vectors.shape[1], *vectors.shape[-2:]
    groups = vectors[0].numel() // max(1, length * size)
    q, k = shaped(vectors, 2, groups, length, size).unbind()
    of_both = biases(start, end, groups, heads, problem, vectors)
    if len(threshold) == 1:
        floor = q.new_full((batch * heads,), threshold[0])  # top_k raises it
    else:
        floor = torch.tensor(threshold, dtype=torch.float64, device=q.device).to(q.dtype).repeat(batch)
    if top_k is None and 0 < batch * heads * length**2 <= FEW:
        cells, scores = _all(q, k, of_both, problem, floor)
        return *((cells, scores) if max_spans is None else (cells[:max_spans], scores[:max_spans])), len(cells)
    start, end = _filled(of_both)
    best: Found = torch.empty(0, dtype=torch.int64, device=q.device), q.new_empty(0)
    pending: list[Found] = []
    count = waiting = 0
    for some in _found(q, k, start, end, problem, floor):
        pending.append(some)
        count += len(some[0])
        waiting += len(some[0])
        if (top_k or max_spans) and waiting > max(TILE, len(best[0])):
            best, pending, waiting = _merged([best, *pending], length, floor, top_k), [], 0
            if not top_k:
                best = best[0][:max_spans], best[1][:max_spans]
    cells, scores = _merged([best, *pending], length, floor, top_k)
    count = len(cells) if top_k else count
    return cells[:max_spans], scores[:max_spans], count


# --- the search ----------------------------------------------------------------------------------------------------


def _all(q: torch.Tensor, k: torch.Tensor, of_both: torch.Tensor, problem: Problem, floor: torch.Tensor) -> Found:
    """Of a problem that is one small tile, in order: whose cells are numbered as they lie."""
    everything, (start, end) = slice(0, q.shape[1]), of_both.unbind()
    triangle = corner(everything, everything, problem, q, penalties)
    x = torch.bmm(q, k.mT) if triangle is None else torch.baddbmm(triangle, q, k.mT)
    scores = torch.add(x.unsqueeze(1), start.unsqueeze(3)).add_(end.unsqueeze(2))  # [groups, heads of a group, N, N]
    cells = (scores > floor.view(*start.shape[:2], 1, 1)).view(-1).nonzero().squeeze(1)
    return cells, scores.view(-1).index_select(0, cells)


def _filled(of_both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """start and end [groups, heads of a group, whole blocks of tokens]. -inf, whose score is above no threshold, where
    one is NaN, and for the tokens that fill the last block."""
    x = of_both.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    start, end = pad(x, (0, -x.shape[-1] % BLOCK), value=-torch.inf) if x.shape[-1] % BLOCK else x
    return start, end


def _found(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, problem: Problem, floor: torch.Tensor
) -> Iterator[Found]:
    """What is above the floor [B * H] of its head, which the caller may raise on the way; in no particular order."""
    (groups, heads, width), length = start.shape, q.shape[1]
    if start.numel() == 0:
        return
    if width > length:
        q, k = (pad(x, (0, 0, 0, width - length)) for x in (q, k))
    start, end = (x.view(groups, heads, width // BLOCK, BLOCK) for x in (start, end))
    most_start, most_end = start.amax(-1), end.amax(-1)
    floor = floor.view(groups, heads)
    height = max(BLOCK, min(HEIGHT, TILE // width // BLOCK * BLOCK))
    for g, r, c, triangle in tiles(groups, width, problem, q, penalties, height=height, cells=TILE, multiple=BLOCK):
        rows, columns = (slice(s.start // BLOCK, s.stop // BLOCK) for s in (r, c))
        x = torch.bmm(q[g, r], k[g, c].mT)
        if triangle is not None:
            x[..., : triangle.shape[1]].add_(triangle)
        if heads * x.numel() <= FEW:
            scores = x.unsqueeze(1) + start[g, :, rows].flatten(2).unsqueeze(3)
            scores.add_(end[g, :, columns].flatten(2).unsqueeze(2))
            i, h, m, n = (scores > floor[g, :, None, None]).nonzero().unbind(1)
            plane = (i + g.start) * heads + h
            yield (plane * length + m + r.start) * length + n + c.start, scores[i, h, m, n]
            continue
        x = x.view(len(x), rows.stop - rows.start, BLOCK, columns.stop - columns.start, BLOCK)
        of_columns, of_blocks = _largest(x)
        if of_blocks.isnan().any():
            of_columns, of_blocks = _largest(x.masked_fill_(x.isnan(), -torch.inf))
        bounds = of_blocks.unsqueeze(1) + most_start[g, :, rows, None] + most_end[g, :, None, columns]
        for some in (bounds > floor[g, :, None, None]).nonzero().split(TILE // BLOCK):  # type: ignore[no-untyped-call]
            i, h, row, column = some.unbind(1)
            group, first, last = i + g.start, row + rows.start, column + columns.start
            bounds = of_columns[i, row, column] + most_start[group, h, first, None] + end[group, h, last]
            for some in (bounds > floor[group, h, None]).nonzero().split(TILE // BLOCK):  # type: ignore[no-untyped-call]
                of, n = some.unbind(1)
                scores = x[i[of], row[of], :, column[of], n]
                scores = scores + start[group[of], h[of], first[of]] + end[group[of], h[of], last[of], n, None]
                here, m = (scores > floor[group[of], h[of], None]).nonzero().unbind(1)
                of, n = of[here], n[here]
                plane, m_token, n_token = group[of] * heads + h[of], first[of] * BLOCK + m, last[of] * BLOCK + n
                yield (plane * length + m_token) * length + n_token, scores[here, m]


def _largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the columns of each block [groups, row blocks, column blocks, BLOCK], and of each block."""
    of_columns = x.amax(2)
    return of_columns, of_columns.amax(-1)


# --- what is kept of it --------------------------------------------------------------------------------------------


def _merged(found: list[Found], length: int, floor: torch.Tensor, top_k: int | None) -> Found:
    """All that was found, sorted; with top_k only the best of each head, below which its floor then comes to lie."""
    cells, order = torch.cat([cells for cells, _ in found]).sort()
    scores = torch.cat([scores for _, scores in found])[order]
    if top_k is None or len(cells) == 0:
        return cells, scores
    order = scores.argsort(descending=True, stable=True)
    planes, by_plane = (cells // length**2)[order].sort(stable=True)
    rank = torch.arange(len(cells), device=cells.device) - torch.searchsorted(planes, planes)
    order = order[by_plane]
    last = rank == top_k - 1
    # Equal ones must still be found: they may turn out to be earlier.
    floor[planes[last]] = scores[order[last]].nextafter(floor.new_tensor(-torch.inf))
    keep = order[rank < top_k].sort().values
    return cells[keep], scores[keep]
