"""Tables on pages, between two comments, ``<!-- name -->`` and ``<!-- /name -->``, written from the committed results.

``python -m benchmarks readme`` writes them, and a test holds that pages and files agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .report import BYTES, SECONDS, scaled, short
from .suite import ops

ROOT = Path(__file__).parent.parent
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
RESULTS, ON_GPU = (Path(__file__).parent / "results" / name for name in ("cpu-amd-epyc-2-cores", "nvidia-h200"))
UNITS = {"time": SECONDS, "peak": BYTES}
TIMES = {"eager": "eager", "compile": "`torch.compile`", "rival": "usual code", "ours": "ours"}
LONGEST = (1, 100, 1, 1024, 64)
SHOWN = (
    *(("pointer_loss", size) for size in ((8, 10, 1, 256, 64), (2, 50, 1, 512, 64), LONGEST)),
    ("pointer_decode", LONGEST),
    ("zlpr_loss", (1024, 983)),
)
SHOWN_ON_GPU = (
    *(("pointer_loss", size) for size in ((16, 9, 1, 128, 64), (2, 50, 1, 512, 64), LONGEST)),
    ("zlpr_loss", (8192, 8192)),
    ("linear_zlpr_loss", (4096, 768, 500000)),
)


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with these tables, by their names."""
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"no {begin} ... {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def measured(folder: Path = RESULTS) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The contenders of all committed cases, by op and size."""
    cases = [case for file in folder.rglob("results.json") for case in json.loads(file.read_text())["cases"]]
    return {(case["op"], *case["size"]): next(iter(case["passes"].values()))["contenders"] for case in cases}


def said(contenders: dict[str, Any], contender: str, what: str) -> str:
    value = contenders[contender][what]
    return scaled(value["median"] if what == "time" else value, UNITS[what])


def on_the_chip(contenders: dict[str, Any], contender: str) -> str:
    """The time in a CUDA graph; where that was not tried or failed the time as launched, with a mark."""
    graph = contenders[contender]["graph"]
    return scaled(graph["median"], SECONDS) if isinstance(graph, dict) else f"{said(contenders, contender, 'time')} †"


def comparison() -> str:
    """Time of all contenders, and peak memory of eager and ours: on the CPU, then on the GPU."""
    found, on_gpu = measured(), measured(ON_GPU)
    cases = [("CPU", case, found[(case[0], *case[1])]) for case in SHOWN]
    cases += [("H200", case, on_gpu[(case[0], *case[1])]) for case in SHOWN_ON_GPU]
    rows = []
    for place, (op, size), contenders in cases:
        if place == "CPU":
            times = [said(contenders, contender, "time") for contender in TIMES]
        else:
            times = [on_the_chip(contenders, contender) for contender in TIMES]
        memory = [said(contenders, contender, "peak") for contender in ("eager", "ours")]
        shape = f"`{op}`: {ops()[op].label(size)}"
        rows.append([place, shape, *times[:-1], f"**{times[-1]}**", memory[0], f"**{memory[1]}**"])
    return table(("on", "", *TIMES.values(), "peak memory, eager", "ours"), rows)


def all_on_gpu() -> str:
    """Of each case the time on the chip of all contenders, ours and compiled as launched, and peak memory."""
    rows = []
    for (op, *size), of in sorted(measured(ON_GPU).items()):
        times = [on_the_chip(of, contender) for contender in TIMES]
        launched = [said(of, contender, "time") for contender in ("compile", "ours")]
        memory = [said(of, contender, "peak") for contender in ("eager", "compile", "ours")]
        rows.append([f"`{op}`: {ops()[op].label(tuple(size))}", *times, *launched, *memory])
    columns = ("", *TIMES.values(), "launched: compiled", "ours", "peak memory: eager", "compiled", "ours")
    return table(columns, rows)


def losing_on_gpu() -> str:
    """Every case in which eager or compiled PyTorch took less time, on the chip or as launched."""
    rows = []
    for (op, *size), of in sorted(measured(ON_GPU).items()):
        names = ("eager", "compile", "ours")
        both = [[of[name][what]["median"] for name in names] for what in ("graph", "time") if of["ours"][what]]
        if any(ours > min(theirs) for *theirs, ours in both):
            chip = [on_the_chip(of, name) for name in names]
            rows.append([f"`{op}`: {ops()[op].label(tuple(size))}", *chip, *(said(of, name, "time") for name in names)])
    columns = [f"{how}: {name}" for how in ("on the chip", "launched") for name in ("eager", "compiled", "ours")]
    return table(("", *columns), rows)


def claim() -> str:
    of = measured()[("pointer_loss", *LONGEST)]
    compiled, eager, ours = (f"{said(of, c, 'time')} and {said(of, c, 'peak')}" for c in ("compile", "eager", "ours"))
    return (
        f"**A document of 1,024 tokens and 100 entity types, on two CPU cores: loss and gradients take {compiled} with "
        f"`torch.compile`, {eager} in eager PyTorch, and {ours} here**, and are the same to within float32's "
        "rounding: entity types [share their exponentials](docs/mathematics.md#the-factorisation)."
    )


def losing() -> str:
    """Every committed case, forward + backward or decoding, in which eager or compiled PyTorch took less time."""
    points = json.loads((RESULTS / "growth" / "growth.json").read_text())["curves"].values()
    found = measured() | {("pointer_loss", *p["size"]): p["contenders"] for points in points for p in points}
    rows = []
    for (op, *size), contenders in found.items():
        times = {c: contenders[c]["time"]["median"] for c in ("eager", "compile", "ours") if c in contenders}
        if times["ours"] > min(times.values()):
            told = [said(contenders, c, "time") for c in ("eager", "compile", "ours")]
            rows.append(
                [f"`{op}`", f"{ops()[op].label(tuple(size))} ({ops()[op].axes})", *told[:-1], f"**{told[-1]}**"]
            )
    return table(("call", "size", "eager", "`torch.compile`", "ours"), sorted(rows))


def products() -> str:
    """``linear_zlpr_loss`` beside the bare products of its layer: shares, ratios and memory."""
    rows = []
    for case in json.loads((RESULTS / "linear_zlpr_loss" / "products.json").read_text())["cases"]:
        of = case["contenders"]
        took = {name: contender["time"]["median"] for name, contender in of.items()}
        ratios = [short(took[name] / took["ours"]) for name in ("eager", "compile", "sparse", "chunks")]
        peaks = [said(of, name, "peak") for name in ("ours", "sparse")]
        size = " x ".join(f"{n:,}" for n in case["size"])
        rows.append([size, f"{took['products'] / took['ours']:.0%}", *ratios, *peaks])
    others = [f"{name} / ours" for name in ("eager", "compiled", "sparse", "chunks")]
    return table(("", "share of the products", *others, "peak beside the gradients", "of sparse"), rows)


def tables() -> dict[Path, dict[str, str]]:
    """Of each page."""
    return {
        README: {"claim": claim(), "measured": comparison(), "losing": losing()},
        PERFORMANCE: {"products": products(), "gpu": all_on_gpu(), "losing on a GPU": losing_on_gpu()},
    }
