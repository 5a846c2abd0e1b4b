"""Trains GPLinker: entities and relations together, by three span heads on one encoder and by Trainer.

    python examples/train_relations.py                             # a corpus that it makes, under a minute, no download

A triple is a predicate and two entities, its subject and its object. One span layer finds subjects and objects. Two
others score each predicate for each pair of tokens, in any order, so they have neither triangle nor RoPE: one for the
first tokens of subject and object, one for their last tokens. A triple is found where all four are: both entities and
both pairs. Entities may lie inside each other and be in several triples. Su Jianlin, https://kexue.fm/archives/8888
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
import transformers
from common import InputError, Options, encoder_of, exit_status, fit, parse
from synthetic import PREDICATES, Relations, Triple, relations
from torch import nn

import flashpointer as fp

SETS = {
    "entities": fp.spans.SpanSet(["subject", "object"]),
    "firsts": fp.spans.SpanSet(PREDICATES, tril_mask=False),
    "lasts": fp.spans.SpanSet(PREDICATES, tril_mask=False),
}


def in_pieces(tokenizer: Any, sentence: Relations) -> tuple[list[int], list[Triple]]:
    """The pieces of a sentence, and its triples in them."""
    encoding = tokenizer(sentence.tokens, is_split_into_words=True)
    words = encoding.word_ids()
    last = {word: piece for piece, word in enumerate(words)}
    first = {word: words.index(word) for word in last}
    triples = [((first[a], last[b]), kind, (first[c], last[d])) for (a, b), kind, (c, d) in sentence.triples]
    return encoding.input_ids, triples


def example(ids: list[int], triples: Sequence[Triple]) -> dict[str, Any]:
    """For ``fp.spans.collate``: what each of the three heads is to find."""
    return {
        "input_ids": ids,
        "entities": [(name, *triple[at]) for triple in triples for name, at in (("subject", 0), ("object", 2))],
        "firsts": [(kind, subject[0], object_[0]) for subject, kind, object_ in triples],
        "lasts": [(kind, subject[1], object_[1]) for subject, kind, object_ in triples],
    }


def join(entities: Iterable[Sequence[int]], *pairs: Iterable[Sequence[int]]) -> set[Triple]:
    """The triples of a sentence, of the rows (head, start, end) that its heads have found, negative for padding."""
    firsts, lasts = ({tuple(row) for row in rows} for rows in pairs)
    subjects, objects = ({(start, end) for head, start, end in entities if head == at} for at in (0, 1))
    return {
        (s, kind, o)
        for (head, kind), s, o in product(enumerate(PREDICATES), subjects, objects)
        if (head, s[0], o[0]) in firsts and (head, s[1], o[1]) in lasts
    }


class GPLinker(nn.Module):
    """An encoder and three heads: with labels it gives the mean of their losses, and in evaluation what each finds."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.dropout, size = encoder, nn.Dropout(0.1), encoder.config.hidden_size
        kinds = {name: (len(of.heads), of.tril_mask) for name, of in SETS.items()}
        self.heads = nn.ModuleDict(
            {name: fp.nn.GlobalPointer(size, n, rope=tril, tril_mask=tril) for name, (n, tril) in kinds.items()}
        )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        hidden = self.dropout(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        losses = [self.heads[name].loss(hidden, spans, attention_mask) for name, spans in labels.items()]
        output = {"loss": torch.stack(losses).mean()} if losses else {}
        if not self.training:
            for name, head in self.heads.items():
                output[name] = head.decode(hidden, attention_mask, padded=True)[0]
        return output


def as_spans(sentences: Iterable[Iterable[Triple]]) -> torch.Tensor:
    """Triples as ``SpanF1`` counts spans: rows (sentence, predicate, subject, object), each entity one number."""
    rows = [
        (i, PREDICATES.index(kind), a << 32 | b, c << 32 | d)
        for i, triples in enumerate(sentences)
        for (a, b), kind, (c, d) in triples
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def main() -> None:
    options, arguments = parse(Options, __doc__.splitlines()[0], rate=4e-3, epochs=5)
    if options.train:
        raise InputError(f"--train: takes no file, as the corpus is made; got {options.train}")
    arguments.label_names = list(SETS)
    transformers.set_seed(arguments.seed)
    splits = relations(arguments.seed)
    tokenizer, encoder = encoder_of(options.encoder, [sentence.tokens for sentence in splits[0]])
    train, dev = ([in_pieces(tokenizer, sentence) for sentence in split] for split in splits)

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        """Of triples, right if their predicate and both entities are."""
        found = [join(*(rows.tolist() for rows in of_heads)) for of_heads in zip(*prediction.predictions, strict=True)]
        f1 = fp.metrics.SpanF1(PREDICATES)
        f1.update(as_spans(found), as_spans([triples for _, triples in dev]))
        return {name: value for name, value in f1.compute().items() if "boundary" not in name}

    fit(
        GPLinker(encoder), options, arguments, processing_class=tokenizer,
        data_collator=functools.partial(fp.spans.collate, heads=SETS, pad_token_id=tokenizer.pad_token_id or 0),
        train_dataset=[example(*x) for x in train], eval_dataset=[example(*x) for x in dev], compute_metrics=metrics,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_status(main))
