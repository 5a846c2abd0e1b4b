"""Trains a multi-label text classifier with ZLPR, or with binary cross entropy beside it.

    python examples/train_multilabel.py --compare                   # a synthetic corpus, under a minute, no download
    python examples/train_multilabel.py --train train.jsonl.gz --dev dev.jsonl.gz --encoder bert-base-cased --out run

A file is JSON lines ``{"text": "...", "labels": ["joy", ...]}``, perhaps gzipped. A text may have no label. Both losses
put the threshold at a score of 0.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import (
    Batch,
    Encoder,
    InputError,
    Tally,
    Trainer,
    build_encoder,
    checkpoints,
    console,
    exit_status,
    make_repeatable,
    number,
    options_parser,
    parse,
    read_json_lines,
    strings_of,
    to_device,
    value_of,
)
from rich.table import Table
from torch import nn

import flashpointer as fp


class Text(NamedTuple):
    words: list[str]
    labels: list[str]


# --- input ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Text]:
    """The texts of a file. One without a word gets an empty word, so that there is something to read."""
    texts = [
        Text(value_of(where, record, "text", str).split() or [""], strings_of(where, record, "labels"))
        for where, record in read_json_lines(path)
    ]
    if not texts:
        raise InputError(f"{path}: no text")
    return texts


KEYWORDS = {
    "food": "bread soup cheese apple recipe kitchen",
    "music": "piano song choir violin concert drum",
    "sport": "goal match tennis referee league sprint",
    "travel": "airport luggage hotel passport ferry island",
    "weather": "rain storm sunny snow forecast wind",
    "money": "bank loan salary tax price budget",
    "health": "doctor fever hospital vaccine nurse pill",
    "school": "teacher exam pupil lesson homework class",
}
FILLERS = "the a we they saw had said of and about with then again today some people it was very near"


def synthetic(seed: int, train: int = 3000, dev: int = 500) -> tuple[list[Text], list[Text]]:
    """Texts with keywords of their labels. A keyword after "no" does not count, so words alone do not tell."""
    rng = random.Random(seed)

    def text() -> Text:
        labels = rng.sample(sorted(KEYWORDS), rng.choice([0, 1, 1, 2, 2, 3]))
        others = [label for label in KEYWORDS if label not in labels]
        parts = [[rng.choice(KEYWORDS[label].split())] for label in labels for _ in range(rng.randint(1, 2))]
        parts += [["no", rng.choice(KEYWORDS[label].split())] for label in rng.sample(others, rng.randint(0, 2))]
        parts += [[word] for word in rng.choices(FILLERS.split(), k=rng.randint(5, 15))]
        rng.shuffle(parts)
        return Text([word for part in parts for word in part], labels)

    return [text() for _ in range(train)], [text() for _ in range(dev)]


# --- the model -----------------------------------------------------------------------------------------------------


def encode(encoder: Encoder, texts: Sequence[Text], types: Sequence[str], max_length: int) -> list[Batch]:
    """Texts in pieces, and their labels as 0 and 1."""
    pieces = encoder.pieces([text.words for text in texts], max_length)
    return [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor([label in text.labels for label in types])}
        for text, (ids, _) in zip(texts, pieces, strict=True)
    ]


def collate(examples: Sequence[Batch], padding: int) -> Batch:
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": torch.stack([example["labels"] for example in examples]),
    }


def bce_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over the labels, as ZLPR is one: else ``--r-drop`` would weigh more here than there."""
    cells = nn.functional.binary_cross_entropy_with_logits(scores.float(), labels.float(), reduction="none")
    return cells.sum(-1).mean()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"zlpr": fp.zlpr_loss, "bce": bce_loss}


class Classifier(nn.Module):
    """The mean of an encoder's hidden states, and a linear layer; it gives the loss of a batch.

    Args:
        r_drop: the alpha of R-Drop (arXiv:2106.14448): two passes, which differ in their dropout, and beside the mean
            of their losses alpha / 4 of the symmetric divergence between them.
        smoothing: labels 0 and 1 become smoothing / 2 and 1 - smoothing / 2.
        mixup: parameter of the beta distribution of which each text's share comes, the rest being another text.
    """

    def __init__(
        self, encoder: Encoder, types: int, loss: str, r_drop: float = 0.0, smoothing: float = 0.0, mixup: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(0.1)
        self.linear = nn.Linear(encoder.width, types)
        self.loss, self.r_drop, self.smoothing, self.mixup = LOSSES[loss], r_drop, smoothing, mixup

    def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(ids, mask)
        return (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)

    def scores(self, batch: Batch) -> torch.Tensor:
        return self.linear(self.dropout(self.pooled(batch["input_ids"], batch["attention_mask"])))

    def forward(self, batch: Batch) -> torch.Tensor:
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        passes = 2 if self.r_drop else 1
        pooled = self.pooled(ids.repeat(passes, 1), mask.repeat(passes, 1)).unflatten(0, (passes, len(ids)))
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample((len(ids), 1)).to(pooled.device)
            other = torch.randperm(len(ids)).to(pooled.device)
            pooled = share * pooled + (1 - share) * pooled[:, other]
            labels = share * labels + (1 - share) * labels[other]
        if self.smoothing:
            labels = (1 - self.smoothing) * labels + self.smoothing / 2
        scores = self.linear(self.dropout(pooled))
        loss = self.loss(scores, labels.expand_as(scores))
        return loss + self.r_drop / 4 * fp.zlpr_kl_div(scores[0], scores[1]) if self.r_drop else loss


def evaluate(
    model: Classifier,
    texts: Sequence[Text],
    examples: Sequence[Batch],
    types: Sequence[str],
    options: argparse.Namespace,
) -> Tally:
    tally = Tally(types)
    for i in range(0, len(texts), options.batch_size):
        batch = collate(examples[i : i + options.batch_size], model.encoder.padding)
        predicted = model.scores(to_device(batch, options.device)) > 0
        for text, row in zip(texts[i : i + options.batch_size], predicted.tolist(), strict=True):
            labels = [(label,) for label, is_on in zip(types, row, strict=True) if is_on]
            tally.add([(label,) for label in text.labels], labels)
    return tally


def train(splits: tuple[list[Text], list[Text]], types: list[str], options: argparse.Namespace) -> Tally:
    """One run: trained on the first split, evaluated on the second."""
    make_repeatable(options)
    encoder = build_encoder(options.encoder, [text.words for text in splits[0]])
    examples, dev = (encode(encoder, split, types, options.max_length) for split in splits)
    model = Classifier(encoder, len(types), options.loss, options.r_drop, options.smoothing, options.mixup)
    about = {"types": types, "examples": len(examples), "vocabulary": getattr(encoder, "vocabulary", None)}
    return Trainer(model, options, about).fit(
        examples,
        lambda chosen: collate(chosen, encoder.padding),
        lambda: evaluate(model, splits[1], dev, types, options),
    )


def main() -> None:
    parser = options_parser(__doc__.splitlines()[0], "JSON lines, perhaps gzipped")
    add, share = parser.add_argument, number(float, 0, 1)
    losses = parser.add_mutually_exclusive_group()
    losses.add_argument("--loss", choices=LOSSES, default="zlpr", help="bce: binary cross entropy")
    losses.add_argument("--compare", action="store_true", help="both losses, on one seed, into folders of their names")
    add("--r-drop", type=number(float, 0), default=0.0, metavar="ALPHA", help="two passes, drawn together by their KL")
    add("--smoothing", type=share, default=0.0, metavar="EPS", help="labels EPS / 2 and 1 - EPS / 2")
    add("--mixup", type=number(float, 0), default=0.0, metavar="ALPHA", help="texts and labels mixed by Beta(ALPHA)")
    add("--max-length", type=number(int, 1), default=128, metavar="N", help="pieces kept of a text")
    options = parse(parser)

    splits = (read(options.train), read(options.dev)) if options.train else synthetic(options.seed)
    types = sorted({label for split in splits for text in split for label in text.labels})
    if not types:
        raise InputError(f"{options.train}, {options.dev}: no label in either")
    for name, split in zip(("train", "dev"), splits, strict=True):
        labels = sum(len(text.labels) for text in split)
        console.print(f"{name}: {len(split)} texts, {labels} labels of {len(types)} types", highlight=False)
    if not options.compare:
        console.print(train(splits, types, options).table("dev"))
        return

    table = Table("loss", "precision", "recall", "micro F1", "macro F1", title="dev", title_justify="left")
    for loss in LOSSES:
        out = options.out and options.out / loss
        own = {
            "loss": loss,
            "out": out,
            "resume": options.resume and bool(checkpoints(out)),  # the second one may not have begun
            "log": options.log and options.log.with_name(f"{options.log.stem}-{loss}{options.log.suffix}"),
        }
        tally = train(splits, types, argparse.Namespace(**{**vars(options), **own}))
        table.add_row(loss, *(f"{x:.4f}" for x in (*tally.micro, tally.macro_f1)))
    console.print(table)


if __name__ == "__main__":
    sys.exit(exit_status(main))
