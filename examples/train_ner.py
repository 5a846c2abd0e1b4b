"""Trains a named-entity tagger, nested entities included: an encoder and an (Efficient) GlobalPointer head.

    python examples/train_ner.py                                    # a synthetic corpus, under a minute, no download
    python examples/train_ner.py --train train.jsonl.gz --dev dev.jsonl.gz --encoder bert-base-cased --out run

A file is JSON lines ``{"tokens": ["Anna", ...], "spans": [[start, end, type], ...]}``, end inclusive, if its name ends
in .jsonl, .json or either with .gz; else CoNLL columns, the token first and its tag (BIO, BIOES, BILOU) last.

Where an encoder splits words into pieces, a span goes from the first piece of its first word to the last piece of its
last word, and a predicted span stands for the words of the pieces that it begins and ends in. Entities that truncation
cuts off stay in the count of gold ones, so they lower recall.
"""

from __future__ import annotations

import argparse
import random
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    Batch,
    Encoder,
    InputError,
    Tally,
    Trainer,
    build_encoder,
    console,
    exit_status,
    make_repeatable,
    number,
    options_parser,
    parse,
    read_json_lines,
    read_lines,
    strings_of,
    to_device,
    value_of,
)
from torch import nn

import flashpointer as fp

HEADS = {"efficient": fp.nn.EfficientGlobalPointer, "global": fp.nn.GlobalPointer}


class Sentence(NamedTuple):
    tokens: list[str]
    spans: list[tuple[str, int, int]]
    """(type, start, end) in words, end inclusive."""


# --- input ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Sentence]:
    """The sentences of a file."""
    json_lines = {".jsonl", ".json"} & {Path(path.name.removesuffix(".gz")).suffix}
    sentences = list(_read_json(path) if json_lines else _read_columns(path))
    if not sentences:
        raise InputError(f"{path}: no sentence")
    return sentences


def _read_json(path: Path) -> Iterator[Sentence]:
    for where, record in read_json_lines(path):
        tokens = strings_of(where, record, "tokens")
        if not tokens:
            raise InputError(f"{where}: 'tokens' is empty")
        spans = value_of(where, record, "spans", list)
        yield Sentence(tokens, [_span(where, span, len(tokens)) for span in spans])


def _span(where: str, span: Any, length: int) -> tuple[str, int, int]:
    match span:
        case [int(start), int(end), str(kind)] if kind and not isinstance(start, bool) and not isinstance(end, bool):
            if 0 <= start <= end < length:
                return kind, start, end
            raise InputError(f"{where}: a span takes 0 <= start <= end < {length}, the tokens; got {span}")
    raise InputError(f"{where}: a span takes [start, end, type]; got {reprlib.repr(span)}")


def _read_columns(path: Path) -> Iterator[Sentence]:
    """Sentences between blank lines; lines that start with -DOCSTART- are left out."""
    tokens: list[str] = []
    tags: list[tuple[str, str]] = []
    for where, line in read_lines(path):
        columns = [column for column in re.split(r"\t" if "\t" in line else r" ", line.strip()) if column]
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                yield Sentence(tokens, _spans_of(tags))
            tokens, tags = [], []
            continue
        if len(columns) == 1:
            raise InputError(f"{where}: takes a token and its tag; got {line.strip()!r}")
        tag = re.fullmatch(r"(O)|([BIESLU])-(.+)", columns[-1])
        if not tag:
            raise InputError(f"{where}: a tag takes O, or B-, I-, E-, L-, S- or U- and a type; got {columns[-1]!r}")
        tokens.append(columns[0])
        tags.append((tag[1] or tag[2], tag[3] or ""))
    if tokens:
        yield Sentence(tokens, _spans_of(tags))


def _spans_of(tags: list[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """Spans of (prefix, type) tags, read as the CoNLL scorer does: an I that continues nothing begins an entity."""
    spans: list[tuple[str, int, int]] = []
    is_open = False
    for i, (prefix, kind) in enumerate(tags):
        if prefix != "O":
            if is_open and prefix in "IEL" and spans[-1][0] == kind:
                spans[-1] = (kind, spans[-1][1], i)
            else:
                spans.append((kind, i, i))
        is_open = prefix in "BI"
    return spans


def join(sentences: Sequence[Sentence], sizes: Sequence[int], limit: int) -> list[Sentence]:
    """Neighbours joined to documents as long as their sizes add up to at most the limit."""
    documents: list[Sentence] = []
    size = limit
    for sentence, more in zip(sentences, sizes, strict=True):
        if size + more > limit:
            documents.append(Sentence([], []))
            size = 0
        tokens, spans = documents[-1]
        spans += [(kind, start + len(tokens), end + len(tokens)) for kind, start, end in sentence.spans]
        tokens += sentence.tokens
        size += more
    return documents


# --- a synthetic corpus --------------------------------------------------------------------------------------------

# An upper-case symbol is an entity, a lower-case one a name.
GRAMMAR = {
    "sentence": (
        "{PER} was born in {LOC} .",
        "{PER} left the {ORG} for the {ORG} .",
        "In {LOC} , {PER} and {PER} opened the {EVENT} .",
        "The {EVENT} moved from {LOC} to {LOC} last year .",
        "The {ORG} hired {PER} , who had worked in {LOC} .",
        "Critics of {PER} and the {ORG} met at the {EVENT} .",
        "At first nobody in the office noticed the change .",
        "Last year was cold , critics said , and few had worked .",
    ),
    "PER": ("{name} {name}", "{name} {name} {name}", "Dr. {name}", "{name} {name} Jr."),
    "LOC": ("{name}", "Port {name}", "{name} Bay", "Lake {name}"),
    "ORG": (
        "University of {LOC}",
        "{LOC} City Council",
        "{PER} Foundation",
        "{name} and Sons Ltd.",
        "Department of Physics of the University of {LOC}",
        "Friends of the {ORG}",
    ),
    "EVENT": ("{LOC} Film Festival", "{PER} Memorial Lecture", "Open Day of the {ORG}"),
}


def synthetic(seed: int, train: int = 2000, dev: int = 500) -> tuple[list[Sentence], list[Sentence]]:
    """Training and dev sentences with nested entities, whose names are not the same ones."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "an", "el")]
    names = sorted({"".join(rng.choices(syllables, k=3)).capitalize() for _ in range(10000)})
    rng.shuffle(names)
    cut = len(names) * train // (train + dev)

    def corpus(size: int, names: list[str]) -> list[Sentence]:
        sentences = [Sentence([], []) for _ in range(size)]
        for sentence in sentences:
            _expand("sentence", sentence, rng, names)
        return sentences

    return corpus(train, names[:cut]), corpus(dev, names[cut:])


def _expand(symbol: str, sentence: Sentence, rng: random.Random, names: list[str]) -> None:
    for word in rng.choice(GRAMMAR[symbol]).split():
        inner, start = word.strip("{}"), len(sentence.tokens)
        if inner == word:
            sentence.tokens.append(word)
        elif inner == "name":
            sentence.tokens.append(rng.choice(names))
        else:
            _expand(inner, sentence, rng, names)
            sentence.spans.append((inner, start, len(sentence.tokens) - 1))


# --- the model -----------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Sentences as examples for ``collate``, and what of their entities did not fit."""

    examples: list[dict[str, Any]]
    lost: int


def encode(encoder: Encoder, sentences: Sequence[Sentence], max_length: int) -> Encoded:
    """Sentences in pieces."""
    examples, lost = [], 0
    pieces = encoder.pieces([sentence.tokens for sentence in sentences], max_length)
    for sentence, (ids, words) in zip(sentences, pieces, strict=True):
        first = {word: piece for piece, word in reversed(list(enumerate(words)))}
        last = {word: piece for piece, word in enumerate(words)}
        spans = [(kind, first[start], last[end]) for kind, start, end in sentence.spans if end in last]
        lost += len(sentence.spans) - len(spans)
        examples.append({"input_ids": ids, "words": words, "spans": spans})
    return Encoded(examples, lost)


def join_pieces(encoder: Encoder, sentences: Sequence[Sentence], limit: int) -> list[Sentence]:
    """Neighbours joined to documents of at most so many pieces, special tokens included."""
    whole = encoder.pieces([sentence.tokens for sentence in sentences], sys.maxsize)
    sizes = [sum(word >= 0 for word in words) for _, words in whole]
    special = len(whole[0].words) - sizes[0]
    return join(sentences, sizes, limit - special)


def collate(examples: Sequence[dict[str, Any]], types: Sequence[str], padding: int) -> Batch:
    """A batch: that of ``fp.spans.collate``, and the word of each piece, -1 for special and padding tokens."""
    words = [torch.tensor(example["words"]) for example in examples]
    padded = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=-1)
    return {**fp.spans.collate(examples, heads=types, pad_token_id=padding, padded=False), "words": padded}


class Tagger(nn.Module):
    """An encoder and a span head, which gives the loss of a batch."""

    def __init__(self, encoder: Encoder, head: str, types: int, loss: str) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(0.1)
        self.head = HEADS[head](encoder.width, types)
        self.loss = {"fused": self.head.loss, "eager": self._eager_loss}[loss]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.loss(self._hidden(batch), batch["spans"], batch["words"] >= 0)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return self.dropout(self.encoder(batch["input_ids"], batch["attention_mask"]))

    def _eager_loss(self, hidden: torch.Tensor, spans: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As without this library: all scores, and dense labels."""
        with fp.use_backend("reference"):
            scores = self.head(hidden, mask)
        labels = fp.spans.to_dense(spans, *scores.shape[:3])
        return fp.reference.zlpr_loss(scores.flatten(2), labels.flatten(2))

    def predict(self, batch: Batch) -> torch.Tensor:
        """Rows (sentence, type, start, end) in words."""
        words = batch["words"]
        spans, _ = self.head.decode(self._hidden(batch), words >= 0)
        sentence, kind, start, end = spans.unbind(1)
        return torch.stack([sentence, kind, words[sentence, start], words[sentence, end]], 1)


def evaluate(
    model: Tagger, sentences: Sequence[Sentence], encoded: Encoded, types: Sequence[str], options: argparse.Namespace
) -> Tally:
    """Span-level precision, recall and F1: a span counts as right if its type and both its ends are."""
    tally = Tally(types)
    for i in range(0, len(sentences), options.batch_size):
        batch = collate(encoded.examples[i : i + options.batch_size], types, model.encoder.padding)
        here = sentences[i : i + options.batch_size]
        predicted: list[list[tuple[str, int, int]]] = [[] for _ in here]
        for sentence, kind, start, end in model.predict(to_device(batch, options.device)).tolist():
            predicted[sentence].append((types[kind], start, end))
        for sentence, spans in zip(here, predicted, strict=True):
            tally.add(sentence.spans, spans)
    return tally


def types_of(sentences: Iterable[Sentence]) -> list[str]:
    return sorted({kind for sentence in sentences for kind, _, _ in sentence.spans})


def main() -> None:
    parser = options_parser(__doc__.splitlines()[0], "JSON lines or CoNLL columns, perhaps gzipped")
    parser.add_argument("--head", choices=HEADS, default="efficient", help="the span head")
    parser.add_argument("--loss", choices=("fused", "eager"), default="fused", help="eager: scores and dense labels")
    parser.add_argument(
        "--max-length", type=number(int, 1), metavar="N", help="pieces kept; default 512 or --join-tokens"
    )
    parser.add_argument("--join-tokens", type=number(int, 1), metavar="N", help="sentences to documents of N pieces")
    options = parse(parser)
    make_repeatable(options)
    max_length = options.max_length or max(512, options.join_tokens or 0)

    splits = [read(options.train), read(options.dev)] if options.train else synthetic(options.seed)
    types = types_of([*splits[0], *splits[1]])
    if not types:
        raise InputError(f"{options.train}, {options.dev}: no span in either")
    encoder = build_encoder(options.encoder, [sentence.tokens for sentence in splits[0]])
    if options.join_tokens:
        splits = [join_pieces(encoder, split, options.join_tokens) for split in splits]
    train, dev = (encode(encoder, split, max_length) for split in splits)
    for name, split, encoded in zip(("train", "dev"), splits, (train, dev), strict=True):
        spans = sum(len(sentence.spans) for sentence in split)
        cut = f"; {encoded.lost} of them beyond --max-length {max_length}" if encoded.lost else ""
        console.print(f"{name}: {len(split)} sentences, {spans} entities of {len(types)} types{cut}", highlight=False)

    model = Tagger(encoder, options.head, len(types), options.loss)
    about = {"types": types, "examples": len(train.examples), "vocabulary": getattr(encoder, "vocabulary", None)}
    tally = Trainer(model, options, about).fit(
        train.examples,
        lambda examples: collate(examples, types, encoder.padding),
        lambda: evaluate(model, splits[1], dev, types, options),
    )
    console.print(tally.table("dev"))


if __name__ == "__main__":
    sys.exit(exit_status(main))
