"""Spans from lists: those of sentences, and those of the examples of a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..ops import _checks
from . import _read
from ._read import Heads

TRIPLE = "(type, start, end)"
LIST = f"a list of {TRIPLE}"


def from_lists(
    sentences: Iterable[Iterable[Sequence[Any]]],
    heads: Heads,
    *,
    lengths: Sequence[int] | torch.Tensor | None = None,
    end: str = "inclusive",
) -> torch.Tensor:
    """Spans from lists of (type, start, end).

    Args:
        sentences: for each sentence its spans (type, start, end) in tokens.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        lengths: for each sentence its number of tokens, beyond which no span may reach.
        end: "inclusive" where the end of a span is its last token, "exclusive" where it is the one behind, as of
            Python's slices and of spaCy. Without lengths nothing tells the one from the other.

    Returns:
        int64 ``[S, 4]`` on the CPU, in the order given, ``[0, 4]`` for no spans.

    Raises:
        TypeError, ValueError: naming the sentence and the span, for a span that is negative, empty, reversed or beyond
            the length, or of a type that is not in heads; for lengths that are not one for each sentence.
    """
    op = "from_lists"
    listed = _read.each(op, "sentences", sentences, f"for each sentence {LIST}")
    limits = None if lengths is None else _read.one_for_each(op, "lengths", lengths, len(listed))
    return _read.tensor(_rows(op, "sentence", listed, heads, limits, end))


def collate(
    examples: Iterable[Mapping[str, Any]], *, heads: Heads, pad_token_id: int = 0, end: str = "inclusive"
) -> dict[str, torch.Tensor]:
    """A batch from examples, for a ``DataLoader``::

        DataLoader(examples, batch_size=16, collate_fn=functools.partial(fp.spans.collate, heads=["PER", "LOC"]))

    Args:
        examples: of each, ``input_ids``: a list or 1-D integer tensor; ``spans``: a list of (type, start, end) in
            tokens; and perhaps ``attention_mask`` (1 throughout where absent) and ``token_type_ids`` (0 where absent),
            as long as input_ids. Other keys are left out.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        pad_token_id: pads input_ids; 0 pads the others.
        end: "inclusive" or "exclusive", as in ``from_lists``.

    Returns:
        ``input_ids``, ``attention_mask`` and, where an example has it, ``token_type_ids``: int64 ``[B, N]``, padded on
        the right to the longest example; ``spans``: int64 ``[S, 4]``.

    Raises:
        TypeError, ValueError: naming the example, for a missing key, a value of wrong type or length, or a span as in
            ``from_lists``.
    """
    op = "collate"
    if not _checks.is_int(pad_token_id, -(2**63)):
        raise TypeError(f"{op}: pad_token_id takes an int; got {_checks.describe(pad_token_id)}")
    examples = _read.each(op, "examples", examples, "a list of mappings with the keys input_ids and spans")
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping):
            takes = "a mapping with the keys input_ids and spans"
            raise TypeError(f"{op}: example {i} takes {takes}; got {_checks.describe(example)}")
        for key in ("input_ids", "spans"):
            if key not in example:
                raise ValueError(
                    f"{op}: example {i} takes the keys input_ids and spans; got {_checks.short(list(example))}"
                )
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
    batch["spans"] = _read.tensor(_rows(op, "example", lists, heads, [len(tokens) for tokens in ids], end))
    return batch


def _rows(
    op: str, unit: str, lists: list[Any], heads: Heads, lengths: list[Any] | None, end: str
) -> list[tuple[int, int, int, int]]:
    """Rows (batch, head, start, end), end inclusive, of lists of (type, start, end), checked."""
    indices = _read.table(op, heads)
    _read.choice(op, "end", end, _read.ENDS)
    beyond = int(end == "exclusive")
    rows = []
    for i, spans in enumerate(lists):
        length = None if lengths is None else _read.integer(lengths[i])
        if lengths is not None and length is None:
            raise TypeError(f"{op}: lengths takes an int for each {unit}; got {_checks.describe(lengths[i])} at {i}")
        where = f"{unit} {i}"
        for span in _read.each(op, where, spans, LIST, ordered=False):
            _, head, first, last = _read.triple(op, where, span, indices, TRIPLE)
            _read.check_ends(op, where, span, first, last, length, end, ("start", "end", "its length"))
            rows.append((i, head, first, last - beyond))
    return rows


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
