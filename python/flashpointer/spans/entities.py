"""Entities from spans, in the characters or the words of a whole text; and characters from UTF-16."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch

from ..ops import _checks
from . import _read
from ._read import Heads
from .offsets import NUMBERS, PAIRS, Tokens, read_texts, rows_of_tokens, tokens_of, words_of
from .padded import flatten


def to_entities(
    spans: torch.Tensor,
    offset_mapping: Iterable[Iterable[Sequence[int] | None]] | torch.Tensor | Mapping[str, Any],
    heads: Heads,
    *,
    scores: torch.Tensor | None = None,
    texts: Iterable[str] | None = None,
    windows: Iterable[int] | torch.Tensor | None = None,
) -> list[list[dict[str, Any]]]:
    """Entities in the characters of each text: the way back from ``from_offsets``. ::

        encoding = tokenizer(texts, return_offsets_mapping=True, return_overflowing_tokens=True, stride=64, ...)
        spans, scores = head.decode(hidden, mask)
        to_entities(spans, encoding, TYPES, scores=scores, texts=texts)
        # [[{"text": "Johannes", "label": "PER", "start": 0, "end": 8, "score": 4.1}, ...], ...]

    Args:
        spans: int64 ``[S, 4]`` or batch-first ``[B, P, 3]``, of rows of tokens: of sentences, or of windows of long
            texts. On a GPU it waits for the device.
        offset_mapping, heads, windows: as for ``from_offsets``.
        scores: ``[S]`` or ``[B, P]``: the score of each span.
        texts: for each sentence its text, as the tokenizer got it. With them an entity has a text, and no whitespace at
            its ends.

    Where windows overlap, one that cuts an entity sees a part of it, which it may take for the whole. So each span is
    judged by the window in which it lies farthest from the edges within the text: what others alone have found is no
    entity. Let windows share twice the tokens of your longest entity, as then whatever lies within one is judged by a
    window that holds it whole. Of a longer one no window may hold all: a part that reaches the end of a window, and one
    of the same type that begins with the next, are joined, if both hold all that the two windows share.

    Returns:
        For each text its entities in order: ``label``, the type; ``start`` and ``end``, exclusive, in characters of the
        whole text; with texts ``text``; with scores ``score``, the best of equal windows or of parts. Tokens without
        characters, as special tokens are, count for nothing: a span of such alone is no entity.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape, a span that ends before it starts, or one of a
            row, a head or a token that is not there; for offsets as of ``from_offsets``.
    """
    op, name = "to_entities", "offset_mapping"
    known = None if texts is None else _read.each(op, "texts", texts, "one for each sentence")
    known = None if known is None else read_texts(op, known, len(known))
    mapping, of = rows_of_tokens(op, name, offset_mapping, windows, None if known is None else len(known))
    rows = [_read.each(op, f"{name} of row {row}", offsets, PAIRS) for row, offsets in enumerate(mapping)]
    of = list(range(len(rows))) if of is None else of
    tokens = [
        tokens_of(op, f"{name} of row {row}", offsets, None if known is None else known[of[row]])
        for row, offsets in enumerate(rows)
    ]
    text = None if known is None else lambda i, start, end: known[i][start:end]
    sentences = max(of, default=-1) + 1 if known is None else len(known)
    return _entities(op, spans, scores, heads, _Rows(tokens, [len(x) for x in rows], of, sentences), text)


def to_words(
    spans: torch.Tensor,
    word_ids: Iterable[Iterable[int | None]] | Mapping[str, Any],
    heads: Heads,
    *,
    scores: torch.Tensor | None = None,
    words: Iterable[Sequence[str]] | None = None,
    windows: Iterable[int] | torch.Tensor | None = None,
    end: str = "inclusive",
) -> list[list[dict[str, Any]]]:
    """Entities in the words of each text: the way back from ``from_words``.

    Args:
        spans, scores: as for ``to_entities``.
        word_ids, heads, windows, end: as for ``from_words``.
        words: for each sentence its words, of which an entity then has its own, with a space between, for a ``text``.

    Returns:
        As ``to_entities``, with ``start`` and ``end`` in words of the whole text, inclusive or exclusive as end says.

    Raises:
        TypeError, ValueError: as for ``to_entities``; and for numbers of words that fall, or are not there.
    """
    op, name = "to_words", "word_ids"
    _read.choice(op, "end", end, _read.ENDS)
    known = None if words is None else _read.each(op, "words", words, "a list of strs for each sentence")
    listed = (
        None if known is None else [_read.each(op, f"words of sentence {i}", x, "strs") for i, x in enumerate(known)]
    )
    mapping, of = rows_of_tokens(op, name, word_ids, windows, None if listed is None else len(listed))
    rows = [_read.each(op, f"{name} of row {row}", ids, NUMBERS) for row, ids in enumerate(mapping)]
    of = list(range(len(rows))) if of is None else of
    tokens = [words_of(op, f"{name} of row {row}", ids) for row, ids in enumerate(rows)]
    for row, i in enumerate(of):
        if listed is not None and max(tokens[row].ends, default=0) > len(listed[i]):
            got = f"{len(listed[i])} for sentence {i}, of which word_ids has word {tokens[row].ends[-1] - 1}"
            raise ValueError(f"{op}: words takes all words of each sentence; got {got}")
    text = None if listed is None else lambda i, start, end: " ".join(listed[i][start:end])
    sentences = max(of, default=-1) + 1 if listed is None else len(listed)
    found = _entities(op, spans, scores, heads, _Rows(tokens, [len(x) for x in rows], of, sentences), text)
    for entity in chain.from_iterable(found):
        entity["end"] -= int(end == "inclusive")
    return found


def from_utf16(
    sentences: Iterable[Iterable[Sequence[Any] | Mapping[str, Any]]], texts: Iterable[str]
) -> list[list[tuple[Any, int, int]]]:
    """Entities in characters, as Python counts them, from such in UTF-16 code units, as JavaScript, Java and C# do: of
    an emoji, and of all else beyond U+FFFF, there are two.

    Args:
        sentences: for each sentence its entities (type, start, end), end exclusive, or ``{"label", "start", "end"}``.
        texts: for each sentence its text.

    Returns:
        For each sentence its entities (type, start, end) in characters, end exclusive: what ``from_offsets`` takes.

    Raises:
        TypeError, ValueError: naming the sentence and the entity, for one that is beyond the text, empty, reversed, or
            ends between the two halves of a character.
    """
    op = "from_utf16"
    listed = _read.each(op, "sentences", sentences, f"for each sentence a list of {_read.TRIPLE}")
    converted = []
    for i, (entities, text) in enumerate(zip(listed, read_texts(op, texts, len(listed)), strict=True)):
        units = accumulate((1 + (character > "\uffff") for character in text), initial=0)
        place = {unit: at for at, unit in enumerate(units)}
        here, where = [], f"sentence {i}"
        for entity in _read.spans_of(op, where, entities, f"a list of {_read.TRIPLE}"):
            kind, _, start, end = _read.triple(op, where, entity, None, _read.TRIPLE)
            if start not in place or end not in place or start >= end:
                takes = f"0 <= start < end <= {max(place)}, the UTF-16 length of its text, between characters"
                raise ValueError(f"{op}: {where} takes spans with {takes}; got {_checks.short(entity)}")
            here.append((kind, place[start], place[end]))
        converted.append(here)
    return converted


class _Rows(NamedTuple):
    """What spans count: sentences, or windows of them."""

    tokens: list[Tokens]
    sizes: list[int]
    """Of each row the number of its tokens,"""
    of: list[int]
    """and its sentence."""
    sentences: int


def _entities(
    op: str, spans: torch.Tensor, scores: torch.Tensor | None, heads: Heads, rows: _Rows,
    text: Callable[[int, int, int], str] | None,
) -> list[list[dict[str, Any]]]:  # fmt: skip
    """Of each sentence, in units of the starts and ends of tokens, end exclusive; of windows each once."""
    _checks.check_spans(op, spans)
    kinds = {head: kind for kind, head in reversed(_read.table(op, heads).items())}
    flat, values = _scored(op, spans, scores)
    windows = [_Window(min(x.starts, default=0), max(x.ends, default=0), {}) for x in rows.tokens]
    for (row, head, first, last), score in zip(flat.tolist(), values, strict=True):
        if not (0 <= row < len(rows.of) and head in kinds and 0 <= first <= last < rows.sizes[row]):
            takes = "rows (batch, head, start, end) of these tokens and heads, start <= end"
            raise ValueError(f"{op}: spans takes {takes}; got {(row, head, first, last)}")
        here, found = rows.tokens[row], windows[row].found
        i, j = bisect_left(here.indices, first), bisect_right(here.indices, last) - 1
        if i <= j:
            cell = here.starts[i], here.ends[j], head
            found[cell] = max(score, found.get(cell, score))
    of_sentences: list[list[_Window]] = [[] for _ in range(rows.sentences)]
    for i, window in zip(rows.of, windows, strict=True):
        if window.start < window.end:
            of_sentences[i].append(window)
    return [
        [
            ({} if text is None else {"text": text(i, start, end)})
            | {"label": kinds[head], "start": start, "end": end}
            | ({} if scores is None else {"score": score})
            for (start, end, head), score in sorted(_merged(here).items())
        ]
        for i, here in enumerate(of_sentences)
    ]


Found = dict[tuple[int, int, int], float]
"""The score of each (start, end, head)."""


class _Window(NamedTuple):
    start: int
    """Of its first token,"""
    end: int
    """of its last one."""
    found: Found


def _merged(windows: list[_Window]) -> Found:
    """What the windows of a text have found, taken from where it lies farthest from their edges; parts joined."""
    windows = sorted(windows, key=lambda window: window[:2])
    starts, reached = [window.start for window in windows], list(accumulate((window.end for window in windows), max))

    def context(window: _Window, start: int, end: int) -> int:
        """How far from the nearer edge. Where that is an end of the text, no other window is farther from it."""
        return min(start - window.start, window.end - end)

    merged: Found = {}
    reaching: Found = {}  # of the window before what reaches its end
    for window, last in zip(windows, [None, *windows], strict=False):
        here: Found = {}
        goes_on = last is not None and last.start < window.start < last.end < window.end
        for (start, end, head), score in window.found.items():
            holding = windows[bisect_left(reached, end) : bisect_right(starts, start)]
            most = max(context(other, start, end) for other in holding if other.end >= end)
            if context(window, start, end) < most:
                continue
            parts = {}
            if goes_on and start == window.start:  # both hold all that is shared, or were judged by the other window
                parts = {part: of for part, of in reaching.items() if part[2] == head}
            for part in parts:
                merged.pop(part, None)
            for (first, _, _), of in parts.items() or [((start, end, head), score)]:
                cell = first, end, head
                here[cell] = max(score, of, here.get(cell, score))
        for cell, score in here.items():
            merged[cell] = max(score, merged.get(cell, score))
        reaching = {cell: score for cell, score in here.items() if cell[1] == window.end}
    return merged


def _scored(op: str, spans: torch.Tensor, scores: torch.Tensor | None) -> tuple[torch.Tensor, list[float]]:
    """Flat spans, and the score of each, 0 without any."""
    if scores is None:
        flat = flatten(spans)
        return flat, [0.0] * len(flat)
    takes = f"a floating-point tensor {list(spans.shape[:-1])}, one for each row of spans, on their device"
    _checks.check_tensor(op, "scores", scores, takes, _checks.FLOATS)
    if scores.shape != spans.shape[:-1] or scores.device != spans.device:
        raise ValueError(f"{op}: scores takes {takes}; got {_checks.describe(scores)}")
    flat, values = flatten(spans, scores)
    return flat, values.tolist()
