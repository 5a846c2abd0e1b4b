"""Machine code of NVIDIA GPUs: its instructions, its loops, and the ways through them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

Line = tuple[str, int]  # of a source file, by its name alone


class Instruction(NamedTuple):
    address: int
    predicate: str
    op: str
    operands: str
    target: int | None  # of a branch
    stall: int  # cycles until its warp may issue the next one
    write: int  # scoreboard it sets when its result is there, 7 for none
    read: int  # scoreboard it sets when it has read its operands
    wait: int  # mask of scoreboards it waits for
    line: Line | None

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def off(self) -> bool:
        return self.predicate == "@!PT" or (self.op.startswith("LDGSTS") and self.operands.endswith("!PT"))

    @property
    def matrix(self) -> str:
        """HGMMA, HMMA and their like; empty for what is no matrix instruction."""
        return self.name if re.fullmatch(r"[HIQ]G?MMA|UTC\w*MMA", self.name) else ""


ENCODING = r"/\* 0x([0-9a-f]{16}) \*/"
FIRST = re.compile(rf"\s+/\*([0-9a-f]{{4,}})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Za-z0-9_.]+)\s*(.*?)\s*;\s+{ENCODING}")
SECOND = re.compile(rf"\s+{ENCODING}")
SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')


def tool(name: str) -> Path:
    """A program of NVIDIA's that Triton's wheel brings."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"the model reads machine code with {name}, which this Triton does not bring: {path}")
    return path


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        options = ("--print-code", "--print-line-info", "--print-instruction-encoding", file.name)
        done = subprocess.run((str(tool("nvdisasm")), *options), check=True, capture_output=True, text=True)
    return done.stdout


def parse(text: str) -> list[Instruction]:
    """The instructions of the one function in the disassembly. Of an instruction's 128 bits, which stand on two lines,
    the upper ones tell what the compiler has scheduled."""
    found: list[tuple[re.Match[str], Line | None, int]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    held: re.Match[str] | None = None
    line: Line | None = None
    for row in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", row):
            waiting.append(label[1])
        elif source := SOURCE.match(row):
            line = Path(source[1]).name, int(source[2])
        elif first := FIRST.match(row):
            held = first
            labels |= dict.fromkeys(waiting, int(first[1], 16))
            waiting = []
        elif held is not None and (second := SECOND.match(row)):
            found.append((held, line, int(second[1], 16) >> 41))
            held = None
    out = []
    for match, at, control in found:
        label = re.search(r"\.L_x_\d+", match[4])
        target = labels.get(label[0]) if label else None
        scheduled = (control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
        out.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4], target, *scheduled, at))
    while out and out[-1].op in ("NOP", "BRA"):  # padding behind the end
        out.pop()
    return out


@dataclass(eq=False)
class Loop:
    header: int
    blocks: set[int]
    parent: Loop | None = None
    children: list[Loop] = field(default_factory=list)


class Flow:
    """Blocks of instructions, the natural loops among them, and ways through them."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        at = {i.address: n for n, i in enumerate(code)}
        leaders = {0}
        for n, i in enumerate(code):
            if i.name in ("BRA", "EXIT", "RET", "BRX", "CALL", "BSYNC"):
                leaders.add(n + 1)
            if i.name in ("BRA", "BSSY", "CALL") and i.target in at:
                leaders.add(at[i.target])
        starts = sorted(n for n in leaders if n < len(code))
        self.blocks = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
        block_of = {code[start].address: n for n, start in enumerate(starts)}
        meets: dict[str, int | None] = {}  # where the threads that a BSSY separates meet again
        self.next = [self._next(n, block_of, meets) for n in range(len(self.blocks))]
        self.loops = self._loops()

    def _next(self, n: int, block_of: dict[int, int], meets: dict[str, int | None]) -> list[int]:
        last = self.blocks[n][-1]
        meets |= {i.operands.split(",")[0]: i.target for i in self.blocks[n] if i.name == "BSSY"}
        diverged = last.op.startswith("BRA.DIV")  # to a copy of what follows, for warps that have diverged
        conditional = diverged or last.predicate not in ("", "@PT") or bool(re.match(r"!?U?P\d", last.operands))
        out = []
        if last.name == "BSYNC" and meets.get(last.operands) in block_of:
            return [block_of[meets[last.operands]]]  # type: ignore[index]
        jump = last.name == "BRA" or (last.name == "CALL" and last.predicate)  # a call under a condition is a jump
        if jump and last.target in block_of and not diverged:
            out.append(block_of[last.target])
        if (last.name not in ("BRA", "EXIT", "RET", "BRX") or conditional) and n + 1 < len(self.blocks):
            out.append(n + 1)
        return list(dict.fromkeys(out))

    def _loops(self) -> list[Loop]:
        before: dict[int, set[int]] = defaultdict(set)
        backward: list[tuple[int, int]] = []
        seen: set[int] = set()
        around: set[int] = set()

        def visit(n: int) -> None:  # subroutines are never reached
            seen.add(n)
            around.add(n)
            for to in self.next[n]:
                before[to].add(n)
                if to in around:
                    backward.append((n, to))
                elif to not in seen:
                    visit(to)
            around.remove(n)

        visit(0)
        bodies: dict[int, set[int]] = {}
        for n, header in backward:
            body, stack = bodies.setdefault(header, {header}), [n]
            while stack:
                if (b := stack.pop()) not in body:
                    body.add(b)
                    stack += before[b]
        loops = [Loop(header, body) for header, body in sorted(bodies.items())]
        for loop in loops:
            outer = [o for o in loops if loop.blocks < o.blocks]
            loop.parent = min(outer, key=lambda o: len(o.blocks), default=None)
            if loop.parent is not None:
                loop.parent.children.append(loop)
        return loops

    def own(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop without those of loops within."""
        blocks = loop.blocks.difference(*(c.blocks for c in loop.children))
        return [i for b in sorted(blocks) for i in self.blocks[b]]

    def path(
        self, loop: Loop | None, trips: Callable[[Loop], int], worth: Callable[[Instruction], float]
    ) -> list[Instruction]:
        """The way through one iteration of a loop, or through the kernel, that is worth most. A loop within is passed
        ``trips`` times; below 0: avoided."""
        children = loop.children if loop else [x for x in self.loops if x.parent is None]
        child_of = {b: c for c in children for b in c.blocks}
        entry = loop.header if loop else 0

        @cache
        def best(b: int) -> tuple[float, list[Instruction]]:
            """From a block, or a loop within, on."""
            child = child_of.get(b)
            mine, value, nodes = self.blocks[b], 0.0, {b}
            if child is not None:
                times, nodes = trips(child), child.blocks
                mine = self.path(child, trips, worth) * times if times > 0 else []
                value = 1e7 if times >= 0 else -1e7
            following = {
                to for n in nodes for to in self.next[n] if to not in nodes and (not loop or to in loop.blocks)
            }
            headers = {child_of[x].header if x in child_of else x for x in following} - {entry}
            rest = max((best(x) for x in sorted(headers)), key=lambda x: x[0], default=(0.0, []))
            if rest[0] < 0 and self.blocks[b][-1].name == "EXIT":  # under a condition
                rest = 0.0, []
            return value + sum(map(worth, mine)) + rest[0], mine + rest[1]

        return best(entry)[1]
