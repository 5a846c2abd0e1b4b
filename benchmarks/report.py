"""What was measured: as a table, as JSON, as plots."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import torch

from flashpointer.agreement import Agreement

from .measure import Ceilings, Failure, Measurement, Result, Timing, keep_memory, memory_of
from .suite import Case, dtype_name, ops

# Imported where they are used: the numbers need neither.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

COLOURS = {"eager": "#9aa5b1", "compile": "#4c78a8", "rival": "#e3a857", "ours": "#c8344f"}
OTHERS = ("eager", "compile", "rival")

SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))

# More of the CPU than this makes a time one of the company as well.
QUIET = 0.05

HOW_TO_READ = """\
Medians, ± half the distance between the 20 % and the 80 % quantile. "/ ours": how many times as much as ours it takes.
"of ceiling": how near ours comes to the measured ceiling, had it to read each input once and write each gradient once;
above 100 % where a cache holds them. Peak memory: the most that was allocated above the inputs."""


# --- conditions ----------------------------------------------------------------------------------------------------


def conditions(device: torch.device, taken: float | None) -> dict[str, str]:
    """What the numbers depend on besides the code; ``taken`` is the share of the CPU that other processes took."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "memory": scaled(memory_of(device), BYTES),
        "allocator": keep_memory(),
        "other processes": "not watched" if taken is None else f"took {taken:.0%} of the CPU meanwhile",
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    try:  # on Linux, where platform does not know
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "absent"


# --- table ---------------------------------------------------------------------------------------------------------


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """To three digits, in the unit that suits it."""
    scale, unit = next((u for u in units if value >= u[0]), units[-1])
    return f"{short(value / scale)} {unit}"


def tick(units: Sequence[tuple[float, str]]) -> Callable[[float, int], str]:
    """How an axis writes its powers of ten."""
    return lambda value, _: scaled(value, units).replace(".00", "").replace(".0", "")


def short(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def table(
    results: list[Result], header: dict[str, str], ceilings: Ceilings, taken: float | None = None
) -> RenderableType:
    """The conditions, all cases, and what their reader must know: in red that others took much of the CPU."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    header = header | ceilings_said(ceilings)
    top = Table.grid(padding=(0, 2))
    for key, value in header.items():
        loud = key == "other processes" and taken is not None and taken > QUIET
        top.add_row(
            f"[dim]{key}[/]", f"[bold red]{value}: compare ratios alone, of rows near each other[/]" if loud else value
        )

    body = Table(box=box.SIMPLE_HEAD, show_lines=True, header_style="bold")
    for column in ("case", "", *COLOURS):
        body.add_column(column, style="bold" if column == "ours" else "", no_wrap=True)
    for column in (*(f"{other}\n/ ours" for other in OTHERS), "of\nceiling"):
        body.add_column(column, justify="right", no_wrap=True)
    for result in results:
        lines = list(case_lines(result)) if result.agrees else [["[bold red]FAILED[/]"]]
        case = f"[bold]{result.case.op.name}[/]\n{result.case.shape}\n[dim]{dtype_name(result.case.dtype)}[/]"
        body.add_row(case, *("\n".join(column) for column in zip(*lines, strict=True)))

    rivals = {r.case.op.name: f"rival of {r.case.op.name}: {rival_name(r)}" for r in results}
    return Group(top, body, *failures(results), *rivals.values(), f"[dim]{HOW_TO_READ}[/]")


def ceilings_said(ceilings: Ceilings) -> dict[str, str]:
    rates = {dtype_name(dtype): rate for dtype, rate in ceilings.matrix.items()}
    rates |= {} if ceilings.tf32 is None else {"tf32": ceilings.tf32}
    in_graph = ceilings.launch_in_graph
    return {
        "copy": f"{ceilings.bandwidth / 1e9:.1f} GB/s, read and written",
        "fill": f"{ceilings.write / 1e9:.1f} GB/s, written",
        "matrix product": ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()),
        "launch": scaled(ceilings.launch, SECONDS)
        + ("" if in_graph is None else f", {scaled(in_graph, SECONDS)} in a CUDA graph"),
    }


def case_lines(result: Result) -> list[list[str]]:
    """For each pass and quantity its name, the four contenders, the three ratios and the share of the ceiling."""
    lines = []
    for name, contenders in result.passes.items():
        for what, label in (("time", name), ("graph", "  in a graph"), ("peak", "  peak memory")):
            if any(getattr(m, what) is not None for m in contenders.values()):
                ratios = [result.ratio(name, what, other) for other in OTHERS]
                share = None if what == "peak" else result.share(name, what)
                lines.append(
                    [label]
                    + [cell(contenders[c], what) for c in COLOURS]
                    + ["" if r is None else f"{short(r)} x" for r in ratios]
                    + ["" if share is None else f"{share:.1%}"]
                )
    return lines


def cell(measurement: Measurement, what: str) -> str:
    from rich.markup import escape

    value = getattr(measurement, what)
    if isinstance(value, Failure):
        return f"[yellow]{escape(value.partition(':')[0])}[/]"
    if isinstance(value, Timing):
        return f"{scaled(value.median, SECONDS)} [dim]±{(value.high - value.low) / 2 / value.median:.0%}[/]"
    return "" if value is None else scaled(value, BYTES)


def rival_name(result: Result) -> str:
    return (result.case.op.rival.__doc__ or "").partition("\n")[0]


def failures(results: list[Result]) -> list[str]:
    """The checks that failed and what the contenders raised, in full."""
    from rich.markup import escape

    said = []
    for result in results:
        if isinstance(result.agreement, Failure):
            said.append(f"[red]{result.case}: the check raised {escape(result.agreement)}[/]")
        elif not result.agrees:
            said.append(f"[red]{result.case} disagrees with the reference: {'; '.join(map(str, result.agreement))}[/]")
        for name, contenders in result.passes.items():
            for contender, m in contenders.items():
                raised = [value for value in (m.time, m.graph, m.peak) if isinstance(value, Failure)]
                said += [f"[yellow]{result.case}, {name}, {contender}: {escape(value)}[/]" for value in raised]
    return said


# --- JSON ----------------------------------------------------------------------------------------------------------


def record(results: list[Result], header: dict[str, str], ceilings: Ceilings) -> dict[str, Any]:
    """Everything, in seconds and bytes."""
    return {
        "conditions": header,
        **ceilings_record(ceilings),
        "cases": [case_record(result) for result in results],
    }


def ceilings_record(ceilings: Ceilings) -> dict[str, Any]:
    return {
        "bytes_per_second": ceilings.bandwidth,
        "bytes_written_per_second": ceilings.write,
        "flop_per_second": {dtype_name(dtype): rate for dtype, rate in ceilings.matrix.items()},
        "tf32_flop_per_second": ceilings.tf32,
        "seconds_of_a_launch": ceilings.launch,
        "seconds_of_a_launch_in_a_graph": ceilings.launch_in_graph,
    }


def ceilings_of(record: dict[str, Any]) -> Ceilings:
    """The inverse."""
    return Ceilings(
        bandwidth=record["bytes_per_second"],
        matrix={getattr(torch, name): rate for name, rate in record["flop_per_second"].items()},
        write=record["bytes_written_per_second"],
        tf32=record["tf32_flop_per_second"],
        launch=record["seconds_of_a_launch"],
        launch_in_graph=record["seconds_of_a_launch_in_a_graph"],
    )


def case_record(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "op": case.op.name,
        "size": case.shape.size,
        "why": case.shape.why,
        "dtype": dtype_name(case.dtype),
        "rival": rival_name(result),
        "agrees": result.agrees,
        "agreement": agreement_record(result.agreement),
        "passes": {
            name: {
                "seconds_at_ceiling": result.floors[name],
                "share_of_ceiling": result.share(name, "time"),
                "contenders": {contender: dataclasses.asdict(m) for contender, m in contenders.items()},
                "over_ours": {
                    what: {other: result.ratio(name, what, other) for other in OTHERS}
                    for what in ("time", "graph", "peak")
                },
            }
            for name, contenders in result.passes.items()
        },
    }


def case_of(record: dict[str, Any], device: torch.device) -> Case:
    """The declared case that has the record's op, size and dtype."""
    op, size = ops()[record["op"]], tuple(record["size"])
    shape = next(shape for shape in op.shapes if shape.size == size)
    return Case(op, shape, getattr(torch, record["dtype"]), device)


def result_of(record: dict[str, Any], device: torch.device) -> Result:
    """The inverse of ``case_record``."""
    passes = record["passes"]
    return Result(
        case_of(record, device),
        agreement_of(record["agreement"]),
        {name: {c: measurement_of(m) for c, m in of["contenders"].items()} for name, of in passes.items()},
        {name: of["seconds_at_ceiling"] for name, of in passes.items()},
    )


def agreement_record(agreement: list[Agreement] | Failure) -> Any:
    return agreement if isinstance(agreement, Failure) else [{**a._asdict(), "ok": a.ok} for a in agreement]


def agreement_of(record: Any) -> list[Agreement] | Failure:
    if isinstance(record, str):
        return Failure(record)
    return [Agreement(*(a[field] for field in Agreement._fields)) for a in record]


def measurement_of(record: dict[str, Any]) -> Measurement:
    def value(x: Any) -> Any:
        return Timing(**x) if isinstance(x, dict) else Failure(x) if isinstance(x, str) else x

    return Measurement(**{what: value(x) for what, x in record.items()})


def write(out: Path, results: list[Result], header: dict[str, str], ceilings: Ceilings) -> list[Path]:
    """results.json, and a plot for each op and dtype of which anything was measured."""
    files = [write_json(out, results, header, ceilings)]
    for name, of_plot in plots(results).items():
        files.append(out / f"{name}.png")
        figure(of_plot, header).savefig(files[-1], dpi=150)
    return files


def write_json(out: Path, results: list[Result], header: dict[str, str], ceilings: Ceilings) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    file.write_text(json.dumps(record(results, header, ceilings), indent=1) + "\n")
    return file


# --- plots ---------------------------------------------------------------------------------------------------------


def plots(results: list[Result]) -> dict[str, list[Result]]:
    """What a plot shows, by op and dtype."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.agrees:
            found.setdefault(f"{result.case.op.name}-{dtype_name(result.case.dtype)}", []).append(result)
    return found


def figure(results: list[Result], header: dict[str, str]) -> Figure:
    """How many times our time and peak memory each contender takes: a line of dots for each shape."""
    from matplotlib.figure import Figure

    name, op = next(iter(results[0].passes)), results[0].case.op
    canvas = Figure(figsize=(12, 2.6 + 0.5 * len(results)), layout="constrained")
    title = f"{op.name}, {name}, {dtype_name(results[0].case.dtype)}, {header['device']}"
    time, memory = canvas.subplots(1, 2, sharey=True)
    dots(time, results, name, "time", SECONDS)
    time.set(title="time", ylabel=op.axes)
    time.set_yticks(range(len(results)), [op.label(result.case.shape.size) for result in results])
    time.set_ylim(len(results) - 0.5, -0.5)
    dots(memory, results, name, "peak", BYTES)
    memory.set_title("peak memory")
    handles, labels = time.get_legend_handles_labels()
    names = {"compile": "torch.compile", "rival": "\n".join(wrap(rival_name(results[0]), 70))}
    canvas.legend(
        handles, [names.get(label, label) for label in labels], ncols=4, loc="outside upper center", frameon=False,
        title=title, title_fontproperties={"weight": "bold", "size": 12},
    )  # fmt: skip
    canvas.supxlabel(
        "Times as much as ours, log scale, and ours on the right. Hollow: less than ours. Medians, with lines from the "
        f"20 % to the 80 % quantile.\n{said_of(header)}", size=8, color="#555555",
    )  # fmt: skip
    return canvas


def said_of(header: dict[str, str]) -> str:
    """The conditions, for a caption."""
    return (
        f"{header['cpu']}, threads: {header['threads']}; allocator: {header['allocator']}; other processes "
        f"{header['other processes']}; torch {header['torch']}, triton {header['triton']}; {header['date']}."
    )


def dots(axes: Axes, results: list[Result], name: str, what: str, units: Sequence[tuple[float, str]]) -> None:
    """A line of dots for each result, by what each contender takes over what ours takes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.axvline(1.0, color=COLOURS["ours"], label="ours")
    for contender in OTHERS:
        axes.plot([], [], "o", color=COLOURS[contender], label=contender)
        for y, result in enumerate(results):
            ratio, time = result.ratio(name, what, contender), result.passes[name][contender].time
            if ratio is None:
                continue
            if what == "time" and isinstance(time, Timing):
                axes.hlines(y, ratio * time.low / time.median, ratio * time.high / time.median, COLOURS[contender])
            fill = "white" if ratio < 1 else COLOURS[contender]
            axes.plot(ratio, y, "o", color=COLOURS[contender], markerfacecolor=fill)
    for y, result in enumerate(results):
        axes.text(
            1.02, y, ours_said(result, name, what, units), transform=axes.get_yaxis_transform(), va="center", size=9
        )
    axes.set_xscale("log")
    least, most = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if most / least > 50 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)


def ours_said(result: Result, name: str, what: str, units: Sequence[tuple[float, str]]) -> str:
    """Our own number, and who has none beside it."""
    measured = result.passes[name]
    ours = measured["ours"].number(what)
    failed = [c for c in OTHERS if measured[c].number(what) is None]
    return ("failed" if ours is None else scaled(ours, units)) + "".join(f"\n{c} failed" for c in failed)
