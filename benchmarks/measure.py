"""Times, peak memory, and the ceilings of the machine."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch._inductor import config as inductor_config

from flashpointer.agreement import Agreement

from .suite import Case, Contender, Inputs

T = TypeVar("T")
Run = Callable[[int], object]  # one repetition, given its number


ROUNDS = 5
MOST_REPETITIONS = 1000  # in a round
WARM_UP = 3

# On a GPU, inputs are rotated through sets that exceed the L2 cache this many times, so that each is read from memory.
PAST_CACHE = 4
USUAL_CACHE = 1 << 26
# A case that needs more sets than this is so small that launches bind it, wherever its inputs lie.
MOST_SETS = 128
# A pass that need take no longer than this is timed without its launches too: inside a CUDA graph.
LAUNCH_BOUND = 100e-6
LONGEST_REPLAY = 0.03  # seconds of such a graph, launches included
# Of an op on one number, to learn what a launch takes.
LAUNCHES = 1000

# Options of glibc's mallopt(3), by the numbers of its header.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Failure(str):
    """Why there is no number."""


@dataclass(frozen=True)
class Timing:
    """Seconds a repetition: the median, and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    repetitions: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[-1], len(seconds))


@dataclass
class Measurement:
    """A contender in a pass; None where nothing was measured."""

    time: Timing | Failure
    graph: Timing | Failure | None = None  # the time inside a CUDA graph
    peak: int | Failure | None = None  # bytes allocated above the start, inputs excluded

    def number(self, what: str) -> float | None:
        value = getattr(self, what)
        return None if isinstance(value, Failure) else value.median if isinstance(value, Timing) else value


@dataclass
class Result:
    """What is known of a case. Nothing is timed without agreement, so that no speed-up can be read from it."""

    case: Case
    agreement: list[Agreement] | Failure
    passes: dict[str, dict[str, Measurement]]
    floors: dict[str, float]  # seconds that each pass takes at the ceilings of the machine

    @property
    def agrees(self) -> bool:
        return not isinstance(self.agreement, Failure) and all(a.ok for a in self.agreement)

    def ratio(self, name: str, what: str, contender: str) -> float | None:
        """How many times as much as ours the contender takes."""
        theirs, ours = (self.passes[name][c].number(what) for c in (contender, "ours"))
        return theirs / ours if theirs is not None and ours else None

    def share(self, name: str, what: str) -> float | None:
        """What ours reaches of the ceiling; more than 1 where the inputs stay in a cache."""
        seconds = self.passes[name]["ours"].number(what)
        return self.floors[name] / seconds if seconds else None


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at its best, a second or in seconds."""

    bandwidth: float  # bytes of a large copy, read and written
    matrix: dict[torch.dtype, float]  # FLOP of a large matrix product
    write: float  # bytes of a large fill
    tf32: float | None  # FLOP of the float32 product on tensor cores
    launch: float  # seconds of an op on one number
    launch_in_graph: float | None  # the same as a node of a CUDA graph

    def floor(self, size: int, flops: float, dtype: torch.dtype) -> float:
        """The seconds below which no implementation can come."""
        return max(size / self.bandwidth, flops / self.matrix[dtype])


def measure_ceilings(device: torch.device, dtypes: set[torch.dtype], seconds: float) -> Ceilings:
    source = torch.rand(1 << 26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    n = 8192 if device.type == "cuda" else 2048
    runs: dict[str, Run] = {"copy": lambda _: target.copy_(source), "write": lambda _: target.fill_(1.0)}
    for dtype in dtypes:
        square = torch.rand((n, n), device=device).to(dtype)
        runs[str(dtype)] = lambda _, x=square: x @ x  # type: ignore[misc]
    number = torch.zeros(1, device=device)
    launches: dict[str, Run] = {"launch": lambda _: [number.add_(1.0) for _ in range(LAUNCHES)]}
    if device.type == "cuda":
        singles = torch.rand((n, n), device=device)
        runs["tf32"] = lambda _: tf32_product(singles)
        launches["launch in a graph"] = replay_of(lambda _: number.add_(1.0), LAUNCHES)
    timed = interleave(runs, device, seconds) | interleave(launches, device, seconds, dict.fromkeys(launches, LAUNCHES))
    # What the machine can do at its best, so the quick repetitions: noise only ever lowers a ceiling.
    took = {name: time.low for name, time in timed.items() if isinstance(time, Timing)}
    return Ceilings(
        bandwidth=2 * source.nbytes / took["copy"],
        matrix={dtype: 2 * n**3 / took[str(dtype)] for dtype in dtypes},
        write=target.nbytes / took["write"],
        tf32=2 * n**3 / took["tf32"] if "tf32" in took else None,
        launch=took["launch"],
        launch_in_graph=took.get("launch in a graph"),
    )


def tf32_product(x: torch.Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    x @ x
    torch.set_float32_matmul_precision(before)


def measure(case: Case, ceilings: Ceilings, seconds: float, announce: Callable[[str], None]) -> Result:
    """Checks the case, then measures its contenders side by side, each for so many seconds in each pass."""
    announce(f"{case}: agreement")
    result = Result(case, attempt(case.agreement), {}, {})
    contenders = fresh_contenders(case)
    sets = input_sets(case)
    for name, backward in case.passes().items():
        announce(f"{case}: {name}")
        size, flops = case.least_bytes(sets[0], backward), case.op.matrix_flops(sets[0], backward)
        result.floors[name] = ceilings.floor(size, flops, case.dtype)
        if result.agrees:
            wanted = case.op.differentiate if backward else ()
            made = {k: attempt(run_of, c, sets, wanted) for k, c in contenders.items()}
            runs = {k: run for k, run in made.items() if not isinstance(run, Failure)}
            # Not of a decoder: it waits for the host, which a graph cannot.
            capturable = case.device.type == "cuda" and bool(case.op.differentiate)
            in_graph = len(sets) if capturable and result.floors[name] < LAUNCH_BOUND else 0
            failed = {k: Measurement(why) for k, why in made.items() if isinstance(why, Failure)}
            result.passes[name] = failed | measure_runs(runs, case.device, seconds, in_graph)
    return result


def fresh_contenders(case: Case) -> dict[str, Contender]:
    # Else what was compiled for other cases counts towards the limit of recompilations.
    torch._dynamo.reset()
    # In this process: a pool of compilers would wake up beside what is timed.
    inductor_config.compile_threads = 1
    return case.contenders()


def input_sets(case: Case) -> list[Inputs]:
    """The inputs to rotate through; one set on a CPU, where scores come warm from the layer before."""
    first = case.inputs()
    if case.device.type == "cpu":
        return [first]
    cache = getattr(torch.cuda.get_device_properties(case.device), "L2_cache_size", USUAL_CACHE)
    wanted = math.ceil(PAST_CACHE * cache / sum(x.nbytes for x in first.values()))
    return [first, *(case.inputs() for _ in range(min(wanted, MOST_SETS) - 1))]


def run_of(contender: Contender, sets: list[Inputs], differentiate: tuple[str, ...]) -> Run:
    """The loss, and its gradients by the arguments to ``differentiate``: without any, under no_grad. Where the op gives
    more than one number, their upstream gradients are random and made before the clock starts."""
    own_sets = [contender.inputs(inputs) for inputs in sets]
    with torch.no_grad():
        upstream = torch.randn_like(contender.function(**own_sets[0])) if differentiate else None

    def run(repetition: int) -> None:
        inputs = own_sets[repetition % len(own_sets)]
        with torch.set_grad_enabled(bool(differentiate)):
            loss = contender.function(**inputs)
        if differentiate:
            torch.autograd.grad(loss, [inputs[name] for name in differentiate], upstream)

    return run


def measure_runs(
    runs: dict[str, Run], device: torch.device, seconds: float, in_graph: int = 0
) -> dict[str, Measurement]:
    """Time and peak memory of each run and, if asked, its time inside a CUDA graph of up to so many repetitions."""
    measured = {name: Measurement(time) for name, time in interleave(runs, device, seconds).items()}
    able = [name for name, m in measured.items() if isinstance(m.time, Timing)]
    for name in able:
        measured[name].peak = attempt(peak_memory, runs[name], device)
    if in_graph:
        # Of a slow one fewer repetitions: what it stores between its kernels leaves the cache no input anyway.
        fitting = {name: int(LONGEST_REPLAY / (measured[name].number("time") or 1.0)) for name in able}
        repetitions = {name: max(1, min(in_graph, n)) for name, n in fitting.items()}
        replays = {name: replay_of(runs[name], n) for name, n in repetitions.items()}
        for name, time in interleave(replays, device, seconds, repetitions).items():
            measured[name].graph = time
    return measured


def interleave(
    runs: dict[str, Run], device: torch.device, seconds: float, repetitions: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Timing | Failure]:
    """Times of the runs, in rounds that give each its turn, so that noise of the machine hits them all alike.

    Args:
        runs: by name; one that raises leaves the rounds.
        device: where they run.
        seconds: for each run, warm-up aside.
        repetitions: how many a run holds, where that is not one.
    """
    clock = cuda_clock if device.type == "cuda" else cpu_clock
    samples: dict[str, list[float] | Failure] = {}
    lengths: dict[str, int] = {}
    for name, run in runs.items():
        warm = attempt(clock, run, WARM_UP)
        samples[name] = warm if isinstance(warm, Failure) else []
        if not isinstance(warm, Failure):
            lengths[name] = max(1, min(MOST_REPETITIONS, int(seconds / ROUNDS / min(warm))))
    for _ in range(ROUNDS):
        for name, length in lengths.items():
            before, new = samples[name], attempt(clock, runs[name], length)
            if not isinstance(before, Failure):
                samples[name] = new if isinstance(new, Failure) else before + new
    return {
        name: taken if isinstance(taken, Failure) else Timing.of([t / repetitions.get(name, 1) for t in taken])
        for name, taken in samples.items()
    }


def cpu_clock(run: Run, repetitions: int) -> list[float]:
    seconds = []
    for i in range(repetitions):
        start = time.perf_counter()
        run(i)
        seconds.append(time.perf_counter() - start)
    return seconds


def cuda_clock(run: Run, repetitions: int) -> list[float]:
    """By events on the stream: a repetition counts from when the GPU reaches it, launches included only if it waits."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def replay_of(run: Run, repetitions: int) -> Run:
    """The repetitions as one CUDA graph, captured when first run."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay(_: int) -> None:
        if not graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(repetitions):
                    run(i)
            graphs.append(graph)
        graphs[0].replay()

    return replay


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes allocated above the start, at the most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(0)
        return torch.cuda.max_memory_allocated(device) - before
    with kineto_silenced(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run(0)
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


@contextmanager
def kineto_silenced() -> Iterator[None]:
    """Without the lines that Kineto prints whenever it starts and stops, from C and past any of its log levels."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def memory_of(device: torch.device) -> int:
    """Bytes that the device has, or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def keep_memory() -> str:
    """Makes glibc keep what is freed, from here on; returns what allocates, for the header.

    By default it gives a tensor of 32 MiB or more back to the system when it is freed, so that the next one is faulted
    in again, page by page: of large scores most of eager's time, and nothing of ours, which makes no such tensor.
    """
    if os.environ.get("LD_PRELOAD"):
        return f"LD_PRELOAD={os.environ['LD_PRELOAD']}"
    if platform.libc_ver()[0] != "glibc":
        return f"that of {platform.system()}"
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
    return "glibc, which keeps what is freed" if kept else "glibc, by its defaults"


class OtherProcesses:
    """They make a parallel loop wait for a thread that has lost its core: on few cores, longer than it takes."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float:
        """Of the CPU's time since the start."""
        taken, passed = (now - start for now, start in zip(self._seconds(), self._start, strict=True))
        return max(0.0, taken / (passed * (os.cpu_count() or 1)))

    def _seconds(self) -> tuple[float, float]:
        import psutil  # here, because the pass on a GPU does without it where it must

        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        own_and_children = own.user + own.system + own.children_user + own.children_system
        nice = getattr(machine, "nice", 0.0)  # user's time at low priority, where there is that
        return machine.user + nice + machine.system - own_and_children, time.monotonic()


def attempt(work: Callable[..., T], *arguments: Any) -> T | Failure:
    """What the work returns, or why it raised: one contender's failure is a result, not the end of the sweep."""
    try:
        return work(*arguments)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return Failure("out of memory")
        message = str(error).strip().partition("\n")[0]
        return Failure(f"{type(error).__name__}: {message}")
