"""Spans from entities in characters, through the offsets of a fast tokenizer.

Each character that a tokenizer sees comes of one character of the text, in the order of the text. A normalizer may
drop some, make several of one, or compose several in the place of the first. So the tokens of one text have starts that
never fall, ends that never fall, and neighbours that share at most one character: bytes of an emoji, letters of a
ligature, a lone marker before a word. Offsets that do otherwise are those of several texts, and are refused.
Only this goes unnoticed: a second text that follows a text of one character with no special token between.
"""

from __future__ import annotations

import operator
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops import _checks
from . import _read
from ._read import Heads

TRIPLE = "(type, char_start, char_end)"
PAIRS = "(char_start, char_end) or None for each token"
NUMBERS = "the number of its word, or None, for each token: numbers that do not fall"
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
    sentences: Iterable[Iterable[Sequence[Any] | Mapping[str, Any]]],
    offset_mapping: Iterable[Iterable[Sequence[int] | None]] | torch.Tensor | Mapping[str, Any],
    heads: Heads,
    *,
    texts: Iterable[str] | None = None,
    windows: Iterable[int] | torch.Tensor | None = None,
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

    A long text may be several windows of tokens: rows that overlap, as a tokenizer makes them with ``stride`` and
    ``return_overflowing_tokens=True``. Spans then count windows, and an entity is in each window that holds it whole.

    Args:
        sentences: for each sentence its entities (type, char_start, char_end), or ``{"label", "start", "end"}``.
        offset_mapping: for each sentence, or window, and in it for each token, (char_start, char_end) in the same text,
            as ``tokenizer(..., return_offsets_mapping=True)`` gives it; or all that it gives. None or an empty range,
            such as the (0, 0) of special and padding tokens, belongs to no text. With a pair of texts, set the tokens
            of the other to None.
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.
        texts: for each sentence its text, as the tokenizer got it.
        windows: for each row of offset_mapping the number of its sentence, as ``overflow_to_sample_mapping`` has it,
            which is taken from what the tokenizer gives.
        alignment: what becomes of an entity whose ends are not those of tokens, as in spaCy's ``Doc.char_span``: with
            "expand" all tokens that overlap it, with "contract" those wholly inside, with "strict" none. Of none it is
            lost.
        end: "exclusive" where the char_end of an entity is the character behind its last one, "inclusive" where it is
            the last one. It holds for lost and adjusted too; that of offset_mapping is always exclusive.

    Returns:
        ``(spans, lost, adjusted)``: int64 ``[S, 4]`` on the CPU, in the order given, window by window; (sentence, type,
        char_start, char_end) of the entities that are in no row of spans; and (sentence, type, char_start, char_end,
        covered) of those that are, but grew or shrank to whole tokens, where covered is (char_start, char_end) of their
        tokens.

    Raises:
        TypeError, ValueError: naming the sentence and the entity, for one that is negative, empty, reversed or beyond
            the text, or of a type that is not in heads; for offsets or texts that are not one for each sentence; for
            offsets beyond the text, or of several texts: of a pair, or of words that were split beforehand. (Of a few
            words of one character each, all at (0, 1), nobody can tell: with texts up to 4, without up to 18.)
    """
    op = "from_offsets"
    listed = _read.each(op, "sentences", sentences, f"for each sentence a list of {TRIPLE}")
    mapping, of = rows_of_tokens(op, "offset_mapping", offset_mapping, windows, len(listed))
    known = [None] * len(listed) if texts is None else read_texts(op, texts, len(listed))
    _read.choice(op, "alignment", alignment, ALIGNMENTS)
    _read.choice(op, "end", end, _read.ENDS)
    tokens = [
        tokens_of(op, f"offset_mapping of {'sentence' if of is None else 'window'} {row}", offsets, known[i])
        for row, (i, offsets) in enumerate(zip(range(len(listed)) if of is None else of, mapping, strict=True))
    ]
    names = ("char_start", "char_end", "the length of its text")
    return _place(op, listed, tokens, of, known, heads, alignment, end, TRIPLE, names)


def from_words(
    sentences: Iterable[Iterable[Sequence[Any] | Mapping[str, Any]]],
    word_ids: Iterable[Iterable[int | None]] | Mapping[str, Any],
    heads: Heads,
    *,
    windows: Iterable[int] | torch.Tensor | None = None,
    end: str = "inclusive",
) -> FromOffsets:
    """Spans from entities in words, through the word of each token, as of text that was split beforehand.

    Args:
        sentences: for each sentence its entities (type, start, end) in words, or ``{"label", "start", "end"}``.
        word_ids: for each sentence, or window, and in it for each token, the number of its word, None for special and
            padding tokens: what ``word_ids(i)`` of a fast tokenizer's encoding gives. Or that encoding.
        heads, windows: as for ``from_offsets``.
        end: "inclusive" where the end of an entity is its last word, "exclusive" where it is the word behind.

    Returns:
        ``(spans, lost, adjusted)`` as of ``from_offsets``, in words. An entity is lost where it has words before the
        first token or behind the last one, as after truncation; one at whose ends are words without a token is
        adjusted.

    Raises:
        TypeError, ValueError: as for ``from_offsets``; and for numbers of words that fall.
    """
    op = "from_words"
    listed = _read.each(op, "sentences", sentences, f"for each sentence a list of {_read.TRIPLE}")
    mapping, of = rows_of_tokens(op, "word_ids", word_ids, windows, len(listed))
    _read.choice(op, "end", end, _read.ENDS)
    tokens = [words_of(op, f"word_ids of row {row}", ids) for row, ids in enumerate(mapping)]
    known = [None] * len(listed)
    return _place(op, listed, tokens, of, known, heads, "expand", end, _read.TRIPLE, ("start", "end", ""))


def _place(
    op: str, sentences: list[Any], tokens: list[Tokens], windows: list[int] | None, texts: Sequence[str | None],
    heads: Heads, alignment: str, end: str, takes: str, names: tuple[str, str, str],
) -> FromOffsets:  # fmt: skip
    """The entities of each sentence in each row of its tokens."""
    indices = _read.table(op, heads)
    beyond = int(end == "inclusive")  # from the end as given to the exclusive end
    read: list[list[tuple[Any, int, int, int]]] = []
    for i, (entities, text) in enumerate(zip(sentences, texts, strict=True)):
        where, size, here = f"sentence {i}", None if text is None else len(text), []
        for entity in _read.spans_of(op, where, entities, f"a list of {takes}"):
            here.append(_read.triple(op, where, entity, indices, takes))
            _read.check_ends(op, where, entity, *here[-1][2:], size, end, names)
        read.append(here)
    rows, adjusted, found = [], [], set()
    for row, (i, of_row) in enumerate(zip(range(len(sentences)) if windows is None else windows, tokens, strict=True)):
        for entity, (kind, head, start, last) in enumerate(read[i]):
            whole, covering = _align(of_row, texts[i], start, last + beyond, alignment)
            if covering is None:
                continue
            first, final = covering
            found.add((i, entity))
            rows.append((row, head, of_row.indices[first], of_row.indices[final]))
            if not whole:
                adjusted.append((i, kind, start, last, (of_row.starts[first], of_row.ends[final] - beyond)))
    lost = [
        (i, kind, start, last)
        for i, here in enumerate(read)
        for entity, (kind, _, start, last) in enumerate(here)
        if (i, entity) not in found
    ]
    return FromOffsets(_read.tensor(rows), lost, adjusted)


# --- tokens ----------------------------------------------------------------------------------------------------------


def rows_of_tokens(
    op: str, name: str, given: Any, windows: Any, sentences: int | None
) -> tuple[list[Any], list[int] | None]:
    """What is known of the tokens of each row, and the sentence of each if rows are windows: as given, or as a fast
    tokenizer's encoding has them."""
    encoding = given
    if isinstance(given, Mapping):
        if windows is None and "overflow_to_sample_mapping" in encoding:
            windows = encoding["overflow_to_sample_mapping"]
        if name == "offset_mapping" and name in encoding:
            given = encoding[name]
        elif name == "word_ids" and callable(getattr(encoding, name, None)):
            given = [encoding.word_ids(row) for row in range(len(encoding["input_ids"]))]
    if windows is None:
        if sentences is None:
            return _read.each(op, name, given, "one for each sentence"), None
        return _read.one_for_each(op, name, given, sentences), None
    rows, takes = _read.each(op, name, given, "one for each window"), "the number of its sentence for each window"
    numbers = [_read.integer(i) for i in _read.each(op, "windows", windows, takes)]
    if len(numbers) != len(rows):
        raise ValueError(f"{op}: windows takes {takes}; got {len(numbers)} for {len(rows)}")
    for i in numbers:
        if i is None or not 0 <= i < (len(rows) if sentences is None else sentences):
            raise ValueError(f"{op}: windows takes {takes}; got {_checks.short(windows)}")
    return rows, numbers  # type: ignore[return-value]


def read_texts(op: str, texts: Any, sentences: int) -> list[str]:
    known = _read.one_for_each(op, "texts", texts, sentences)
    for i, text in enumerate(known):
        if not isinstance(text, str):
            raise TypeError(f"{op}: texts takes a str for each sentence; got {_checks.describe(text)} at {i}")
    return known


class Tokens(NamedTuple):
    """The tokens that hold characters, in order, and their characters. Neither starts nor ends fall."""

    indices: list[int]
    starts: list[int]
    ends: list[int]


def tokens_of(op: str, name: str, offsets: Any, text: str | None) -> Tokens:
    takes = PAIRS
    tokens = Tokens([], [], [])
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


def words_of(op: str, name: str, ids: Any) -> Tokens:
    """A word for a character: those of a token are one, and those of a word many."""
    takes = NUMBERS
    tokens = Tokens([], [], [])
    for token, given in enumerate(_read.each(op, name, ids, takes)):
        word = _read.integer(given)
        if given is None:
            continue
        if word is None or word < 0 or (tokens.starts and word < tokens.starts[-1]):
            raise ValueError(f"{op}: {name} takes {takes}; got {_checks.short(given)} at token {token}")
        tokens.indices.append(token)
        tokens.starts.append(word)
        tokens.ends.append(word + 1)
    return tokens


def _most(text: str | None, at: int) -> int:
    """How many tokens may share the character at: its bytes, or what the normal forms or the lower case make of it."""
    if text is None or at >= len(text):
        return 18  # of U+FDFA
    character = text[at]
    forms = (character.encode("utf-8", "replace"), unicodedata.normalize("NFKD", character), character.lower())
    return max(map(len, forms)) + 1  # a lone marker before a word


def _align(
    tokens: Tokens, text: str | None, start: int, end: int, alignment: str
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
