"""What data sets hold, read and checked: lists in lists, types, ints."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch

from ..ops import _checks

Heads = Mapping[Any, int] | Sequence[Any]
"""The head of each type: a mapping from type to head index, or the types in the order of their heads."""

ENDS = ("inclusive", "exclusive")


def each(op: str, name: str, values: Any, takes: str, *, ordered: bool = True) -> list[Any]:
    """The list of an iterable: no string or mapping, of which only the characters or keys would be read, and where the
    order counts no set."""
    try:
        listed = values.tolist() if hasattr(values, "tolist") else values
    except RuntimeError:  # a sparse, nested or meta tensor
        listed = None
    if not isinstance(listed, Iterable) or isinstance(listed, (str, bytes, Mapping, Set if ordered else bytes)):
        raise TypeError(f"{op}: {name} takes {takes}; got {_checks.describe(values)}")
    return list(listed)


def one_for_each(op: str, name: str, values: Any, count: int) -> list[Any]:
    listed = each(op, name, values, "one for each sentence")
    if len(listed) != count:
        raise ValueError(f"{op}: {name} takes one for each of {count} sentences; got {len(listed)}")
    return listed


def choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} takes one of {', '.join(map(repr, choices))}; got {_checks.describe(value)}")


def integer(value: Any) -> int | None:
    """An int, also of NumPy or a tensor, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def table(op: str, heads: Heads) -> dict[Any, int]:
    """The head index of each type."""
    if isinstance(heads, Mapping):
        indices = dict(heads)
        for kind, head in indices.items():
            index = integer(head)
            if index is None or index < 0:
                takes = "a head index, 0 or more, for each type"
                raise ValueError(f"{op}: heads takes {takes}; got {_checks.short(head)} for {_checks.short(kind)}")
            indices[kind] = index
        return indices
    if not isinstance(heads, Sequence) or isinstance(heads, (str, bytes)):
        takes = "a mapping from type to head index, or a sequence of types"
        raise TypeError(f"{op}: heads takes {takes}; got {_checks.describe(heads)}")
    try:
        indices = {kind: head for head, kind in enumerate(heads)}
    except TypeError:
        raise TypeError(f"{op}: heads takes types that can be hashed; got {_checks.describe(heads)}") from None
    if len(indices) < len(heads):
        twice = next(kind for head, kind in enumerate(heads) if indices[kind] != head)
        raise ValueError(f"{op}: heads takes each type once; got {_checks.short(twice)} twice")
    return indices


def triple(op: str, where: str, span: Any, heads: dict[Any, int], takes: str) -> tuple[Any, int, int, int]:
    """The type, the head index and the two ends of a span as a data set gives it."""
    if not isinstance(span, Sequence) or isinstance(span, (str, bytes)) or len(span) != 3:
        raise TypeError(f"{op}: {where} takes spans {takes}; got {_checks.short(span)}")
    kind, start, end = span[0], integer(span[1]), integer(span[2])
    try:
        head = heads.get(kind)
    except TypeError:  # not hashable
        head = None
    if head is None:
        types = _checks.short(list(heads))
        raise ValueError(f"{op}: {where} takes spans {takes} of a type in heads, {types}; got {_checks.short(span)}")
    if start is None or end is None:
        raise TypeError(f"{op}: {where} takes spans {takes} with ints; got {_checks.short(span)}")
    return kind, head, start, end


def check_ends(
    op: str, where: str, span: Any, start: int, end: int, size: int | None, ends: str, names: tuple[str, str, str]
) -> None:
    """Raises ValueError unless start and end, which is inclusive or exclusive as ends says, lie in order below size."""
    inclusive = ends == "inclusive"
    if start >= 0 and (start <= end if inclusive else start < end) and (size is None or end < size + (not inclusive)):
        return
    name, stop, length = names
    below, bound, other = ("<=", "<", "exclusive") if inclusive else ("<", "<=", "inclusive")
    takes = f"0 <= {name} {below} {stop}" + ("" if size is None else f" {bound} {size}, {length}")
    # what the last token, or a single one, looks like if ends are meant the other way
    mistaken = start >= 0 and (start < end == size if inclusive else start == end)
    hint = f'. If ends are {other}, say end="{other}"' if mistaken else ""
    raise ValueError(f"{op}: {where} takes spans with {takes}; got {_checks.short(span)}{hint}")


def tensor(rows: list[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)
