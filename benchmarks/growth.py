"""``python -m benchmarks growth``: how time and peak memory of the span loss grow with the heads and with the tokens.

Forward + backward of ``pointer_loss`` beside the eager formula, its ``torch.compile``, and ``pointer_scores`` followed
by ``zlpr_loss``, which stores the scores. A contender leaves a curve where its next point would take too much memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import flashpointer

from . import pointer_loss, report
from .measure import Ceilings, Measurement, measure_runs, memory_of, run_of
from .suite import Contender, Inputs, Shape

HEAD_SIZE = 64
# Of sentences, heads and tokens, one grows.
CURVES = {
    "heads": [(1, heads, 128) for heads in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)],
    "tokens": [(1, 10, tokens) for tokens in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)],
}
AXES = {"heads": "heads (entity types)", "tokens": "tokens"}
# Heads times tokens up to which a point is taken.
QUICK, ALL = 10_000, 1 << 30
COLOURS = {"eager": "#9aa5b1", "compile": "#4c78a8", "scores + loss": "#e3a857", "ours": "#c8344f"}
LABELS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "scores + loss": "fused scores, stored, then fused loss",
    "ours": "pointer_loss",
}
# Tensors of scores at the peak; measured, and rounded up.
SCORE_TENSORS = {"eager": 12, "compile": 8, "scores + loss": 4, "ours": 0}


def scores_and_loss(
    q: torch.Tensor, k: torch.Tensor, spans: torch.Tensor, start: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    scores = flashpointer.pointer_scores(q, k, start, end)
    labels = flashpointer.spans.to_dense(spans, *scores.shape[:3])
    return flashpointer.zlpr_loss(scores.flatten(2), labels.flatten(2))


def measure(device: torch.device, seconds: float, announce: Callable[[str], None], largest: int) -> dict[str, Any]:
    """Each curve: its points, each with the measurements of the contenders that are still in it."""
    limit = memory_of(device) / 4
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    curves: dict[str, Any] = {}
    for name, sizes in CURVES.items():
        curves[name] = []
        for batch, heads, length in (size for size in sizes if size[1] * size[2] <= largest):
            announce(f"{name}: {heads:,} heads, {length:,} tokens")
            size = (batch, heads, 1, length, HEAD_SIZE)
            inputs = pointer_loss.make_inputs(size, dtype, device)
            inputs = {k: v.requires_grad_() if k in pointer_loss.OP.differentiate else v for k, v in inputs.items()}
            scores = 4 * batch * heads * length**2
            able = {k: f for k, f in contenders().items() if scores * SCORE_TENSORS[k] < limit}
            runs = {k: run_of(Contender(f), [inputs], pointer_loss.OP.differentiate) for k, f in able.items()}
            point = {"size": Shape(size, ""), "inputs": inputs, "measured": measure_runs(runs, device, seconds)}
            curves[name].append(point)
    return curves


def contenders() -> dict[str, Callable[..., torch.Tensor]]:
    torch._dynamo.reset()
    eager = flashpointer.reference.pointer_loss
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return {"eager": eager, "compile": compiled, "scores + loss": scores_and_loss, "ours": flashpointer.pointer_loss}


def share_of_floor(inputs: Inputs, ours: Measurement, ceilings: Ceilings) -> float | None:
    """How near ours comes to the matrix products alone, at the measured rate of a large one."""
    seconds, flops = ours.number("time"), pointer_loss.matrix_flops(inputs, True)
    return None if seconds is None else ceilings.floor(0, flops, inputs["q"].dtype) / seconds


def write(out: Path, curves: dict[str, Any], header: dict[str, str], ceilings: Ceilings) -> list[Path]:
    """growth.json and growth.png."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "conditions": header,
        "flop_per_second": {str(dtype): rate for dtype, rate in ceilings.matrix.items()},
        "curves": {
            name: [
                {
                    "size": point["size"].size,
                    "contenders": {k: dataclasses.asdict(m) for k, m in point["measured"].items()},
                    "share_of_matrix_floor": share_of_floor(point["inputs"], point["measured"]["ours"], ceilings),
                }
                for point in points
            ]
            for name, points in curves.items()
        },
    }
    files = [out / "growth.json", out / "growth.png"]
    files[0].write_text(json.dumps(record, indent=1) + "\n")
    figure(curves, header).savefig(files[1], dpi=150)
    return files


def figure(curves: dict[str, Any], header: dict[str, str]) -> Figure:
    canvas = Figure(figsize=(11, 8), layout="constrained")
    canvas.suptitle(f"pointer_loss, forward + backward, {header['device']}", weight="bold", size=13)
    axes = canvas.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        for row, (what, quantity, units) in enumerate(
            (("time", "time", report.SECONDS), ("peak", "peak memory", report.BYTES))
        ):
            plot = axes[row][column]
            for contender, colour in COLOURS.items():
                at = [p for p in points if contender in p["measured"]]
                values = [p["measured"][contender].number(what) or math.nan for p in at]
                plot.plot(
                    [x_of(name, p) for p in at], values, "o-", markersize=4, color=colour, label=LABELS[contender]
                )
            plot.set_xscale("log")
            plot.set_yscale("log")
            plot.minorticks_off()
            plot.set_xticks([x_of(name, p) for p in points], [f"{x_of(name, p):,}" for p in points])
            plot.yaxis.set_major_formatter(report.tick(units))
            plot.set_ylabel(quantity)
            plot.grid(color="#dddddd")
            plot.spines[["top", "right"]].set_visible(False)
        others = points[0]["size"].size
        fixed = f"{others[3]} tokens" if name == "heads" else f"{others[1]} heads"
        axes[0][column].set_title(f"one sentence, {fixed}")
        axes[1][column].set_xlabel(AXES[name])
    axes[0][0].legend(frameon=False, title="loss and gradients of all spans")
    canvas.supxlabel(
        f"A curve ends where its next point would need more than a quarter of the memory, {header['memory']}.\n"
        f"{report.said_of(header)}",
        size=8, color="#555555",
    )  # fmt: skip
    return canvas


def x_of(name: str, point: dict[str, Any]) -> int:
    return int(point["size"].size[1 if name == "heads" else 3])
