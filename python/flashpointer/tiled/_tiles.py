"""How rows are cut into tiles that stay in cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# 768 KiB in float32: a few such buffers stay in cache, and each operation still outweighs its own call.
TILE = 3 << 16
# Of rows, whose operations are simpler, twice as much: half of it took a sixth longer on two threads, which wait for
# each other at each operation, and on one as long.
ROW_TILE = 2 * TILE

# Cells whose work is over before the second thread is there, if another process has its core. PyTorch, and it seems MKL
# below it for 500 exponentials, would wait for it at each call, spinning: a hundred times as long as the work takes.
SMALL = 1 << 17
# Where there is another way to make threads PyTorch takes no orders about them once it has some.
OPENMP = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()

LOG2_E = 1.0 / math.log(2.0)
EXACT_EXP = 22.0  # times log2(e) it is below 32, where half a digit is 1e-6
# Numbers of which one operation more costs as much as exp2 saves.
FEW_EXPONENTIALS = 1 << 11


def small_on_one_thread(cells: Callable[..., int]) -> Callable[[F], F]:
    """A function that computes so many cells, of its arguments: on one thread if they are SMALL. The number of threads
    is the calling thread's own, so that others go on with theirs."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Any:
            threads = torch.get_num_threads()
            if threads == 1 or not OPENMP or cells(*arguments) > SMALL:
                return function(*arguments)
            torch.set_num_threads(1)
            try:
                return function(*arguments)
            finally:
                torch.set_num_threads(threads)

        return wrapped  # type: ignore[return-value]

    return decorate


def row_tiles(outer: int, inner: int, classes: int, cells: int = ROW_TILE) -> Iterator[tuple[int, slice]]:
    """(outer index, rows of the inner index) whose tiles hold about so many cells."""
    height = max(1, cells // max(1, classes))
    for o in range(outer):
        for first in range(0, inner, height):
            yield o, slice(first, min(first + height, inner))


def column_tiles(classes: int, cells: int = ROW_TILE) -> list[slice]:
    return [slice(first, min(first + cells, classes)) for first in range(0, classes, cells)]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_tile(scores: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether rows of scores go the short way, as they are: on a CPU, which can look, without a mask, in one tile."""
    return mask is None and scores.device.type == "cpu" and 0 < scores.numel() <= ROW_TILE


def computing(x: torch.Tensor) -> torch.Tensor:
    """x in its computing dtype; itself where it is, for to() is a call even then."""
    dtype = computing_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)


def exp(x: torch.Tensor, out: torch.Tensor, farthest: float = 0.0) -> torch.Tensor:
    """e^x as 2^(x log2 e), in contiguous memory: PyTorch's exp is MKL's where there is MKL, and on an AMD CPU takes
    twice as long as a product and exp2. But the product rounds, and beyond EXACT_EXP that costs digits, of a small loss
    more than eager loses. So exp it is where the ``farthest`` of x is known to lie there."""
    if x.numel() <= FEW_EXPONENTIALS or farthest > EXACT_EXP:
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()
