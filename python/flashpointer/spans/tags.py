"""Entities from a tag for each word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..ops import _checks
from . import _read

TAG = re.compile(r"O|([BIMESLU])-(.+)")
TAKES = "O, or B-, I-, M-, E-, L-, S- or U- and a type"


def from_tags(
    tags: Iterable[Iterable[str | int]], *, names: Sequence[str] | None = None
) -> list[list[tuple[str, int, int]]]:
    """Entities as lists, from tags in BIO (IOB1 and IOB2), BIOES, BILOU or BMES: what ``from_words`` takes for words
    that a tokenizer splits, and ``from_lists`` where each tag is a token's. ::

        spans, lost, adjusted = fp.spans.from_words(fp.spans.from_tags(tags), encoding, ["PER", "LOC"])

    Args:
        tags: for each sentence the tag of each word: ``O``, or ``B-``, ``I-``, ``M-``, ``E-``, ``L-``, ``S-`` or ``U-``
            and a type. They are read as the CoNLL scorer does: whatever continues nothing begins an entity.
        names: of the tags, where these are numbers, as of ``datasets``: ``features["ner_tags"].feature.names``.

    Returns:
        For each sentence its entities (type, start, end) in words, end inclusive, in their order. A tag for each word
        cannot express nested entities.

    Raises:
        TypeError, ValueError: naming the sentence and the word, for a tag of another form, or a number that names
            does not have.
    """
    op = "from_tags"
    known = None if names is None else _read.each(op, "names", names, "a list of tags")
    sentences = _read.each(op, "tags", tags, "for each sentence a list of tags")
    found = []
    for i, sentence in enumerate(sentences):
        entities: list[tuple[str, int, int]] = []
        is_open = False
        for word, given in enumerate(_read.each(op, f"sentence {i}", sentence, "a list of tags")):
            where = f"sentence {i}, word {word},"
            match = TAG.fullmatch(_name(op, where, given, known))
            if not match:
                raise ValueError(f"{op}: {where} takes a tag {TAKES}; got {_checks.short(given)}")
            prefix, kind = match.groups()
            if prefix is not None:
                goes_on = is_open and prefix in "IMEL" and entities[-1][0] == kind
                entities.append((kind, entities.pop()[1] if goes_on else word, word))
            is_open = prefix is not None and prefix in "BIM"
        found.append(entities)
    return found


def _name(op: str, where: str, tag: object, names: list[str] | None) -> str:
    if names is not None:
        index = _read.integer(tag)
        if index is None or not 0 <= index < len(names):
            raise ValueError(f"{op}: {where} takes a number below {len(names)}, the names; got {_checks.short(tag)}")
        tag = names[index]
    if not isinstance(tag, str):
        hint = ". Of numbers, names= says what they stand for" if _read.integer(tag) is not None else ""
        raise TypeError(f"{op}: {where} takes a tag {TAKES}; got {_checks.describe(tag)}{hint}")
    return tag
