"""Tables on pages, between two comments, ``<!-- name -->`` and ``<!-- /name -->``, written from the committed results.

``python -m benchmarks readme`` writes those of README.md, and a test holds that page and files agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .report import BYTES, SECONDS, scaled
from .suite import ops

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results" / "cpu-amd-epyc-2-cores"
UNITS = {"time": SECONDS, "peak": BYTES}
TIMES = {"eager": "eager", "compile": "`torch.compile`", "rival": "usual code", "ours": "ours"}
LONGEST = (1, 100, 1, 1024, 64)
SHOWN = (
    *(("pointer_loss", size) for size in ((16, 10, 1, 64, 64), (8, 10, 1, 256, 64), (2, 50, 1, 512, 64), LONGEST)),
    ("pointer_loss", (16, 9, 9, 128, 64)),
    ("pointer_decode", LONGEST),
    *(("zlpr_loss", size) for size in ((1024, 983), (8, 1000000))),
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


def measured() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The contenders of all committed cases, by op and size."""
    cases = [case for file in RESULTS.rglob("results.json") for case in json.loads(file.read_text())["cases"]]
    return {(case["op"], *case["size"]): next(iter(case["passes"].values()))["contenders"] for case in cases}


def said(contenders: dict[str, Any], contender: str, what: str) -> str:
    value = contenders[contender][what]
    return scaled(value["median"] if what == "time" else value, UNITS[what])


def comparison() -> str:
    """Time of all contenders, and peak memory of eager and ours."""
    found = measured()
    rows = []
    for op, size in SHOWN:
        contenders = found[(op, *size)]
        times = [said(contenders, contender, "time") for contender in TIMES]
        memory = [said(contenders, contender, "peak") for contender in ("eager", "ours")]
        shape = f"`{op}`: {ops()[op].label(size)}"
        rows.append([shape, *times[:-1], f"**{times[-1]}**", memory[0], f"**{memory[1]}**"])
    return table(("", *TIMES.values(), "peak memory, eager", "ours"), rows)


def claim() -> str:
    of = measured()[("pointer_loss", *LONGEST)]
    compiled, eager, ours = (f"{said(of, c, 'time')} and {said(of, c, 'peak')}" for c in ("compile", "eager", "ours"))
    return (
        f"**A document of 1,024 tokens and 100 entity types, on two CPU cores: loss and gradients take {compiled} with "
        f"`torch.compile`, {eager} in eager PyTorch, and {ours} here**, and are the same to within float32's rounding."
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


def tables() -> dict[str, str]:
    """Of README.md."""
    return {
        "claim": claim(),
        "measured": comparison(),
        "losing": losing(),
    }
