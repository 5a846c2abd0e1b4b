"""The libraries that split, pad and gather batches by themselves, with spans in them. With flat spans each of these
goes wrong, and all but one silently."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import flashpointer as fp

from .processes import run

TYPES = ["PER", "LOC"]
LENGTH = 6


def example(i: int) -> dict[str, Any]:
    """Sentence i, whose spans, none to four, tell which one it is."""
    spans = [(TYPES[j % 2], (i + j) % LENGTH, (i + j) % LENGTH) for j in range(i % 5)]
    return {"input_ids": [i + 1] * LENGTH, "spans": spans}


def expected_spans(sentence: int) -> list[list[int]]:
    return [[TYPES.index(kind), start, end] for kind, start, end in example(sentence)["spans"]]


def check(tokens: torch.Tensor, spans: torch.Tensor) -> list[int]:
    """Raises AssertionError unless the spans of a batch are those of its sentences, which are returned."""
    sentences = (tokens[:, 0] - 1).tolist()
    for sentence, rows in zip(sentences, spans, strict=True):
        assert [row for row in rows.tolist() if min(row) >= 0] == expected_spans(sentence)
    return sentences


class Tagger(torch.nn.Module):
    """What Trainer and DataParallel are given: the loss first, and where there is no gradient what was found."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Embedding(64, 16)
        self.head = fp.nn.EfficientGlobalPointer(16, len(TYPES), 8)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        hidden = self.encoder(input_ids)
        output = {} if labels is None else {"loss": self.head.loss(hidden, labels, attention_mask)}
        return (
            output if self.training else {**output, "spans": self.head.decode(hidden, attention_mask, padded=True)[0]}
        )


collate = functools.partial(fp.spans.collate, heads=TYPES, key="labels")


def test_data_parallel_splits_a_batch() -> None:
    """Into a chunk of each tensor for each replica: halves whose losses are those of their sentences."""
    model, batch = Tagger(), collate([example(i) for i in range(8)])
    with torch.no_grad():
        hidden = model.encoder(batch["input_ids"])
        of_each = model.head.loss(hidden, batch["labels"], reduction="none")
        halves = [
            dict(zip(batch, chunks, strict=True)) for chunks in zip(*(x.chunk(2) for x in batch.values()), strict=True)
        ]
        for half, expected in zip(halves, of_each.chunk(2), strict=True):
            replica = model._replicate_for_data_parallel()
            torch.testing.assert_close(replica(**half)["loss"], expected.mean())
    assert abs(of_each[:4].mean() - of_each[4:].mean()) > 1e-3


def _accelerator(rank: int, **options: Any) -> Any:
    import accelerate

    # As torchrun sets them, where accelerate looks; the process group is there already.
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    return accelerate.Accelerator(dataloader_config=accelerate.DataLoaderConfiguration(**options))


def _dispatched(rank: int) -> None:
    """Rank 0 reads batches of 6 and sends each rank its half."""
    accelerator = _accelerator(rank, dispatch_batches=True, split_batches=True)
    loader = accelerator.prepare(DataLoader([example(i) for i in range(30)], batch_size=6, collate_fn=collate))
    seen = [sentence for batch in loader for sentence in check(batch["input_ids"], batch["labels"])]
    assert seen == [i for first in range(3 * rank, 30, 6) for i in range(first, first + 3)]


@pytest.mark.slow
def test_accelerate_dispatches_batches() -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'flashpointer[test]'")
    run(2, _dispatched)


def _gathered(rank: int) -> None:
    """45 sentences, of which the last batch has too few for both ranks, which pads it with others."""
    accelerator = _accelerator(rank)
    loader = accelerator.prepare(DataLoader([example(i) for i in range(45)], batch_size=4, collate_fn=collate))
    seen = []
    for batch in loader:
        spans = accelerator.pad_across_processes(batch["labels"], dim=1, pad_index=-100)
        seen += check(*accelerator.gather_for_metrics((batch["input_ids"], spans)))
    assert seen == list(range(45))


@pytest.mark.slow
def test_accelerate_gathers_for_metrics() -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'flashpointer[test]'")
    run(2, _gathered)


def check_evaluation(folder: str, sizes: tuple[int, ...], **options: Any) -> None:
    """Trainer's F1 is that of sets of tuples at every batch size, and eval_loss is there, as the key is "labels"."""
    import transformers

    torch.manual_seed(0)
    sentences, model = [example(i) for i in range(13)], Tagger().eval()
    with torch.no_grad():
        output = model(**collate(sentences))
    found = set(map(tuple, fp.spans.flatten(output["spans"]).tolist()))
    gold = {(i, *row) for i in range(13) for row in expected_spans(i)}
    expected = 2 * len(found & gold) / (len(found) + len(gold))
    assert 0 < expected < 1
    for size in sizes:
        arguments = transformers.TrainingArguments(
            folder, per_device_eval_batch_size=size, use_cpu=True, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, data_collator=collate, eval_dataset=sentences,
            compute_metrics=fp.metrics.SpanF1(TYPES).compute_metrics,
        )  # fmt: skip
        result = trainer.evaluate()
        assert result["eval_f1"] == pytest.approx(expected)
        assert result["eval_loss"] == pytest.approx(output["loss"].item(), rel=0.01)  # ranks repeat a sentence or two


@pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True}], ids=str)
def test_trainer_computes_metrics_across_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'flashpointer[test]'")
    check_evaluation(str(tmp_path), (1, 4, 13), **options)


def _evaluated(rank: int, folder: str) -> None:
    _accelerator(rank)
    check_evaluation(folder, (1, 4))


@pytest.mark.slow
def test_trainer_computes_metrics_across_ranks(tmp_path: Path) -> None:
    for library in ("accelerate", "transformers"):
        pytest.importorskip(library, reason=f"needs {library}: pip install 'flashpointer[test]'")
    run(2, _evaluated, str(tmp_path))
