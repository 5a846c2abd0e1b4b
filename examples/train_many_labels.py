"""Trains a classifier of very many labels: codes of diagnoses, and all codes above them, from their descriptions.

    pip install simple-icd-10-cm                                    # 98,466 codes; without it, labels are made up
    python examples/train_many_labels.py                            # some minutes on two cores
    python examples/train_many_labels.py --compare                  # first, loss and gradients beside the eager ones
    python examples/train_many_labels.py --in-backward adafactor    # the gradient of the output layer is never stored
    torchrun --nproc-per-node 2 examples/train_many_labels.py       # the labels are sharded over two processes

Training reads the descriptions and three in four of the other names of a code; the rest is for evaluation.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import exit_status
from synthetic import many_labels
from torch import Tensor, nn

import flashpointer as fp

BUCKETS = 1 << 15  # of the hashes of words
BLOCKWISE = {"sgd": partial(torch.optim.SGD, lr=0.3), "adafactor": partial(torch.optim.Adafactor, lr=1e-2)}

Examples = list[tuple[str, list[int]]]
"""Texts, and the labels of each."""


class Batch(NamedTuple):
    words: Tensor  # of all texts, hashed
    first: Tensor  # where those of each text begin
    labels: Tensor  # [texts, labels], padded with -100


def read(seed: int) -> tuple[Examples, Examples, int]:
    """For training, for evaluation, and how many labels there are."""
    try:
        import simple_icd_10_cm as icd  # MIT licence
    except ImportError:
        print("simple-icd-10-cm is not installed: the labels are made up")
        return many_labels(seed)
    numbers = {code: number for number, code in enumerate(dict.fromkeys(icd.get_all_codes(True)))}
    labels = {code: [numbers[above] for above in (code, *icd.get_ancestors(code))] for code in numbers}
    names = [(name, labels[code]) for code in numbers for name in icd.get_inclusion_term(code)]
    descriptions = [(icd.get_description(code), labels[code]) for code in numbers]
    return descriptions + [name for i, name in enumerate(names) if i % 4], names[::4], len(numbers)


def features(text: str) -> list[int]:
    """Hashes of its words, and of their beginnings."""
    words = re.findall(r"\w+", text.lower())
    return [zlib.crc32(part.encode()) % BUCKETS for word in words for part in (word, f"{word[:5]}-")] or [0]


def batches(examples: Examples, order: Tensor, size: int) -> Iterator[Batch]:
    for chosen in order.split(size):
        words = [features(examples[i][0]) for i in chosen]
        first = torch.tensor([0, *map(len, words[:-1])]).cumsum(0)
        labels = [torch.tensor(examples[i][1]) for i in chosen]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        yield Batch(torch.tensor(list(chain(*words))), first, padded)


def endless(examples: Examples, size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch, without a last batch of fewer texts: the blocks of a weight depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        yield from batches(examples, order[: len(order) // size * size], size)


class Encoder(nn.Module):
    """The mean of word vectors, and two layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, size)
        layers = (
            nn.LayerNorm(size),
            nn.Linear(size, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size),
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(self.bag(batch.words, batch.first))


class InBackward:
    """Steps of an optimiser on each block of a weight's rows, as soon as backward has its gradient: as
    ``optimizer(weight.split(...))`` would take them, if all gradients were stored."""

    def __init__(self, weight: Tensor, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.weight, self.optimizer = weight.detach(), optimizer
        self.blocks: dict[int, tuple[Tensor, torch.optim.Optimizer]] = {}

    def __call__(self, first: int, gradient: Tensor) -> None:
        if first not in self.blocks:
            block = self.weight[first : first + len(gradient)].requires_grad_()
            self.blocks[first] = block, self.optimizer([block])
        block, optimizer = self.blocks[first]
        block.grad = gradient
        optimizer.step()
        block.grad = None


def compare(encoder: Encoder, head: nn.Module, batch: Batch, seconds: float = 3.0) -> None:
    """Loss and gradients of a step by all scores and dense labels, and by the head: their time and peak memory."""
    sys.path.append(str(Path(__file__).parent.parent))
    import rich

    from benchmarks.measure import keep_memory, measure_runs
    from benchmarks.report import cell

    keep_memory()
    losses = {
        "eager": lambda: fp.reference.linear_zlpr_loss(encoder(batch), head.weight, batch.labels, head.bias),
        "fused": lambda: head.loss(encoder(batch), batch.labels),
    }
    torch.testing.assert_close(losses["fused"](), losses["eager"](), rtol=1e-5, atol=0)
    weights = [*encoder.parameters(), *head.parameters()]
    runs = {name: lambda _, loss=loss: torch.autograd.grad(loss(), weights) for name, loss in losses.items()}
    for name, measured in measure_runs(runs, torch.device("cpu"), seconds).items():
        rich.print(f"{name}: {cell(measured, 'time')}, at most {cell(measured, 'peak')}")


@torch.no_grad()
def evaluate(encoder: Encoder, head: nn.Module, examples: Examples, **shard: Any) -> dict[str, float]:
    """The loss, and which shares of the best label and of the best five are right."""
    loss, right, count = 0.0, torch.zeros(5), len(examples)
    for batch in batches(examples, torch.arange(count), 256):
        hidden = encoder(batch)
        loss += head.loss(hidden, batch.labels, reduction="sum", **shard).item()
        best = head.topk(hidden, k=5, **shard).classes
        right += (best.unsqueeze(2) == batch.labels.unsqueeze(1)).any(2).sum(0)
    return {"loss": loss / count, "P@1": right[0].item() / count, "P@5": right.mean().item() / count}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1500, help="training steps")
    add("--batch", type=int, default=128, help="texts per step")
    add("--size", type=int, default=128, help="hidden size")
    add("--rate", type=float, default=3e-3, help="learning rate of Adam")
    add("--in-backward", choices=BLOCKWISE, help="optimizer that updates the output layer in backward, block by block")
    add("--compare", action="store_true", help="first measure a step beside the eager one")
    add("--seed", type=int, default=0, help="seed of weights and data")
    options = parser.parse_args()

    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    train, dev, labels = read(options.seed)
    torch.manual_seed(options.seed)  # all ranks have the same encoder, and the same batches
    encoder = Encoder(options.size)
    first, stop = (labels * r // ranks for r in (rank, rank + 1))
    torch.manual_seed(options.seed + rank)
    head = fp.nn.LinearZLPR(options.size, stop - first)
    shard: dict[str, Any] = {}
    if ranks > 1:
        dist.init_process_group("gloo")
        shard = {"group": dist.group.WORLD, "first_class": first}
    elif options.compare:
        compare(encoder, head, next(endless(train, options.batch, options.seed)))

    rest = [*encoder.parameters(), head.bias]
    update = InBackward(head.weight, BLOCKWISE[options.in_backward]) if options.in_backward else None
    optimizer = torch.optim.Adam(rest if update else [*rest, head.weight], options.rate, fused=True)
    began = time.perf_counter()
    for step, batch in zip(range(1, options.steps + 1), endless(train, options.batch, options.seed), strict=False):
        optimizer.zero_grad()
        head.loss(encoder(batch), batch.labels, weight_grad=update, **shard).backward()
        optimizer.step()
        if step % 250 == 0 or step == options.steps:
            spent = (time.perf_counter() - began) / step
            found = ", ".join(f"{name} {value:.3f}" for name, value in evaluate(encoder, head, dev, **shard).items())
            if rank == 0:
                print(f"step {step}, {1e3 * spent:.0f} ms each: {found}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(main))
