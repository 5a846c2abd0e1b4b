"""The k best classes of each row, without the scores: tiles of classes, and a running selection.

A tile of scores [T, R] is cut into groups of G neighbouring classes, whose maxima cost one pass. The k best classes of
a row lie in the k groups with the best maxima: a class of any other group is behind each of these k maxima. So what is
put in order is not T scores but T / G maxima and k G scores, least where G = sqrt(T / k). A CPU, which can look, does
so only for the rows where some maximum is above the worst of the best, and for no more groups than are.

Of equal scores the first class is the better one. What was found before stands in front, groups are in order, and
``_order`` takes the first of equal ones.
"""

from __future__ import annotations

import math

import torch

from ._tiles import computing_dtype

# Scores of a tile: 2 MiB in float32 on a CPU, where they stay in cache; elsewhere 256 MiB, for a tile is 40 launches.
CPU_CELLS, CELLS = 1 << 19, 1 << 26
# Rows of a tile, as many as make a fast product.
CPU_HEIGHT, HEIGHT = 512, 4096
# Whether NVIDIA's library gives products of half precision in float32: PyTorch 2.8 and later.
HALVES = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and classes [R, k] of hidden [R, D], weight [C, D] and bias [C]: the best first, NaN above all; behind the
    last class -inf and -1. In float32, and float64 for float64."""
    dtype, can_look = computing_dtype(hidden.dtype), hidden.device.type == "cpu"
    scores = torch.full((len(hidden), k), -torch.inf, dtype=dtype, device=hidden.device)
    classes = torch.full((len(hidden), k), -1, dtype=torch.int64, device=hidden.device)
    height = CPU_HEIGHT if can_look else HEIGHT
    for first in range(0, len(hidden), height):
        rows = slice(first, first + height)
        best, of = _best(hidden[rows], weight, bias, k, can_look)
        scores[rows, : best.shape[1]] = best
        classes[rows, : best.shape[1]] = of.masked_fill_(of >= len(weight), -1)
    return scores, classes


def _best(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int, can_look: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a block of rows, in the computing dtype. Perhaps with classes behind the last one, whose score is -inf."""
    rows, device, dtype = len(hidden), hidden.device, computing_dtype(hidden.dtype)
    as_it_is = weight.dtype == dtype or (HALVES and hidden.is_cuda and weight.dtype == hidden.dtype)
    hidden = hidden.to(weight.dtype if as_it_is else dtype)
    # What is turned into the computing dtype, tile by tile, shall take no more than the scores.
    across = max(1, rows, 0 if as_it_is else hidden.shape[1])
    width = max(1, min(len(weight), (CPU_CELLS if can_look else CELLS) // across))
    group = max(1, math.isqrt(width // k))
    every, inner = torch.arange(rows, device=device), torch.arange(group, device=device)
    scores, classes = (torch.empty(rows, 0, dtype=kind, device=device) for kind in (dtype, torch.int64))
    width = math.ceil(width / group) * group
    s = scores.new_empty(width, rows)
    for first in range(0, len(weight), width):
        here = slice(first, first + width)
        _write_scores(s, hidden, weight[here], None if bias is None else bias[here])
        maxima = s.view(len(s) // group, group, rows).amax(1)  # [T / G, R]
        some, count = every, k
        if can_look and scores.shape[1] == k:
            above = (~(maxima <= scores[:, -1])).sum(0)  # a NaN is
            some = above.nonzero().squeeze(1)
            if len(some) == 0:
                continue
            count = min(k, int(above.max()))
        groups = _order(maxima.T[some], count).sort(dim=1).values
        places = (groups.unsqueeze(2) * group + inner).flatten(1)
        found = s.view(-1)[places * rows + some.unsqueeze(1)]
        found, at = torch.cat([scores[some], found], dim=1), torch.cat([classes[some], places + first], dim=1)
        order = _order(found, k)
        found, at = found.gather(1, order), at.gather(1, order)
        if len(some) == rows:
            scores, classes = found, at
        else:
            scores[some], classes[some] = found, at
    return scores, classes


def _write_scores(s: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Into s [T, R] those of at most T classes, and -inf behind them."""
    here, weight = s[: len(weight)], weight.to(hidden.dtype)
    if hidden.dtype != s.dtype:
        torch.mm(weight, hidden.T, out_dtype=s.dtype, out=here)
        if bias is not None:
            here.add_(bias.unsqueeze(1))
    elif bias is None:
        torch.mm(weight, hidden.T, out=here)
    else:
        torch.addmm(bias.to(s.dtype).unsqueeze(1), weight, hidden.T, out=here)
    s[len(weight) :].fill_(-torch.inf)


def _order(x: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k best of each row are, the best first and of equal ones the first: at most all."""
    k = min(k, x.shape[1])
    if x.dtype == torch.float64:
        return x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # In one int64 the float32, whose bits are turned so that they sort as it does, and its place: several times as fast
    # as a stable sort. One zero and one NaN for all of theirs.
    bits = torch.where(x.isnan(), torch.nan, x + 0.0).view(torch.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(torch.int64) * 2**32 - torch.arange(x.shape[1], device=x.device)
    return keys.topk(k).indices
