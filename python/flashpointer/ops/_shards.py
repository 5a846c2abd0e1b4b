"""Classes that are sharded over the ranks of a process group.

Each rank sums the exponentials of its own classes. One all-gather then brings everybody the four numbers a row of
everybody, and as all merge them alike, in the order of the ranks, all have the same bits: of the loss, and of what
turns a rank's exponentials into the gradient of its scores.

Registered ops take a group by its name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import backends
from ..problem import LogSums, log_one_plus
from . import _checks

_collective = torch.ops._c10d_functional  # PyTorch's, by the names of groups


class Apart(NamedTuple):
    """A group over whose ranks no gradient is summed: a DTensor keeps its parts, Partial, until it is read."""

    group: dist.ProcessGroup


def name_of(op: str, group: object, first_class: object = None) -> str | None:
    """The name of a process group of this rank, or None for None.

    Raises:
        TypeError: for anything else.
        ValueError: for a first_class without a group.
    """
    if group is None:
        if first_class is not None:
            raise ValueError(f"{op}: first_class takes None where group is None; got {_checks.describe(first_class)}")
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        takes = "a torch.distributed.ProcessGroup that this rank is in, or None"
        raise TypeError(f"{op}: group takes {takes}; got {_checks.describe(group)}")
    return str(group.group_name)


def refuse_reference(op: str, group: object) -> None:
    """Raises ValueError for a group under the reference backend."""
    if group is not None:
        raise ValueError(f"{op}: group takes None under the reference backend, whose formula is of whole rows")


class Shard(NamedTuple):
    """This rank's classes among those of all."""

    first: int
    total: int | None  # how many all ranks have, where that is known


def shard_of(op: str, first_class: object, classes: int, group: dist.ProcessGroup, device: torch.device) -> Shard:
    """Where this rank's classes begin: where ``first_class`` says, or at rank * classes.

    On a CPU, and elsewhere under ``FLASHPOINTER_CHECK=1``, the ranks tell each other, and all raise if any is wrong.

    Raises:
        TypeError: first_class is no int.
        ValueError: the shards leave a gap, or overlap.
    """
    if first_class is not None and not _checks.is_int(first_class, 0):
        raise TypeError(f"{op}: first_class takes an int of at least 0, or None; got {_checks.describe(first_class)}")
    first = group.rank() * classes if first_class is None else first_class
    assert isinstance(first, int)
    if not _may_compare(device):
        return Shard(first, None)
    here = torch.tensor([first, first + classes], device=device)
    bounds = gather(here, str(group.group_name)).tolist()
    shards = sorted(shard for shard in bounds if shard[0] != shard[1])
    stops = [0, *(stop for _, stop in shards)]
    if [start for start, _ in shards] != stops[:-1]:
        takes = "the first class of this rank's shard, where the classes of another end; None if all are equal"
        got = _checks.short([f"{start}:{stop}" for start, stop in bounds])
        raise ValueError(f"{op}: first_class takes {takes}; got the shards {got}")
    return Shard(first, stops[-1])


def check_same(op: str, values: dict[str, int], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises ValueError on all ranks unless all have the same values, where ``shard_of`` would check too: libraries of
    communication hang or abort. What must be the same is said by the keys, with what was got of each rank to follow."""
    if _may_compare(device):
        here = torch.tensor(list(values.values()), device=device)
        for must, everywhere in zip(values, gather(here, str(group.group_name)).t().tolist(), strict=True):
            if len(set(everywhere)) > 1:
                raise ValueError(f"{op}: {must} {_checks.short(list(map(type(values[must]), everywhere)))}")


def rows_of(name: str) -> str:
    """The key of the number of its rows, for ``check_same``."""
    return f"{name} must have the same rows on all ranks of the group; got numbers of"


def _may_compare(device: torch.device) -> bool:
    """Whether the ranks may tell each other what to check: it is small beside the rest on a CPU, and on a GPU it is to
    wait for the stream, and done on demand."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or backends.CHECK_INDICES)


def merge(sums: LogSums, group: str) -> LogSums:
    """The log-sums of all shards from those of this rank's: a collective, once for a forward."""
    return merged(gather(torch.stack(sums), group))


def merged(parts: torch.Tensor) -> LogSums:
    """The log-sums of all parts [parts, 4, R], added in their order."""
    m_n, S_n, m_p, S_p = parts.unbind(1)
    return LogSums(*_merged_term(m_n, S_n), *_merged_term(m_p, S_p))


def _merged_term(m: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pivot = m.amax(0).clamp(min=0.0)  # [R]
    return pivot, (S * torch.exp(m - pivot)).sum(0)


def value(sums: LogSums) -> torch.Tensor:
    """The loss [R] of each row, of the log-sums of all its classes."""
    return log_one_plus(sums.m_n, sums.S_n) + log_one_plus(sums.m_p, sums.S_p)


def add_up(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over all ranks, in the place of x: a collective."""
    if x.numel() > 0:
        _collective.wait_tensor(_collective.all_reduce_(x, "sum", group))
    return x


def gather(x: torch.Tensor, group: str) -> torch.Tensor:
    """[ranks, *x.shape] of x, contiguous and of one shape, in the order of the ranks: a collective."""
    ranks = dist.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    if x.numel() == 0:
        return x.new_empty((ranks, *x.shape))
    parts: torch.Tensor = _collective.wait_tensor(_collective.all_gather_into_tensor(x, ranks, group))
    return parts.view(ranks, *x.shape)
