"""Spans from lists: those of sentences, and those of the examples of a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops import _checks
from . import _read
from ._read import Heads
from .padded import pad

LIST = f"a list of {_read.TRIPLE}"


class SpanSet(NamedTuple):
    """One of several sets of spans that an example has, each for a span head of its own, as GPLinker's three are."""

    heads: Heads
    """A mapping from type to head index, or the types in the order of their heads."""
    tril_mask: bool = True
    """As of its head: False where a pair may end before it starts."""


def from_lists(
    sentences: Iterable[Iterable[Sequence[Any] | Mapping[str, Any]]],
    heads: Heads,
    *,
    lengths: Sequence[int] | torch.Tensor | None = None,
    end: str = "inclusive",
    tril_mask: bool = True,
) -> torch.Tensor:
    """Spans from lists of (type, start, end).

    Args:
        sentences: for each sentence its spans (type, start, end) in tokens, or ``{"label", "start", "end"}``.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        lengths: for each sentence its number of tokens, beyond which no span may reach.
        end: "inclusive" where the end of a span is its last token, "exclusive" where it is the one behind, as of
            Python's slices and of spaCy. Without lengths nothing tells the one from the other.
        tril_mask: as of the heads: False where a pair may end before it starts, as those of a relation.

    Returns:
        int64 ``[S, 4]`` on the CPU, in the order given, ``[0, 4]`` for no spans.

    Raises:
        TypeError, ValueError: naming the sentence and the span, for a span that is negative, empty, reversed or beyond
            the length, or of a type that is not in heads; for lengths that are not one for each sentence.
    """
    op = "from_lists"
    listed = _read.each(op, "sentences", sentences, f"for each sentence {LIST}")
    limits = None if lengths is None else _read.one_for_each(op, "lengths", lengths, len(listed))
    return _read.tensor(_rows(op, "sentence", listed, SpanSet(heads, tril_mask), limits, end))


def collate(
    examples: Iterable[Mapping[str, Any]],
    *,
    heads: Heads | Mapping[str, SpanSet],
    pad_token_id: int = 0,
    end: str = "inclusive",
    key: str = "spans",
    padded: bool = True,
    tril_mask: bool = True,
    pad_to_multiple_of: int | None = None,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """A batch from examples, for a ``DataLoader``, and as ``data_collator`` for Transformers' Trainer::

        DataLoader(examples, batch_size=16, collate_fn=functools.partial(fp.spans.collate, heads=["PER", "LOC"]))

    Args:
        examples: of each, ``input_ids``: a list or 1-D integer tensor; ``spans``: a list of (type, start, end) in
            tokens, or of ``{"label", "start", "end"}``, or none in any example, for inference; and perhaps
            ``attention_mask`` (1 throughout where absent), ``token_type_ids`` and ``special_tokens_mask`` (0 where
            absent), as long as input_ids. A row of ``datasets`` is an example. Other keys are left out.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index. Of
            several sets of spans a mapping from the key of each, in examples and batch, to its ``SpanSet``.
        pad_token_id: pads input_ids; 0 pads the others.
        end: "inclusive" or "exclusive", as in ``from_lists``.
        key: of the spans in the batch: as "labels" Trainer takes them for labels, and computes ``eval_loss``. (It drops
            what forward does not name before it collates: say ``remove_unused_columns=False``.)
        padded: batch-first, which whoever splits, pads or gathers the batch treats as any other tensor. False gives
            ``[S, 4]``, whose first column counts the sentences of this batch: right only while it stays whole.
        tril_mask: as in ``from_lists``; that of several sets is in each.
        pad_to_multiple_of: pads tokens to a multiple of it: few shapes to compile, full tensor cores.
        keep: keys that pass through, each as the list of what the examples have.

    Returns:
        ``input_ids``, ``attention_mask`` and, where an example has them, ``token_type_ids`` and
        ``special_tokens_mask``: int64 ``[B, N]``, padded on the right to the longest example; where the examples have
        spans, int64 ``[B, P, 3]``, or ``[S, 4]``; then what to keep.

    Raises:
        TypeError, ValueError: naming the example, for a missing key, a value of wrong type or length, or a span as in
            ``from_lists``.
    """
    op = "collate"
    if not _checks.is_int(pad_token_id, -(2**63)):
        raise TypeError(f"{op}: pad_token_id takes an int; got {_checks.describe(pad_token_id)}")
    if pad_to_multiple_of is not None and not _checks.is_int(pad_to_multiple_of, 1):
        takes = "an int of at least 1, or None"
        raise ValueError(f"{op}: pad_to_multiple_of takes {takes}; got {_checks.describe(pad_to_multiple_of)}")
    if not isinstance(key, str):
        raise TypeError(f"{op}: key takes a str; got {_checks.describe(key)}")
    _checks.check_flag(op, "padded", padded)
    several = isinstance(heads, Mapping) and heads and all(isinstance(x, SpanSet) for x in heads.values())
    sets: Any = heads if several else {"spans": SpanSet(heads, tril_mask)}  # type: ignore[arg-type]
    listed = _examples(op, examples, sets)
    ids = [_vector(op, i, "input_ids", example["input_ids"]) for i, example in enumerate(listed)]
    batch: dict[str, Any] = {"input_ids": _pad(ids, pad_token_id, pad_to_multiple_of)}
    for name, absent in (("attention_mask", 1), ("token_type_ids", 0), ("special_tokens_mask", 0)):
        if name == "attention_mask" or any(name in example for example in listed):
            rows = [
                _vector(op, i, name, example[name], len(tokens)) if name in example else torch.full_like(tokens, absent)
                for i, (example, tokens) in enumerate(zip(listed, ids, strict=True))
            ]
            batch[name] = _pad(rows, 0, pad_to_multiple_of)
    lengths = [len(tokens) for tokens in ids]
    for name, of in sets.items():
        if not listed or name in listed[0]:
            spans = _read.tensor(_rows(op, "example", [example[name] for example in listed], of, lengths, end))
            name = key if name == "spans" else name
            if name in batch:
                raise ValueError(f"{op}: key takes one that the batch has not already; got {_checks.short(name)}")
            batch[name] = pad(spans, len(listed)) if padded else spans
    return batch | _kept(op, listed, keep, batch)


def _kept(op: str, examples: list[Mapping[str, Any]], keep: Any, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = _read.each(op, "keep", keep, "a list of keys")
    for name in names:
        if not isinstance(name, str) or name in batch:
            raise ValueError(f"{op}: keep takes keys that the batch has not already; got {_checks.short(name)}")
        for i, example in enumerate(examples):
            if name not in example:
                got = f"{_checks.short(name)}, and example {i} has {_checks.short(list(example))}"
                raise ValueError(f"{op}: keep takes keys that each example has; got {got}")
    return {name: [example[name] for example in examples] for name in names}


def _examples(op: str, examples: Any, sets: Mapping[str, SpanSet]) -> list[Mapping[str, Any]]:
    """Checked: each has input_ids, and each set of spans that any other has."""
    listed = _read.each(op, "examples", examples, "a list of mappings with the keys input_ids and spans")
    keys = " and ".join(["input_ids", *sets])
    for i, example in enumerate(listed):
        if not isinstance(example, Mapping):
            raise TypeError(f"{op}: example {i} takes a mapping with the keys {keys}; got {_checks.describe(example)}")
    needed = ["input_ids", *(name for name in sets if any(name in example for example in listed))]
    for i, example in enumerate(listed):
        if not all(name in example for name in needed):
            raise ValueError(f"{op}: example {i} takes the keys {keys}; got {_checks.short(list(example))}")
    return listed


def _rows(
    op: str, unit: str, lists: list[Any], of: SpanSet, lengths: list[Any] | None, end: str
) -> list[tuple[int, int, int, int]]:
    """Rows (batch, head, start, end), end inclusive, of lists of (type, start, end), checked."""
    indices = _read.table(op, of.heads)
    _read.choice(op, "end", end, _read.ENDS)
    _checks.check_flag(op, "tril_mask", of.tril_mask)
    beyond = int(end == "exclusive")
    rows = []
    for i, spans in enumerate(lists):
        length = None if lengths is None else _read.integer(lengths[i])
        if lengths is not None and length is None:
            raise TypeError(f"{op}: lengths takes an int for each {unit}; got {_checks.describe(lengths[i])} at {i}")
        where = f"{unit} {i}"
        for span in _read.spans_of(op, where, spans, LIST):
            _, head, first, last = _read.triple(op, where, span, indices, _read.TRIPLE)
            if of.tril_mask:
                _read.check_ends(op, where, span, first, last, length, end, _read.TOKENS)
            else:
                _read.check_pair(op, where, span, first, last - beyond, length)
            rows.append((i, head, first, last - beyond))
    return rows


def _vector(op: str, i: int, key: str, value: Any, length: int | None = None) -> torch.Tensor:
    """A list or tensor of integers as int64 ``[length]``."""
    try:
        vector = _checks.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        vector = None
    takes = "a list or 1-D tensor of integers"
    if vector is None or vector.dim() != 1 or (vector.numel() and vector.dtype not in (torch.bool, *_checks.INTEGERS)):
        raise TypeError(f"{op}: {key} of example {i} takes {takes}; got {_checks.describe(value)}")
    if length is not None and len(vector) != length:
        raise ValueError(f"{op}: {key} of example {i} takes {length} entries, as input_ids has; got {len(vector)}")
    return vector.long()


def _pad(rows: list[torch.Tensor], value: int, multiple: int | None) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64, device="cpu")
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, -padded.shape[1] % (multiple or 1)), value=value)
