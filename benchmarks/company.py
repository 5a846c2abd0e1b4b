"""``python -m benchmarks company``: the ops on a CPU, alone and beside one busy process a core.

A DataLoader's workers are such company. Where a parallel loop waits for the thread that has lost its core, and libgomp
waits spinning, a step may take a hundred times as long as its work. ``OMP_WAIT_POLICY=passive`` is the remedy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from rich.table import Table

from .measure import Run, Timing, interleave, run_of
from .suite import Case, Op

CPU = torch.device("cpu")
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"


@contextmanager
def company() -> Iterator[None]:
    """One busy process a core, which ends with the block, or with this process."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.wait()


def table(ops: list[Op], seconds: float, quick: bool) -> Table:
    """Medians of forward + backward, ours and eager's; of forward where there is no backward."""
    runs: dict[str, Run] = {}
    for op in ops:
        for shape in op.shapes:
            if "cpu" in shape.devices and (not quick or shape.size in (op.shapes[0].size, *op.quick)):
                case = Case(op, shape, torch.float32, CPU)
                inputs, contenders = case.inputs(), case.contenders()
                for name in ("ours", "eager"):
                    runs[f"{op.name} {shape}, {name}"] = run_of(contenders[name], [inputs], op.differentiate)
    times = []
    for surroundings in (nullcontext(), company()):
        with surroundings:
            times.append(interleave(runs, CPU, seconds))
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    result = Table(
        "", title=f"{torch.get_num_threads()} threads, OMP_WAIT_POLICY {policy}, {os.cpu_count()} busy processes"
    )
    for column in ("alone, ms", "in company, ms", "times as long"):
        result.add_column(column, justify="right")
    for name in runs:
        alone, beside = (of[name] for of in times)
        if isinstance(alone, Timing) and isinstance(beside, Timing):
            numbers = alone.median * 1e3, beside.median * 1e3, beside.median / alone.median
            result.add_row(name, *(f"{x:.2f}" for x in numbers))
    return result
