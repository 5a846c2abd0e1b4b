"""Entities to spans and back: through windows of real tokenizers, in characters, in words, in UTF-16."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashpointer import spans

from .test_offsets import TOKENIZERS

HEADS = ["PER", "LOC", "ORG"]
WORDS = [
    "Johannes",
    "lives",
    "in",
    "New",
    "Brunswick",
    "today",
    ",",
    "Berlin",
    "hello",
    "😀",
    "cafés",
    "résumé",
    "test",
]
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def encoded(name: str, texts: list[str], **options: Any) -> Any:
    """As a fast tokenizer of Transformers gives it: windows of 40 tokens, 30 of which they share."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'flashpointer[test]'")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[name], pad_token="<unk>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    windows = {"truncation": True, "max_length": 40, "stride": 30, "return_overflowing_tokens": True, "padding": True}
    return tokenizer(texts, return_offsets_mapping=True, **{**windows, **options})


def long_text(words: int) -> tuple[str, list[tuple[str, int, int]]]:
    """And entities of one word, of some, nested, of one place twice, at both ends; none longer than windows share."""
    chosen = [random.choice(WORDS) for _ in range(words)]
    starts = [sum(len(word) + 1 for word in chosen[:i]) for i in range(words)]
    entities = []
    for first in (0, *range(2, words - 1, 3), words - 1):
        last = min(words - 1, first + random.choice([0, 0, 1]))
        entities.append((random.choice(HEADS), starts[first], starts[last] + len(chosen[last])))
    entities.append(("ORG" if entities[0][0] != "ORG" else "LOC", *entities[0][1:]))
    return " ".join(chosen), entities


def triples(found: list[dict[str, Any]]) -> set[tuple[str, int, int]]:
    assert len({(x["label"], x["start"], x["end"]) for x in found}) == len(found)  # none twice
    return {(x["label"], x["start"], x["end"]) for x in found}


@every_tokenizer
def test_through_windows_and_back(name: str) -> None:
    """Of what fits into one window nothing is lost, and nothing comes back twice."""
    texts, entities = zip(*(long_text(words) for words in (40, 1, 90)), strict=True)
    encoding = encoded(name, list(texts))
    rows = len(encoding["input_ids"])
    assert rows > 6 and encoding["overflow_to_sample_mapping"][0] == 0
    listed = spans.from_offsets(entities, encoding, HEADS, texts=texts)
    assert int(listed.spans[:, 0].max()) == rows - 1
    assert listed.spans[:, 1:].unique(dim=0).shape[0] < len(listed.spans)
    assert listed.lost == []  # none is longer than what windows share
    whole = {(i, *entity): (entity[0], *covered) for i, *entity, covered in listed.adjusted}  # tokens across a space
    assert not whole or name == "BPE with byte fallback"
    scores = torch.rand(len(listed.spans))
    padded = spans.pad(listed.spans, rows, scores)
    for given_spans, of in ((listed.spans, scores), padded):
        found = spans.to_entities(given_spans, encoding, HEADS, scores=of, texts=texts)
        assert len(found) == 3
        for i, (text, here) in enumerate(zip(texts, found, strict=True)):
            assert triples(here) == {whole.get((i, *entity), entity) for entity in entities[i]}
            assert all(x["text"] == text[x["start"] : x["end"]] for x in here)
            assert [x["start"] for x in here] == sorted(x["start"] for x in here)
    mapping, windows = encoding["offset_mapping"], encoding["overflow_to_sample_mapping"]
    by_hand = spans.from_offsets(entities, mapping, HEADS, texts=texts, windows=torch.tensor(windows))
    assert torch.equal(by_hand.spans, listed.spans) and by_hand.lost == listed.lost
    assert spans.to_entities(listed.spans, mapping, HEADS, scores=scores, texts=texts, windows=windows) == found


def test_an_entity_of_two_windows_is_one_with_the_better_score() -> None:
    offsets = [[None, (0, 4), (5, 9)], [(5, 9), (10, 12), (0, 0)]]
    found = spans.to_entities(
        torch.tensor([[0, 1, 2, 2], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]),
        offsets, HEADS, scores=torch.tensor([1.0, 3.0, 2.0, 4.0]), texts=["Anna Berg ok"], windows=[0, 0],
    )  # fmt: skip
    assert found == [
        [
            {"text": "Berg", "label": "PER", "start": 5, "end": 9, "score": 2.0},
            {"text": "Berg", "label": "LOC", "start": 5, "end": 9, "score": 3.0},
            {"text": "Berg ok", "label": "PER", "start": 5, "end": 12, "score": 4.0},
        ]
    ]


Run = tuple[str, int, int]


def runs(kinds: list[str | None], first: int, last: int) -> list[Run]:
    """The entities of a text, one of a type for each run of tokens of it, as a window of tokens [first, last) sees
    them."""
    found, start = [], first
    for kind, same in itertools.groupby(kinds[first:last]):
        end = start + len(list(same))
        if kind is not None:
            found.append((kind, start, end))
        start = end
    return found


def merged(windows: list[tuple[int, int]], found: list[list[Run]]) -> set[Run]:
    """Of windows of tokens [first, last) the entities, in tokens of the text, between special tokens."""
    offsets = [[None, *((3 * i, 3 * i + 2) for i in range(*window)), None] for window in windows]
    rows = [
        (row, HEADS.index(kind), start - windows[row][0] + 1, end - windows[row][0])
        for row, here in enumerate(found)
        for kind, start, end in here
    ]
    (entities,) = spans.to_entities(
        torch.tensor(rows, dtype=torch.int64).view(-1, 4), offsets, HEADS, windows=[0] * len(windows)
    )
    return {(kind, start // 3, end // 3 + 1) for kind, start, end in triples(entities)}


@st.composite
def windowed(draw: st.DrawFn) -> tuple[list[str | None], list[tuple[int, int]], int]:
    """The type of each token of a text, windows, in any order, and how many tokens neighbours share, 1 or more."""
    parts = draw(st.lists(st.tuples(st.sampled_from([None, *HEADS]), st.integers(1, 9)), min_size=1, max_size=9))
    kinds = [kind for kind, count in parts for _ in range(count)]
    size = draw(st.integers(2, 12))
    shared = draw(st.integers(1, size - 1))
    firsts = [0]
    while firsts[-1] + size < len(kinds):
        firsts.append(firsts[-1] + size - shared)
    windows = [(first, min(first + size, len(kinds))) for first in firsts]
    return kinds, draw(st.permutations(windows)), shared


@given(windowed())
def test_windows_that_find_a_part_of_what_they_cut(text: tuple[list[str | None], list[tuple[int, int]], int]) -> None:
    """Entities are whole, however long they are, over however many windows."""
    kinds, windows, _ = text
    found = [runs(kinds, *window) for window in windows]
    assert merged(windows, found) == set(runs(kinds, 0, len(kinds)))


@given(windowed(), st.data())
def test_windows_that_find_anything_in_what_they_cut(
    text: tuple[list[str | None], list[tuple[int, int]], int], data: st.DataObject
) -> None:
    """It does not count, if entities are at most half as long as what windows share."""
    kinds, windows, shared = text
    long = {run for run in runs(kinds, 0, len(kinds)) if run[2] - run[1] > shared // 2}
    for _, start, end in long:
        kinds[start:end] = [None] * (end - start)
    whole, found = runs(kinds, 0, len(kinds)), []
    for first, last in windows:
        found.append([run for run in whole if first <= run[1] and run[2] <= last])
        for _, start, end in whole:
            if start < first < end or start < last < end:
                a = data.draw(st.integers(max(start, first), min(end, last) - 1))
                b = data.draw(st.integers(a + 1, min(end, last)))
                found[-1].append((data.draw(st.sampled_from(HEADS)), a, b))
    assert merged(windows, found) == set(whole)


def test_where_windows_share_nothing_each_counts() -> None:
    windows = [(0, 4), (4, 8)]
    found = [[("PER", 2, 4)], [("PER", 4, 5), ("LOC", 7, 8)]]
    assert merged(windows, found) == {("PER", 2, 4), ("PER", 4, 5), ("LOC", 7, 8)}


def test_only_parts_of_one_type_are_joined() -> None:
    windows = [(0, 6), (4, 10)]
    found = [[("PER", 3, 6)], [("LOC", 4, 8)]]
    assert merged(windows, found) == {("PER", 3, 6), ("LOC", 4, 8)}
    assert merged(windows, [[*found[0], ("LOC", 1, 6)], found[1]]) == {("PER", 3, 6), ("LOC", 1, 8)}


def test_windows_of_one_end_join_nothing() -> None:
    """As of one text in windows of two sizes."""
    windows = [(0, 6), (2, 6), (3, 9)]
    assert merged(windows, [[("PER", 1, 6)], [("PER", 2, 6)], []]) == {("PER", 1, 6), ("PER", 2, 6)}
    assert merged([(0, 6), (2, 6)], [[("PER", 4, 6)], [("PER", 2, 6)]]) == {("PER", 4, 6), ("PER", 2, 6)}


def test_a_score_is_that_of_the_window_with_most_around_it() -> None:
    offsets = [[(i, i + 1) for i in range(first, first + 6)] for first in (0, 2, 4)]
    found = torch.tensor([[0, 0, 4, 4], [1, 0, 2, 2], [2, 0, 0, 0]])
    (entities,) = spans.to_entities(found, offsets, HEADS, scores=torch.tensor([3.0, 1.0, 2.0]), windows=[0, 0, 0])
    assert entities == [{"label": "PER", "start": 4, "end": 5, "score": 1.0}]


def test_special_tokens_are_no_entity() -> None:
    """Nor part of one: what reaches into them is what it holds of the text."""
    offsets = [[(0, 0), (0, 4), (4, 9), (0, 0), None]]
    reaching = torch.tensor([[[0, 0, 1], [1, 2, 4], [2, 3, 4], [2, 0, 0], [-100, -100, -100]]])
    assert spans.to_entities(reaching, offsets, HEADS) == [
        [{"label": "PER", "start": 0, "end": 4}, {"label": "LOC", "start": 4, "end": 9}]
    ]
    (found,) = spans.to_entities(reaching, offsets, HEADS, texts=["Anna Berg"])
    assert [x["text"] for x in found] == ["Anna", "Berg"]  # without the space
    assert spans.to_entities(torch.zeros(0, 4, dtype=torch.int64), offsets, HEADS, texts=["Anna Berg"]) == [[]]
    assert spans.to_entities(torch.zeros(0, 4, dtype=torch.int64), [], HEADS) == []


def test_entities_come_back_as_they_went_in() -> None:
    """What to_entities gives, from_offsets takes."""
    text, entities = long_text(30)
    offsets = [pair for pair in TOKENIZERS["byte-level BPE"].encode(text).offsets]
    first = spans.from_offsets([entities], [offsets], HEADS, texts=[text])
    back = spans.to_entities(first.spans, [offsets], HEADS, texts=[text])
    again = spans.from_offsets(back, [offsets], HEADS, texts=[text])
    assert first.lost == again.lost == []
    assert torch.equal(again.spans.unique(dim=0), first.spans.unique(dim=0))


# Words


@every_tokenizer
def test_words_through_windows_and_back(name: str) -> None:
    entities = [[("PER", 0, 0), ("LOC", 3, 4), ("ORG", 38, 39)], [("LOC", 0, 1)]]
    words = [[random.choice(WORDS) for _ in range(40)], ["in", "Berlin"]]
    encoding = encoded(name, words, is_split_into_words=True)
    listed = spans.from_words(entities, encoding, HEADS)
    assert listed.lost == [] and listed.adjusted == []
    for row, head, start, end in listed.spans.tolist():
        ids, i = encoding.word_ids(row), encoding["overflow_to_sample_mapping"][row]
        assert (HEADS[head], ids[start], ids[end]) in entities[i]
    found = spans.to_words(listed.spans, encoding, HEADS, words=words, scores=torch.ones(len(listed.spans)))
    assert [triples(here) for here in found] == list(map(set, entities))
    assert found[1] == [{"text": "in Berlin", "label": "LOC", "start": 0, "end": 1, "score": 1.0}]


def test_words_by_hand() -> None:
    ids = [[None, 0, 0, 1, 3], [None, 3, 3, 4, None]]  # of word 2 there is no token
    entities = [("PER", 0, 1), ("LOC", 3, 5), ("ORG", 1, 3), ("ORG", 2, 4)]
    listed = spans.from_words([entities], ids, HEADS, windows=[0, 0], end="exclusive")
    assert listed.spans.tolist() == [[0, 0, 1, 2], [0, 2, 3, 3], [0, 2, 4, 4], [1, 1, 1, 3]]
    assert listed.lost == []
    assert listed.adjusted == [(0, "ORG", 1, 3, (1, 2)), (0, "ORG", 2, 4, (3, 4))]
    assert spans.to_words(listed.spans[[3]], ids, HEADS, windows=[0, 0], end="exclusive") == [
        [{"label": "LOC", "start": 3, "end": 5}]
    ]
    cut = spans.from_words([[("PER", 0, 4), ("LOC", 0, 0)]], [[0, 1, 2]], HEADS)
    assert cut.spans.tolist() == [[0, 1, 0, 0]] and cut.lost == [(0, "PER", 0, 4)]


# UTF-16


@given(text=st.text(alphabet="aé😀 \U0001d538", min_size=1, max_size=20), data=st.data())
def test_utf16(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    units = lambda part: len(part.encode("utf-16-le")) // 2  # noqa: E731
    in_units = units(text[:start]), units(text[:end])
    named = {"label": "PER", "start": in_units[0], "end": in_units[1], "id": 3}
    assert spans.from_utf16([[("PER", *in_units)], [named]], [text, text]) == [[("PER", start, end)]] * 2


# Errors

OFFSETS = [[None, (0, 4), (4, 9)]]
ROW = torch.tensor([[0, 1, 1, 2]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spans": ROW.int()}, TypeError, r"spans takes an int64 tensor .*; got a torch.int32"),
        ({"spans": ROW + 1}, ValueError, r"spans takes rows .* of these tokens and heads.*; got \(1, 2, 2, 3\)"),
        ({"spans": torch.tensor([[0, 0, 2, 1]])}, ValueError, r"spans takes rows .*start <= end; got \(0, 0, 2, 1\)"),
        ({"spans": torch.tensor([[0, 5, 1, 1]])}, ValueError, r"spans takes rows .*; got \(0, 5, 1, 1\)"),
        ({"scores": torch.ones(2)}, ValueError, r"scores takes a floating-point tensor \[1\], .*; got .*\(2,\)"),
        ({"scores": [1.0]}, TypeError, r"scores takes a floating-point tensor \[1\], .*; got list"),
        ({"texts": ["a", "b"]}, ValueError, "offset_mapping takes one for each of 2 sentences; got 1"),
        ({"texts": [3]}, TypeError, "texts takes a str for each sentence; got int 3 at 0"),
        ({"texts": ["Anna"]}, ValueError, r"offset_mapping of row 0 takes offsets within its text of 4 char.*\(4, 9\)"),
        ({"windows": [0, 0]}, ValueError, "windows takes the number of its sentence for each window; got 2 for 1"),
        ({"windows": [3]}, ValueError, r"windows takes the number of its sentence for each window; got \[3\]"),
        ({"windows": ["0"]}, ValueError, r"windows takes the number of its sentence for each window; got \['0'\]"),
        ({"offset_mapping": {"input_ids": []}}, TypeError, "offset_mapping takes one for each sentence; got dict"),
        ({"heads": None}, TypeError, "heads takes a mapping .*; got NoneType None"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^to_entities: {message}"):
        spans.to_entities(**{"spans": ROW, "offset_mapping": OFFSETS, "heads": HEADS, **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"word_ids": [[1, 0]]}, ValueError, "word_ids of row 0 takes .* do not fall; got 0 at token 1"),
        ({"word_ids": [["a"]]}, ValueError, "word_ids of row 0 takes .*; got 'a' at token 0"),
        ({"word_ids": [3]}, TypeError, "word_ids of row 0 takes .*; got int 3"),
        ({"words": [["a"]]}, ValueError, "words takes all words of each sentence; got 1 for sentence 0, of which .* 1"),
        ({"words": ["ab"]}, TypeError, "words of sentence 0 takes strs; got str 'ab'"),
        ({"end": "last"}, ValueError, "end takes one of 'inclusive', 'exclusive'; got str 'last'"),
    ],
)
def test_errors_of_words(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"spans": ROW, "word_ids": [[None, 0, 1]], "heads": HEADS}
    with pytest.raises(error, match=f"^to_words: {message}"):
        spans.to_words(**{**right, **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sentences": [[("PER", 1, 2)]]}, ValueError, r"sentence 0 takes .* <= 3, the UTF-16 .*; got \('PER', 1, 2\)"),
        ({"sentences": [[("PER", 0, 4)]]}, ValueError, r"sentence 0 takes spans with 0 <= start < end <= 3, .*; got"),
        ({"sentences": [[("PER", 2, 2)]]}, ValueError, r"sentence 0 takes spans with 0 <= start < end <= 3, .*; got"),
        ({"sentences": [["PER"]]}, TypeError, r"sentence 0 takes spans \(type, start, end\); got 'PER'"),
        ({"texts": None}, TypeError, "texts takes one for each sentence; got NoneType None"),
        ({"texts": []}, ValueError, "texts takes one for each of 1 sentences; got 0"),
    ],
)
def test_errors_of_utf16(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^from_utf16: {message}"):
        spans.from_utf16(**{"sentences": [[]], "texts": ["😀a"], **arguments})
