"""Which cells (start token, end token) may be spans, and how they are cut into tiles.

A group is what shares q and k: a sentence, or one head of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch

from ..problem import Problem

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
    bias: torch.Tensor | None, batch: int, heads: int, length: int, problem: Problem, like: torch.Tensor
) -> torch.Tensor:
    """A bias [B, H, N] in the dtype of ``like``: 0 for none, -inf for the tokens that the mask drops."""
    x = like.new_zeros((batch, heads, length)) if bias is None else bias.to(like.dtype).contiguous()
    return x if problem.mask is None else torch.where(problem.mask.unsqueeze(1), x, -torch.inf)


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
        last = (problem.mask * torch.arange(1, problem.mask.shape[1] + 1)).amax(1)
        extents = (last + -last % multiple).repeat_interleave(groups // len(last)).tolist()
    for first in range(0, length, height):
        r = slice(first, min(first + height, length))
        stop = length if problem.max_width is None else min(length, r.stop - 1 + problem.max_width)
        c = slice(first if problem.tril_mask else 0, stop + -stop % multiple)
        corner = _corner(r, c, problem, like, corner_of)
        # As many groups to each of the tiles of these rows: of 8, not 6 and 2.
        most = max(1, cells // ((r.stop - r.start) * (c.stop - c.start)))
        depth = math.ceil(groups / math.ceil(groups / most))
        for g in (slice(g, min(g + depth, groups)) for g in range(0, groups, depth)):
            extent = max(extents[g])
            if extent > first:
                rows, columns = (slice(s.start, min(s.stop, extent)) for s in (r, c))
                here = None if corner is None else corner[: rows.stop - first, : columns.stop - c.start]
                yield g, rows, columns, here


def _corner(r: slice, c: slice, problem: Problem, like: torch.Tensor, corner_of: CornerOf) -> torch.Tensor | None:
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
