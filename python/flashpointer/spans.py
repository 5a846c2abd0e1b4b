"""Span tensors: what ``pointer_loss`` takes for labels and ``pointer_decode`` gives back.

int64 ``[S, 4]``, a row (batch, head, start, end) for each span, end inclusive, in any order; a row that is listed twice
counts once. A batch of 16 sentences takes a few hundred bytes, where its dense labels take megabytes. ::

    spans = from_lists([[("PER", 0, 1), ("LOC", 4, 4)], []], heads=["PER", "LOC"])
    # [[0, 0, 0, 1],
    #  [0, 1, 4, 4]]
"""

from __future__ import annotations

import itertools
import operator
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import backends
from .ops import _checks

Heads = Mapping[Any, int] | Sequence[Any]
"""The head of each type: a mapping from type to head index, or the types in the order of their heads."""


class FromOffsets(NamedTuple):
    """What ``from_offsets`` returns."""

    spans: torch.Tensor
    """int64 ``[S, 4]``, rows (batch, head, start, end) in tokens, end inclusive, in the order given."""
    lost: list[tuple[int, Any, int, int]]
    """(sentence, type, char_start, char_end) of each entity that is not in spans."""


def from_lists(
    sentences: Iterable[Iterable[Sequence[Any]]],
    heads: Heads,
    *,
    lengths: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Spans from lists of (type, start, end).

    Args:
        sentences: for each sentence its spans (type, start, end) in tokens, end inclusive.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        lengths: for each sentence its number of tokens, which the ends of its spans must be below.

    Returns:
        int64 ``[S, 4]`` on the CPU, in the order given, ``[0, 4]`` for no spans.

    Raises:
        TypeError, ValueError: naming the sentence and the span, for a span that is negative, reversed or beyond the
            length, or of a type that is not in heads; for lengths that are not one for each sentence.
    """
    op, listed = "from_lists", list(sentences)
    limits = None if lengths is None else _one_for_each(op, "lengths", lengths, len(listed))
    return _spans(_rows(op, "sentence", listed, heads, limits))


def from_offsets(
    sentences: Iterable[Iterable[Sequence[Any]]],
    offset_mapping: Sequence[Iterable[Sequence[int] | None]] | torch.Tensor,
    heads: Heads,
) -> FromOffsets:
    """Spans from entities in characters, through the offsets of a fast tokenizer.

    An entity becomes the tokens that overlap it, so it may start or end inside a token, and a token may hold leading
    whitespace, as those of byte-level BPE do. It is lost where it reaches beyond the characters of the first and last
    tokens, as after truncation, or overlaps no token. Whitespace at the end of an entity counts as part of it.

    Args:
        sentences: for each sentence its entities (type, char_start, char_end), char_end exclusive.
        offset_mapping: for each sentence, and in it for each token, (char_start, char_end) in the same text, as
            ``tokenizer(..., return_offsets_mapping=True)`` gives it. None or an empty range, such as the (0, 0) of
            special and padding tokens, belongs to no text. With a pair of texts, set the tokens of the other to None.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.

    Returns:
        ``(spans, lost)``: int64 ``[S, 4]`` on the CPU, in the order given; and a list of
        (sentence, type, char_start, char_end) for the entities that are not in spans.

    Raises:
        TypeError, ValueError: naming the sentence and the entity, for one that is negative, empty or reversed, or of a
            type that is not in heads; for offsets that are not one list for each sentence, or that run backwards.
    """
    op, listed, table = "from_offsets", list(sentences), _table("from_offsets", heads)
    mapping = _one_for_each(op, "offset_mapping", offset_mapping, len(listed))
    rows: list[tuple[int, int, int, int]] = []
    lost: list[tuple[int, Any, int, int]] = []
    for i, (entities, offsets) in enumerate(zip(listed, mapping, strict=True)):
        tokens, starts, ends = _tokens(op, i, offsets)
        for entity in entities:
            kind, head, start, end = _triple(op, f"sentence {i}", entity, table, "(type, char_start, char_end)")
            if not 0 <= start < end:
                raise ValueError(f"{op}: sentence {i} takes 0 <= char_start < char_end; got {entity!r}")
            first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
            if first <= last and starts[0] <= start and end <= ends[-1]:
                rows.append((i, head, tokens[first], tokens[last]))
            else:
                lost.append((i, kind, start, end))
    return FromOffsets(_spans(rows), lost)


def from_dense(labels: torch.Tensor) -> torch.Tensor:
    """Spans from dense labels. On a GPU it waits for the device, to learn how many there are.

    Args:
        labels: ``[B, H, N, N]``, bool, or 0 and 1 of any integer or floating dtype: 1 at (batch, head, start, end).

    Returns:
        int64 ``[S, 4]`` on the device of labels, sorted by (batch, head, start, end).

    Raises:
        TypeError, ValueError: for labels of wrong type, shape or value.
    """
    op = "from_dense"
    takes = "a bool, integer or floating-point tensor [batch, heads, length, length]"
    _checks.check_tensor(op, "labels", labels, takes, (torch.bool, *_checks.INTEGERS, *_checks.FLOATS))
    if labels.dim() != 4 or labels.shape[2] != labels.shape[3]:
        raise ValueError(f"{op}: labels must be [batch, heads, length, length]; got {_checks.describe(labels)}")
    if labels.dtype != torch.bool:
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{op}: labels takes 0 and 1; got {labels[where].item()} at {where}")
    return labels.nonzero()


def to_dense(spans: torch.Tensor, batch: int, heads: int, length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Dense labels from spans.

    Args:
        spans: int64 ``[S, 4]``, rows (batch, head, start, end), end inclusive, in any order. Duplicates count once.
        batch, heads, length: the sizes B, H, N of the result.
        dtype: of the result.

    Returns:
        ``[B, H, N, N]`` on the device of spans: 1 at (batch, head, start, end) of each span, else 0.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape, or a span outside the result. On a GPU, where to
            look is to wait, such a span is dropped, and so under ``torch.compile``; the environment variable
            ``FLASHPOINTER_CHECK=1`` makes it an error on a GPU too.
    """
    op, sizes = "to_dense", {"batch": batch, "heads": heads, "length": length}
    _checks.check_tensor(op, "spans", spans, "an int64 tensor [spans, 4]", [torch.int64])
    if spans.dim() != 2 or spans.shape[1] != 4:
        raise ValueError(f"{op}: spans must be [spans, 4]; got {_checks.describe(spans)}")
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)):  # a union is none to torch.compile in PyTorch 2.8
            raise TypeError(f"{op}: {name} takes an int; got {_checks.describe(size)}")
        if size < 0:
            raise ValueError(f"{op}: {name} takes 0 or more; got {size}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype takes a torch.dtype; got {_checks.describe(dtype)}")
    inside = _inside(spans, batch, heads, length)
    look = spans.device.type == "cpu" or (spans.device.type != "meta" and backends.CHECK_INDICES)
    if look and not torch.compiler.is_compiling() and not inside.all():
        where = int((~inside).nonzero()[0])
        raise ValueError(
            f"{op}: spans takes rows (batch, head, start, end) below ({batch}, {heads}, {length}, {length}); got "
            f"{tuple(spans[where].tolist())} at {where}"
        )
    return _fill(spans, inside, batch, heads, length, dtype)


def from_padded(labels: torch.Tensor, *, mask_zero: bool = False, ignore_index: int = -100) -> torch.Tensor:
    """Spans from the padded pairs that bert4keras and bert4torch use. On a GPU it waits for the device, to count them.

    Args:
        labels: integer ``[B, H, P, 2]``: pairs (start, end), end inclusive, for each sentence and head. A pair with a
            negative entry is padding.
        mask_zero: the pair (0, 0) is padding too, as those projects pad with ``mask_zero=True``.
        ignore_index: a pair with this entry is padding too.

    Returns:
        int64 ``[S, 4]`` on the device of labels, in the order of labels.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape.
    """
    op = "from_padded"
    _checks.check_tensor(op, "labels", labels, "an integer tensor [batch, heads, pairs, 2]", _checks.INTEGERS)
    if labels.dim() != 4 or labels.shape[3] != 2:
        raise ValueError(f"{op}: labels must be [batch, heads, pairs, 2]; got {_checks.describe(labels)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index takes an int; got {_checks.describe(ignore_index)}")
    pairs = labels.long()
    padding = ((pairs < 0) | (pairs == ignore_index)).any(-1)
    if mask_zero:
        padding |= (pairs == 0).all(-1)
    where = (~padding).nonzero()
    return torch.cat([where[:, :2], pairs[where.unbind(1)]], dim=1)


def collate(examples: Sequence[Mapping[str, Any]], *, heads: Heads, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch from examples, for a ``DataLoader``::

        DataLoader(examples, batch_size=16, collate_fn=functools.partial(fp.spans.collate, heads=["PER", "LOC"]))

    Args:
        examples: of each, ``input_ids``: a list or 1-D integer tensor; ``spans``: a list of (type, start, end) in
            tokens, end inclusive; and perhaps ``attention_mask`` (1 throughout where absent) and ``token_type_ids`` (0
            where absent), as long as input_ids. Other keys are left out.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        pad_token_id: pads input_ids; 0 pads the others.

    Returns:
        ``input_ids``, ``attention_mask`` and, where an example has it, ``token_type_ids``: int64 ``[B, N]``, padded on
        the right to the longest example; ``spans``: int64 ``[S, 4]``.

    Raises:
        TypeError, ValueError: naming the example, for a missing key, a value of wrong type or length, or a span as in
            ``from_lists``.
    """
    op = "collate"
    if not isinstance(pad_token_id, int):
        raise TypeError(f"{op}: pad_token_id takes an int; got {_checks.describe(pad_token_id)}")
    for i, example in enumerate(examples):
        for key in ("input_ids", "spans"):
            if key not in example:
                raise ValueError(f"{op}: example {i} takes the keys input_ids and spans; got {list(example)}")
    ids = [_vector(op, i, "input_ids", example["input_ids"]) for i, example in enumerate(examples)]
    batch = {"input_ids": _pad(ids, pad_token_id)}
    for key, absent in (("attention_mask", 1), ("token_type_ids", 0)):
        if key == "attention_mask" or any(key in example for example in examples):
            rows = [
                _vector(op, i, key, example[key], len(tokens)) if key in example else torch.full_like(tokens, absent)
                for i, (example, tokens) in enumerate(zip(examples, ids, strict=True))
            ]
            batch[key] = _pad(rows, 0)
    lists = [example["spans"] for example in examples]
    batch["spans"] = _spans(_rows(op, "example", lists, heads, [len(tokens) for tokens in ids]))
    return batch


def _spans(rows: list[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def _rows(
    op: str, unit: str, lists: list[Iterable[Sequence[Any]]], heads: Heads, lengths: list[Any] | None
) -> list[tuple[int, int, int, int]]:
    """Rows (batch, head, start, end) of lists of (type, start, end), checked."""
    table = _table(op, heads)
    rows = []
    for i, spans in enumerate(lists):
        length = None if lengths is None else _int(lengths[i])
        if lengths is not None and length is None:
            raise TypeError(f"{op}: lengths takes an int for each {unit}; got {_checks.describe(lengths[i])} at {i}")
        for span in spans:
            _, head, start, end = _triple(op, f"{unit} {i}", span, table, "(type, start, end)")
            if not 0 <= start <= end or (length is not None and end >= length):
                bound = "" if length is None else f" < {length}, its length"
                raise ValueError(f"{op}: {unit} {i} takes spans with 0 <= start <= end{bound}; got {span!r}")
            rows.append((i, head, start, end))
    return rows


def _table(op: str, heads: Heads) -> dict[Any, int]:
    """The head index of each type."""
    if isinstance(heads, Mapping):
        table = dict(heads)
        for kind, head in table.items():
            index = _int(head)
            if index is None or index < 0:
                raise ValueError(f"{op}: heads takes a head index, 0 or more, for each type; got {head!r} for {kind!r}")
            table[kind] = index
        return table
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        takes = "a mapping from type to head index, or a sequence of types"
        raise TypeError(f"{op}: heads takes {takes}; got {_checks.describe(heads)}")
    table = {kind: head for head, kind in enumerate(heads)}
    if len(table) < len(heads):
        twice = next(kind for head, kind in enumerate(heads) if table[kind] != head)
        raise ValueError(f"{op}: heads takes each type once; got {twice!r} twice")
    return table


def _triple(op: str, where: str, span: Any, table: dict[Any, int], takes: str) -> tuple[Any, int, int, int]:
    """The type, the head index and the two ends of a span as a data set gives it."""
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 3:
        raise TypeError(f"{op}: {where} takes spans {takes}; got {span!r}")
    kind, start, end = span[0], _int(span[1]), _int(span[2])
    try:
        head = table.get(kind)
    except TypeError:  # not hashable
        head = None
    if head is None:
        raise ValueError(
            f"{op}: {where} takes spans {takes} of a type in heads, {reprlib.repr(list(table))}; got {span!r}"
        )
    if start is None or end is None:
        raise TypeError(f"{op}: {where} takes spans {takes} with ints; got {span!r}")
    return kind, head, start, end


def _tokens(op: str, sentence: int, offsets: Any) -> tuple[list[int], list[int], list[int]]:
    """The tokens that stand for characters, where each starts, and how far the text is covered after each."""
    tokens: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for token, pair in enumerate(_listed(offsets)):
        if pair is None:
            continue
        try:
            start, end = map(operator.index, pair)
        except (TypeError, ValueError):
            takes = "(char_start, char_end) or None for each token"
            raise TypeError(
                f"{op}: offset_mapping of sentence {sentence} takes {takes}; got {pair!r} at token {token}"
            ) from None
        if start >= end:
            continue
        if starts and start < starts[-1]:
            raise ValueError(
                f"{op}: offset_mapping of sentence {sentence} takes the offsets of one text, which never decrease; got "
                f"{(start, end)} at token {token} after {starts[-1]}. With a pair of texts, set the tokens of the "
                "other to None"
            )
        tokens.append(token)
        starts.append(start)
        ends.append(end)
    return tokens, starts, list(itertools.accumulate(ends, max))


def _inside(spans: torch.Tensor, batch: int, heads: int, length: int) -> torch.Tensor:
    """Which spans lie in labels of these sizes: compared column by column, as a tensor of limits would have to be
    copied to the device."""
    inside = (spans >= 0).all(1)
    for column, limit in zip(spans.unbind(1), (batch, heads, length, length), strict=True):
        inside &= column < limit
    return inside


def _fill(
    spans: torch.Tensor, inside: torch.Tensor, batch: int, heads: int, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Dense labels of the spans inside. The others go to one cell behind the last, which is then cut off."""
    cells = batch * heads * length * length
    b, h, start, end = spans.unbind(1)
    cell = torch.where(inside, ((b * heads + h) * length + start) * length + end, cells)
    labels = torch.zeros(cells + 1, dtype=dtype, device=spans.device)
    return labels.index_fill_(0, cell, 1)[:cells].view(batch, heads, length, length)


def _vector(op: str, i: int, key: str, value: Any, length: int | None = None) -> torch.Tensor:
    """A list or tensor of integers as int64 ``[length]``."""
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        vector = None
    takes = "a list or 1-D tensor of integers"
    if vector is None or vector.dim() != 1 or (vector.numel() and vector.dtype not in (torch.bool, *_checks.INTEGERS)):
        raise TypeError(f"{op}: {key} of example {i} takes {takes}; got {_checks.describe(value)}")
    if length is not None and len(vector) != length:
        raise ValueError(f"{op}: {key} of example {i} takes {length} entries, as input_ids has; got {len(vector)}")
    return vector.long()


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _one_for_each(op: str, name: str, values: Any, count: int) -> list[Any]:
    try:
        listed = _listed(values)
    except TypeError:
        raise TypeError(f"{op}: {name} takes one for each sentence; got {_checks.describe(values)}") from None
    if len(listed) != count:
        raise ValueError(f"{op}: {name} takes one for each of {count} sentences; got {len(listed)}")
    return listed


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if isinstance(values, torch.Tensor) else values)


def _int(value: Any) -> int | None:
    """An int, also of NumPy or a tensor, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
