"""spans.from_tags: the schemes, against the CoNLL scorer's reading, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashpointer as fp

SCHEMES = {"BIO": "BII", "BIOES": "BIE", "BILOU": "BIL", "BMES": "BME"}  # first, between, last
SINGLE = {"BIO": "B", "BIOES": "S", "BILOU": "U", "BMES": "S"}


@pytest.mark.parametrize(
    "tags, entities",
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("B-A B-A I-B O", [("A", 0, 0), ("A", 1, 1), ("B", 2, 2)]),
        ("I-A I-A O I-B", [("A", 0, 1), ("B", 3, 3)]),
        ("S-A B-A I-A E-A", [("A", 0, 0), ("A", 1, 3)]),
        ("U-A B-A L-A I-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]),
        ("B-A M-A E-A S-B", [("A", 0, 2), ("B", 3, 3)]),
        ("O O O O", []),
        ("", []),
    ],
)
def test_tags_are_read_as_the_conll_scorer_does(tags: str, entities: list[tuple[str, int, int]]) -> None:
    assert fp.spans.from_tags([tags.split(), []]) == [entities, []]
    names = ["O", *dict.fromkeys(tag for tag in tags.split() if tag != "O")]
    numbers = torch.tensor([names.index(tag) for tag in tags.split()], dtype=torch.int64)
    assert fp.spans.from_tags([numbers], names=names) == [entities]


@given(lengths=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["PER", "a-b", None])), max_size=8))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_scheme_writes_is_read(scheme: str, lengths: list[tuple[int, str | None]]) -> None:
    """Also of neighbours of one type."""
    tags: list[str] = []
    entities = []
    first, between, last = SCHEMES[scheme]
    for length, kind in lengths:
        if kind is None:
            tags += ["O"] * length
            continue
        entities.append((kind, len(tags), len(tags) + length - 1))
        prefixes = SINGLE[scheme] if length == 1 else first + between * (length - 2) + last
        tags += [f"{prefix}-{kind}" for prefix in prefixes]
    assert fp.spans.from_tags([tags]) == [entities]


def test_they_are_what_from_words_takes() -> None:
    found = fp.spans.from_tags([["B-PER", "I-PER", "O"]])
    spans, lost, adjusted = fp.spans.from_words(found, [[None, 0, 0, 1, 2, None]], ["PER"])
    assert (spans.tolist(), lost, adjusted) == ([[0, 0, 1, 3]], [], [])


def test_words_become_texts() -> None:
    """And their entities the characters of the same words."""
    words = [["Anna", "Lee", "ran"], [], ["Oslo"]]
    entities = [[("PER", 0, 1), ("X", 2, 2), ("ALL", 0, 2)], [], [("LOC", 0, 0)]]
    texts, found = fp.spans.join_words(words, entities)
    assert texts == ["Anna Lee ran", "", "Oslo"]
    cut = [[(kind, text[start:end]) for kind, start, end in here] for text, here in zip(texts, found, strict=True)]
    assert cut == [[("PER", "Anna Lee"), ("X", "ran"), ("ALL", "Anna Lee ran")], [], [("LOC", "Oslo")]]


@pytest.mark.parametrize(
    "words, entities, says",
    [
        ([["a"]], [], "entities takes one for each of 1 sentences; got 0"),
        (["ab"], [[]], "words of sentence 0 takes a list of strs; got str 'ab'"),
        ([["a", 3]], [[]], "words of sentence 0 takes strs; got ['a', 3]"),
        ([["a"]], [[("X", 0, 1)]], "entities of sentence 0 takes spans with 0 <= start <= end < 1, its words"),
        ([["a"]], [[("X", 0)]], "entities of sentence 0 takes spans (type, start, end)"),
    ],
)
def test_errors_of_words(words: object, entities: object, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        fp.spans.join_words(words, entities)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"join_words: {says}")


@pytest.mark.parametrize(
    "tags, names, says",
    [
        ([["O", "X-PER"]], None, "sentence 0, word 1, takes a tag O, or B-"),
        ([[], ["B"]], None, "sentence 1, word 0, takes a tag O, or B-"),
        ([["B-"]], None, "got 'B-'"),
        ([[3]], None, "names= says what they stand for"),
        ([[3]], ["O", "B-A"], "takes a number below 2, the names; got 3"),
        ([["O"]], ["O", "B-A"], "takes a number below 2, the names; got 'O'"),
        (["O"], None, "sentence 0 takes a list of tags"),
        ([["O"]], "O", "names takes a list of tags"),
    ],
)
def test_errors(tags: object, names: object, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        fp.spans.from_tags(tags, names=names)  # type: ignore[arg-type]
    assert str(caught.value).startswith("from_tags: ")
    assert says in str(caught.value)
