"""Which cells (start token, end token) may be spans, and how they are cut into tiles.

A group is what shares q and k: a sentence, or one head of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch

from ..problem import Problem
from ._tiles import computing

Tile = tuple[slice, slice, slice, torch.Tensor | None]
"""Groups, start tokens, end tokens, and what triangle and band make of the first columns: None if they rule out
nothing. Beyond these columns they rule out nothing either."""

CornerOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def penalties(invalid: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """-inf in invalid cells and 0 in others, to be added."""
    return like.new_zeros(invalid.shape).masked_fill_(invalid, -torch.inf)


def factors(invalid: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """0 in invalid cells and 1 in others."""
    return (~invalid).to(like.dtype)


def invalid_cells(rows: slice, columns: slice, problem: Problem, device: torch.device) -> torch.Tensor:
    """Which cells [rows, columns] triangle and band rule out."""
    m, n = (torch.arange(tokens.start, tokens.stop, device=device) for tokens in (rows, columns))
    m = m.unsqueeze(1)
    invalid = (m > n) if problem.tril_mask else torch.zeros_like(m > n)
    if problem.max_width is not None:
        invalid |= n - m >= problem.max_width
    return invalid


def biases(
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    groups: int,
    heads: int,
    problem: Problem,
    vectors: torch.Tensor,
) -> torch.Tensor:
    """start and end [2, groups, heads of a group, N] in the dtype of ``vectors`` [2, B, ..., N, D]: 0 for none, -inf
    for the tokens that the mask drops."""
    batch, length = vectors.shape[1], vectors.shape[-2]
    if start is None and end is None:
        x = vectors.new_zeros((2, batch, heads, length))
    else:
        given = [x for x in (start, end) if x is not None]
        x = computing(torch.stack([torch.zeros_like(given[0]) if x is None else x for x in (start, end)]))
    if problem.mask is not None:
        x.masked_fill_(~problem.mask.unsqueeze(1), -torch.inf)
    return shaped(x, 2, groups, batch * heads // max(1, groups), length)


# --- of a problem of one tile nothing is cut: a view is a call too ----------------------------------------------------


def part(x: torch.Tensor, *slices: slice | None) -> torch.Tensor:
    """These slices of its first dimensions, None for all of one; itself where they are all there is."""
    for dim, s in enumerate(slices):
        if s is not None and s.stop - s.start < x.shape[dim]:
            x = x.narrow(dim, s.start, s.stop - s.start)
    return x


def shaped(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """A view of this shape; itself where it has it."""
    return x if x.shape == shape else x.view(shape)


# --- tiles ------------------------------------------------------------------------------------------------------------


def tiles(
    groups: int,
    length: int,
    problem: Problem,
    like: torch.Tensor,
    corner_of: CornerOf,
    *,
    height: int,
    cells: int,
    multiple: int = 1,
) -> Iterator[Tile]:
    """Tiles that together hold each valid cell once, and of which none lies in padding.

    Args:
        groups, length, problem: whose cells; ``like`` is one of their tensors.
        corner_of: ``penalties`` or ``factors``.
        height: start tokens of a tile, at most.
        cells: of a tile, at most, but for one group's, which may have more.
        multiple: of so many tokens each tile begins and ends at one, as length and height do.
    """
    extents = [length] * groups
    if problem.mask is not None and problem.mask.device.type == "cpu":  # elsewhere to look is to wait
        last = (problem.mask * torch.arange(1, problem.mask.shape[1] + 1, device="cpu")).amax(1)
        extents = (last + -last % multiple).repeat_interleave(groups // len(last)).tolist()
    for first in range(0, length, height):
        r = slice(first, min(first + height, length))
        stop = length if problem.max_width is None else min(length, r.stop - 1 + problem.max_width)
        c = slice(first if problem.tril_mask else 0, stop + -stop % multiple)
        here = corner(r, c, problem, like, corner_of)
        # As many groups to each of the tiles of these rows: of 8, not 6 and 2.
        most = max(1, cells // ((r.stop - r.start) * (c.stop - c.start)))
        depth = math.ceil(groups / math.ceil(groups / most))
        for g in (slice(g, min(g + depth, groups)) for g in range(0, groups, depth)):
            extent = max(extents[g])
            if extent > first:
                rows, columns = (slice(s.start, min(s.stop, extent)) for s in (r, c))
                sides = (slice(0, s.stop - s.start) for s in (rows, columns))
                yield g, rows, columns, None if here is None else part(here, *sides)


def corner(r: slice, c: slice, problem: Problem, like: torch.Tensor, corner_of: CornerOf) -> torch.Tensor | None:
    """What triangle and band make of the first columns of a tile, as ``Tile`` says."""
    if problem.max_width is not None:
        return corner_of(invalid_cells(r, c, problem, like.device), like)
    if not problem.tril_mask:
        return None
    height = r.stop - r.start
    # On a GPU what one CUDA graph made cannot serve outside it, and what tracing makes (a subclass) holds no numbers.
    if like.device.type != "cpu" or type(like) is not torch.Tensor:
        return corner_of(invalid_cells(r, r, problem, like.device), like)
    return _triangle(height, corner_of, like.dtype)


@functools.lru_cache(maxsize=8)
def _triangle(height: int, corner_of: CornerOf, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):
        like = torch.empty(0, dtype=dtype, device="cpu")
        return corner_of(torch.ones(height, height, dtype=torch.bool, device="cpu").tril_(-1), like)
