"""Characters to tokens, through the offsets of real tokenizers, trained here on a few sentences."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from flashpointer import spans

HEADS = ["PER", "LOC"]
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "Johannes lives in New Brunswick today, not in Berlin.",
    "This is a test: hello, hello.",
    "I ❤️ 😀 in Berlin\n and cafés, my résumé",
    "ภาษาไทย ที่นี่ น้ำ",
    "日本語 東京に 한국어",
    "हिन्दी में",
]


def word_pieces(lowercase: bool) -> Tokenizer:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def byte_level(trim: bool, prefix: bool = False) -> Tokenizer:
    """As GPT-2's, or trimmed as RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trim:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=prefix)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's: no words, so tokens with spaces at both ends; bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=370, special_tokens=SPECIAL + bytes_of, show_progress=False)
    )
    return tokenizer


def unigram(compose: bool) -> Tokenizer:
    """As T5's, or without its normalizer."""
    tokenizer = Tokenizer(models.Unigram())
    if compose:
        steps = [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if compose else "first")
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.post_processor is None:
        special = [(token, SPECIAL.index(token)) for token in SPECIAL[1:]]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", special)
    return tokenizer


TOKENIZERS = {
    "WordPiece": word_pieces(lowercase=True),
    "WordPiece, cased": word_pieces(lowercase=False),
    "byte-level BPE": byte_level(trim=False),
    "byte-level BPE, trimmed": byte_level(trim=True),
    "byte-level BPE, trimmed, with a space in front": byte_level(trim=True, prefix=True),
    "BPE with byte fallback": byte_fallback(),
    "Unigram": unigram(compose=False),
    "Unigram, NFKC": unigram(compose=True),
}
TOKENIZERS = {name: with_special_tokens(tokenizer) for name, tokenizer in TOKENIZERS.items()}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def entity(text: str, words: str, kind: str = "LOC") -> tuple[str, int, int]:
    start = text.index(words)
    return kind, start, start + len(words)


def one(text: str, words: str, offsets: Any, **options: Any) -> spans.FromOffsets:
    return spans.from_offsets([[entity(text, words)]], [offsets], HEADS, texts=[text], **options)


def tokens_of(found: spans.FromOffsets) -> list[list[int]]:
    return [row[2:] for row in found.spans.tolist()]


# Several texts


@every_tokenizer
@pytest.mark.parametrize("first", ["hello", "a", "I", "This is", "日", "😀"])
@pytest.mark.parametrize("second", ["This is a test", "a", "hello", "日本語"])
def test_the_second_text_of_a_pair_is_refused_until_it_is_none(name: str, first: str, second: str) -> None:
    encoding = TOKENIZERS[name].encode(first, second)
    for texts in (None, [first + " " + second]):
        with pytest.raises(
            ValueError, match=r"^from_offsets: offset_mapping of sentence 0 takes the offsets of one text"
        ):
            spans.from_offsets([[]], [encoding.offsets], HEADS, texts=texts)
    for sequence, text in enumerate((first, second)):
        kept = [
            pair if i == sequence else None for pair, i in zip(encoding.offsets, encoding.sequence_ids, strict=True)
        ]
        of_one = [token for token, i in enumerate(encoding.sequence_ids) if i == sequence]
        found = one(text, text, kept)
        assert (found.lost, found.adjusted) == ([], [])
        (first_token, last_token), *_ = tokens_of(found)
        assert last_token == of_one[-1]
        # a lone marker of a space that the tokenizer has put there, and trimmed away, holds no character
        assert first_token == next(token for token in of_one if kept[token] != (0, 0))


def test_a_second_text_is_refused_without_a_token_between() -> None:
    for offsets in ([(0, 5), (0, 4)], [(0, 4), (0, 5)], [(0, 4), (5, 7), (0, 9)], [(0, 2), (2, 5), (2, 7)]):
        with pytest.raises(ValueError, match=r"one text, which go on; got \(\d, \d\) at token \d, after one that ends"):
            spans.from_offsets([[]], [offsets], HEADS)


@pytest.mark.parametrize("between", [[None], [(0, 0)], [None, (0, 0), None]])
def test_texts_of_one_character_share_it_with_no_other_text(between: list[Any]) -> None:
    for second in ((0, 1), (0, 4)):
        with pytest.raises(
            ValueError, match=rf"one text, which go on; got \(0, {second[1]}\) at token {len(between) + 1}"
        ):
            spans.from_offsets([[]], [[(0, 1), *between, second]], HEADS)


def test_a_character_that_becomes_several_words_is_of_one_text() -> None:
    """NFKC makes four words of U+FDFA; the space between two of them may be a token, trimmed to nothing."""
    text, offsets = "a \ufdfa", [(0, 1), (2, 3), (3, 3), (2, 3), (3, 3), (2, 3)]
    for alignment in ("expand", "contract", "strict"):
        assert tokens_of(one(text, "\ufdfa", offsets, alignment=alignment)) == [[1, 5]]


@every_tokenizer
@pytest.mark.parametrize("words", [["hello", "This", "test"], ["Berlin", "in"], ["in", "Berlin"], ["日本語", "日本語"]])
def test_words_split_beforehand_are_refused(name: str, words: list[str]) -> None:
    offsets = TOKENIZERS[name].encode(words, is_pretokenized=True).offsets
    with pytest.raises(ValueError, match=r"one text, .* words split beforehand start anew"):
        spans.from_offsets([[]], [offsets], HEADS)


def test_tokens_inside_another_are_refused() -> None:
    with pytest.raises(ValueError, match=r"which go on; got \(1, 2\) at token 1, after one that ends at 5\."):
        spans.from_offsets([[]], [[(0, 5), (1, 2), (5, 8), (6, 7)]], HEADS)


# The edge of a text

# Each ends, or begins, in what some tokenizer makes no token of.
EDGES = [
    ("I ❤\N{VARIATION SELECTOR-16}", "❤\N{VARIATION SELECTOR-16}"),
    (unicodedata.normalize("NFD", "my résumé"), unicodedata.normalize("NFD", "résumé")),
    ("in Berlin\n", "in Berlin\n"),
    ("in Berlin \t", "in Berlin \t"),
    ("\N{ZERO WIDTH NO-BREAK SPACE}Berlin", "\N{ZERO WIDTH NO-BREAK SPACE}Berlin"),
    ("in Berlin\N{ZERO WIDTH SPACE}", "in Berlin\N{ZERO WIDTH SPACE}"),
    ("\N{REPLACEMENT CHARACTER}Berlin\x00", "\N{REPLACEMENT CHARACTER}Berlin\x00"),
    ("ไทย ที่นี่", "ที่นี่"),
    ("हिन्दी में", "में"),
    (unicodedata.normalize("NFD", "한국"), unicodedata.normalize("NFD", "한국")),
    ("ﾊﾞ", "ﾊﾞ"),
]


@every_tokenizer
@pytest.mark.parametrize("text, words", EDGES, ids=[ascii(words) for _, words in EDGES])
@pytest.mark.parametrize("alignment", ["expand", "strict"])
def test_an_entity_at_the_edge_of_its_text_is_not_lost(name: str, text: str, words: str, alignment: str) -> None:
    offsets = TOKENIZERS[name].encode(text).offsets
    found = one(text, words, offsets, alignment=alignment)
    assert found.lost == []
    assert found.adjusted == []
    held = [i for i, (start, end) in enumerate(offsets) if text[start:end].strip()]
    _, start, _ = entity(text, words)
    assert tokens_of(found) == [[next(i for i in held if offsets[i][1] > start), held[-1]]]


def test_without_the_texts_such_an_entity_is_lost() -> None:
    text = "I ❤\N{VARIATION SELECTOR-16}"
    offsets = TOKENIZERS["WordPiece"].encode(text).offsets
    assert offsets == [(0, 0), (0, 1), (2, 3), (0, 0)]
    assert spans.from_offsets([[("LOC", 2, 4)]], [offsets], HEADS).lost == [(0, "LOC", 2, 4)]


@every_tokenizer
def test_a_truncated_entity_is_lost_with_the_texts_too(name: str) -> None:
    text = "Johannes lives in New Brunswick"
    offsets = TOKENIZERS[name].encode(text).offsets
    cut = [None if end > text.index("swick") else (start, end) for start, end in offsets]
    for alignment in ("expand", "contract", "strict"):
        assert one(text, "New Brunswick", cut, alignment=alignment).lost == [(0, *entity(text, "New Brunswick"))]
        assert one(text, "New", cut, alignment=alignment).lost == []
    front = [None if start < 3 else (start, end) for start, end in offsets]
    assert one(text, "Johannes", front).lost == [(0, "LOC", 0, 8)]


def test_an_entity_of_whitespace_is_lost() -> None:
    text = "in  Berlin\n"
    for name, tokenizer in TOKENIZERS.items():
        for words in ("  ", " ", "\n"):
            assert len(one(text, words, tokenizer.encode(text).offsets).lost) == 1, name
    assert one("in Berlin", " ", [(0, 9)]).lost == [(0, "LOC", 2, 3)]


# Whitespace


@every_tokenizer
@pytest.mark.parametrize("words", ["in", " in", "in ", " in ", "Johannes lives ", " New Brunswick", "\nBerlin"])
def test_whitespace_around_an_entity_changes_nothing(name: str, words: str) -> None:
    text = "Johannes lives in New Brunswick\nBerlin"
    offsets = TOKENIZERS[name].encode(text).offsets
    for alignment in ("expand", "contract", "strict"):
        padded, bare = (one(text, w, offsets, alignment=alignment) for w in (words, words.strip()))
        assert torch.equal(padded.spans, bare.spans)
        assert len(padded.lost) == len(bare.lost)
        assert [covered for *_, covered in padded.adjusted] == [covered for *_, covered in bare.adjusted]


def test_a_token_is_judged_without_the_space_that_it_holds() -> None:
    """Without the text it cannot be, and is reported."""
    text, offsets = "in Berlin today", [(0, 2), (2, 9), (9, 15)]
    for words in ("Berlin", "Berlin ", " Berlin "):
        for alignment in ("expand", "contract", "strict"):
            found = one(text, words, offsets, alignment=alignment)
            assert tokens_of(found) == [[1, 1]]
            assert found.adjusted == []
    unknown = spans.from_offsets([[("LOC", 3, 9), ("LOC", 3, 10)]], [offsets], HEADS)
    assert tokens_of(unknown) == [[1, 1], [1, 2]]
    assert unknown.adjusted == [(0, "LOC", 3, 9, (2, 9)), (0, "LOC", 3, 10, (2, 15))]


# Alignment

WORDS = "Johannes Brunswick"
PIECES = [None, (0, 3), (3, 6), (6, 8), (8, 12), (12, 18), (0, 0)]  # Joh ann es " Bru" nswick


@pytest.mark.parametrize(
    "words, expand, contract, fits",
    [
        ("Johannes", [1, 3], [1, 3], True),
        ("annes Bru", [2, 4], [2, 4], True),
        ("hannes Bru", [1, 4], [2, 4], False),
        ("annes Br", [2, 4], [2, 3], False),
        ("hannes Br", [1, 4], [2, 3], False),
        ("Johan", [1, 2], [1, 1], False),
        ("oh", [1, 1], None, False),
        ("hann", [1, 2], [2, 2], False),
        ("han", [1, 2], None, False),
        (WORDS, [1, 5], [1, 5], True),
    ],
)
def test_alignment(words: str, expand: list[int], contract: list[int] | None, fits: bool) -> None:
    given = (0, *entity(WORDS, words))
    covers = {1: (0, 3), 2: (3, 6), 3: (6, 8), 4: (9, 12), 5: (12, 18)}
    for alignment, tokens in (("expand", expand), ("contract", contract), ("strict", expand if fits else None)):
        found = one(WORDS, words, PIECES, alignment=alignment)
        assert tokens_of(found) == ([] if tokens is None else [tokens])
        assert found.lost == ([given] if tokens is None else [])
        covered = tokens and (covers[tokens[0]][0], covers[tokens[1]][1])
        assert found.adjusted == ([] if fits or tokens is None else [(*given, covered)])


def test_a_character_in_several_tokens_is_whole_with_all_of_them() -> None:
    """東京に in byte-level BPE: the middle token holds bytes of all three characters."""
    text, offsets = "東京に", [(0, 1), (0, 3), (2, 3)]
    assert one(text, "東", offsets, alignment="contract").adjusted == [(0, "LOC", 0, 1, (0, 1))]
    assert one(text, "東", offsets).adjusted == [(0, "LOC", 0, 1, (0, 3))]
    assert tokens_of(one(text, "京", offsets)) == [[1, 1]]
    assert one(text, "京", offsets, alignment="contract").lost == [(0, "LOC", 1, 2)]
    assert tokens_of(one(text, text, offsets, alignment="strict")) == [[0, 2]]


def test_inclusive_ends() -> None:
    for text in (None, WORDS):
        exclusive, inclusive = (
            spans.from_offsets(
                [[("PER", 0, 8 - last), ("LOC", 1, 3 - last), ("LOC", 1, 2 - last)]],
                [PIECES[:4]],
                HEADS,
                texts=text and [text],
                end=end,
                alignment="contract",
            )
            for last, end in ((0, "exclusive"), (1, "inclusive"))
        )
        assert torch.equal(exclusive.spans, inclusive.spans)
        assert tokens_of(inclusive) == [[1, 3]]
        assert inclusive.lost == [(0, "LOC", 1, 2), (0, "LOC", 1, 1)]
    found = one(WORDS, "oh", PIECES)
    assert found.adjusted == [(0, "LOC", 1, 3, (0, 3))]
    found = spans.from_offsets([[("LOC", 1, 2)]], [PIECES], HEADS, texts=[WORDS], end="inclusive")
    assert found.adjusted == [(0, "LOC", 1, 2, (0, 2))]


# Any text, any tokenizer, any entity

BLOCKS = [
    (32, 126),
    (0, 31),
    (160, 383),
    (0x300, 0x33F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x627, 0x652),
]
BLOCKS += [(0x905, 0x94D), (0xE01, 0xE3A), (0xE40, 0xE4E), (0x1100, 0x1112), (0x1160, 0x11C2), (0x2000, 0x2027)]
BLOCKS += [(0x3041, 0x3096), (0x3099, 0x309C), (0x4E00, 0x4E20), (0xAC00, 0xAC20), (0xFB00, 0xFB06), (0xFE0E, 0xFE0F)]
BLOCKS += [(0xFF66, 0xFF9F), (0xFFFD, 0xFFFD), (0xFEFF, 0xFEFF), (0xE000, 0xE001), (0x1F600, 0x1F64F), (0x2460, 0x2463)]
ANY = st.sampled_from(BLOCKS).flatmap(lambda block: st.integers(*block)).map(chr)
COMMON = st.sampled_from(list(" \n" + "".join(CORPUS)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, list[tuple[str, int, int]], int, int]:
    """A text, its entities, and how many tokens a truncation leaves out in front and behind."""
    text = "".join(draw(st.lists(ANY | COMMON | COMMON, min_size=1, max_size=24)))
    ends = st.tuples(st.integers(0, len(text) - 1), st.integers(0, len(text) - 1)).map(sorted)
    entities = [
        (kind, a, b + 1) for kind, (a, b) in draw(st.lists(st.tuples(st.sampled_from(HEADS), ends), max_size=6))
    ]
    cuts = st.just(0) | st.integers(0, 3)
    return text, entities, draw(cuts), draw(cuts)


def characters(text: str, start: int, end: int, known: bool) -> set[int]:
    """Those from the first to the last that is no whitespace."""
    inked = [i for i in range(start, end) if not (known and text[i].isspace())]
    return set(range(min(inked), max(inked) + 1)) if inked else set()


def may_go_unseen(text: str, i: int) -> bool:
    parts = unicodedata.normalize("NFKD", text[i])
    kinds = {"Mn", "Mc", "Me", "Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"}
    return all(unicodedata.category(c) in kinds or c in "\ufffd" or 0x1160 <= ord(c) < 0x1200 for c in parts)


def by_hand(
    text: str, offsets: list[tuple[int, int]], kept: range, start: int, end: int, alignment: str, known: bool
) -> tuple[int, int, tuple[int, int] | None] | None:
    """First token, last token, and the characters they cover if those are others; None where lost. With the text that
    is where the truncation took some of it, as the offsets of the whole text say."""
    letters = characters(text, start, end, known)
    own = {token: characters(text, *pair, known) for token, pair in enumerate(offsets)}
    held = set().union(*(own[token] for token in kept))
    here = [token for token in kept if own[token] & letters]
    if not here:
        return None
    if known:
        gone = set().union(*(own[token] for token in own if token not in kept)) - held
        if any(not may_go_unseen(text, i) for i in letters & gone):
            return None
    elif not letters <= set(range(min(held), max(held) + 1)):
        return None
    covered = set().union(*(own[token] for token in here))
    whole = covered <= letters and (known or {min(covered), max(covered)} == {min(letters), max(letters)})
    if not whole and alignment == "strict":
        return None
    if not whole and alignment == "contract":
        here = [token for token in here if own[token] <= letters]
        if not here:
            return None
    covered = set().union(*(own[token] for token in here))
    return here[0], here[-1], None if whole else (min(covered), max(covered) + 1)


@every_tokenizer
@pytest.mark.parametrize("known", [True, False], ids=["text known", "text unknown"])
@given(problem=problems(), alignment=st.sampled_from(["expand", "contract", "strict"]))
def test_any_entity_of_any_text(
    name: str, known: bool, problem: tuple[str, list[tuple[str, int, int]], int, int], alignment: str
) -> None:
    text, entities, front, back = problem
    offsets = TOKENIZERS[name].encode(text).offsets
    kept = range(front, len(offsets) - back)
    cut = [pair if token in kept else None for token, pair in enumerate(offsets)]
    found = spans.from_offsets([entities], [cut], HEADS, texts=[text] if known else None, alignment=alignment)
    expected: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for kind, start, end in entities:
        answer = by_hand(text, offsets, kept, start, end, alignment, known)
        if answer is None:
            expected[1].append((0, kind, start, end))
            continue
        first, last, covered = answer
        expected[0].append([0, HEADS.index(kind), first, last])
        if covered:
            expected[2].append((0, kind, start, end, covered))
    assert (found.spans.tolist(), found.lost, found.adjusted) == expected


# What it takes and what it does not


def test_offsets_in_arrays() -> None:
    pairs = [[0, 0], [0, 3], [3, 6], [6, 8], [8, 12], [12, 18], [0, 0]]
    array = numpy.array([pairs])
    for mapping in (array, list(array), [list(array[0])], torch.tensor([pairs]), [list(torch.tensor(pairs))]):
        found = spans.from_offsets([[("PER", 0, numpy.int64(8))]], mapping, HEADS, texts=(t for t in [WORDS]))
        assert tokens_of(found) == [[1, 3]]


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sentences": None}, TypeError, "sentences takes for each sentence a list of .*; got NoneType None"),
        ({"sentences": [None]}, TypeError, r"sentence 0 takes a list of \(type, char_start, char_end\); got NoneType"),
        ({"sentences": [{"PER": (0, 1)}]}, TypeError, "sentence 0 takes a list of .*; got dict"),
        ({"sentences": ["PER"]}, TypeError, "sentence 0 takes a list of .*; got str 'PER'"),
        ({"sentences": [3]}, TypeError, "sentence 0 takes a list of .*; got int 3"),
        ({"sentences": [[("PER", LONG, 1)]]}, TypeError, "sentence 0 takes spans .* with ints; got"),
        ({"sentences": [[(LONG, 0, 1)]]}, ValueError, "sentence 0 takes spans .* of a type in heads"),
        ({"sentences": [[LONG]]}, TypeError, "sentence 0 takes spans .*; got 'xxx"),
        ({"sentences": [[torch.zeros(99, 99)]]}, TypeError, "sentence 0 takes spans .*; got tensor"),
        ({"sentences": [[numpy.zeros((99, 99))]]}, TypeError, "sentence 0 takes spans .*; got array"),
        ({"sentences": [[("PER", 0, 19)]]}, ValueError, "sentence 0 takes spans with .*; got"),
        ({"offset_mapping": {"offsets": [PIECES]}}, TypeError, "offset_mapping takes one for .*; got dict"),
        ({"offset_mapping": [None]}, TypeError, "offset_mapping of sentence 0 takes .*; got NoneType None"),
        ({"offset_mapping": ["abc"]}, TypeError, "offset_mapping of sentence 0 takes .*; got str 'abc'"),
        ({"offset_mapping": numpy.zeros((1, 3))}, TypeError, "offset_mapping of sentence 0 takes .*; got 0.0 at token"),
        ({"offset_mapping": numpy.ones((1, 2, 2)) / 2}, TypeError, "offset_mapping of sentence 0 takes .*; got .0.5"),
        ({"offset_mapping": numpy.int64(3)}, TypeError, "offset_mapping takes one for each sentence; got int64"),
        ({"offset_mapping": [[{0, 3}]]}, TypeError, r"offset_mapping of sentence 0 takes .*; got \{0, 3\} at token 0"),
        ({"offset_mapping": [[LONG]]}, TypeError, "offset_mapping of sentence 0 takes .*; got 'xx"),
        ({"offset_mapping": [[(5, 3)]]}, ValueError, r"offset_mapping .* <= char_start <= char_end; got \(5, 3\) at"),
        ({"offset_mapping": [[(-1, 3)]]}, ValueError, r"offset_mapping .* <= char_start <= char_end; got \(-1, 3\) at"),
        (
            {"offset_mapping": [[(0, 3), (3, 19)]]},
            ValueError,
            r"offset_mapping of sentence 0 takes offsets within its text of 18 characters; got \(3, 19\) at token 1",
        ),
        ({"texts": WORDS}, TypeError, "texts takes one for each sentence; got str 'Joh"),
        ({"texts": LONG}, TypeError, "texts takes one for each sentence; got str 'xxx"),
        ({"texts": [[LONG]]}, TypeError, "texts takes a str for each sentence; got list"),
        ({"sentences": LONG}, TypeError, "sentences takes for each sentence a list of .*; got str 'xxx"),
        ({"sentences": [{i: 0 for i in range(10**6)}]}, TypeError, "sentence 0 takes a list of .*; got dict"),
        ({"alignment": LONG}, ValueError, "alignment takes one of .*; got str 'xxx"),
        ({"alignment": numpy.zeros((99, 99))}, ValueError, "alignment takes one of .*; got ndarray"),
        ({"heads": LONG}, TypeError, "heads takes a mapping .*; got str 'xxx"),
        ({"texts": []}, ValueError, "texts takes one for each of 1 sentences; got 0"),
        ({"texts": {WORDS}}, TypeError, "texts takes one for each sentence; got set"),
        ({"texts": [WORDS.encode()]}, TypeError, "texts takes a str for each sentence; got bytes b'Joh.* at 0"),
        ({"texts": [None]}, TypeError, "texts takes a str for each sentence; got NoneType None at 0"),
        ({"texts": [WORDS.split()]}, TypeError, "texts takes a str for each sentence; got list"),
        ({"alignment": "loose"}, ValueError, "alignment takes one of 'expand', 'contract', 'strict'; got str 'loose'"),
        ({"alignment": None}, ValueError, "alignment takes one of .*; got NoneType None"),
        ({"end": True}, ValueError, "end takes one of 'inclusive', 'exclusive'; got bool True"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"sentences": [[("PER", 0, 8)]], "offset_mapping": [PIECES], "heads": HEADS, "texts": [WORDS]}
    with pytest.raises(error, match=f"^from_offsets: {message}") as caught:
        spans.from_offsets(**{**good, **arguments})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "start, last, end, message",
    [
        (
            4,
            4,
            "exclusive",
            r"0 <= char_start < char_end <= 18, .*; got .*\. If ends are inclusive, say end=\"inclusive\"$",
        ),
        (12, 18, "inclusive", r"0 <= char_start <= char_end < 18, .*\. If ends are exclusive, say end=\"exclusive\"$"),
        (4, 19, "exclusive", r"0 <= char_start < char_end <= 18, the length of its text; got \('PER', 4, 19\)$"),
        (5, 4, "inclusive", r"0 <= char_start <= char_end < 18, the length of its text; got \('PER', 5, 4\)$"),
    ],
)
def test_an_error_says_which_ends_the_data_seems_to_mean(start: int, last: int, end: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_offsets: sentence 0 takes spans with {message}"):
        spans.from_offsets([[("PER", start, last)]], [PIECES], HEADS, texts=[WORDS], end=end)


def test_words_of_one_character_each_are_not_one_text() -> None:
    """The usual form of Chinese data, split beforehand: every token is at (0, 1)."""
    entities, mapping = [[("PER", 0, 1)]], [[(0, 0), *[(0, 1)] * 6, (0, 0)]]
    with pytest.raises(ValueError, match=r"got \(0, 1\) for 5 tokens on end, up to token 5\. Words split beforehand"):
        spans.from_offsets(entities, mapping, ["PER"], texts=["\u6211\u5728\u5317\u4eac\u5de5\u4f5c"])
    with pytest.raises(ValueError, match="for 19 tokens on end"):
        spans.from_offsets(entities, [[(0, 1)] * 20], ["PER"])
    # The bytes of an emoji are one character's.
    found = spans.from_offsets(entities, [[(0, 1)] * 4], ["PER"], texts=["\U0001f600"])
    assert found.spans.tolist() == [[0, 0, 0, 3]]
