"""Measures the span head on real batches, eager and fused: by itself, in the whole training step, and in decoding.

    python examples/measure_head.py                                 # a synthetic corpus and the small plain encoder
    python examples/measure_head.py --data dev.jsonl.gz --encoder bert-base-cased --out head.json

A batch is 16 sentences, or 4 documents: neighbouring sentences joined. The head is its linear layers, its scores and
its loss, forward and backward, from given hidden states to the gradients of these and of its weights. The step is that
of the encoder, in training mode, and the head together, without the optimizer. Where a document is longer than the
positions that the encoder has, the encoder reads it in windows, and the head reads the whole.

Contenders take turns in one run. Eager is ``train_ner.py --loss eager``: all scores, and dense labels made of the
spans. Nothing is timed before the losses, gradients and decoded spans of all contenders agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from common import (
    Batch,
    Encoder,
    InputError,
    build_encoder,
    console,
    default_device,
    existing_device,
    exit_status,
    indices_of,
    number,
    to_device,
)
from rich.table import Table
from torch._inductor import config as inductor_config
from train_ner import HEADS, Sentence, Tagger, collate, encode, join_pieces, read, synthetic, types_of

import flashpointer as fp

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.growth import SCORE_TENSORS
from benchmarks.measure import Measurement, OtherProcesses, Run, measure_runs
from benchmarks.report import cell, conditions

SENTENCES, DOCUMENTS = 16, 4  # in a batch
CONTENDERS = ("eager", "compile", "fused")
LESSONS = 200

Gradients = Callable[[int], tuple[torch.Tensor, ...]]
Parts = dict[str, dict[str, Measurement]]
"""Of each part (head, step, decode) its contenders."""


def batch_of(encoder: Encoder, sentences: Sequence[Sentence], types: Sequence[str], size: int, seed: int) -> Batch:
    """A batch of so many sentences, or documents, as training draws its first one."""
    chosen = [sentences[i] for i in indices_of(0, len(sentences), size, seed)]
    return collate(encode(encoder, chosen, sys.maxsize).examples, types, encoder.padding)


def measure(encoder: Encoder, batch: Batch, types: int, options: argparse.Namespace) -> Parts:
    """The head, the step and the decoding of a batch. Where the scores would not fit in memory, fused alone."""
    torch.manual_seed(options.seed)
    taggers = {loss: Tagger(encoder, options.head, types, loss).to(options.device) for loss in ("eager", "fused")}
    head = taggers["eager"].head = taggers["fused"].head
    mask, spans = batch["words"] >= 0, batch["spans"]
    with torch.no_grad():
        hidden = encoder.eval()(batch["input_ids"], batch["attention_mask"])
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
        name: gradients(lambda t=taggers[name]: t.train()(batch), list(taggers[name].parameters()))
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="JSON lines or CoNLL columns, perhaps gzipped; else synthetic")
    add("--encoder", metavar="NAME", help="a Hugging Face encoder, by path or name; without it, a small plain one")
    add("--head", choices=HEADS, default="efficient", help="the span head")
    add("--documents", type=number(int, 16), nargs="+", default=[512, 1024, 2048], metavar="N", help="their pieces")
    add("--seconds", type=number(float, 0), default=2.0, help="for each contender, warm-up aside")
    add("--device", type=existing_device, default=default_device(), help="where to measure")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the batches, of weights and dropout")
    add("--out", type=Path, metavar="FILE", help="JSON: all numbers and their conditions")
    options = parser.parse_args()
    if options.out:
        try:  # now, not after all the measuring
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.touch()
        except OSError as error:
            raise InputError(f"--out: {error.filename}: {error.strerror}") from None

    torch.manual_seed(options.seed)
    sentences = read(options.data) if options.data else synthetic(options.seed)[0]
    types = types_of(sentences)
    if not types:
        raise InputError(f"{options.data}: no span")
    encoder = build_encoder(options.encoder, [sentence.tokens for sentence in sentences]).to(options.device)

    plans = {f"{SENTENCES} sentences": (sentences, SENTENCES)}
    for length in options.documents:
        documents = join_pieces(encoder, sentences, length)
        if len(documents) < DOCUMENTS:
            source = options.data or "the synthetic corpus"
            raise InputError(f"--documents {length}: a batch takes {DOCUMENTS}; {source} makes {len(documents)}")
        plans[f"{DOCUMENTS} documents of {length:,}"] = documents, DOCUMENTS

    others, cases, records = OtherProcesses(), [], []
    for name, (examples, size) in plans.items():
        batch = to_device(batch_of(encoder, examples, types, size, options.seed), options.device)
        with console.status(name):
            parts = measure(encoder, batch, len(types), options)
        cases.append((name, parts))
        shape = {"batch": size, "heads": len(types), "tokens": batch["words"].shape[1], "spans": len(batch["spans"])}
        numbers = {part: {c: dataclasses.asdict(m) for c, m in measured.items()} for part, measured in parts.items()}
        records.append({"name": name, **shape, **numbers})
    header = conditions(options.device, others.share())
    console.print(table(cases, header))
    if options.out:
        model = getattr(encoder, "model", encoder)
        about = {
            "data": str(options.data or "synthetic"),
            "encoder": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters",
            "head": f"{HEADS[options.head].__name__}, head size {HEADS[options.head](encoder.width, 1).head_size}",
        }
        options.out.write_text(json.dumps({"conditions": header, **about, "cases": records}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
