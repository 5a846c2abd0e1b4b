"""``python -m benchmarks``: see ``benchmarks/__init__.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import gpu, report
from .measure import OtherProcesses, keep_memory, measure, measure_ceilings
from .suite import cases, ops

# Of the table: a pipe has no width of its own.
PIPE_WIDTH = 150


def main() -> int:
    known = ops()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=sys.modules[__package__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tool",
        nargs="?",
        choices=("sweep", "growth", "overhead", "products", "company", "model", "gpu", "readme"),
        default="sweep",
        help="default: sweep",
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, one dtype")
    parser.add_argument("--op", nargs="+", choices=known, default=list(known), metavar="NAME", help="default: all")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        metavar="DIR",
        help="for results and plots; default: benchmarks/results/local",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--chip", choices=("sm_90", "sm_80"), default="sm_90", help="the chip that is modelled; default: sm_90"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="length of the gpu pass; default: 9.5")
    arguments = parser.parse_args()
    if arguments.tool == "gpu":
        chosen = [known[name] for name in arguments.op]
        return gpu.main(arguments.out, torch.device(arguments.device), arguments.minutes, arguments.quick, chosen)

    # Here, because the pass on a GPU does without their packages where it must.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import company, growth, model, overhead, pages, products

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if arguments.tool == "overhead":
        console.print(overhead.table())
        console.print(overhead.launches())
        return 0
    keep_memory()
    if arguments.tool == "company":
        chosen, seconds = [known[name] for name in arguments.op], 0.2 if arguments.quick else 1.0
        console.print(company.table(chosen, seconds, arguments.quick))
        return 0
    if arguments.tool == "model":
        return model.main(arguments.chip, arguments.op, arguments.out, console.print)
    if arguments.tool == "readme":
        for page, tables in pages.tables().items():
            page.write_text(pages.filled(page.read_text("utf-8"), tables), "utf-8")
        return 0

    others = OtherProcesses()
    torch.manual_seed(0)
    device, seconds = torch.device(arguments.device), 0.2 if arguments.quick else 1.0
    if arguments.tool == "growth":
        ceilings = measure_ceilings(device, {torch.bfloat16 if device.type == "cuda" else torch.float32}, seconds)
        curves = growth.measure(device, seconds, console.print, growth.QUICK if arguments.quick else growth.ALL)
        for file in growth.write(arguments.out, curves, report.conditions(device, others.share()), ceilings):
            console.print(f"wrote {file}")
        return 0
    if arguments.tool == "products":
        found = products.measure(device, seconds, console.print, arguments.quick)
        console.print(products.table(found))
        console.print(f"wrote {products.write(arguments.out, found, report.conditions(device, others.share()))}")
        return 0
    todo = cases([known[name] for name in arguments.op], device, arguments.quick)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Not refreshed of itself: that is a thread, which would draw beside what is timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("ceilings", total=1 + sum(1 + len(case.passes()) for case in todo))
        ceilings = measure_ceilings(device, {case.dtype for case in todo}, seconds)

        def announce(stage: str) -> None:
            progress.update(task, advance=1, description=stage, refresh=True)

        results = [measure(case, ceilings, seconds, announce) for case in todo]
    taken = others.share()
    header = report.conditions(device, taken)
    console.print(report.table(results, header, ceilings, taken))
    for file in report.write(arguments.out, results, header, ceilings):
        console.print(f"wrote {file}")
    return 0 if all(result.agrees for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
