"""Trains a multi-label text classifier with ZLPR, or with binary cross entropy beside it, by Trainer.

    python examples/train_multilabel.py --compare                   # a synthetic corpus, under a minute, no download
    python examples/train_multilabel.py --train train.jsonl.gz --dev dev.jsonl.gz --encoder bert-base-cased

A file is JSON lines ``{"text": "...", "labels": ["joy", ...]}``, perhaps gzipped. A text may have no label. With both
losses a label is predicted where its score is above 0.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from common import InputError, Options, encoder_of, exit_status, fit, parse, read_json_lines
from synthetic import Text, labels
from torch import Tensor, nn

import flashpointer as fp


@dataclass
class ClassifierOptions(Options):
    loss: Literal["zlpr", "bce"] = field(default="zlpr", metadata={"help": "bce: binary cross entropy"})
    compare: bool = field(default=False, metadata={"help": "both losses from one seed, each into its own folder"})
    r_drop: float = field(default=0.0, metadata={"help": "alpha of R-Drop (arXiv:2106.14448): two passes"})
    smoothing: float = field(default=0.0, metadata={"help": "labels become smoothing / 2 and 1 - smoothing / 2"})
    mixup: float = field(default=0.0, metadata={"help": "mixup of texts and labels, with shares of Beta(mixup)"})
    max_length: int = field(default=128, metadata={"help": "tokens kept of a text"})


def read(path: Path) -> list[Text]:
    """The texts of a file."""
    records = read_json_lines(path, text=str, labels=list[str])
    texts = [Text(record["text"].split(), record["labels"]) for _, record in records]
    if not texts:
        raise InputError(f"{path}: no text")
    return texts


def bce_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The sum over the labels, as ZLPR is one: else ``--r_drop`` would weigh more here than there."""
    return nn.functional.binary_cross_entropy_with_logits(scores.float(), labels, reduction="none").sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"zlpr": fp.zlpr_loss, "bce": bce_loss}


class Classifier(nn.Module):
    """The mean of an encoder's hidden states, and a linear layer: it gives the loss, and the scores."""

    def __init__(self, encoder: Any, types: int, options: ClassifierOptions) -> None:
        super().__init__()
        self.encoder, self.dropout, self.options = encoder, nn.Dropout(0.1), options
        self.linear = nn.Linear(encoder.config.hidden_size, types)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        options, passes = self.options, 2 if self.options.r_drop and self.training else 1
        ids, mask = input_ids.repeat(passes, 1), attention_mask.repeat(passes, 1)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = ((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)).unflatten(0, (passes, -1))
        if options.mixup and self.training:
            share = torch.distributions.Beta(options.mixup, options.mixup).sample((len(labels), 1)).to(pooled.device)
            other = torch.randperm(len(labels)).to(pooled.device)
            pooled = share * pooled + (1 - share) * pooled[:, other]
            labels = share * labels + (1 - share) * labels[other]
        if self.training:
            labels = (1 - options.smoothing) * labels + options.smoothing / 2
        scores = self.linear(self.dropout(pooled))
        loss = LOSSES[options.loss](scores, labels.expand_as(scores))
        if passes == 2:
            loss = loss + options.r_drop / 4 * fp.zlpr_kl_div(scores[0], scores[1])
        return {"loss": loss, "scores": scores[0]}


def main() -> None:
    options, arguments = parse(ClassifierOptions, __doc__.splitlines()[0], rate=1e-3)
    splits = (read(options.train), read(options.dev)) if options.train else labels(arguments.seed)
    types = sorted({label for split in splits for text in split for label in text.labels})
    if not types:
        raise InputError(f"{options.train}, {options.dev}: no label in either")

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        """A label is a span of its text, from 0 to 0."""
        f1 = fp.metrics.SpanF1(types)
        found, gold = (torch.as_tensor(x).nonzero() for x in (prediction.predictions > 0, prediction.label_ids))
        f1.update(nn.functional.pad(found, (0, 2)), nn.functional.pad(gold, (0, 2)))
        return {name: value for name, value in f1.compute().items() if "boundary" not in name}

    for loss in LOSSES if options.compare else [options.loss]:
        own, here = dataclasses.replace(options, loss=loss), copy(arguments)
        if options.compare:
            print(f"loss: {loss}")
            here.output_dir = str(Path(arguments.output_dir) / loss)
        transformers.set_seed(arguments.seed)
        tokenizer, encoder = encoder_of(options.encoder, [text.words for text in splits[0]])
        size = min(options.max_length, tokenizer.model_max_length)
        examples = [
            {
                "input_ids": tokenizer(
                    text.words, is_split_into_words=True, truncation=True, max_length=size
                ).input_ids,
                "labels": [float(label in text.labels) for label in types],
            }
            for split in splits
            for text in split
        ]
        fit(
            Classifier(encoder, len(types), own), own, here, processing_class=tokenizer, compute_metrics=metrics,
            train_dataset=examples[: len(splits[0])], eval_dataset=examples[len(splits[0]) :],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_status(main))
