"""What instructions cost a multiprocessor (SM), and how long its warps take over some of them.

The latencies are rounded from published microbenchmarks. Caches, pages of memory, bank conflicts, clocks and power are
not modelled.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .sass import Instruction


class Machine(NamedTuple):
    name: str
    sms: int
    clock: float  # GHz, under load
    dram: float  # bytes a second, of which 0.9 can be had
    l2: float  # bytes a cycle and SM
    l2_size: float  # bytes
    shared: int  # KiB an SM
    tensor: float  # bf16 multiply-adds a cycle and scheduler with dense operands
    mma_sync: float  # of that, what HMMA reaches
    flops: float  # bf16 a second, of a large product
    doubles: float  # multiply-adds of float64 a cycle and SM


MACHINES = {
    "sm_90": Machine("H100 SXM", 132, 1.7, 3.35e12, 32.0, 50e6, 228, 512.0, 0.62, 800e12, 64.0),
    "sm_80": Machine("A100 SXM 80GB", 108, 1.41, 2.0e12, 32.0, 40e6, 164, 256.0, 1.0, 264e12, 32.0),
}

# Cycles until a result is there. Global loads hit L2 where not all of what a pass moves comes from DRAM.
LATENCY = {
    "global": 280, "dram": 620, "shared": 30, "ldsm": 33, "shfl": 24, "mufu": 22, "mma": 33, "wgmma": 30, "bar": 24,
    "fence": 18, "conv": 22, "constant": 40, "atomic": 350, "uniform": 14,
}  # fmt: skip
# Cycles' worth of work that may wait in front of a unit.
QUEUES = {"lsu": 24, "tensor": 64, "mufu": 8, "double": 0, "alu": 0, "fma": 0, "heavy": 0}

FMA = re.compile(r"(FFMA|FADD|FMUL|FFMA2|FADD2|FMUL2|HFMA2|HADD2|HMUL2)$")
HEAVY = re.compile(r"(IMAD|IDP|IMUL)$")  # the half of the float pipe that multiplies integers
ALU = re.compile(
    r"(IADD\w*|VIADD\w*|VIMNMX\w*|ISETP|LOP3|PLOP3|LEA|SHF|IABS|SGXT|PRMT|IMNMX|R2P|P2R|BMSK|I2FP|VOTE|FMNMX\w*|FSETP"
    r"|FSEL|SEL|FSET|FCHK|F2FP|MOV|CS2R|NOP|HSETP2|HMNMX2)$"
)
UNIFORM = re.compile(r"(U[A-Z0-9]+|R2UR|S2UR|VOTEU|REDUX)$")
CONVERT = re.compile(r"(F2F|F2I|I2F|FRND|POPC|FLO|BREV|MOVM)$")
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP)$")
GLOBAL = re.compile(r"(LDG|LD|STG|ST|LDGSTS|RED|ATOM|ATOMG)$")


class Cost(NamedTuple):
    unit: str
    cycles: float  # of its unit, a warp: of a quarter of the SM, but of the whole one's lsu, which the quarters share
    latency: float
    bytes: float = 0.0  # of global memory, a warp


def width(op: str) -> int:
    """Bytes a thread loads or stores."""
    sizes = {"128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in op.split(".") if part in sizes), 4)


def cost(i: Instruction, machine: Machine, global_latency: float) -> Cost:
    name = i.name
    if name == "HGMMA":
        _, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", i.op).groups())  # type: ignore[union-attr]
        depth = k if k != 8 else 16  # tf32: k 8 at half the rate
        from_registers = "gdesc" not in i.operands.split(", ")[1]
        # A warpgroup is four warps, one on each scheduler; operands from shared memory come at 128 bytes a cycle.
        feed = (0 if from_registers else 64 * depth * 2 / 128) + n * depth * 2 / 128
        return Cost("tensor", max(16 * n * depth / machine.tensor, feed), LATENCY["wgmma"])
    if i.matrix:
        shape = re.search(r"\.(\d{4,5})\b", i.op)
        depth = {"16816": 16, "1688": 8, "1684": 4}.get(shape[1] if shape else "", 16)
        rate = machine.tensor * machine.mma_sync / (2 if "TF32" in i.op else 1)
        return Cost("tensor", 16 * 8 * depth / rate, LATENCY["mma"])
    if name == "MUFU":
        return Cost("mufu", 8, LATENCY["mufu"])
    if GLOBAL.match(name):
        size = 0 if i.off else width(i.op)
        latency = LATENCY["atomic"] if name.startswith("ATOM") else global_latency
        return Cost("lsu", max(1, size * 32 / 128), latency, size * 32)
    if name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        size = 16 if i.op.endswith(".4") else 8 if i.op.endswith(".2") else width(i.op)
        return Cost("lsu", 1 if i.off else max(1, size * 32 / 128), LATENCY["ldsm" if name == "LDSM" else "shared"])
    if name in ("SHFL", "MATCH"):
        return Cost("lsu", 1, LATENCY["shfl"])
    if CONVERT.match(name):
        return Cost("mufu", 8, LATENCY["conv"])
    if DOUBLE.match(name):
        return Cost("double", 128 / machine.doubles, LATENCY["conv"])
    if name in ("S2R", "LDC", "LDCU", "ULDC", "S2UR", "LDL", "STL"):
        return Cost("other", 1, LATENCY["constant"])
    if FMA.match(name):
        return Cost("fma", 1, 4)
    if HEAVY.match(name):
        return Cost("heavy", 2, 4)
    if UNIFORM.match(name):
        return Cost("other", 1, LATENCY["uniform"])
    return Cost("alu", 2, 5) if ALU.match(name) else Cost("other", 1, 20)


def busy(trace: Iterable[Instruction], machine: Machine, warps: int) -> dict[str, float]:
    """Cycles of an SM that each of its units takes over what the warps of one block issue."""
    out: dict[str, float] = defaultdict(float)
    for i in trace:
        c = cost(i, machine, 0)
        out["issue"] += warps / 4
        if c.unit != "other":
            out["fma" if c.unit == "heavy" else c.unit] += c.cycles * (warps if c.unit == "lsu" else warps / 4)
        out["L2"] += c.bytes * warps / machine.l2
    return out


# --- the simulated scheduler ---------------------------------------------------------------------------------------


def place(warps: int, blocks: int) -> list[int]:
    """The blocks of the warps on the fullest of an SM's four schedulers, to which warps go in turn."""
    return [n // warps for n in range(0, warps * blocks, 4)]


class Warp:
    def __init__(self, block: int, start: float) -> None:
        self.block, self.ready, self.at = block, start, 0
        self.boards = [0.0] * 6
        self.copies = 0.0  # when those of the open group are done
        self.groups: list[float] = []  # of copies
        self.products: list[float] = []  # of HGMMA
        self.barriers, self.waiting = 0, False


def pending(i: Instruction) -> int:
    """How many groups may be left when a wait is over."""
    return int(re.findall(r"0x([0-9a-f]+)", i.operands)[-1], 16)


def simulate(
    trace: list[Instruction], machine: Machine, warps: int, starts: Sequence[float], latency: float, repeat: int = 1
) -> float:
    """Cycles until every warp on one of an SM's schedulers has run the trace ``repeat`` times, where the SM has a block
    for each of the starts.

    Warps issue in order, one instruction a cycle, heeding stall counts, scoreboards, barriers, groups of copies, and
    the units' throughput. What the four schedulers share serves them alike.
    """
    costs = [cost(i, machine, latency) for i in trace]
    placed = place(warps, len(starts))
    running = [Warp(block, starts[block]) for block in placed]
    share = warps * len(starts) / len(placed)
    arrivals: dict[tuple[int, int], list[float]] = defaultdict(list)
    free: dict[str, float] = defaultdict(float)
    total = len(trace) * repeat
    clock, turn, last = 0.0, 0, 0.0

    def earliest(w: Warp) -> float:
        """When the next instruction of a warp may be issued; inf at a barrier that others have not reached."""
        i, c = trace[w.at % len(trace)], costs[w.at % len(trace)]
        t = max([w.ready, *(w.boards[b] for b in range(6) if i.wait >> b & 1)])
        if i.name == "DEPBAR" and "SB0" in i.operands:
            t = max([t, *w.groups[: max(0, len(w.groups) - pending(i))]])
        elif i.op.startswith("WARPGROUP.DEPBAR"):
            t = max([t, *w.products[: max(0, len(w.products) - pending(i))]])
        elif i.name == "SYNCS" and "TRYWAIT" in i.op:
            t = max([t, *w.groups[:1]])
        elif i.name == "BAR" and "ARV" not in i.op:
            met = arrivals[w.block, w.barriers]
            if not w.waiting:
                met.append(max(t, clock))
                w.waiting = True
            if len(met) < placed.count(w.block):
                return math.inf
            t = max(met) + LATENCY["bar"]
        return max(t, free[c.unit] - QUEUES[c.unit]) if c.unit in QUEUES else t

    alive = len(running)
    while alive:
        chosen, soonest = running[turn], math.inf
        for n in range(len(running)):  # the same warp as long as it can, then the next one
            w = running[(turn + n) % len(running)]
            if w.at < total and (t := earliest(w)) < soonest:
                soonest, chosen = t, w
                if t <= clock:
                    break
        if soonest == math.inf:
            raise ValueError("its warps wait for each other for ever")
        w, clock = chosen, max(clock, soonest)
        i, c = trace[w.at % len(trace)], costs[w.at % len(trace)]
        cycles = c.cycles * share if c.unit == "lsu" else c.cycles
        begin = max(clock, free[c.unit])
        if c.unit in QUEUES:
            free[c.unit] = begin + cycles
        done = begin + cycles + c.latency
        if c.bytes:
            free["L2"] = max(clock, free["L2"]) + c.bytes * share / machine.l2
            done = max(done, free["L2"] + c.latency)
        w.ready = clock + max(1, i.stall)
        if i.name == "LDGSTS":
            w.copies = max(w.copies, done)
        elif i.name == "UTMALDG":
            w.groups.append(clock + latency + 200)
        elif i.name == "LDGDEPBAR":
            w.groups.append(w.copies)
        elif i.name == "HGMMA" and "gsb0" in i.operands:
            w.products.append(done)
        elif i.name == "DEPBAR" and "SB0" in i.operands:
            w.groups = w.groups[max(0, len(w.groups) - pending(i)) :]
        elif i.op.startswith("WARPGROUP.DEPBAR"):
            w.products = w.products[max(0, len(w.products) - pending(i)) :]
        elif i.name in ("MEMBAR", "FENCE"):
            done = w.ready = max(w.ready, clock + LATENCY["fence"])
        elif i.name == "BAR" and "ARV" not in i.op:
            w.barriers, w.waiting = w.barriers + 1, False
        if i.write < 6:
            w.boards[i.write] = max(w.boards[i.write], done)
        if i.read < 6:
            w.boards[i.read] = max(w.boards[i.read], begin + cycles + 12)
        w.at += 1
        clock += 1
        turn = running.index(w)
        if w.at == total:
            alive -= 1
            last = max(last, w.ready, *w.boards, *w.groups, *w.products)
    return last


def steady(
    trace: list[Instruction], machine: Machine, warps: int, blocks: int, latency: float, staggers: Iterable[float]
) -> float:
    """Cycles in which each of the blocks does one iteration, while all of them run: an average over how far one may be
    ahead of the next, as shares of an iteration."""
    few, many = 2, 5
    alone = simulate(trace, machine, warps, [0.0], latency)
    each = []
    for stagger in staggers:
        starts = [alone * (stagger * block % 1.0) for block in range(blocks)]
        a, b = (simulate(trace, machine, warps, starts, latency, times) for times in (few, many))
        each.append(max(1.0, (b - a) / (many - few)))
    return sum(each) / len(each)


# --- a launch ------------------------------------------------------------------------------------------------------


def occupancy(registers: int, shared: int, warps: int, machine: Machine) -> int:
    """Blocks that fit an SM at once."""
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    by_shared = machine.shared * 1024 // (shared + 1024)
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


def deal(cycles: Iterable[float], slots: int) -> float:
    """Until the last of the programs is done, each given to the first slot that is free."""
    free = [0.0] * slots
    for more in cycles:
        heapq.heappush(free, heapq.heappop(free) + more)
    return max(free)
