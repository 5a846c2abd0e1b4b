"""Spans from entities in characters, through the offsets of a fast tokenizer.

Each character that a tokenizer sees comes of one character of the text, in the order of the text. A normalizer may
drop some, make several of one, or compose several in the place of the first. So the tokens of one text have starts that
never fall, ends that never fall, and neighbours that share at most one character: bytes of an emoji, letters of a
ligature, a lone marker before a word. Offsets that do otherwise are those of several texts, and are refused.
Only a text of one character goes unseen, if the next one follows with no special token between.
"""

from __future__ import annotations

import operator
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..ops import _checks
from . import _read
from ._read import Heads

TRIPLE = "(type, char_start, char_end)"
ALIGNMENTS = ("expand", "contract", "strict")


class FromOffsets(NamedTuple):
    """What ``from_offsets`` returns."""

    spans: torch.Tensor
    """int64 ``[S, 4]``, rows (batch, head, start, end) in tokens, end inclusive, in the order given."""
    lost: list[tuple[int, Any, int, int]]
    """(sentence, type, char_start, char_end) of each entity that is not in spans."""
    adjusted: list[tuple[int, Any, int, int, tuple[int, int]]]
    """(sentence, type, char_start, char_end, (char_start, char_end) of its tokens) of each entity that grew or shrank
    to whole tokens."""


def from_offsets(
    sentences: Iterable[Iterable[Sequence[Any]]],
    offset_mapping: Iterable[Iterable[Sequence[int] | None]] | torch.Tensor,
    heads: Heads,
    *,
    texts: Iterable[str] | None = None,
    alignment: str = "expand",
    end: str = "exclusive",
) -> FromOffsets:
    """Spans from entities in characters, through the offsets of a fast tokenizer.

    **Pass the texts**, and whitespace at the ends of an entity or a token counts for nothing. Nor does, where no token
    holds it, a character of which a tokenizer may make no token: a mark that a normalizer joins to its letter or drops
    (accents, vowel signs, variation selectors, the later letters of a decomposed Hangul syllable), a control or format
    character (a byte order mark, a zero-width space), one that is private or unassigned. An entity is then lost only
    where another character of it lies before the first token or behind the last one, as after truncation, or where it
    overlaps no token. That a truncation took such characters alone goes unseen.

    Without the texts nobody can tell a letter from a space. Then an entity is lost wherever it reaches beyond the first
    or last token, and one that ends in a space takes the next word too, if that word's token holds the space, as those
    of byte-level BPE do; it is in ``adjusted``, and so is each entity whose token holds the space before it.

    Args:
        sentences: for each sentence its entities (type, char_start, char_end).
        offset_mapping: for each sentence, and in it for each token, (char_start, char_end) in the same text, as
            ``tokenizer(..., return_offsets_mapping=True)`` gives it. None or an empty range, such as the (0, 0) of
            special and padding tokens, belongs to no text. With a pair of texts, set the tokens of the other to None.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        texts: for each sentence its text, as the tokenizer got it.
        alignment: what becomes of an entity whose ends are not those of tokens, as in spaCy's ``Doc.char_span``: with
            "expand" all tokens that overlap it, with "contract" those wholly inside, with "strict" none. Of none it is
            lost.
        end: "exclusive" where the char_end of an entity is the character behind its last one, "inclusive" where it is
            the last one. It holds for lost and adjusted too; that of offset_mapping is always exclusive.

    Returns:
        ``(spans, lost, adjusted)``: int64 ``[S, 4]`` on the CPU, in the order given; (sentence, type, char_start,
        char_end) of the entities that are not in spans; and (sentence, type, char_start, char_end, covered) of those
        that are, but grew or shrank to whole tokens, where covered is (char_start, char_end) of their tokens.

    Raises:
        TypeError, ValueError: naming the sentence and the entity, for one that is negative, empty, reversed or beyond
            the text, or of a type that is not in heads; for offsets or texts that are not one for each sentence; for
            offsets beyond the text, or of several texts: of a pair, or of words that were split beforehand. (Of a few
            words of one character each, all at (0, 1), nobody can tell: with texts up to 4, without up to 18.)
    """
    op = "from_offsets"
    listed = _read.each(op, "sentences", sentences, f"for each sentence a list of {TRIPLE}")
    mapping = _read.one_for_each(op, "offset_mapping", offset_mapping, len(listed))
    known = [None] * len(listed) if texts is None else _read.one_for_each(op, "texts", texts, len(listed))
    indices = _read.table(op, heads)
    _read.choice(op, "alignment", alignment, ALIGNMENTS)
    _read.choice(op, "end", end, _read.ENDS)
    beyond = int(end == "inclusive")  # from the end as given to the exclusive end

    rows, lost, adjusted = [], [], []
    for i, (entities, offsets, text) in enumerate(zip(listed, mapping, known, strict=True)):
        if texts is not None and not isinstance(text, str):
            raise TypeError(f"{op}: texts takes a str for each sentence; got {_checks.describe(text)} at {i}")
        tokens = _tokens(op, i, offsets, text)
        where, size = f"sentence {i}", None if text is None else len(text)
        for entity in _read.spans_of(op, where, entities, f"a list of {TRIPLE}"):
            kind, head, start, last = _read.triple(op, where, entity, indices, TRIPLE)
            _read.check_ends(
                op, where, entity, start, last, size, end, ("char_start", "char_end", "the length of its text")
            )
            whole, covering = _align(tokens, text, start, last + beyond, alignment)
            given = (i, kind, start, last)
            if covering is None:
                lost.append(given)
                continue
            first, final = covering
            rows.append((i, head, tokens.indices[first], tokens.indices[final]))
            if not whole:
                adjusted.append((*given, (tokens.starts[first], tokens.ends[final] - beyond)))
    return FromOffsets(_read.tensor(rows), lost, adjusted)


class _Tokens(NamedTuple):
    """The tokens that hold characters, in order, and their characters. Neither starts nor ends fall."""

    indices: list[int]
    starts: list[int]
    ends: list[int]


def _tokens(op: str, sentence: int, offsets: Any, text: str | None) -> _Tokens:
    name = f"offset_mapping of sentence {sentence}"
    takes = "(char_start, char_end) or None for each token"
    tokens = _Tokens([], [], [])
    last, run = (0, 0), 0  # the pair before, and for how many tokens on end
    reached, shared = 0, 1  # the end of the token before, and how many of its characters the next may share
    for token, pair in enumerate(_read.each(op, name, offsets, takes)):
        if pair is None:
            shared = 0
            continue
        try:
            start, end = map(operator.index, pair if isinstance(pair, Sequence) else pair.tolist())
        except (AttributeError, RuntimeError, TypeError, ValueError):
            raise TypeError(f"{op}: {name} takes {takes}; got {_checks.short(pair)} at token {token}") from None
        if start == end:
            if start == 0:  # a special token; elsewhere whitespace that the tokenizer has trimmed from its offsets
                shared = 0
            continue
        if not 0 <= start < end:
            raise ValueError(f"{op}: {name} takes 0 <= char_start <= char_end; got {(start, end)} at token {token}")
        if start < reached - shared:  # then ends never fall either
            raise ValueError(
                f"{op}: {name} takes the offsets of one text, which go on; got {(start, end)} at token {token}, after "
                f"one that ends at {reached}. With a pair of texts, set the tokens of the other to None; words split "
                "beforehand start anew: tokenize the text itself"
            )
        run = run + 1 if (start, end) == last else 1
        last = start, end
        if end - start == 1 and run > _most(text, start):
            raise ValueError(
                f"{op}: {name} takes the offsets of one text, which go on; got {(start, end)} for {run} tokens on end, "
                f"up to token {token}. Words split beforehand start anew: tokenize the text itself"
            )
        if text is not None and end > len(text):
            within = f"offsets within its text of {len(text)} characters"
            raise ValueError(f"{op}: {name} takes {within}; got {(start, end)} at token {token}")
        reached, shared = end, 1
        if text is not None:
            start, end = _trim(text, start, end)
        if start < end:
            tokens.indices.append(token)
            tokens.starts.append(start)
            tokens.ends.append(end)
    return tokens


def _most(text: str | None, at: int) -> int:
    """How many tokens may share the character at: its bytes, or what the normal forms or the lower case make of it."""
    if text is None or at >= len(text):
        return 18  # of U+FDFA
    character = text[at]
    forms = (character.encode("utf-8", "replace"), unicodedata.normalize("NFKD", character), character.lower())
    return max(map(len, forms)) + 1  # a lone marker before a word


def _align(
    tokens: _Tokens, text: str | None, start: int, end: int, alignment: str
) -> tuple[bool, tuple[int, int] | None]:
    """Whether tokens hold the characters [start, end) and no others; and the first and last token that the entity
    becomes, as positions in tokens, or None if it is lost."""
    if text is not None:
        start, end = _trim(text, start, end)
    starts, ends = tokens.starts, tokens.ends
    first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
    if start >= end or first > last or _any(text, start, starts[0]) or _any(text, ends[-1], end):
        return False, None
    grown = starts[first] < start or end < ends[last]
    if not grown and not _any(text, start, starts[first]) and not _any(text, ends[last], end):
        return True, (first, last)
    if alignment == "contract":
        first, last = bisect_left(starts, start), bisect_right(ends, end) - 1
    return False, None if alignment == "strict" or first > last else (first, last)


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the whitespace at both ends."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _any(text: str | None, start: int, end: int) -> bool:
    """Whether there is a character in [start, end) of which every tokenizer makes a token."""
    return start < end if text is None else not all(map(_silent, text[start:end]))


def _silent(character: str) -> bool:
    """Whether a tokenizer may make no token of it: marks, controls, formats, separators, what BERT's normalizer takes
    for one of them, and what the normal forms compose with the character before."""
    return all(
        unicodedata.category(c)[0] in "MCZ" or c == "\N{REPLACEMENT CHARACTER}" or _follows_in_hangul(c)
        for c in unicodedata.normalize("NFKD", character)
    )


def _follows_in_hangul(character: str) -> bool:
    """Whether it is a vowel or final letter of a decomposed syllable."""
    return "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7fb"
