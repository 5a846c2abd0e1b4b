"""Launches as they would be on a chip that is not there: their kernels, the roles of their programs, their time.

A role is what programs of one launch have in common that pass the same loops and branches. Of each, the loop in which
most instructions are issued, the hot one, is simulated by itself, and what is around it once.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from .machine import LATENCY, Machine, busy, deal, occupancy, pending, simulate, steady
from .programs import Array, Count, Known, Launch, Region
from .sass import Flow, Instruction, Line, Loop, disassemble, parse

STAGGERS = (0.03, 0.25, 0.5, 0.8)  # of an iteration, from one program to the next on an SM: nobody knows


@contextmanager
def launches_for(chip: str, inputs: Iterable[torch.Tensor]) -> Iterator[list[Launch]]:
    """Inside, launches are compiled for the chip and noted, not made. They leave ones in all integers but the inputs,
    as if something had been found."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tests import chips

    out: list[Launch] = []
    launch, kept = JITFunction.run, {x.data_ptr() for x in inputs}

    def note(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = dict(zip(self.arg_names, given, strict=False)) | options
        size = tuple(grid(arguments) if callable(grid) else grid)
        compiled = launch(self, *given, grid=grid, warmup=True, **options)
        out.append(Launch(self.fn.__name__, Path(self.fn.__code__.co_filename), size, arguments, compiled))
        for x in given:
            if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64) and x.data_ptr() not in kept:
                x.fill_(1)

    active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    before = getattr(driver, active)
    driver.set_active(chips._NamedDriver(chip))
    try:
        with patch.object(JITFunction, "run", note), patch.object(torch.cuda, "device_of", lambda x: nullcontext()):
            yield out
    finally:
        setattr(driver, active, before)


# --- what a kernel does --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A role, as instructions."""

    name: str
    programs: Array  # their numbers
    iterations: Array  # of the hot loop, by program
    iteration: list[Instruction]  # one of them; empty where no loop is hot
    rest: list[Instruction]  # of a program
    guessed: bool

    def matrix(self) -> Counter[str]:
        of_loop = Counter(i.matrix for i in self.iteration if i.matrix)
        return of_loop or Counter(i.matrix for i in self.rest if i.matrix)


def match_loops(flow: Flow, regions: list[Region]) -> dict[Loop, Region]:
    """Each loop of the machine code with the one of the source whose lines its instructions have; a line that few loops
    have says most."""
    loops = [r for r in regions if r.kind in ("for", "while")]
    lines = {r: {x for s in regions if s.loop() is r for x in s.lines} for r in loops}
    shared = Counter(x for r in loops for x in lines[r])
    out: dict[Loop, Region] = {}
    for loop in flow.loops:
        own = Counter(i.line for i in flow.own(loop) if i.line)
        worth = {r: sum(n / shared[x] for x, n in own.items() if x in lines[r]) for r in loops}
        if any(worth.values()):
            out[loop] = max(loops, key=lambda r: (worth[r], r not in out.values()))
        elif any(i.matrix for i in flow.own(loop)):
            raise ValueError("a loop with matrix products has no lines of source")
    return out


def parts(launch: Launch, flow: Flow, regions: list[Region]) -> list[Part]:
    """The ways that programs take."""
    matched = match_loops(flow, regions)
    passed = np.array([region.passed > 0 for region in regions])  # [regions, programs]
    members: dict[bytes, list[int]] = {}
    for program in range(passed.shape[1]):
        members.setdefault(passed[:, program].tobytes(), []).append(program)
    everywhere = {r for r, here in zip(regions, passed, strict=True) if here.all()}
    regions_of: dict[Line | None, set[Region]] = defaultdict(set)
    for region in regions:
        for line in region.lines:
            regions_of[line].add(region)

    def size(loop: Loop) -> int:
        return sum(i.name in ("LDG", "LDS", "STG", "STS", "LDGSTS", "ATOMG") for i in flow.own(loop)) or len(
            flow.own(loop)
        )

    def part(programs: Array) -> Part:
        mine = {r for r in regions if r.passed[programs].any()}

        def worth(i: Instruction) -> float:
            """On the way, which avoids other regions and seeks those that others avoid."""
            theirs = regions_of.get(i.line, everywhere)
            return 1.0 if theirs & everywhere else 1e4 if theirs & mine else -1e4

        def iterations(loop: Loop) -> Array:
            """By program; only those that an `if` around the body lets pass. A loop that the compiler has unrolled has
            a second one for the rest."""
            region = matched[loop]
            inside = [r for r in regions if r.parent is region and r.lines.total() > region.lines.total()]
            entered = np.maximum(region.entered[programs], 1)
            left = (inside or [region])[0].passed[programs] / entered
            pieces = sorted((x for x in matched if matched[x] is region), key=size, reverse=True)
            for piece in pieces:
                unrolled = round(size(piece) / size(pieces[-1]))
                mine = left // unrolled if len(pieces) > 1 else left
                if piece is loop:
                    break
                left = left - mine * unrolled
            return mine * entered

        def trips(loop: Loop) -> int:
            """Each time that the loop is entered; -1 if it never is."""
            entered = matched[loop].entered[programs].sum() if loop in matched else 0
            return round(iterations(loop).sum() / entered) if entered else 1 if loop not in matched else -1

        hot = max(
            (x for x in matched if trips(x) > 1),
            key=lambda x: len(flow.own(x)) * float(iterations(x).mean()),
            default=None,
        )
        calls: Counter[str] = Counter()
        for line, times in sum((r.calls for r in mine - everywhere), Counter[Line]()).items():
            calls[launch.function(line)] += times
        return Part(
            max(calls, key=lambda x: calls[x], default="others") if len(members) > 1 else "all",
            programs,
            iterations(hot) if hot else np.zeros(len(programs)),
            flow.path(hot, trips, worth) if hot else [],
            flow.path(None, lambda x: 0 if x is hot else trips(x), worth),
            any(r.guessed for r in mine),
        )

    return [part(np.array(x)) for x in members.values()]


# --- how long it takes ---------------------------------------------------------------------------------------------


@dataclass
class Role:
    name: str
    programs: int
    iterations: float  # of the hot loop, a program
    instructions: int  # in one of them, or in all of a program that has no such loop
    matrix: str  # those among them for matrix products, or if there are none those besides
    copies: str  # asynchronous, @ instructions from the issue of one to the wait for it
    loads: int  # others, from global memory
    cycles: float  # of a program in one iteration, while as many programs as fit are on its SM
    once: float  # and besides
    bound: str
    guessed: bool  # it passes loops whose bounds are not known


@dataclass
class Modelled:
    """A launch."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    resident: int  # programs on an SM at once
    roles: list[Role]
    instructions: float  # of all threads
    bytes: float  # loaded and stored, whether in L2 or not
    us: float
    busiest: str  # the unit with most to do
    busiest_us: float  # what it would take if it never waited


def loads(trace: list[Instruction]) -> tuple[str, int]:
    """Of one iteration the asynchronous copies, with the least number of instructions from the issue of one to the wait
    for it, which is what hides its latency; and the other loads from global memory."""
    live = [i for i in trace if not i.off]
    counts = Counter(i.name for i in live)
    ahead: list[int] = []
    groups: list[int] = []  # where each committed group began
    begun: int | None = None
    for n, i in enumerate(live * 3):
        if i.name == "LDGSTS" and begun is None:
            begun = n
        elif i.name == "LDGDEPBAR":
            groups.append(-1 if begun is None else begun)  # it may be empty
            begun = None
        elif i.name == "DEPBAR" and "SB0" in i.operands:
            done = max(0, len(groups) - pending(i))
            ahead += [n - g for g in groups[:done] if g >= 0]
            groups = groups[done:]
    return (f"{counts['LDGSTS']} @ {min(ahead, default=0)}" if ahead else ""), counts["LDG"] + counts["LD"]


def model(launch: Launch, machine: Machine, rules: Known, traffic: float) -> Modelled:
    """``traffic``: the bytes that the pass cannot do without. Where L2 cannot hold them they come from DRAM."""
    from tests import chips

    binary, meta = launch.compiled.asm["cubin"], launch.compiled.metadata
    usage = chips._cuobjdump(binary, "--dump-resource-usage")
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    spills = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    programs, warps = math.prod(launch.grid), meta.num_warps
    resident = min(occupancy(registers, meta.shared, warps, machine), math.ceil(programs / machine.sms))
    regions = Count(launch, rules).regions
    of_launch = parts(launch, Flow(parse(disassemble(binary))), regions)

    work: dict[str, float] = defaultdict(float)  # cycles of SMs
    instructions = 0.0
    for part in of_launch:
        for trace, times in ((part.iteration, part.iterations.sum()), (part.rest, len(part.programs))):
            for unit, cycles in busy(trace, machine, warps).items():
                work[unit] += cycles * times
            instructions += len(trace) * times * warps * 32
    moved = sum(float(region.passed.sum()) * region.bytes for region in regions)
    # Of a number that several threads load L2 sends less than their instructions ask for.
    asked = max(1.0, work["L2"] * machine.l2 / max(moved, 1.0))
    machine, work["L2"] = machine._replace(l2=machine.l2 * asked), work["L2"] / asked
    far = min(moved, traffic) > machine.l2_size
    latency = LATENCY["dram" if far else "global"]
    together = [40.0 * n for n in range(resident)]  # when programs of one wave begin
    took = np.zeros(programs)  # cycles
    roles = []
    for part in of_launch:
        each = steady(part.iteration, machine, warps, resident, latency, STAGGERS) if part.iteration else 0.0
        if part.iteration or programs <= 2 * machine.sms * resident:
            once = simulate(part.rest, machine, warps, together, latency)
        else:  # while some load others compute
            once = steady(part.rest, machine, warps, resident, latency, [1 / resident])
        took[part.programs] = once + each * part.iterations
        trace = part.iteration or part.rest
        unit, most = max(busy(trace, machine, warps).items(), key=lambda x: x[1])
        bound = unit if (each or once) < 1.4 * most * resident else "latency"
        matrix = ", ".join(f"{n} {name}" for name, n in part.matrix().items())
        mean = float(part.iterations.mean())
        counts = (len(part.programs), mean, len(trace), matrix, *loads(trace))
        roles.append(Role(part.name, *counts, each, once, bound, part.guessed))
    us = {unit: x / machine.sms / machine.clock / 1e3 for unit, x in work.items()}
    us["DRAM"] = min(moved, traffic) / (0.9 * machine.dram) * 1e6 if far else 0.0
    busiest = max(us, key=lambda unit: us[unit])
    time = max(us[busiest], deal(took, min(programs, machine.sms * resident)) / machine.clock / 1e3)
    return Modelled(
        launch.kernel, launch.grid, warps, registers, spills, meta.shared, resident, roles, instructions, moved, time,
        busiest, us[busiest],
    )  # fmt: skip
