"""Measures the span head on real batches, eager and fused: by itself, in the whole training step, and in decoding.

    python examples/measure_head.py                                 # a synthetic corpus and the small plain encoder
    python examples/measure_head.py --data dev.jsonl.gz --encoder bert-base-cased --out head.json

A batch is 16 sentences, or 4 documents: neighbouring sentences joined. The head is its linear layers, its scores and
its loss, forward and backward, from given hidden states to the gradients of these and of its weights. The step is the
encoder, in training mode, and the head together, without the optimizer. If a document is longer than the encoder's
positions, the encoder reads it in windows, and the head reads the whole.

Contenders take turns in one run. Eager computes all scores and makes dense labels of the spans. Nothing is timed before
the losses, gradients and decoded spans of all contenders agree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from common import InputError, encoder_of, exit_status
from rich.console import Console
from rich.table import Table
from synthetic import Sentence, entities
from torch import nn
from torch._inductor import config as inductor_config
from train_ner import HEADS, TAGGERS, read

import flashpointer as fp

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.growth import SCORE_TENSORS
from benchmarks.measure import Measurement, OtherProcesses, Run, keep_memory, measure_runs
from benchmarks.report import cell, conditions

SENTENCES, DOCUMENTS = 16, 4  # in a batch
CONTENDERS = ("eager", "compile", "fused")
LESSONS = 200

console = Console()

Batch = dict[str, torch.Tensor]
Gradients = Callable[[int], tuple[torch.Tensor, ...]]
Parts = dict[str, dict[str, Measurement]]
"""Of each part (head, step, decode) its contenders."""


class WindowedEncoder(nn.Module):
    """What is longer than the encoder's positions is read in windows, of which none sees the others."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.config = encoder, encoder.config
        self.window = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", math.inf))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        batch, length = input_ids.shape
        ids, mask, windows = input_ids, attention_mask, math.ceil(length / self.window)
        if windows > 1:
            size = math.ceil(length / windows)
            ids, mask = (
                nn.functional.pad(x, (0, windows * size - length)).view(batch * windows, size) for x in (ids, mask)
            )
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)  # attention over nothing is NaN
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden.view(batch, -1, hidden.shape[-1])[:, :length])


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


def join_pieces(tokenizer: Any, sentences: Sequence[Sentence], limit: int) -> list[Sentence]:
    """Neighbours joined to documents of at most so many pieces, special tokens included."""
    words = [sentence.tokens for sentence in sentences]
    whole = tokenizer(words, is_split_into_words=True, add_special_tokens=False, verbose=False)
    return join(sentences, [len(ids) for ids in whole.input_ids], limit - tokenizer.num_special_tokens_to_add())


def batch_of(tokenizer: Any, sentences: Sequence[Sentence], types: Sequence[str], size: int, seed: int) -> Batch:
    """A batch of so many sentences, or documents, drawn at random."""
    chosen = [sentences[i] for i in np.random.default_rng([seed, 0]).permutation(len(sentences))[:size]]
    encoding = tokenizer([sentence.tokens for sentence in chosen], is_split_into_words=True, verbose=False)
    spans = fp.spans.from_words([sentence.spans for sentence in chosen], encoding, types).spans
    padded = tokenizer.pad(encoding, return_tensors="pt", verbose=False)
    return {name: padded[name] for name in ("input_ids", "attention_mask")} | {"labels": fp.spans.pad(spans, size)}


def measure(encoder: WindowedEncoder, batch: Batch, types: int, options: argparse.Namespace) -> Parts:
    """The head, the step and the decoding of a batch. Where the scores would not fit in memory, fused alone."""
    torch.manual_seed(options.seed)
    taggers = {name: kind(encoder, options.head, types).to(options.device) for name, kind in TAGGERS.items()}
    head = taggers["eager"].head = taggers["fused"].head
    mask, spans = batch["attention_mask"], batch["labels"]
    with torch.no_grad():
        hidden = encoder.eval()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    teach(head, hidden, spans, mask)
    hidden.requires_grad_()

    cuda = options.device.type == "cuda"
    memory = torch.cuda.mem_get_info(options.device)[0] if cuda else psutil.virtual_memory().available
    scores = 4 * types * mask.shape[0] * mask.shape[1] ** 2
    fits = scores * SCORE_TENSORS["eager"] < 0.75 * memory  # the rest is for the encoder
    able = CONTENDERS if fits else ("fused",)

    torch._dynamo.reset()  # else batches of other shapes count towards the limit of recompilations
    inductor_config.compile_threads = 1  # in this process: a pool of compilers would wake up beside what is timed
    losses = {name: tagger.loss for name, tagger in taggers.items()}
    losses["compile"] = torch.compile(losses["eager"], fullgraph=True, dynamic=False)
    alone = {
        name: gradients(lambda f=losses[name]: f(hidden, spans, mask), [hidden, *head.parameters()]) for name in able
    }
    steps = {
        name: gradients(lambda t=taggers[name]: t.train()(**batch)["loss"], list(taggers[name].parameters()))
        for name in able
        if name in taggers
    }
    decoders = {"eager": usual_decode, "fused": fused_decode}
    decodes = {name: lambda _, f=decoders[name]: f(head, hidden, mask) for name in able if name in decoders}

    agree({name: losses[name](hidden, spans, mask) for name in able}, alone, decodes)
    parts = {"head": alone, "step": steps, "decode": decodes}
    return {part: measure_runs(runs, options.device, options.seconds) for part, runs in parts.items()}


def teach(head: torch.nn.Module, hidden: torch.Tensor, spans: torch.Tensor, mask: torch.Tensor) -> None:
    """The head learns the batch: one that has learned nothing would decode half of all cells."""
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(LESSONS):
        optimizer.zero_grad()
        head.loss(hidden, spans, mask).backward()
        optimizer.step()


def gradients(loss: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> Gradients:
    """Forward and backward. What the loss does not depend on, such as an encoder's pooler, gets no gradient."""
    return lambda _: torch.autograd.grad(loss(), inputs, allow_unused=True)


def usual_decode(head: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """As without this library: all scores, on the CPU, and a loop over those above 0."""
    with torch.no_grad(), fp.use_backend("reference"):
        scores = head(hidden, mask).cpu().numpy()
    return [[int(b), int(h), int(start), int(end)] for b, h, start, end in zip(*np.where(scores > 0), strict=True)]


def fused_decode(head: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    spans, _ = head.decode(hidden, mask)
    return spans.tolist()


def agree(losses: dict[str, torch.Tensor], heads: dict[str, Gradients], decodes: dict[str, Run]) -> None:
    """Raises AssertionError where a contender's loss, gradients or spans are not those of the first."""
    results = {name: [loss, *heads[name](0)] for name, loss in losses.items()}
    first, *others = results.values()
    for other in others:
        for x, y in zip(other, first, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
    found, *rest = (decode(0) for decode in decodes.values())
    assert all(spans == found for spans in rest)


def table(cases: Sequence[tuple[str, Parts]], header: dict[str, str]) -> Table:
    """Times and peak memory of all contenders, and how many times as much as fused eager takes."""
    caption = "; ".join(f"{key}: {value}" for key, value in header.items())
    made = Table("batch", "part", *CONTENDERS, "eager / fused", caption=caption, caption_justify="left")
    for name, parts in cases:
        for part, measured in parts.items():
            for what in ("time", "peak"):
                eager, fused = (measured[c].number(what) if c in measured else None for c in ("eager", "fused"))
                row = [cell(measured[c], what) if c in measured else "" for c in CONTENDERS]
                made.add_row(name, part, *row, f"{eager / fused:.1f}" if eager and fused else "")
            name = ""
        made.add_section()
    return made


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        bound = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"takes {kind.__name__} {bound}; got {text!r}")

    return parse


def existing_device(name: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="JSON lines or CoNLL columns, perhaps gzipped; else synthetic")
    add("--encoder", metavar="NAME", help="a Hugging Face encoder; without it, a small one")
    add("--head", choices=HEADS, default="efficient", help="the span head")
    add(
        "--documents", type=number(int, 16), nargs="+", default=[512, 1024, 2048], metavar="N", help="lengths in tokens"
    )
    add("--seconds", type=number(float, 0), default=2.0, help="time for each contender, after warm-up")
    add(
        "--device",
        type=existing_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure",
    )
    add("--seed", type=number(int, 0, 2**31), default=0, help="seed of batches, weights and dropout")
    add("--out", type=Path, metavar="FILE", help="where to write all numbers, as JSON")
    options = parser.parse_args()
    if options.out:
        try:  # now, not after all the measuring
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.touch()
        except OSError as error:
            raise InputError(f"--out: {error.filename}: {error.strerror}") from None

    torch.manual_seed(options.seed)
    sentences = read(options.data) if options.data else entities(options.seed)[0]
    types = sorted({kind for sentence in sentences for kind, _, _ in sentence.spans})
    if not types:
        raise InputError(f"{options.data}: no span")
    tokenizer, model = encoder_of(options.encoder, [sentence.tokens for sentence in sentences])
    encoder = WindowedEncoder(model, tokenizer).to(options.device)

    plans = {f"{SENTENCES} sentences": (sentences, SENTENCES)}
    for length in options.documents:
        documents = join_pieces(tokenizer, sentences, length)
        if len(documents) < DOCUMENTS:
            source = options.data or "the synthetic corpus"
            raise InputError(f"--documents {length}: a batch takes {DOCUMENTS}; {source} makes {len(documents)}")
        plans[f"{DOCUMENTS} documents of {length:,}"] = documents, DOCUMENTS

    keep_memory()
    others, cases, records = OtherProcesses(), [], []
    for name, (examples, size) in plans.items():
        batch = batch_of(tokenizer, examples, types, size, options.seed)
        batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
        with console.status(name):
            parts = measure(encoder, batch, len(types), options)
        cases.append((name, parts))
        spans = len(fp.spans.flatten(batch["labels"]))
        shape = {"batch": size, "heads": len(types), "tokens": batch["input_ids"].shape[1], "spans": spans}
        numbers = {part: {c: dataclasses.asdict(m) for c, m in measured.items()} for part, measured in parts.items()}
        records.append({"name": name, **shape, **numbers})
    header = conditions(options.device, others.share())
    console.print(table(cases, header))
    if options.out:
        head = HEADS[options.head]
        about = {
            "data": str(options.data or "synthetic"),
            "encoder": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters",
            "head": f"{head.__name__}, head size {head(model.config.hidden_size, 1).head_size}",
        }
        options.out.write_text(json.dumps({"conditions": header, **about, "cases": records}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
