"""``python -m benchmarks gpu --out DIR``: all that only a GPU can show, in one pass of ten minutes.

    ceilings      what the machine can do, and its conditions
    correctness   every op, shape and dtype against float64
    checks        pointer_scores of more than 2**31 numbers; 200 bitwise equal runs of the span ops
    tests         ``pytest -m gpu``, on half of the cores where pytest-xdist is installed
    sanitizer     memcheck and racecheck of every kernel, where compute-sanitizer is installed
    kernels       what each launch of an op takes, by the profiler
    sweep         the suite, timed, most valuable first
    growth        the curves of ``python -m benchmarks growth``

An illegal memory access spoils the process that makes it. So this one never touches the device: its children do, they
say each result as soon as they have it, and it is written at once. One that dies, hangs or is spoilt costs the case it
was at; a new one goes on with the next. What is not timed runs side by side, and compiles the contenders of the sweep
meanwhile. When the time is up, or at SIGTERM, the rest is recorded as skipped and the report written.

Only what the tests leave open is checked here: replays of CUDA graphs and 200 equal runs of the losses are in
``tests/test_gpu.py``, the graph of ``pointer_loss`` in ``tests/test_pointer_loss.py``, more than 2**31 scores of
``zlpr_loss`` in ``tests/test_zlpr_loss.py``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import flashpointer
from flashpointer.agreement import Agreement, relative_error, run

from . import pointer_loss, pointer_scores, report
from .measure import (
    Ceilings,
    Failure,
    OtherProcesses,
    Result,
    attempt,
    fresh_contenders,
    measure,
    measure_ceilings,
    run_of,
)
from .suite import DTYPES, Case, Inputs, Op, Shape, cases, dtype_name, ops

Record = dict[str, Any]

ROOT = Path(__file__).parent.parent
WORKER = [sys.executable, "-m", "benchmarks.gpu"]
# Unbuffered, for a result must not wait; and one that dies says where.
# And one cache for what Triton compiles: Inductor would have another, once it is at work in a process.
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "TRITON_INTERPRET": "0",
    "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache")),
}

MOST_VALUABLE = ("pointer_loss", "zlpr_loss", "pointer_scores", "pointer_decode")
FILES = dict.fromkeys(("kernels", "sweep", "growth"), "sweep.jsonl")  # the other stages': correctness.jsonl

# Shares of the time, counted from the start, after which a stage gives way to the next.
UNTIMED, SWEPT = 0.5, 0.88
REPORT_SECONDS = 20
CASE_SECONDS = 90  # after which a child hangs
GRACE = 5  # for a child that is asked to end

NO_TESTS: Record = {"passed": 0, "failed": 0, "skips": 0, "failures": []}
MARK = "\x1e"  # of a result among what else a child says
LONGEST_LINE, LINES_KEPT = 1 << 24, 1000
SPOILT = 75  # exit status of a child whose results stand, and that can make no more
FOUND = 76  # exit status of the sanitizer when it found something

REPEATS, PROFILED = 200, 20
# A quarter of a million cells, of which half lie in the last head: that one alone is past 2**31.
PAST_32_BITS, TOY, SAMPLES = (1, 33, 1, 8192, 64), (1, 3, 1, 32, 64), 1 << 18
# Of the memory, for each process beside others, and for one that only compiles.
SIDE_BY_SIDE, TO_COMPILE = 0.25, 0.03
MOST_BAD = 25  # lines of the summary


# --- in a child: one function a stage ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    device: str
    seconds: float  # for each contender in each pass
    memory: float = 1.0  # of the device's, at the most
    ceilings: Record | None = None


def ceilings(_: Record, device: torch.device, settings: Settings) -> Record:
    measured = measure_ceilings(device, set(DTYPES[device.type]), settings.seconds)
    backend = "{}, {}".format(*flashpointer.backends.explain(device, DTYPES[device.type][0]))
    conditions = {**report.conditions(device, None), "backend": backend, **driver()}
    return {"ok": True, "conditions": conditions, **report.ceilings_record(measured)}


def driver() -> dict[str, str]:
    found = shutil.which("nvidia-smi")
    if found is None:
        return {}
    asked = "driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    command = [found, f"--query-gpu={asked}", "--format=csv,noheader"]
    said = attempt(lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    return {"cuda": str(torch.version.cuda), asked.replace(",", ", "): said.strip()}


def correctness(item: Record, device: torch.device, _: Settings) -> Record:
    return agreed(report.case_of(item, device).agreement())


def agreed(agreement: list[Agreement]) -> Record:
    return {"ok": all(a.ok for a in agreement), "agreement": report.agreement_record(agreement)}


def past_32_bits(item: Record, device: torch.device, _: Settings) -> Record:
    """Sampled cells of ``pointer_scores``, against the formula of these cells."""
    dtype = getattr(torch, item["dtype"])
    inputs: dict[str, Any] = pointer_scores.make_inputs(tuple(item["size"]), dtype, device)
    del inputs["mask"]
    scores = flashpointer.pointer_scores(**inputs)
    cells = [torch.randint(n, (SAMPLES,), device=device) for n in scores.shape]
    cells[1][: SAMPLES // 2] = scores.shape[1] - 1
    truth, eager = (scores_of_cells(inputs, cells, d) for d in (torch.float64, dtype))
    epsilon = max(1e-6, torch.finfo(dtype).eps)
    sampled = scores[tuple(cells)]
    return agreed([Agreement("scores", relative_error(sampled, truth), relative_error(eager, truth), epsilon)])


def scores_of_cells(inputs: Inputs, cells: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    b, h, m, n = cells
    q, k, start, end = (inputs[name].to(dtype) for name in ("q", "k", "start", "end"))
    q, k = (flashpointer.reference.rotate(x, torch.arange(x.shape[-2], device=x.device)) for x in (q, k))
    scores = (q[b, m] * k[b, n]).sum(-1) * q.shape[-1] ** -0.5 + start[b, h, m] + end[b, h, n]
    return scores.masked_fill(m > n, -torch.inf)


def repeats(item: Record, device: torch.device, _: Settings) -> Record:
    case = report.case_of(item, device)
    inputs = case.inputs()
    first = outputs(case, inputs)
    equal = sum(all(map(torch.equal, first, outputs(case, inputs))) for _ in range(REPEATS))
    return {"ok": equal == REPEATS, "equal": equal, "of": REPEATS}


def outputs(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """What ours returns, and its gradients."""
    function = case.contenders()["ours"].function
    return run(function, inputs, case.op.differentiate) if case.op.differentiate else list(function(**inputs))


def once(item: Record, device: torch.device, _: Settings) -> Record:
    case = report.case_of(item, device)
    outputs(case, case.inputs())
    return {"ok": True}


def compiles(item: Record, device: torch.device, _: Settings) -> Record:
    """What ``torch.compile`` makes of the formula goes into its cache on disk. No result of the pass."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(TO_COMPILE)
    case = report.case_of(item, device)
    contender = fresh_contenders(case)["compile"]
    for backward in case.passes().values():
        run_of(contender, [case.inputs()], case.op.differentiate if backward else ())(0)
    return {"ok": True}


def kernels(item: Record, device: torch.device, _: Settings) -> Record:
    """Of each launch in a forward and a backward of ours the microseconds on the device, in order; medians."""
    case = report.case_of(item, device)
    inputs = case.inputs()
    outputs(case, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            outputs(case, inputs)
        torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    runs = [events[i : i + len(events) // PROFILED] for i in range(0, len(events), len(events) // PROFILED)]
    launches = [
        {"name": of_run[0].name, "microseconds": statistics.median(e.time_range.elapsed_us() for e in of_run)}
        for of_run in zip(*runs, strict=True)
    ]
    return {"ok": True, "launches": launches}


def sweep(item: Record, device: torch.device, settings: Settings) -> Record:
    case = report.case_of(item, device)
    known = unknown_ceilings() if settings.ceilings is None else report.ceilings_of(settings.ceilings)
    result = measure(case, known, settings.seconds, print)
    return {"ok": result.agrees, **report.case_record(result)}


def unknown_ceilings() -> Ceilings:
    """So that a sweep is possible where they could not be measured."""
    rates = {dtype: math.nan for dtypes in DTYPES.values() for dtype in dtypes}
    return Ceilings(math.nan, rates, math.nan, None, math.nan, None)


def growth(item: Record, device: torch.device, settings: Settings) -> Record:
    from . import growth as tool

    # Its tool measures all curves at once; a child, one point.
    tool.CURVES = {item["curve"]: [tuple(item["size"])]}
    (point,) = tool.measure(device, settings.seconds, print, tool.ALL)[item["curve"]]
    return {"ok": True, "contenders": {k: dataclasses.asdict(m) for k, m in point["measured"].items()}}


STAGES: dict[str, Callable[[Record, torch.device, Settings], Record]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "past 32 bits": past_32_bits,
    "repeats": repeats,
    "once": once,
    "compiles": compiles,
    "kernels": kernels,
    "sweep": sweep,
    "growth": growth,
}


def work(stage: str, settings: Settings, items: list[Record]) -> None:
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(settings.memory)
    for item in items:
        torch.manual_seed(0)
        begun = time.monotonic()
        result = attempt(STAGES[stage], item, device, settings)
        found = {"failure": result} if isinstance(result, Failure) else result
        # On a line of its own, whatever a library said last.
        print(f"\n{MARK}{json.dumps({**found, 'took': round(time.monotonic() - begun, 2)})}")
        if spoilt(device):
            sys.stdout.flush()
            os._exit(SPOILT)  # with no teardown, which may abort then


def spoilt(device: torch.device) -> bool:
    """By an earlier error on the device: an illegal access, or a failed capture, on which the allocator chokes."""
    if device.type == "cpu":
        return False
    return any(isinstance(attempt(f), Failure) for f in (torch.cuda.synchronize, torch.cuda.empty_cache))


# --- in the parent ----------------------------------------------------------------------------------------------------


class Pass:
    """The time left, the files, and the records."""

    def __init__(self, out: Path, settings: Settings, minutes: float) -> None:
        self.settings = settings
        self.begun = time.monotonic()
        self.whole = max(0.0, 60 * minutes - REPORT_SECONDS)
        self.end = self.begun + self.whole
        self.slots = asyncio.Semaphore(max(2, (os.cpu_count() or 1) - 2))
        # What is done again is recorded again: the last holds.
        self.records: dict[tuple[str, str], Record] = {}
        out.mkdir(parents=True, exist_ok=True)
        self.files = {
            name: (out / name).open("w", buffering=1) for name in ("log.txt", "correctness.jsonl", "sweep.jsonl")
        }

    def until(self, share: float) -> float:
        return self.begun + share * self.whole

    def over(self, until: float) -> bool:
        return time.monotonic() >= min(until, self.end)

    def cut_off(self) -> None:
        self.end = time.monotonic()

    def log(self, text: str) -> None:
        self.files["log.txt"].write(f"{time.monotonic() - self.begun:6.1f} {text}\n")

    def record(self, stage: str, item: Record, **found: Any) -> None:
        record = {"stage": stage, **item, **found}
        self.records[stage, name_of(item)] = record
        self.files[FILES.get(stage, "correctness.jsonl")].write(json.dumps(record) + "\n")
        line = f"{stage}: {name_of(item)}: {verdict(record)}"
        self.log(line)
        print(line, flush=True)

    def of(self, stage: str) -> list[Record]:
        return [record for (s, _), record in self.records.items() if s == stage]

    def only(self, stage: str) -> Record:
        return next(iter(self.of(stage)), {})

    def results(self) -> list[Record]:
        """Not of what only prepares others."""
        return [record for (stage, _), record in self.records.items() if stage != "compiles"]

    async def side_by_side(self, jobs: Iterable[Awaitable[None]]) -> None:
        for error in await asyncio.gather(*jobs, return_exceptions=True):
            if error is not None:
                self.log("".join(traceback.format_exception(error)))
                self.record("pass", {"error": type(error).__name__}, failure=str(error))

    async def follow(
        self, name: str, command: Sequence[str], until: float, seconds: float = math.inf,
        got: Callable[[Record], None] = lambda _: None,
    ) -> tuple[int | str, list[str]]:  # fmt: skip
        """A child, from start to end: its exit status, or why it had to end, and the last that it said.

        Args:
            name: before each of its lines in the log.
            command: what it runs.
            until: when it must end.
            seconds: how long it may take for a result.
            got: told each result.
        """
        child = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, limit=LONGEST_LINE,
        )  # fmt: skip
        assert child.stdout is not None
        said: deque[str] = deque(maxlen=LINES_KEPT)

        def heard(line: bytes) -> str:
            text, _, result = line.decode(errors="replace").rstrip().partition(MARK)
            if text:
                said.append(text)
                self.log(f"[{name}] {text}")
            return result

        async def listen(out: asyncio.StreamReader) -> int | str:
            last = time.monotonic()
            while not self.over(until):
                if time.monotonic() > last + seconds:
                    return f"took more than {seconds:g} s"
                try:
                    line = await asyncio.wait_for(out.readline(), 0.5)
                except asyncio.TimeoutError:
                    # What it has started may outlive it, and hold the pipe.
                    if child.returncode is None:
                        continue
                    line = b""
                if not line:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(child.wait(), GRACE)
                    return "hung up" if child.returncode is None else child.returncode
                if result := heard(line):
                    got(json.loads(result))
                    last = time.monotonic()
            return "the time was up"

        try:
            status = await listen(child.stdout)
        finally:
            await end(child)
        # A line that it had begun: pytest's names the test that hung.
        with suppress(asyncio.TimeoutError):
            for line in (await asyncio.wait_for(child.stdout.read(), GRACE)).splitlines():
                heard(line)
        return status, list(said)

    async def work(self, stage: str, items: Sequence[Record], until: float) -> None:
        """The items, in a child; in a new one from the next item on when it dies, hangs or is spoilt."""
        async with self.slots:
            todo = list(items)

            def got(found: Record) -> None:
                self.record(stage, todo.pop(0), **found)

            while todo and not self.over(until):
                before = len(todo)
                command = [*WORKER, stage, json.dumps(dataclasses.asdict(self.settings)), json.dumps(todo)]
                status, said = await self.follow(stage, command, until, CASE_SECONDS, got)
                if todo and not self.over(until) and (status not in (0, SPOILT) or len(todo) == before):
                    self.record(stage, todo.pop(0), failure=ended(status), said=said[-20:])
            for item in todo:
                self.record(stage, item, skipped="no time was left")

    async def test(self, files: list[Path], until: float) -> None:
        """The tests of the files that need a GPU, in one run of pytest."""
        workers = ["-n", str(max(1, (os.cpu_count() or 1) // 2))] if importlib.util.find_spec("xdist") else []
        async with self.slots:
            if self.over(until):
                for file in files:
                    self.record("tests", {"file": file.name}, skipped="no time was left")
                return
            with tempfile.TemporaryDirectory() as folder:
                junit = Path(folder) / "junit.xml"
                pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
                pytest += [*workers, f"--junitxml={junit}", *map(str, files)]
                status, said = await self.follow("tests", pytest, until)
                counts = attempt(junit_counts, junit)
        for file in files:
            item = {"file": file.name}
            if isinstance(counts, Failure):
                self.record("tests", item, failure=ended(status), said=said[-20:])
                continue
            known = counts.get(file.stem, dict(NO_TESTS))
            if self.over(until):
                known["cut"] = "the time was up"
            elif status not in (0, 1, 5):  # 1: a test failed; 5: none was selected
                known |= {"failure": ended(status), "said": said[-20:]}
            self.record("tests", item, ok=not known["failed"], **known)

    async def sanitize(self, tool: str, op: str, items: list[Record], until: float) -> None:
        item = {"tool": tool, "op": op}
        found = shutil.which("compute-sanitizer")
        if found is None:
            return self.record("sanitizer", item, skipped="compute-sanitizer was not found")
        async with self.slots:
            if self.over(until):
                return self.record("sanitizer", item, skipped="no time was left")
            results: list[Record] = []
            # Without PyTorch's allocator, whose large blocks would hide an overrun.
            command = [
                "env",
                "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
                found,
                "--tool",
                tool,
                "--error-exitcode",
                str(FOUND),
                *WORKER,
                "once",
            ]
            command += [json.dumps(dataclasses.asdict(self.settings)), json.dumps(items)]
            status, said = await self.follow(f"{tool} {op}", command, until, got=results.append)
        summary = [line for line in said if "SUMMARY" in line]
        ran = [result for result in results if result.get("ok")]
        known: Record = {"ran": len(ran), "of": len(items), "summary": summary}
        if status in (0, FOUND):
            # Products of cuBLAS that split their sum look like races to it; their kernels have other names than ours.
            places = [line for line in said if "access at" in line]
            known["of libraries"] = sum("_kernel" not in place for place in places)
            own = status == FOUND and known["of libraries"] < max(1, len(places))
            known["ok"] = not own and len(ran) == len(items)
        elif self.over(until):
            known["skipped"] = "the time was up"
        else:
            known |= {"failure": ended(status), "said": said[-20:]}
        self.record("sanitizer", item, **known)


async def end(child: asyncio.subprocess.Process) -> None:
    """With all that it has started. If it still runs it is asked first: pytest then writes down what it has."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if number == signal.SIGKILL or child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(child.wait(), GRACE)


def ended(status: int | str) -> str:
    if isinstance(status, str):
        return status
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def junit_counts(report: Path) -> dict[str, Record]:
    """By the name of a file without its ending."""
    counts: dict[str, Record] = {}
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        # The last, for a folder may be called so, too.
        file = next((part for part in test.get("classname", "").split(".")[::-1] if part.startswith("test_")), "")
        of_file = counts.setdefault(file, {**NO_TESTS, "failures": []})
        bad = [*test.findall("failure"), *test.findall("error")]
        of_file["failures"] += [f"{test.get('name')}: {(what.get('message') or '')[:300]}" for what in bad]
        of_file["failed" if bad else "passed" if test.find("skipped") is None else "skips"] += 1
    return counts


def name_of(item: Record) -> str:
    return " ".join(" x ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for x in item.values())


def verdict(record: Record) -> str:
    """In a word, and why if it is a bad one."""
    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    if "failure" in record:
        return f"FAILED: {record['failure']}"
    if record["ok"]:
        return f"ok: until {record['cut']}" if "cut" in record else "ok"
    checked = report.agreement_of(record["agreement"]) if "agreement" in record else None
    if isinstance(checked, list):
        return "WRONG: " + "; ".join(str(a) for a in checked if not a.ok)
    return f"WRONG: {checked or {k: record[k] for k in ('failures', 'summary', 'equal', 'ran') if k in record}}"


def is_bad(record: Record) -> bool:
    return verdict(record).startswith(("FAILED", "WRONG"))


# --- the pass ---------------------------------------------------------------------------------------------------------


def main(out: Path, device: torch.device, minutes: float, quick: bool, chosen: list[Op]) -> int:
    watched = attempt(OtherProcesses)
    the_pass = Pass(out, Settings(device.type, 0.01 if quick else 0.1), minutes)
    crashed = attempt(asyncio.run, stages(the_pass, device, quick, chosen))
    if isinstance(crashed, Failure):
        the_pass.record("pass", {"from": "here on"}, failure=crashed)
    share = watched if isinstance(watched, Failure) else attempt(watched.share)
    write_report(the_pass, out, device, None if isinstance(share, Failure) else share)
    return 1 if any(map(is_bad, the_pass.results())) else 0


async def stages(the_pass: Pass, device: torch.device, quick: bool, chosen: list[Op]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, the_pass.cut_off)
    todo, first = by_value(chosen, device, quick), dtype_name(DTYPES[device.type][0])
    of_op: dict[str, list[Record]] = {}
    for case in todo:
        of_op.setdefault(case.op.name, []).append(item_of(case))

    untimed, swept = the_pass.until(UNTIMED), the_pass.until(SWEPT)
    await the_pass.side_by_side([the_pass.work("ceilings", [{"device": device.type}], untimed)])
    measured = the_pass.only("ceilings")
    alone = dataclasses.replace(the_pass.settings, ceilings=measured if "ok" in measured else None)

    the_pass.settings = dataclasses.replace(alone, memory=SIDE_BY_SIDE)
    await the_pass.side_by_side(untimed_jobs(the_pass, of_op, first, quick, untimed))
    the_pass.settings = alone
    if device.type == "cuda":
        first_items = [item_of(case) for case in todo if dtype_name(case.dtype) == first]
        await the_pass.side_by_side([the_pass.work("kernels", first_items, swept)])
    # Side by side they may have been too much for the memory; alone they may not.
    for stage in ("correctness", "past 32 bits"):
        tight = [record for record in the_pass.of(stage) if record.get("failure") == "out of memory"]
        again: list[Record] = [
            {key: record[key] for key in ("op", "size", "dtype") if key in record} for record in tight
        ]
        await the_pass.side_by_side([the_pass.work(stage, again, swept)])

    await the_pass.side_by_side([the_pass.work("sweep", [item_of(case) for case in todo], swept)])
    if "pointer_loss" in of_op:
        points = attempt(growth_points, quick)
        if isinstance(points, Failure):
            return the_pass.record("growth", {"curve": "all"}, failure=points)
        await the_pass.side_by_side([the_pass.work("growth", points, the_pass.end)])


def untimed_jobs(
    the_pass: Pass, of_op: dict[str, list[Record]], first: str, quick: bool, until: float
) -> Iterator[Awaitable[None]]:
    """In the order in which they get their turn; ``first`` is the dtype that counts."""
    firsts = {op: [item for item in items if item["dtype"] == first] for op, items in of_op.items()}
    for items in of_op.values():
        yield the_pass.work("correctness", items, until)
    if any(op.startswith("pointer_") for op in of_op):
        size = TOY if quick else PAST_32_BITS
        yield the_pass.work("past 32 bits", [{"size": size, "dtype": first}], until)
        span_ops = [item for op, items in firsts.items() if op.startswith("pointer_") for item in items]
        yield the_pass.work("repeats", span_ops, until)
    tests = sorted((ROOT / "tests").glob("test_*.py"), key=lambda file: (file.name != "test_gpu.py", file.name))
    yield the_pass.test(tests[: 1 if quick else None], until)
    for item in chain.from_iterable(firsts.values()):
        yield the_pass.work("compiles", [item], until)
    for tool in ("memcheck", "racecheck"):
        for op, items in firsts.items():
            small = [item for item in items if quick or item["size"] in ops()[op].quick]
            yield the_pass.sanitize(tool, op, small, until)


def by_value(chosen: list[Op], device: torch.device, quick: bool) -> list[Case]:
    """The cases, most valuable first: of every op the dtype that counts, then the others. Quick: its smallest shape."""
    if quick:
        chosen = [dataclasses.replace(op, shapes=(smallest(op, device),)) for op in chosen]
    dtypes = DTYPES[device.type][: 1 if quick else None]
    of = [case for case in cases(chosen, device, quick=False) if case.dtype in dtypes]
    return sorted(of, key=lambda case: (dtypes.index(case.dtype), rank(case.op)))


def rank(op: Op) -> int:
    return MOST_VALUABLE.index(op.name) if op.name in MOST_VALUABLE else len(MOST_VALUABLE)


def smallest(op: Op, device: torch.device) -> Shape:
    return min((shape for shape in op.shapes if device.type in shape.devices), key=lambda shape: math.prod(shape.size))


def item_of(case: Case) -> Record:
    return {"op": case.op.name, "size": case.shape.size, "dtype": dtype_name(case.dtype)}


def growth_points(quick: bool) -> list[Record]:
    """Of the curves in turn, so that none has all of the time."""
    from .growth import CURVES

    longest = 1 if quick else max(map(len, CURVES.values()))
    return [{"curve": name, "size": of[i]} for i in range(longest) for name, of in CURVES.items() if i < len(of)]


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(the_pass: Pass, out: Path, device: torch.device, share: float | None) -> None:
    """What costs most comes last; a part that fails costs no other."""
    measured = the_pass.only("ceilings")
    known = report.ceilings_of(measured) if "ok" in measured else unknown_ceilings()
    header = report.conditions(torch.device("cpu"), share)
    header |= {k: v for k, v in measured.get("conditions", {"device": "unknown"}).items() if k != "other processes"}
    results = [report.result_of(record, device) for record in the_pass.of("sweep") if "passes" in record]
    lost = {
        "results.json": attempt(report.write_json, out, results, header, known),
        "the table": attempt(write_table, the_pass, results, header, known),
        "growth": attempt(write_growth, the_pass, out, device, header, known),
    }
    print("\n".join(summary(the_pass, results, header | report.ceilings_said(known))), flush=True)
    lost["plots.pdf"] = attempt(write_plots, out, results, header)
    for what, why in lost.items():
        if isinstance(why, Failure):
            the_pass.log(f"not written: {what}: {why}")
            print(f"not written: {what}: {why}")


def write_table(the_pass: Pass, results: list[Result], header: dict[str, str], known: Ceilings) -> None:
    from rich.console import Console

    Console(file=the_pass.files["log.txt"], width=160).print(report.table(results, header, known))


def write_growth(the_pass: Pass, out: Path, device: torch.device, header: dict[str, str], known: Ceilings) -> None:
    """With inputs that have shapes and no numbers: these are all that the share of the floor is computed from."""
    records = [record for record in the_pass.of("growth") if "contenders" in record]
    if not records:
        return
    from . import growth as tool

    curves: dict[str, list[Record]] = {}
    for record in records:
        batch, heads, length = record["size"]
        size = (batch, heads, 1, length, tool.HEAD_SIZE)
        inputs = pointer_loss.make_inputs(size, DTYPES[device.type][0], torch.device("meta"))
        of = {name: report.measurement_of(m) for name, m in record["contenders"].items()}
        curves.setdefault(record["curve"], []).append({"size": Shape(size, ""), "inputs": inputs, "measured": of})
    tool.write(out, curves, header, known)


def write_plots(out: Path, results: list[Result], header: dict[str, str]) -> None:
    """All in one file; ``report.write`` draws them one by one from results.json."""
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(out / "plots.pdf") as pages:
        for of_plot in report.plots(results).values():
            pages.savefig(report.figure(of_plot, header))


def summary(the_pass: Pass, results: list[Result], header: dict[str, str]) -> list[str]:
    """What counts most comes last, for of a long output it is the end that is seen."""
    bad = [f"{s}: {name}: {verdict(record)[:200]}" for (s, name), record in the_pass.records.items() if is_bad(record)]
    lines = ["", *map(speed, results), "", *bad[:MOST_BAD]]
    if len(bad) > MOST_BAD:
        lines.append(f"and {len(bad) - MOST_BAD} more")
    lines += ["", *(f"{key}: {value}" for key, value in header.items()), ""]
    for stage in dict.fromkeys(stage for stage, _ in the_pass.records):
        words = Counter(verdict(record).partition(":")[0] for record in the_pass.of(stage))
        lines.append(f"{stage}: " + ", ".join(f"{n} {word}" for word, n in words.items()))
    of_tests = the_pass.of("tests")
    counts = [f"{sum(tests.get(what, 0) for tests in of_tests)} {what}" for what in ("passed", "failed", "skips")]
    return [*lines, f"pytest -m gpu: {', '.join(counts)}"]


def speed(result: Result) -> str:
    """In one line: ours in the first pass, and how many times as much the others take."""
    if not result.passes:
        return f"{result.case}: not timed, for it does not agree"
    name = next(iter(result.passes))
    ours = {what: result.passes[name]["ours"].number(what) for what in ("time", "graph", "peak")}
    units = {"time": report.SECONDS, "graph": report.SECONDS, "peak": report.BYTES}
    said = [f"{what} {report.scaled(x, units[what])}" for what, x in ours.items() if x is not None]
    ratios = {other: result.ratio(name, "time", other) for other in report.OTHERS}
    said += [f"{other} {report.short(ratio)} x" for other, ratio in ratios.items() if ratio is not None]
    share = result.share(name, "graph" if ours["graph"] else "time")
    return f"{result.case}: " + ", ".join(said + ([] if share is None else [f"{share:.0%} of ceiling"]))


if __name__ == "__main__":
    work(sys.argv[1], Settings(**json.loads(sys.argv[2])), json.loads(sys.argv[3]))
