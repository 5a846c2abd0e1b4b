"""``python -m benchmarks products``: ``linear_zlpr_loss`` beside the three bare matrix products of a linear layer,
forward and backward, that no implementation can do without.

In turns with them: ours, the eager formula and ``torch.compile`` of it, the rival, and the scores in chunks with
checkpointing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import flashpointer

from . import report
from .linear_zlpr_loss import LAYER, OP, rival
from .measure import Failure, Measurement, Run, measure_runs, run_of
from .suite import Contender, Inputs, Shape

CHUNK = 8192  # classes
PRODUCTS = "products"


def chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """the scores of 8,192 classes at a time, computed again in backward: checkpointing, as it is usually done"""

    def log_sum(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        scores = linear(hidden, weight, bias).float()
        scores = torch.cat([scores, scores.new_full((len(scores), 1), -torch.inf)], dim=1)
        return torch.logsumexp(scores.scatter(1, at, -torch.inf), 1)

    padding = positives < 0
    known = positives.clamp(min=0)
    listed = (hidden.unsqueeze(1) * weight[known]).sum(-1).float() + bias[known]
    sums, first = [], 0
    for w, b in zip(weight.split(CHUNK), bias.split(CHUNK), strict=True):
        here = (positives >= first) & (positives < first + len(w))
        at = torch.where(here, positives - first, len(w))
        sums.append(checkpoint(log_sum, hidden, w, b, at, use_reentrant=False))
        first += len(w)
    zero = torch.zeros_like(sums[0]).unsqueeze(1)
    of_positives = torch.cat([(-listed).masked_fill(padding, -torch.inf), zero], dim=1)
    loss = torch.logsumexp(torch.cat([torch.stack(sums, 1), zero], dim=1), 1) + torch.logsumexp(of_positives, 1)
    return loss.mean()


def bare_products(inputs: Inputs) -> Run:
    """The three of forward and backward, each as a whole, into memory that is there."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    scores = hidden @ weight.T
    results = torch.empty_like(scores), torch.empty_like(hidden), torch.empty_like(weight)

    def run(_: int) -> None:
        torch.mm(hidden, weight.T, out=results[0])
        torch.mm(scores, weight, out=results[1])
        torch.mm(scores.T, hidden, out=results[2])

    return run


def functions() -> dict[str, Callable[..., torch.Tensor]]:
    torch._dynamo.reset()
    eager = flashpointer.reference.linear_zlpr_loss
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    ours = flashpointer.linear_zlpr_loss
    return {"ours": ours, "eager": eager, "compile": compiled, "sparse": rival, "chunks": chunks}


def measure(
    device: torch.device, seconds: float, announce: Callable[[str], None], quick: bool
) -> dict[Shape, dict[str, Measurement]]:
    """Of each shape the products and the contenders, forward + backward; peaks without the gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {}
    for shape in OP.shapes:
        if device.type not in shape.devices or (quick and shape.size not in OP.quick):
            continue
        announce(f"{shape}")
        inputs = OP.make_inputs(shape.size, dtype, device)
        inputs = {name: x.requires_grad_() if name in LAYER else x for name, x in inputs.items()}
        runs = {name: run_of(Contender(f), [inputs], LAYER) for name, f in functions().items()}
        found[shape] = measure_runs({PRODUCTS: bare_products(inputs), **runs}, device, seconds)
        gradients = sum(inputs[name].nbytes for name in LAYER)
        for name in runs:
            peak = found[shape][name].peak
            if isinstance(peak, int) and not isinstance(peak, Failure):
                found[shape][name].peak = peak - gradients
    return found


def table(found: dict[Shape, dict[str, Measurement]]) -> Table:
    result = Table(OP.axes, "", title="linear_zlpr_loss, forward + backward", show_lines=True)
    for column in ("time", "of the products", "/ ours", "peak beside the gradients"):
        result.add_column(column, justify="right")
    for shape, measured in found.items():
        products, ours = (measured[name].number("time") for name in (PRODUCTS, "ours"))
        lines = []
        for name, m in measured.items():
            time = m.number("time")
            share = "" if name == PRODUCTS or not time or not products else f"{products / time:.1%}"
            ratio = "" if name == PRODUCTS or not time or not ours else f"{report.short(time / ours)} x"
            lines.append([name, report.cell(m, "time"), share, ratio, "" if not share else report.cell(m, "peak")])
        result.add_row(str(shape), *("\n".join(column) for column in zip(*lines, strict=True)))
    return result


def write(out: Path, found: dict[Shape, dict[str, Measurement]], header: dict[str, str]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = [
        {"size": shape.size, "why": shape.why, "contenders": {k: dataclasses.asdict(m) for k, m in measured.items()}}
        for shape, measured in found.items()
    ]
    file = out / "products.json"
    file.write_text(json.dumps({"conditions": header, "cases": cases}, indent=1) + "\n")
    return file
