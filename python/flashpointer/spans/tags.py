"""For words that were split beforehand: entities from their tags, and texts made of the words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

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


def join_words(
    words: Iterable[Iterable[str]], entities: Iterable[Iterable[tuple[Any, int, int]]]
) -> tuple[list[str], list[list[tuple[Any, int, int]]]]:
    """Texts of words that were split beforehand, joined by spaces, and their entities in characters, end exclusive:
    what ``flashpointer.hf.SpanModel.examples`` takes. ::

        texts, entities = fp.spans.join_words(words, fp.spans.from_tags(tags))

    Args:
        words: for each sentence its words.
        entities: for each sentence its entities (type, start, end) in words, end inclusive.

    Raises:
        TypeError, ValueError: naming the sentence, for a word that is no str, an entity beyond the words, or lists of
            entities that are not one for each sentence.
    """
    op = "join_words"
    sentences = _read.each(op, "words", words, "for each sentence a list of words")
    texts, found = [], []
    for i, (sentence, here) in enumerate(
        zip(sentences, _read.one_for_each(op, "entities", entities, len(sentences)), strict=True)
    ):
        listed = _read.each(op, f"words of sentence {i}", sentence, "a list of strs")
        if not all(isinstance(word, str) for word in listed):
            raise TypeError(f"{op}: words of sentence {i} takes strs; got {_checks.short(listed)}")
        ends = list(itertools.accumulate((len(word) + 1 for word in listed), initial=0))  # where the next word begins
        texts.append(" ".join(listed))
        where, of_text = f"entities of sentence {i}", []
        for entity in _read.each(op, where, here, f"a list of {_read.TRIPLE}"):
            kind, _, start, end = _read.triple(op, where, entity, None, _read.TRIPLE)
            _read.check_ends(op, where, entity, start, end, len(listed), "inclusive", ("start", "end", "its words"))
            of_text.append((kind, ends[start], ends[end + 1] - 1))
        found.append(of_text)
    return texts, found


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
