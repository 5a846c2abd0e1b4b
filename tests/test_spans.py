"""Span tensors: round trips between every form of them, characters to tokens, batches for training, errors."""

from __future__ import annotations

import functools
import gzip
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from flashpointer import spans

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16]
HEADS = ["PER", "LOC", "ORG"]
EMPTY = torch.zeros(0, 4, dtype=torch.int64)


def rows(*listed: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(listed, dtype=torch.int64).view(-1, 4)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.int64 and torch.equal(a, b)


# Lists, dense and padded labels


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[list[tuple[str, int, int]]], list[int]]:
    """Sentences, with spans that may be nested, crossing and repeated, and their lengths."""
    lengths = draw(st.lists(st.integers(0, 9), max_size=4))
    sentences = []
    for length in lengths:
        ends = st.tuples(st.integers(0, max(length - 1, 0)), st.integers(0, max(length - 1, 0))).map(sorted)
        span = st.builds(lambda kind, pair: (kind, *pair), st.sampled_from(HEADS), ends)
        sentences.append(draw(st.lists(span, max_size=6 if length else 0)))
    return sentences, lengths


@given(document=documents(), dtype=st.sampled_from(DTYPES))
def test_lists_to_spans_to_dense_and_back(
    document: tuple[list[list[tuple[str, int, int]]], list[int]], dtype: torch.dtype
) -> None:
    sentences, lengths = document
    listed = spans.from_lists(sentences, HEADS, lengths=lengths)
    expected = [(b, HEADS.index(kind), s, e) for b, sentence in enumerate(sentences) for kind, s, e in sentence]
    assert same(listed, rows(*expected))

    size = (len(sentences), len(HEADS), max(lengths, default=0))
    dense = spans.to_dense(listed, *size, dtype=dtype)
    assert dense.dtype == dtype
    assert dense.shape == (*size, size[-1])
    assert {tuple(cell) for cell in dense.nonzero().tolist()} == set(expected)
    assert dense.double().sum() == len(set(expected))

    back = spans.from_dense(dense)
    assert same(back, rows(*sorted(set(expected))))
    assert torch.equal(spans.to_dense(back.flip(0), *size, dtype=dtype), dense)


def test_heads_by_name_and_by_position() -> None:
    sentences = [[("LOC", 2, 3)], [], [["PER", 0, 0]]]
    expected = rows((0, 1, 2, 3), (2, 0, 0, 0))
    assert same(spans.from_lists(sentences, HEADS), expected)
    assert same(spans.from_lists(iter(sentences), {"PER": 0, "LOC": 1}, lengths=torch.tensor([4, 0, 1])), expected)
    assert same(spans.from_lists([[(7, torch.tensor(2), 3)]], range(10)), rows((0, 7, 2, 3)))


def test_exclusive_ends() -> None:
    sentences, heads = [[("PER", 0, 1), ("LOC", 2, 5)], [], [("LOC", 3, 4)]], ["PER", "LOC"]
    expected = rows((0, 0, 0, 0), (0, 1, 2, 4), (2, 1, 3, 3))
    for lengths in (None, [5, 0, 4]):
        assert same(spans.from_lists(sentences, heads, lengths=lengths, end="exclusive"), expected)
    examples = [{"input_ids": [1] * 5, "spans": listed} for listed in sentences]
    assert same(spans.collate(examples, heads=heads, end="exclusive", padded=False)["spans"], expected)
    inclusive = [[(kind, start, end - 1) for kind, start, end in listed] for listed in sentences]
    assert same(spans.from_lists(inclusive, heads, end="inclusive"), expected)


def test_lists_may_be_any_iterable() -> None:
    expected = rows((0, 0, 1, 2), (1, 1, 0, 0))
    assert same(spans.from_lists(({span} for span in [("PER", 1, 2), ("LOC", 0, 0)]), HEADS), expected)
    by_number = torch.tensor([[[0, 1, 2]], [[1, 0, 0]]])
    for sentences in (by_number, list(by_number), by_number.numpy()):
        assert same(spans.from_lists(sentences, range(3)), expected)
    examples = [{"input_ids": [1, 2, 3], "spans": iter([("PER", 1, 2)])}, {"input_ids": [1], "spans": [("LOC", 0, 0)]}]
    batch = spans.collate(iter(examples), heads=HEADS)
    assert same(spans.flatten(batch["spans"]), expected)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]


def test_nothing_at_all() -> None:
    assert same(spans.from_lists([], HEADS), EMPTY)
    assert same(spans.from_lists([[], []], []), EMPTY)
    assert same(spans.from_dense(torch.zeros(2, 3, 4, 4)), EMPTY)
    for size in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)):
        dense = spans.to_dense(EMPTY, *size)
        assert dense.shape == (*size, size[-1])
        assert not dense.any()
        assert same(spans.from_dense(dense), EMPTY)
    assert same(spans.from_padded(torch.zeros(2, 3, 0, 2, dtype=torch.int64)), EMPTY)
    assert same(spans.from_padded(torch.full((2, 3, 5, 2), -1)), EMPTY)
    found = spans.from_offsets([], [], HEADS)
    assert same(found.spans, EMPTY)
    assert (found.lost, found.adjusted) == ([], [])


def test_dense_labels_of_relations_need_no_triangle() -> None:
    """The head-head and tail-tail planes of GPLinker hold pairs of tokens in both directions."""
    pairs = rows((0, 0, 3, 1), (0, 1, 1, 3))
    assert same(spans.from_dense(spans.to_dense(pairs, 1, 2, 4)), pairs)


def test_strided_labels() -> None:
    labels = torch.rand(4, 4, 2, 3).permute(3, 2, 1, 0) < 0.3
    assert same(spans.from_dense(labels), spans.from_dense(labels.contiguous()))
    listed = spans.from_dense(labels)
    assert torch.equal(spans.to_dense(listed.t().contiguous().t(), 3, 2, 4), labels)


@given(document=documents(), pad=st.sampled_from([-1, -100, 90]), dtype=st.sampled_from([torch.int8, torch.int64]))
def test_padded(document: tuple[list[list[tuple[str, int, int]]], list[int]], pad: int, dtype: torch.dtype) -> None:
    sentences, _ = document
    expected = spans.from_lists(sentences, HEADS)
    labels = torch.full((len(sentences), len(HEADS), 9, 2), pad, dtype=dtype)
    filled = torch.zeros(labels.shape[:2], dtype=torch.int64)
    for b, h, start, end in expected.tolist():
        labels[b, h, filled[b, h]] = torch.tensor([start, end], dtype=dtype)
        filled[b, h] += 1
    found = spans.from_padded(labels, ignore_index=90)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_padded_with_zeros() -> None:
    labels = torch.tensor([[[[0, 0], [0, 2], [1, 1], [0, 0]], [[3, 0], [0, -1], [-100, 4], [0, 0]]]])
    kept = rows((0, 0, 0, 2), (0, 0, 1, 1), (0, 1, 3, 0))
    assert same(spans.from_padded(labels, mask_zero=True), kept)
    zeros = rows((0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0))
    found = spans.from_padded(labels).tolist()
    assert sorted(found) == sorted(torch.cat([kept, zeros]).tolist())
    assert same(spans.from_padded(labels, mask_zero=True, ignore_index=3), kept[:2])


WILD = rows((2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 4, 0), (0, 0, 0, 4), (-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0))
WILD = torch.cat([WILD, rows((0, 0, 0, -1), (1, -1, 4, 4), (2**62, 2**62, 1, 1), (-(2**62), 3, 2**40, -(2**63)))])
TAME = rows((1, 1, 3, 3), (0, 1, 2, 1), (1, 1, 3, 3))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_span_that_nobody_checked_is_dropped(device: str) -> None:
    """As on a GPU, where to look would be to wait, and in a graph."""
    mixed = torch.cat([WILD, TAME, WILD]).to(device)
    inside = spans.dense._inside(mixed, 2, 2, 4)
    for dtype in DTYPES:
        expected = spans.to_dense(TAME, 2, 2, 4, dtype)
        assert torch.equal(spans.dense._fill(mixed, inside, 2, 2, 4, dtype).cpu(), expected)
        if device == "cuda":
            assert torch.equal(spans.to_dense(mixed, 2, 2, 4, dtype).cpu(), expected)


def test_dense_labels_inside_a_compiled_loss() -> None:
    compiled = torch.compile(lambda s: spans.to_dense(s, 2, 2, 4).float().sum((2, 3)), fullgraph=True, backend="eager")
    for mixed in (TAME, torch.cat([WILD, TAME]), EMPTY):
        expected = spans.to_dense(TAME if len(mixed) else EMPTY, 2, 2, 4).float().sum((2, 3))
        assert torch.equal(compiled(mixed), expected)


@pytest.mark.gpu
def test_a_gpu_waits_for_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    wild, tame = WILD.cuda(), TAME.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spans.to_dense(tame, 2, 2, 4)
        spans.to_dense(wild, 2, 2, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(spans.from_dense(spans.to_dense(tame, 2, 2, 4)).cpu(), rows((0, 1, 2, 1), (1, 1, 3, 3)))
    monkeypatch.setattr("flashpointer.backends.CHECK_INDICES", True)
    with pytest.raises(ValueError, match="to_dense: spans takes rows"):
        spans.to_dense(wild, 2, 2, 4)


# Batch-first


@given(document=documents(), extra=st.integers(0, 3), scores=st.booleans())
def test_flat_to_padded_and_back(
    document: tuple[list[list[tuple[str, int, int]]], list[int]], extra: int, scores: bool
) -> None:
    """And to the same dense labels."""
    sentences, lengths = document
    flat, batch = spans.from_lists(sentences, HEADS), len(sentences)
    mixed = flat[torch.randperm(len(flat))]
    padded = spans.pad(mixed, batch)
    most = max((len(listed) for listed in sentences), default=0)
    assert padded.dtype == torch.int64 and padded.shape == (batch, most, 3)
    for b, of_sentence in enumerate(padded):
        expected = mixed[mixed[:, 0] == b, 1:]
        assert torch.equal(of_sentence[: len(expected)], expected)
        assert (of_sentence[len(expected) :] == -100).all()
    more = torch.nn.functional.pad(padded, (0, 0, 0, extra), value=-1)
    back = spans.flatten(more)
    assert same(back, mixed[mixed[:, 0].argsort(stable=True)])
    size = (batch, len(HEADS), max(lengths, default=0))
    assert torch.equal(spans.to_dense(more, *size), spans.to_dense(flat, *size))
    if scores:
        values = torch.randn(len(mixed))
        rows_again, of_rows = spans.pad(mixed, batch, values)
        assert same(rows_again, padded) and of_rows.shape == padded.shape[:2]
        assert ((of_rows == -100) == (padded < 0).any(-1)).all()
        flat_again, of_flat = spans.flatten(padded, of_rows)
        assert same(flat_again, back) and torch.equal(of_flat, values[mixed[:, 0].argsort(stable=True)])


def test_flat_spans_are_flat() -> None:
    assert spans.flatten(TAME) is TAME
    assert spans.flatten(TAME, torch.ones(3))[1].tolist() == [1.0] * 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padding_is_dropped_and_what_is_wild_too(device: str) -> None:
    """One negative entry is padding, whatever stands beside it; unchecked, as on a GPU, the rest is dropped."""
    padded = torch.tensor([[[0, 2, 1], [-1, 9, 9]], [[9, -9, 0], [1, 3, 3]]], device=device)
    assert same(spans.flatten(padded).cpu(), rows((0, 0, 2, 1), (1, 1, 3, 3)))
    assert spans.to_dense(padded, 2, 2, 4).nonzero().tolist() == [[0, 0, 2, 1], [1, 1, 3, 3]]
    compiled = torch.compile(lambda s: spans.to_dense(s, 2, 2, 4), fullgraph=True, backend="eager")
    wild = torch.cat([padded, torch.full_like(padded[:, :1], 7)], dim=1)
    assert torch.equal(compiled(wild), spans.to_dense(padded, 2, 2, 4))


# Characters to tokens


def tokenize(text: str, *, spaces: bool, special: Any, keep: int | None = None) -> list[Any]:
    """Offsets as a fast tokenizer gives them: words in pieces of 3, the space before a word in its first piece or in
    none, special tokens around, cut to ``keep`` tokens and padded."""
    pieces = []
    for word in re.finditer(r"\S+", text):
        for start in range(word.start(), word.end(), 3):
            led = spaces and start == word.start() and start > 0
            pieces.append((start - led, min(start + 3, word.end())))
    return [special, *pieces[:keep], special, special]


TEXT = "Johannes lives in New Brunswick today"


def entity(kind: str, words: str) -> tuple[str, int, int]:
    start = TEXT.index(words)
    return kind, start, start + len(words)


@pytest.mark.parametrize("special", [(0, 0), None])
@pytest.mark.parametrize("spaces", [False, True])
def test_entities_become_tokens(spaces: bool, special: Any) -> None:
    # Tokens: 0 special, 1-3 Joh ann es, 4-5 liv es, 6 in, 7 New, 8-10 Bru nsw ick, 11-12 tod ay, 13-14 special
    offsets = tokenize(TEXT, spaces=spaces, special=special)
    assert len(offsets) == 15
    entities = [entity("PER", "Johannes"), entity("LOC", "New Brunswick"), entity("ORG", "Brunswick")]
    inside = [entity("PER", "Johan"), entity("PER", "hanne"), entity("LOC", "unsw"), entity("LOC", "ew Brunswick to")]
    found = spans.from_offsets([entities, inside], [offsets, offsets], HEADS)
    assert found.lost == []
    expected = [(0, 0, 1, 3), (0, 1, 7, 10), (0, 2, 8, 10), (1, 0, 1, 2), (1, 0, 1, 3), (1, 1, 8, 9), (1, 1, 7, 11)]
    assert same(found.spans, rows(*expected))


@pytest.mark.parametrize("spaces", [False, True])
def test_truncated_entities_are_reported(spaces: bool) -> None:
    entities = [entity("PER", "Johannes"), entity("LOC", "New Brunswick"), entity("LOC", "New"), entity("ORG", "today")]
    cut = tokenize(TEXT, spaces=spaces, special=(0, 0), keep=8)  # to "... New Bru"
    found = spans.from_offsets([[], entities], [[None], cut], {"PER": 5, "LOC": 0, "ORG": 1})
    assert same(found.spans, rows((1, 5, 1, 3), (1, 0, 7, 7)))
    assert found.lost == [(1, *entities[1]), (1, *entities[3])]

    window = [None, *cut[6:9], None]  # from " in", as a tokenizer with a stride gives the later windows
    entities.append(entity("ORG", "lives in"))
    found = spans.from_offsets([entities], [window], HEADS)
    assert same(found.spans, rows((0, 1, 2, 2)))
    assert found.lost == [(0, *entities[i]) for i in (0, 1, 3, 4)]

    assert spans.from_offsets([entities], [[(0, 0), None]], HEADS).lost == [(0, *e) for e in entities]


def test_an_entity_of_which_the_tokenizer_made_no_token_is_reported() -> None:
    found = spans.from_offsets([[("PER", 2, 3), ("PER", 1, 3)]], [[(0, 2), (3, 5)]], HEADS)
    assert same(found.spans, rows((0, 0, 0, 0)))
    assert found.lost == [(0, "PER", 2, 3)]


def test_offsets_in_tensors_and_of_split_characters() -> None:
    """Bytes of one character are tokens of the same offsets; SentencePiece may put a lone marker before a word."""
    offsets = torch.tensor([[[0, 0], [0, 1], [0, 3], [4, 5], [4, 5], [5, 6], [0, 0]]])
    expected = rows((0, 0, 1, 2), (0, 1, 3, 4), (0, 2, 3, 5))
    entities = [("PER", 0, 3), ("LOC", 4, 5), ("ORG", 4, 6)]
    for mapping in (offsets, list(offsets), offsets.tolist()):
        assert same(spans.from_offsets([entities], mapping, HEADS).spans, expected)


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, list[tuple[str, int, int]]]:
    """A text, and entities that start and end at any character but a space."""
    text = draw(st.text(alphabet="ab ", max_size=40))
    letters = [i for i, c in enumerate(text) if c != " "]
    if not letters:
        return text, []
    ends = st.tuples(st.sampled_from(letters), st.sampled_from(letters)).map(sorted)
    found = draw(st.lists(st.tuples(st.sampled_from(HEADS), ends), max_size=5))
    return text, [(kind, start, last + 1) for kind, (start, last) in found]


@given(case=texts(), keep=st.none() | st.integers(0, 8), special=st.sampled_from([None, (0, 0)]))
def test_any_entity_takes_the_tokens_of_its_letters(
    case: tuple[str, list[tuple[str, int, int]]], keep: int | None, special: Any
) -> None:
    text, entities = case
    plain, spaced = (tokenize(text, spaces=spaces, special=special, keep=keep) for spaces in (False, True))
    owner = {char: token for token, pair in enumerate(plain) if pair for char in range(*pair)}
    expected, lost = [], []
    for kind, start, end in entities:
        letters = [owner.get(i) for i in range(start, end) if text[i] != " "]
        if None in letters:
            lost.append((0, kind, start, end))
        else:
            expected.append((0, HEADS.index(kind), letters[0], letters[-1]))
    for offsets in (plain, spaced):
        found = spans.from_offsets([entities], [offsets], HEADS)
        assert same(found.spans, rows(*expected))
        assert found.lost == lost


# Batches for training

EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [101, 7, 8, 102], "spans": [("PER", 1, 2), ["LOC", 2, 2]], "text": "not for the model"},
    {"input_ids": torch.tensor([101, 102], dtype=torch.int32), "spans": [], "attention_mask": [True, False]},
    {"input_ids": [101, 9, 102], "spans": (("ORG", 1, 1),), "token_type_ids": torch.tensor([0, 1, 1])},
    {"input_ids": [], "spans": []},
]


def test_collate() -> None:
    batch = spans.collate(EXAMPLES, heads=HEADS, pad_token_id=3)
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids", "spans"]
    assert all(x.dtype == torch.int64 for x in batch.values())
    assert batch["input_ids"].tolist() == [[101, 7, 8, 102], [101, 102, 3, 3], [101, 9, 102, 3], [3, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    special = [{**EXAMPLES[0], "special_tokens_mask": [1, 0, 0, 1]}, EXAMPLES[1]]
    marked = spans.collate(special, heads=HEADS)["special_tokens_mask"]
    assert same(marked, torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]))
    none = [-100] * 3
    assert batch["spans"].tolist() == [[[0, 1, 2], [1, 2, 2]], [none, none], [[2, 1, 1], none], [none, none]]
    flat = spans.collate(EXAMPLES, heads=HEADS, pad_token_id=3, padded=False)
    assert same(flat["spans"], rows((0, 0, 1, 2), (0, 1, 2, 2), (2, 2, 1, 1)))
    assert all(torch.equal(flat[key], x) for key, x in batch.items() if key != "spans")


def test_collate_by_name() -> None:
    """Spans as mappings, as ``datasets`` stores them: in a list, or as a mapping of lists; types by number too."""
    named = [{"label": kind, "start": start, "end": end, "score": 1.0} for kind, start, end in EXAMPLES[0]["spans"]]
    columns = {"label": ["PER", "LOC"], "start": torch.tensor([1, 2]), "end": numpy.array([2, 2])}
    numbers = [{"label": torch.tensor(i), "start": torch.tensor(i + 1), "end": numpy.int64(2)} for i in range(2)]
    for heads, listed in ((HEADS, named), (HEADS, columns), (range(2), numbers)):
        batch = spans.collate([{"input_ids": [1, 2, 3], "spans": listed}], heads=heads, key="labels")
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert batch["labels"].tolist() == [[[0, 1, 2], [1, 2, 2]]]
        assert same(spans.from_lists([listed], heads), rows((0, 0, 1, 2), (0, 1, 2, 2)))
    in_characters = spans.from_offsets([named], [[(0, 2), (2, 3)]], HEADS, end="inclusive").spans
    assert same(in_characters, rows((0, 0, 0, 1), (0, 1, 1, 1)))


def test_a_row_of_datasets() -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'flashpointer[integrations]'")
    listed = [
        {"input_ids": [1, 2, 3], "spans": [{"label": "LOC", "start": 1, "end": 2}]},
        {"input_ids": [4], "spans": []},
    ]
    stored = datasets.Dataset.from_list(listed)
    expected = spans.collate(listed, heads=HEADS)
    for rows_of in (stored, stored.with_format("torch"), stored.with_format("numpy")):
        (batch,) = DataLoader(rows_of, batch_size=2, collate_fn=functools.partial(spans.collate, heads=HEADS))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_collate_for_inference_has_no_spans() -> None:
    batch = spans.collate([{"input_ids": [1, 2]}, {"input_ids": [3]}], heads=HEADS, key="labels")
    assert list(batch) == ["input_ids", "attention_mask"]


def test_collate_pads_to_a_multiple() -> None:
    batch = spans.collate(EXAMPLES[:3], heads=HEADS, pad_token_id=3, pad_to_multiple_of=8)
    assert batch["input_ids"].tolist()[0] == [101, 7, 8, 102, 3, 3, 3, 3]
    assert all(batch[key].shape == (3, 8) for key in ("input_ids", "attention_mask", "token_type_ids"))
    assert int(batch["attention_mask"].sum()) == 8
    assert spans.collate(EXAMPLES[:3], heads=HEADS, pad_to_multiple_of=4)["input_ids"].shape == (3, 4)


def test_collate_keeps_what_it_is_told_to() -> None:
    examples = [{**example, "id": i} for i, example in enumerate(EXAMPLES)]
    assert spans.collate(examples, heads=HEADS, keep=["id"])["id"] == [0, 1, 2, 3]


RELATIONS = spans.SpanSet(["born in"], tril_mask=False)
GPLINKER = {"entities": spans.SpanSet(HEADS), "first": RELATIONS, "last": RELATIONS}


def test_collate_of_several_sets() -> None:
    """GPLinker's: entities, and the pairs of first and of last tokens of subject and object, in any order."""
    examples: list[dict[str, Any]] = [
        {
            "input_ids": [1] * 5,
            "entities": [("PER", 3, 4), ("LOC", 0, 1)],
            "first": [("born in", 3, 0)],
            "last": [{"label": "born in", "start": 4, "end": 1}],
        },
        {"input_ids": [1] * 2, "entities": [], "first": [], "last": []},
    ]
    batch = spans.collate(examples, heads=GPLINKER)
    assert list(batch) == ["input_ids", "attention_mask", "entities", "first", "last"]
    assert batch["entities"].tolist() == [[[0, 3, 4], [1, 0, 1]], [[-100] * 3] * 2]
    assert batch["first"].tolist() == [[[0, 3, 0]], [[-100] * 3]]
    assert batch["last"].tolist() == [[[0, 4, 1]], [[-100] * 3]]
    pairs = [{"input_ids": [1] * 5, "spans": examples[0]["first"]}]
    assert spans.collate(pairs, heads=["born in"], tril_mask=False)["spans"].tolist() == [[[0, 3, 0]]]


def test_collate_of_the_least() -> None:
    batch = spans.collate([{"input_ids": [5], "spans": []}], heads={})
    assert {key: x.tolist() for key, x in batch.items()} == {"input_ids": [[5]], "attention_mask": [[1]], "spans": [[]]}
    narrow = {"input_ids": torch.ones(2, dtype=torch.int32), "attention_mask": [True, False], "spans": []}
    assert all(x.dtype == torch.int64 for x in spans.collate([narrow], heads={}).values())
    batch = spans.collate([], heads=HEADS)
    assert {key: tuple(x.shape) for key, x in batch.items()} == {
        "input_ids": (0, 0),
        "attention_mask": (0, 0),
        "spans": (0, 0, 3),
    }
    assert spans.collate([], heads=HEADS, padded=False)["spans"].shape == (0, 4)


def check_loader(**options: Any) -> None:
    collate = functools.partial(spans.collate, heads=HEADS, pad_token_id=3)
    loader = DataLoader(EXAMPLES, batch_size=3, collate_fn=collate, **options)
    batches = list(loader)
    assert len(batches) == 2
    for batch, examples in zip(batches, (EXAMPLES[:3], EXAMPLES[3:]), strict=True):
        expected = collate(examples)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_collate_in_a_loader() -> None:
    check_loader()
    collate = functools.partial(spans.collate, heads={"PER": 0, "LOC": 1, "ORG": 2})
    assert torch.equal(pickle.loads(pickle.dumps(collate))(EXAMPLES)["spans"], collate(EXAMPLES)["spans"])


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_collate_in_a_worker_process(context: str) -> None:
    check_loader(num_workers=1, multiprocessing_context=context)


# Errors

LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sentences": [[], [("PER", -1, 2)]]}, ValueError, r"sentence 1 .* 0 <= start <= end; got \('PER', -1, 2\)"),
        ({"sentences": [[["PER", 3, 2]]]}, ValueError, r"sentence 0 .* 0 <= start <= end; got \['PER', 3, 2\]"),
        (
            {"sentences": [[], [("PER", 0, 3)]], "lengths": [9, 3]},
            ValueError,
            r"sentence 1 .* 0 <= start <= end < 3, its length; got \('PER', 0, 3\)",
        ),
        (
            {"sentences": [[("MISC", 0, 3)]]},
            ValueError,
            r"sentence 0 takes spans \(type, start, end\) of a type in heads, \['PER', 'LOC', 'ORG'\]; got \('MISC', 0",
        ),
        ({"sentences": [[(0, 3, "PER")]]}, ValueError, r"sentence 0 .* of a type in heads.*got \(0, 3, 'PER'\)"),
        ({"sentences": [[(["PER"], 3, 4)]]}, ValueError, r"sentence 0 .* of a type in heads.*got \(\['PER'\], 3, 4\)"),
        ({"sentences": [[("PER", 0.0, 3)]]}, TypeError, r"sentence 0 takes .* with ints; got \('PER', 0.0, 3\)"),
        ({"sentences": [[("PER", 0)]]}, TypeError, r"sentence 0 takes spans \(type, start, end\); got \('PER', 0\)"),
        ({"sentences": [("PER", 0, 1)]}, TypeError, r"sentence 0 takes spans \(type, start, end\); got 'PER'"),
        ({"heads": "PER"}, TypeError, "heads takes a mapping from type to head index, or a sequence.*; got str 'PER'"),
        ({"heads": {"PER"}}, TypeError, "heads takes a mapping .*; got set"),
        ({"heads": ["LOC", "PER", "LOC"]}, ValueError, "heads takes each type once; got 'LOC' twice"),
        ({"heads": {"LOC": 0, "PER": -1}}, ValueError, "heads takes a head index, 0 or more.*; got -1 for 'PER'"),
        ({"heads": {"PER": "0"}}, ValueError, "heads takes a head index, 0 or more.*; got '0' for 'PER'"),
        ({"lengths": [1, 2]}, ValueError, "lengths takes one for each of 1 sentences; got 2"),
        ({"lengths": 7}, TypeError, "lengths takes one for each sentence; got int 7"),
        ({"lengths": torch.ones(1)}, TypeError, "lengths takes an int for each sentence; got float 1.0 at 0"),
        ({"lengths": {1}}, TypeError, "lengths takes one for each sentence; got set"),
        ({"lengths": "1"}, TypeError, "lengths takes one for each sentence; got str '1'"),
        ({"sentences": None}, TypeError, r"sentences takes for each sentence a list of \(type, .*; got NoneType None"),
        ({"sentences": {0: []}}, TypeError, "sentences takes for each sentence a list of .*; got dict"),
        ({"sentences": {}}, TypeError, "sentences takes for each sentence a list of .*; got dict"),
        ({"sentences": ""}, TypeError, "sentences takes for each sentence a list of .*; got str ''"),
        ({"sentences": [[], None]}, TypeError, r"sentence 1 takes a list of \(type, start, end\); got NoneType None"),
        ({"sentences": [{"PER": (0, 1)}]}, TypeError, "sentence 0 takes a list of .*; got dict"),
        ({"sentences": [{}]}, TypeError, "sentence 0 takes a list of .*; got dict"),
        ({"sentences": ["PER"]}, TypeError, "sentence 0 takes a list of .*; got str 'PER'"),
        ({"sentences": torch.tensor([3])}, TypeError, "sentence 0 takes a list of .*; got int 3"),
        ({"sentences": torch.tensor(3)}, TypeError, "sentences takes .*; got a torch.int64 tensor of shape"),
        ({"sentences": [[LONG]]}, TypeError, "sentence 0 takes spans .*; got 'xxx"),
        ({"sentences": [[(LONG, 0, 1)]]}, ValueError, "sentence 0 takes spans .* of a type in heads"),
        ({"sentences": [[("PER", LONG, 1)]]}, TypeError, "sentence 0 takes spans .* with ints"),
        ({"sentences": [[list(range(10**6))]]}, TypeError, r"sentence 0 takes spans .*; got \[0, 1, 2"),
        ({"sentences": [[torch.ones(2, 2)]]}, TypeError, "sentence 0 takes spans .*; got tensor"),
        ({"heads": {LONG: LONG}}, ValueError, "heads takes a head index, 0 or more"),
        ({"heads": [LONG, LONG]}, ValueError, "heads takes each type once; got 'xxx"),
        ({"heads": [["PER"]]}, TypeError, "heads takes types that can be hashed; got list"),
        ({"end": "excl"}, ValueError, "end takes one of 'inclusive', 'exclusive'; got str 'excl'"),
        ({"lengths": [LONG]}, TypeError, "lengths takes an int for each sentence; got str 'xxx.* at 0"),
        ({"end": LONG}, ValueError, "end takes one of 'inclusive', 'exclusive'; got str 'xxx"),
        ({"end": 1}, ValueError, "end takes one of 'inclusive', 'exclusive'; got int 1"),
        (
            {"sentences": [[("PER", 2, 3)]], "lengths": [3]},
            ValueError,
            r"sentence 0 .* end < 3, its length; got \(.PER., 2, 3\)\. If ends are exclusive, say end=\"exclusive\"$",
        ),
        (
            {"sentences": [[("PER", 2, 4)]], "lengths": [3]},
            ValueError,
            r"sentence 0 takes spans with 0 <= start <= end < 3, its length; got \('PER', 2, 4\)$",
        ),
        (
            {"sentences": [[("PER", 2, 2)]], "lengths": [3], "end": "exclusive"},
            ValueError,
            r"sentence 0 takes spans with 0 <= start < end <= 3, its .* If ends are inclusive, say end=\"inclusive\"$",
        ),
        (
            {"sentences": [[("PER", 2, 4)]], "lengths": [3], "end": "exclusive"},
            ValueError,
            r"sentence 0 takes spans with 0 <= start < end <= 3, its length; got \('PER', 2, 4\)$",
        ),
    ],
)
def test_errors_of_lists(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^from_lists: {message}") as caught:
        spans.from_lists(**{"sentences": [[]], "heads": HEADS, **arguments})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_error_does_not_list_ten_thousand_types() -> None:
    with pytest.raises(ValueError, match=r"heads, \[0, 1, 2, 3, 4, 5, ...\]; got"):
        spans.from_lists([[("PER", 0, 0)]], range(10000))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"sentences": [[("PER", -1, 2)]]},
            ValueError,
            r"sentence 0 takes spans with 0 <= char_start < char_end; got \('PER', -1",
        ),
        (
            {"sentences": [[("PER", 2, 2)]]},
            ValueError,
            r"sentence 0 takes spans with 0 <= char_start < char_end; got \('PER', 2, 2",
        ),
        (
            {"sentences": [[("MISC", 0, 2)]]},
            ValueError,
            r"sentence 0 .*char_end\) of a type in heads.*got \('MISC', 0, 2",
        ),
        ({"sentences": [["PER"]]}, TypeError, r"sentence 0 takes spans \(type, char_start, char_end\); got 'PER'"),
        ({"heads": None}, TypeError, "heads takes a mapping .*; got NoneType None"),
        ({"sentences": []}, ValueError, "offset_mapping takes one for each of 0 sentences; got 1"),
        ({"offset_mapping": None}, TypeError, "offset_mapping takes one for each sentence; got NoneType None"),
        (
            {"offset_mapping": [(0, 3)]},
            TypeError,
            r"offset_mapping of sentence 0 takes \(char_start.*; got 0 at token 0",
        ),
        ({"offset_mapping": [[(0, 3, 4)]]}, TypeError, r"offset_mapping of sentence 0 .*; got \(0, 3, 4\) at token 0"),
        (
            {"offset_mapping": [[(0, 3), (4, 7), None, (0, 2)]]},
            ValueError,
            r"offset_mapping of sentence 0 .* one text, which go on; got \(0, 2\) at token 3, after one that ends at 7",
        ),
    ],
)
def test_errors_of_offsets(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^from_offsets: {message}"):
        spans.from_offsets(**{"sentences": [[]], "offset_mapping": [[(0, 3)]], "heads": HEADS, **arguments})


@pytest.mark.parametrize(
    "labels, error, message",
    [
        (None, TypeError, "labels takes a bool, integer or floating-point tensor .*; got NoneType None"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.complex64), TypeError, "labels takes .*; got a torch.complex64 tensor"),
        (torch.zeros(1, 2, 2), ValueError, r"labels must be \[batch, heads, length, length\]; got .*\(1, 2, 2\)"),
        (torch.zeros(1, 1, 2, 3), ValueError, r"labels must be .*; got .*\(1, 1, 2, 3\)"),
        (torch.tensor([[[[0, 1], [1, 2]]]]), ValueError, r"labels takes 0 and 1; got 2 at \(0, 0, 1, 1\)"),
        (torch.tensor([[[[0, -100], [1, 0]]]]), ValueError, r"labels takes 0 and 1; got -100 at \(0, 0, 0, 1\)"),
        (torch.tensor([[[[0.0, 1.0], [0.5, 0.0]]]]), ValueError, r"labels takes 0 and 1; got 0.5 at \(0, 0, 1, 0\)"),
        (torch.full((1, 1, 1, 1), torch.nan), ValueError, "labels takes 0 and 1; got nan"),
    ],
)
def test_errors_of_dense(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^from_dense: {message}"):
        spans.from_dense(labels)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spans": [[0, 0, 0, 0]]}, TypeError, r"spans takes an int64 tensor .*\[S, 4\], .*; got list"),
        ({"spans": EMPTY.int()}, TypeError, "spans takes an int64 tensor .*; got a torch.int32 tensor"),
        ({"spans": EMPTY[0:0, 1:]}, ValueError, r"spans must be an .*\[S, 4\], or .*\[B, P, 3\]; got .*\(0, 3\)"),
        ({"spans": TAME[None, :, 1:]}, ValueError, r"spans must be \[2, P, 3\], as batch is 2; got .*\(1, 3, 3\)"),
        (
            {"spans": torch.tensor([[[1, 3, 3], [-1, 9, 9]], [[1, 4, 3], [1, 1, 1]]])},
            ValueError,
            r"spans takes rows .* below \(2, 2, 4, 4\); got \(1, 1, 4, 3\) at 2",
        ),
        ({"batch": 2.0}, TypeError, "batch takes an int; got float 2.0"),
        ({"heads": HEADS}, TypeError, "heads takes an int; got list"),
        ({"length": -1}, ValueError, "length takes 0 or more; got -1"),
        ({"dtype": bool}, TypeError, "dtype takes a torch.dtype; got type"),
        *(
            (
                {"spans": torch.cat([TAME, row[None], row[None]])},
                ValueError,
                r"spans takes rows \(batch, head, start, end\) below \(2, 2, 4, 4\); got "
                + re.escape(str(tuple(row.tolist())))
                + " at 3",
            )
            for row in WILD
        ),
    ],
)
def test_errors_of_to_dense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^to_dense: {message}"):
        spans.to_dense(**{"spans": TAME, "batch": 2, "heads": 2, "length": 4, **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"labels": torch.zeros(1, 1, 1, 2)}, TypeError, "labels takes an integer tensor .*; got a torch.float32"),
        ({"labels": torch.zeros(1, 1, 2).long()}, ValueError, r"labels must be \[batch, heads, pairs, 2\]; got .*\(1,"),
        ({"labels": torch.zeros(1, 1, 2, 3).long()}, ValueError, r"labels must be .*; got .*\(1, 1, 2, 3\)"),
        ({"ignore_index": None}, TypeError, "ignore_index takes an int; got NoneType None"),
    ],
)
def test_errors_of_padded(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^from_padded: {message}"):
        spans.from_padded(**{"labels": torch.zeros(1, 1, 1, 2).long(), **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spans": TAME[:, 1:]}, ValueError, r"spans takes an int64 tensor \[S, 4\]; got .*\(3, 3\)"),
        ({"spans": TAME.int()}, TypeError, r"spans takes an int64 tensor \[S, 4\]; got a torch.int32"),
        ({"batch": 1.0}, ValueError, "batch takes an int of at least 0; got float 1.0"),
        ({"batch": 1}, ValueError, "spans takes rows of sentences 0 to 0; got one of sentence 1"),
        ({"spans": rows((-1, 0, 0, 0))}, ValueError, "spans takes rows of sentences 0 to 1; got one of sentence -1"),
        ({"values": [1.0]}, TypeError, r"values takes a tensor \[3\], one for each row of spans, .*; got list"),
        ({"values": torch.ones(2)}, ValueError, r"values takes a tensor \[3\], one for each row of .*; got .*\(2,\)"),
    ],
)
def test_errors_of_pad(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pad: {message}"):
        spans.pad(**{"spans": TAME, "batch": 2, **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spans": TAME[:, 1:]}, ValueError, r"spans must be an int64 tensor of rows .*; got .*\(3, 3\)"),
        ({"values": torch.ones(3)}, ValueError, r"values takes a tensor \[1, 3\], one for each row .*; got .*\(3,\)"),
    ],
)
def test_errors_of_flatten(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^flatten: {message}"):
        spans.flatten(**{"spans": TAME[None, :, 1:], **arguments})


@pytest.mark.parametrize("pair", [("born in", -1, 0), ("born in", 2, 5), ("born in", 5, 0)])
def test_pairs_too_lie_within_their_sentence(pair: tuple[str, int, int]) -> None:
    example = {"input_ids": [1] * 5, "entities": [], "first": [pair], "last": []}
    with pytest.raises(ValueError, match=r"^collate: example 0 takes pairs with 0 <= start, end < 5, its length; got"):
        spans.collate([example], heads=GPLINKER)
    del example["last"]
    other = {"input_ids": [1], "entities": [], "first": [], "last": []}
    with pytest.raises(
        ValueError, match=r"^collate: example 0 takes the keys input_ids and entities and first and las"
    ):
        spans.collate([example, other], heads=GPLINKER)


GOOD: dict[str, Any] = {"input_ids": [1, 2, 3], "spans": []}


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"ids": [1]}, ValueError, r"example 1 takes the keys input_ids and spans; got \['ids'\]"),
        ({"input_ids": [1]}, ValueError, r"example 1 takes the keys input_ids and spans; got \['input_ids'\]"),
        (
            {**GOOD, "input_ids": None},
            TypeError,
            "input_ids of example 1 takes a list or 1-D tensor of int.*; got None",
        ),
        ({**GOOD, "input_ids": [[1]]}, TypeError, r"input_ids of example 1 takes .*; got list \[\[1\]\]"),
        ({**GOOD, "input_ids": [0.5]}, TypeError, r"input_ids of example 1 takes .*; got list \[0.5\]"),
        ({**GOOD, "attention_mask": [1, 1]}, ValueError, "attention_mask of example 1 takes 3 entries, as in.*; got 2"),
        ({**GOOD, "token_type_ids": []}, ValueError, "token_type_ids of example 1 takes 3 entries, as in.*; got 0"),
        (
            {**GOOD, "spans": [("PER", 1, 3)]},
            ValueError,
            r"example 1 takes spans with 0 <= start <= end < 3, its length; got \('PER', 1, 3\)",
        ),
        (
            {**GOOD, "spans": [("MISC", 1, 1)]},
            ValueError,
            r"example 1 takes .* of a type in heads.*got \('MISC', 1, 1\)",
        ),
        (None, TypeError, "example 1 takes a mapping with the keys input_ids and spans; got NoneType None"),
        ([1, 2], TypeError, "example 1 takes a mapping with the keys input_ids and spans; got list"),
        ({key: 0 for key in range(10**6)}, ValueError, r"example 1 takes the keys .*; got \[0, 1, 2, 3, 4, 5, ...\]$"),
        ({**GOOD, "spans": None}, TypeError, r"example 1 takes a list of \(type, start, end\); got NoneType None"),
        ({**GOOD, "spans": {"PER": (0, 1)}}, TypeError, "example 1 takes a list of .*; got dict"),
        ({**GOOD, "spans": "PER"}, TypeError, "example 1 takes a list of .*; got str 'PER'"),
        ({**GOOD, "spans": [(LONG, 1, 1)]}, ValueError, "example 1 takes spans .* of a type in heads"),
        ({**GOOD, "spans": [("PER", 2, 3)]}, ValueError, r'example 1 .* If ends are exclusive, say end="exclusive"$'),
        ({**GOOD, "spans": [("PER", 2, 1)]}, ValueError, r"example 1 .* If its heads have no .*, say tril_mask=False$"),
        ({**GOOD, "spans": [{"label": "PER", "start": 1}]}, TypeError, r"example 1 takes spans .*; got \{'label'"),
        (
            {"input_ids": [1], "span": []},
            ValueError,
            r"example 1 takes the keys input_ids and spans; got \['input_ids'",
        ),
    ],
)
def test_errors_of_collate(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^collate: {message}") as caught:
        spans.collate([GOOD, wrong], heads=HEADS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pad_token_id": None}, "pad_token_id takes an int; got NoneType None"),
        ({"heads": 3}, "heads takes a mapping .*; got int 3"),
        ({"heads": {"spans": RELATIONS, "PER": 1}}, r"heads takes a head index, 0 or more.*; got SpanSet\("),
        ({"key": None}, "key takes a str; got NoneType None"),
        ({"key": "input_ids"}, "key takes one that the batch has not already; got 'input_ids'"),
        ({"padded": 1}, "padded takes a bool; got int 1"),
        ({"tril_mask": 0}, "tril_mask takes a bool; got int 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of takes an int of at least 1, or None; got int 0"),
        ({"keep": "text"}, "keep takes a list of keys; got str 'text'"),
        ({"keep": [3]}, "keep takes keys that the batch has not already; got 3"),
        ({"keep": ["spans"]}, "keep takes keys that the batch has not already; got 'spans'"),
        (
            {"keep": ["id"]},
            r"keep takes keys that each example has; got 'id', and example 0 has \['input_ids', 'spans'\]",
        ),
        ({"examples": None}, "examples takes a list of mappings with the keys input_ids and spans; got NoneType None"),
        ({"examples": GOOD}, "examples takes a list of mappings with the keys input_ids and spans; got dict"),
    ],
)
def test_errors_of_the_options_of_collate(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^collate: {message}"):
        spans.collate(**{"examples": [GOOD], "heads": HEADS, **options})


WRONG: dict[str, Any] = {
    "a number": 3,
    "a long string": LONG,
    "a long list of strings": [LONG] * 1000,
    "bytes": b"PER",
    "a mapping": {LONG: LONG},
    "an array of no dimension": numpy.zeros(()),
    "a large array": numpy.zeros((99, 99)),
    "a sparse tensor": torch.eye(7).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "a tensor on no device": torch.ones(2, 3, device="meta"),
    "something of many lines": type("Many", (), {"__repr__": lambda self: "line\n" * 1000})(),
}
CALLS: dict[str, dict[str, Any]] = {
    "from_lists": {"sentences": [[("PER", 0, 1)]], "heads": HEADS, "lengths": [2], "end": "inclusive"},
    "collate": {"examples": [GOOD], "heads": HEADS, "pad_token_id": 0, "end": "inclusive"},
    "from_offsets": {
        "sentences": [[("PER", 0, 1)]],
        "offset_mapping": [[(0, 1)]],
        "heads": HEADS,
        "texts": ["a"],
        "alignment": "expand",
        "end": "exclusive",
    },
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op, name", [(op, name) for op, arguments in CALLS.items() for name in arguments])
def test_whatever_is_given_for_an_argument_an_error_of_one_line_names_it(op: str, name: str, wrong: str) -> None:
    if name == "pad_token_id" and wrong == "a number":
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(spans, op)(**{**CALLS[op], name: WRONG[wrong]})
    message = str(caught.value)
    unit = {"sentences": r"sentence 0|(lengths|offset_mapping) takes one for each of \d+", "examples": "example 0"}
    assert re.match(f"{op}: ({name}|{unit.get(name, name)}) ", message), message
    assert " takes " in message
    assert "got " in message
    assert "\n" not in message
    assert len(message) < 400


# Real sentences


def sentences_of(path: Path) -> Iterator[tuple[list[str], list[tuple[str, int, int]]]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            example = json.loads(line)
            yield example["tokens"], [(kind, start, end) for start, end, kind in example["spans"]]


@pytest.mark.skipif("FLASHPOINTER_DATA" not in os.environ, reason="FLASHPOINTER_DATA names no folder of data sets")
def test_every_entity_of_germeval_survives() -> None:
    """In tokens, through dense labels; and in characters, through offsets of pieces."""
    examples = list(sentences_of(Path(os.environ["FLASHPOINTER_DATA"]) / "germeval2014" / "dev.jsonl.gz"))
    heads = sorted({kind for _, listed in examples for kind, _, _ in listed})
    assert (len(examples), len(heads)) == (2200, 12)
    survived = 0
    for first in range(0, len(examples), 64):
        words, listed = zip(*examples[first : first + 64], strict=True)
        lengths = [len(w) for w in words]
        found = spans.from_lists(listed, heads, lengths=lengths)
        dense = spans.to_dense(found, len(words), len(heads), max(lengths))
        expected = {(b, heads.index(kind), s, e) for b, sentence in enumerate(listed) for kind, s, e in sentence}
        assert same(spans.from_dense(dense), rows(*sorted(expected)))
        survived += len(expected)

        characters, mapping, pieces = [], [], []
        for tokens, sentence in zip(words, listed, strict=True):
            starts = [sum(len(t) + 1 for t in tokens[:i]) for i in range(len(tokens))]
            characters.append([(kind, starts[s], starts[e] + len(tokens[e])) for kind, s, e in sentence])
            mapping.append(tokenize(" ".join(tokens), spaces=True, special=(0, 0)))
            pieces.append([i for i, t in enumerate(tokens) for _ in range(0, len(t), 3)])
        in_pieces = spans.from_offsets(characters, mapping, heads)
        assert in_pieces.lost == []
        back = [(b, h, pieces[b][s - 1], pieces[b][e - 1]) for b, h, s, e in in_pieces.spans.tolist()]
        assert same(rows(*back), found)
    assert survived == 2886
