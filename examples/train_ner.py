"""Trains a named-entity tagger, nested entities included: an encoder and an (Efficient) GlobalPointer head, by Trainer.

    python examples/train_ner.py                                    # a synthetic corpus, under a minute, no download
    python examples/train_ner.py --train train.jsonl.gz --dev dev.jsonl.gz --encoder bert-base-cased --output_dir run
    python examples/train_ner.py --trained run/model --dev test.jsonl.gz --output_dir test      # scores it alone

A file is JSON lines ``{"tokens": ["Anna", ...], "spans": [[start, end, type], ...]}``, end inclusive, if its name ends
in .jsonl, .json or either with .gz; else CoNLL columns, the token first and its tag (BIO, BIOES, BILOU, BMES) last.

The tokenizer splits words into pieces. A span goes from the first piece of its first word to the last piece of its last
word, and found spans are converted back to words. Longer sentences than --max_length are read in windows that overlap
by a quarter. Dev scores are those of whole sentences, so an entity that no window holds lowers recall. The folder
``model`` in --output_dir then holds the trained ``SpanModel`` and its tokenizer.
"""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from common import InputError, Options, encoder_of, exit_status, fit, parse, read_json_lines, read_lines, score
from synthetic import Sentence, entities
from torch import Tensor, nn

import flashpointer as fp
from flashpointer.hf import SpanConfig, SpanModel

HEADS = {"efficient": fp.nn.EfficientGlobalPointer, "global": fp.nn.GlobalPointer}


@dataclass
class NerOptions(Options):
    head: Literal["efficient", "global"] = field(default="efficient", metadata={"help": "the span head"})
    loss: Literal["fused", "eager"] = field(default="fused", metadata={"help": "eager: from stored scores, to compare"})
    trained: Path | None = field(default=None, metadata={"help": "a model that this program saved, to score on --dev"})

    def __post_init__(self) -> None:
        if self.trained is None:
            super().__post_init__()
        elif self.train is not None:
            raise ValueError("--trained and --train exclude each other")


def read(path: Path) -> list[Sentence]:
    """The sentences of a file."""
    sentences = list((_read_json if re.search(r"\.jsonl?(\.gz)?$", path.name) else _read_columns)(path))
    if not sentences:
        raise InputError(f"{path}: no sentence")
    return sentences


def _read_json(path: Path) -> Iterator[Sentence]:
    for where, record in read_json_lines(path, tokens=list[str], spans=list):
        if not (length := len(record["tokens"])):
            raise InputError(f"{where}: 'tokens' is empty")
        for span in record["spans"]:
            typed = isinstance(span, list) and [type(x) for x in span] == [int, int, str] and span[2]
            if not typed or not 0 <= span[0] <= span[1] < length:
                takes = f"[start, end, type] with 0 <= start <= end < {length}, the tokens"
                raise InputError(f"{where}: a span takes {takes}; got {reprlib.repr(span)}")
        yield Sentence(record["tokens"], [(kind, start, end) for start, end, kind in record["spans"]])


def _read_columns(path: Path) -> Iterator[Sentence]:
    """Sentences between blank lines. Lines of -DOCSTART- are left out, and so are comments. A line that starts with #
    is one if its last column is no tag, or if it has other columns than the words have. A word may be # or #topic."""
    lines = []
    for where, line in itertools.chain(read_lines(path), [("its end", "")]):
        separator = "\t" if "\t" in line else " "
        columns = [column for column in line.strip().split(separator) if column]
        lines.append((where, columns, (separator, len(columns))))
    shapes = {shape for _, columns, shape in lines if columns and not columns[0].startswith(("#", "-DOCSTART-"))}
    tokens: list[str] = []
    tags: list[str] = []
    for where, columns, shape in lines:
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                yield Sentence(tokens, fp.spans.from_tags([tags])[0])
            tokens, tags = [], []
            continue
        may_be_comment = columns[0].startswith("#")
        if may_be_comment and shapes and shape not in shapes:
            continue
        try:
            fp.spans.from_tags([columns[-1:]])
        except ValueError as error:
            if may_be_comment:
                continue
            takes = str(error).partition(" takes ")[2]
            raise InputError(f"{where}: column {len(columns)}, the last, takes {takes}") from None
        if len(columns) == 1:
            raise InputError(f"{where}: takes a token and its tag; got {' '.join(columns)!r}")
        tokens.append(columns[0])
        tags.append(columns[-1])


def encode(tokenizer: Any, sentences: Sequence[Sentence], types: Sequence[str], max_length: int) -> tuple[Any, ...]:
    """Windows of so many pieces: their encoding, an example of each for ``collate``, and entities that none holds."""
    size = min(max_length, tokenizer.model_max_length)
    room = size - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise InputError(
            f"--max_length takes more than {size - room}, the special tokens of --encoder; got {max_length}"
        )
    encoding = tokenizer(
        [sentence.tokens for sentence in sentences], is_split_into_words=True, truncation=True, max_length=size,
        stride=room // 4, return_overflowing_tokens=True,
    )  # fmt: skip
    spans, lost, _ = fp.spans.from_words([sentence.spans for sentence in sentences], encoding, types)
    examples: list[Any] = [{"input_ids": ids, "spans": []} for ids in encoding.input_ids]
    for row, head, start, end in spans.tolist():
        examples[row]["spans"].append((types[head], start, end))
    return encoding, examples, lost


class Tagger(nn.Module):
    """An encoder and a span head: with labels it gives the loss, and in evaluation the spans that it finds."""

    def __init__(self, encoder: Any, head: str, types: int) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(0.1)
        self.head = HEADS[head](encoder.config.hidden_size, types)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.dropout(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        output = {} if labels is None else {"loss": self.loss(hidden, labels, attention_mask)}
        if not self.training:
            output["spans"] = self.head.decode(hidden, attention_mask, padded=True)[0]
        return output

    def loss(self, hidden: Tensor, spans: Tensor, mask: Tensor) -> Tensor:
        return self.head.loss(hidden, spans, mask)


class EagerTagger(Tagger):
    """As without this library: all scores, and dense labels."""

    def loss(self, hidden: Tensor, spans: Tensor, mask: Tensor) -> Tensor:
        with fp.use_backend("reference"):
            scores = self.head(hidden, mask)
        labels = fp.spans.to_dense(spans, *scores.shape[:3])
        return fp.reference.zlpr_loss(scores.flatten(2), labels.flatten(2))


TAGGERS = {"eager": EagerTagger, "fused": Tagger}


def load(folder: Path, types: Sequence[str]) -> tuple[SpanModel, Any]:
    """A trained model that knows these types, and its tokenizer."""
    if not (folder / "config.json").exists():
        raise InputError(f"--trained: no model in {folder}")
    model, tokenizer = SpanModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    if unknown := sorted(set(types) - set(model.config.label2id)):
        raise InputError(
            f"--trained: {folder} has no type {unknown[0]!r}; it has {reprlib.repr([*model.config.label2id])}"
        )
    return model, tokenizer


def main() -> None:
    options, arguments = parse(NerOptions, __doc__.splitlines()[0], rate=4e-3)
    transformers.set_seed(arguments.seed)
    if options.dev:
        train, dev = read(options.train) if options.train else [], read(options.dev)
    else:
        train, dev = entities(arguments.seed)
    types = sorted({kind for sentence in (*train, *dev) for kind, _, _ in sentence.spans})
    if options.trained:
        train, saved, tokenizer = [], *load(options.trained, types)
        types, encoder = list(saved.config.label2id), saved.encoder
    elif types:
        tokenizer, encoder = encoder_of(options.encoder, [sentence.tokens for sentence in train])
    else:
        raise InputError(f"{options.train}, {options.dev}: no span in either")
    examples = encode(tokenizer, train, types, options.max_length)[1] if train else []
    encoding, dev_examples, lost = encode(tokenizer, dev, types, options.max_length)
    gold = fp.spans.from_lists([sentence.spans for sentence in dev], types)
    print(f"{len(train)} and {len(dev)} sentences; no window holds {len(lost)} of the {len(gold)} entities of dev")

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        f1 = fp.metrics.SpanF1(types)
        found = fp.spans.to_words(torch.as_tensor(prediction.predictions), encoding, types)
        f1.update(fp.spans.from_lists(found, types), gold)
        true = f1.counts[:-1, 2].tolist()
        return f1.compute() | {f"gold/{kind}": count for kind, count in zip(types, true, strict=True)}

    pad, tagger = tokenizer.pad_token_id or 0, TAGGERS[options.loss](encoder, options.head, len(types))
    parts: dict[str, Any] = {
        "data_collator": functools.partial(fp.spans.collate, heads=types, key="labels", pad_token_id=pad),
        "train_dataset": examples, "eval_dataset": dev_examples, "compute_metrics": metrics,
        "processing_class": tokenizer,
    }  # fmt: skip
    if options.trained:
        tagger.head = saved.head
        return score(transformers.Trainer(tagger, arguments, **parts))
    fit(tagger, options, arguments, **parts)
    model = SpanModel(SpanConfig(encoder.config, types, HEADS[options.head].__name__), encoder)
    model.head = tagger.head
    folder = Path(arguments.output_dir) / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"The model is loaded by flashpointer.hf.SpanModel.from_pretrained({str(folder)!r}); its predict takes texts")


if __name__ == "__main__":
    sys.exit(exit_status(main))
