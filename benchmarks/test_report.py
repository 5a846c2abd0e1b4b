"""What a reader is shown: the allocator that was measured with, the red line, the plots, the losing cases."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

from flashpointer.agreement import Agreement

from . import pages, report, zlpr_loss
from .measure import Ceilings, Measurement, Result, Timing
from .suite import Case, Shape

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, {torch.float32: 1e11}, 1e10, None, 1e-6, None)


def result(**seconds: float) -> Result:
    """Of made-up times, and a byte for each microsecond."""
    measured = {name: Measurement(Timing(s, 0.9 * s, 1.1 * s, 5), peak=round(s * 1e6)) for name, s in seconds.items()}
    case = Case(zlpr_loss.OP, Shape((16, 28), "made up"), torch.float32, CPU)
    return Result(
        case, [Agreement("loss", 0.0, 0.0, 1.0)], {"forward + backward": measured}, {"forward + backward": 1.0}
    )


def test_memory_is_kept_once_asked() -> None:
    """By default a tensor of 64 MiB goes back to the system when it is freed."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    program = """
import psutil, sys, torch
from benchmarks.measure import keep_memory
if sys.argv[1] == "kept":
    assert keep_memory() == "glibc, which keeps what is freed"
before = psutil.Process().memory_info().rss
torch.empty(1 << 24).fill_(1.0)
print(psutil.Process().memory_info().rss - before)
"""
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "usual")
    )
    assert kept > 60 << 20 and usual < 10 << 20


def test_the_header_says_what_allocated_and_warns_in_red() -> None:
    results = [result(eager=2.0, compile=1.0, rival=3.0, ours=1.5)]
    for taken, red in ((0.01, False), (0.2, True)):
        console = Console(width=170, record=True, color_system="truecolor", force_terminal=True)
        console.print(report.table(results, report.conditions(CPU, taken), CEILINGS, taken))
        told = console.export_text(styles=True)
        assert "allocator" in told
        (line,) = (line for line in told.splitlines() if "of the CPU meanwhile" in line)
        assert ("\x1b[1;31m" in line or "\x1b[31m" in line) == red


def test_a_plot_marks_what_is_ahead_of_ours() -> None:
    """Hollow, to the left of the line of ours; the others are filled, to the right; all are named."""
    figure = report.figure([result(eager=3.0, compile=1.0, rival=6.0, ours=1.5)], report.conditions(CPU, 0.0))
    time, memory = figure.axes
    for axes in (time, memory):
        dots = {
            line.get_color(): line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1
        }
        at: dict[str, Any] = {name: dots[report.COLOURS[name]] for name in report.OTHERS}
        assert [round(float(at[name].get_xdata()[0]), 3) for name in report.OTHERS] == [2.0, 0.667, 4.0]
        assert [at[name].get_markerfacecolor() == "white" for name in report.OTHERS] == [False, True, False]
    names = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert names[:3] == ["ours", "eager", "torch.compile"] and names[3] == report.rival_name(result(ours=1.0))
    assert time.get_ylabel() == "rows x classes" and time.get_yticklabels()[0].get_text() == "16 x 28"


def test_the_losing_cases_are_those_that_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(eager: float, compiled: float, ours: float) -> dict[str, Any]:
        times = {"eager": eager, "compile": compiled, "ours": ours}
        return {name: {"time": {"median": s}, "peak": 1} for name, s in times.items()}

    found = {("zlpr_loss", 16, 28): contenders(3.0, 1.0, 2.0), ("zlpr_loss", 4, 5): contenders(3.0, 2.0, 1.0)}
    monkeypatch.setattr(pages, "measured", lambda: found)
    rows = [line for line in pages.losing().splitlines() if "zlpr_loss" in line]
    assert rows == ["| `zlpr_loss` | 16 x 28 (rows x classes) | 3.00 s | 1.00 s | **2.00 s** |"]
