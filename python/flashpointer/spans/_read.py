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
TOKENS = ("start", "end", "its length")
"""What ``check_ends`` calls the ends of a span in tokens, and their bound."""


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


TRIPLE = "(type, start, end)"
FIELDS = ("label", "start", "end")


def spans_of(op: str, where: str, spans: Any, takes: str) -> list[Any]:
    """The spans of a sentence: of ``datasets`` also a mapping of three lists, as it stores a list of mappings."""
    if isinstance(spans, Mapping) and spans.keys() >= set(FIELDS):
        columns = [each(op, where, spans[name], takes) for name in FIELDS]
        if len(set(map(len, columns))) == 1:
            return list(zip(*columns, strict=True))
    return each(op, where, spans, takes, ordered=False)


def triple(op: str, where: str, span: Any, heads: dict[Any, int] | None, takes: str) -> tuple[Any, int, int, int]:
    """The type, the head index and the two ends of a span as a data set gives it: type and ends in this order, or by
    name. Without heads a type may be anything, and its index is -1."""
    fields = span
    if isinstance(span, Mapping) and span.keys() >= set(FIELDS):
        fields = [span[name] for name in FIELDS]
    if not isinstance(fields, Sequence) or isinstance(fields, (str, bytes)) or len(fields) != 3:
        raise TypeError(f"{op}: {where} takes spans {takes}; got {_checks.short(span)}")
    kind, start, end = fields[0], integer(fields[1]), integer(fields[2])
    if isinstance(kind, torch.Tensor) and kind.numel() == 1:  # whose hash is not that of its number
        kind = kind.item()
    try:
        head = -1 if heads is None else heads.get(kind)
    except TypeError:  # not hashable
        head = None
    if head is None:
        types = _checks.short(list(heads or ()))
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
    if names == TOKENS and size is not None and 0 <= end < start < size:
        hint = ". If its heads have no triangle, say tril_mask=False"
    raise ValueError(f"{op}: {where} takes spans with {takes}; got {_checks.short(span)}{hint}")


def check_pair(op: str, where: str, span: Any, start: int, end: int, size: int | None) -> None:
    """Raises ValueError unless start and end, in any order, lie below size."""
    if min(start, end) < 0 or (size is not None and max(start, end) >= size):
        below = "" if size is None else f" < {size}, its length"
        raise ValueError(f"{op}: {where} takes pairs with 0 <= start, end{below}; got {_checks.short(span)}")


def tensor(rows: list[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
