"""``python -m benchmarks model``: what the kernels would take on a GPU that is not there, read from their machine code.

Each op runs through its public function, and what it would launch is compiled for the chip. Triton's own disassembler
tells the instructions of a kernel and the line of source of each (``sass``). How often a program passes a loop follows
from Triton's IR of the kernel and from the sizes (``programs``). Programs that pass the same loops have one role: its
hot loop is simulated, instruction by instruction, on one of the four schedulers of a multiprocessor (``machine``), and
what is around the loop once; then programs are dealt out (``launches``).

ALL OF IT IS MODELLED, NOT MEASURED. Trust the counts; ratios of two versions of a kernel to some 30 %; times to a
factor of two. Launches of PyTorch itself, gaps between launches and the host are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich import box
from rich.table import Table

import flashpointer
from flashpointer import backends

from .cases import CASES, Case, Linear
from .launches import Modelled, launches_for, model
from .machine import MACHINES, Machine
from .sass import tool

NOTE = "modelled, not measured"


def run(case: Case | Linear, chip: str) -> dict[str, Any]:
    """Of a case, pass by pass; of a kernel that is not understood what is the matter."""
    machine, inputs = MACHINES[chip], case.inputs()
    passes: dict[str, Any] = {}
    least = case.least(inputs)

    def floor(name: str) -> float:
        """µs. A float32 product is three of tf32, at half the rate."""
        rate = machine.flops if case.dtype.itemsize == 2 else machine.flops / 6
        return max(least[name][0] / machine.dram, least[name][1] / rate) * 1e6

    for name, run_pass in case.passes():
        with (
            launches_for(chip, inputs.values()) as launches,
            patch.object(backends, "why_not_triton", lambda device, dtype: None),
            flashpointer.use_backend("triton"),
        ):
            run_pass(inputs)
        modelled: list[Modelled | str] = []
        for launch in launches:
            try:
                modelled.append(model(launch, machine, case.rules, least[name][0]))
            except Exception as error:  # whatever kernels of another day may be like
                modelled.append(f"{launch.kernel} is not understood: {error!r}")
        us = sum(x.us for x in modelled if isinstance(x, Modelled))
        passes[name] = {"us": us, "floor_us": floor(name), "launches": modelled}
    us = sum(x["us"] for x in passes.values())
    step = floor("step" if len(passes) > 1 else "forward")
    return {"op": case.op, "case": case.title, "cells": case.cells, "us": us, "floor_us": step, "passes": passes}


def table(results: Iterable[dict[str, Any]], op: str, machine: Machine) -> Table:
    title = f"{op}, {machine.name}: {NOTE}"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("launch", "role: programs"):
        out.add_column(column, overflow="fold", max_width=26)
    for column in ("reg", "KiB", "fit", "instr", "times", "matrix", "async", "loads", "µs", "floor", "bound"):
        out.add_column(column, justify="left" if column in ("matrix", "async", "bound") else "right")
    for result in results:
        out.add_section()
        out.add_row(f"[bold]{result['case']}")
        for name, of_pass in result["passes"].items():
            for launch in of_pass["launches"]:
                for row in rows(launch, result["cells"]):
                    out.add_row(*row)
            out.add_row(*total(name, of_pass))
        if len(result["passes"]) > 1:
            out.add_row(*total("step", result))
    return out


def total(name: str, of: dict[str, Any]) -> tuple[str, ...]:
    of_passes = of["passes"].values() if "passes" in of else [of]
    more = "> " if any(isinstance(x, str) for of_pass in of_passes for x in of_pass["launches"]) else ""
    return (f"[bold]{name}", *[""] * 9, f"[bold]{more}{of['us']:.1f}", f"{of['floor_us']:.1f}")


def rows(launch: Modelled | str, cells: int) -> Iterator[tuple[str, ...]]:
    if isinstance(launch, str):
        yield (launch,)
        return
    registers = f"{launch.registers}" + (f" [red]spills {launch.spills}" if launch.spills else "")
    name, per_cell = launch.kernel.removesuffix("_kernel"), ""
    first = (name, registers, f"{launch.shared / 1024:.0f}", f"{launch.resident}", f"{launch.us:.1f}")
    if cells:
        per_cell = f" ({launch.instructions / cells:.0f} a cell)"
    for role in launch.roles:
        kernel, reg, shared, fit, us = first
        times = (f"{role.iterations:.1f}" if role.iterations else "1") + "?" * role.guessed + per_cell
        bound = role.bound + (f"; {launch.busiest} {launch.busiest_us:.1f}" if us else "")
        yield (
            kernel, f"{role.name}: {role.programs}", reg, shared, fit, f"{role.instructions}", times, role.matrix,
            role.copies, f"{role.loads}", us, "", bound,
        )  # fmt: skip
        first = ("",) * 5


def main(chip: str, chosen: Iterable[str], out: Path, show: Callable[[Any], object]) -> int:
    try:
        for name in ("nvdisasm", "cuobjdump"):
            tool(name)
    except (ImportError, FileNotFoundError) as error:
        show(f"{error}")
        return 1
    import triton

    machine, begun = MACHINES[chip], time.monotonic()
    show(f"{machine.name}, {NOTE}: compiling, reading and simulating, for a minute or two")
    results = []
    for op in chosen:
        of_op = []
        for case in (case for case in CASES if case.op == op):
            of_op.append(run(case, chip))
            show(f"{time.monotonic() - begun:4.0f} s  {op}, {case.title}")
        show(table(of_op, op, machine))
        results += of_op
    show(
        "KiB: shared memory. fit: programs on a multiprocessor at once. instr: of an iteration of the hot loop. times:"
        " iterations a program; ?: of some loop the data decides. async: copies @ instructions from the issue of one to"
        " the wait for it. floor: what no implementation can do without. bound: of an iteration; then the busiest unit"
        " of the launch, and the µs that it would take if it never waited."
    )
    record = {"what": NOTE, "chip": chip, "torch": torch.__version__, "triton": triton.__version__, "cases": results}
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"model-{chip}.json"
    file.write_text(json.dumps(record, indent=1, default=asdict) + "\n")
    show(f"wrote {file}")
    return 0
