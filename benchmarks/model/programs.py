"""How often each program of a launch passes the loops and branches of its kernel, from Triton's IR of the kernel.

Numbers that follow from the launch's arguments and the number of a program are computed, for all programs at once. What
is loaded is not known, nor what follows from it, but for what ``Known`` tells.
"""

from __future__ import annotations

import linecache
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .sass import Line

Array = Any  # of NumPy: a number for each program, behind an axis for each loop around it
Value = Any  # the same; or "int" or "float": not known, and whether it follows from numbers with a point
LARGEST = 200_000  # numbers, with which loops are still followed iteration by iteration


class Launch(NamedTuple):
    kernel: str
    file: Path
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any  # by Triton

    def source(self, line: Line) -> str:
        return linecache.getline(str(self.file.with_name(line[0])), line[1])

    def function(self, line: Line) -> str:
        """That has a line of source."""
        rows = linecache.getlines(str(self.file.with_name(line[0])))[: line[1]]
        return next((found[1] for row in reversed(rows) if (found := re.match(r"def (\w+)", row))), "")


class Known(NamedTuple):
    """What cannot be seen in a launch: what a line of source with some word in it loads, or finds to be the largest;
    whether comparisons with numbers that have a point come out true; how often the while loops of a kernel are passed,
    if not once. All else is assumed: tokens are kept, loops between bounds that are not known are passed once, and
    those of which only the first one is not known begin at 0."""

    loaded: tuple[tuple[str, int], ...] = ()
    passes: bool = False
    times: tuple[tuple[str, int], ...] = ()


@dataclass(eq=False)
class Region:
    """The body of a loop, or one side of a branch."""

    kind: str  # kernel, for, while, then, else
    parent: Region | None = None
    line: Line | None = None
    lines: Counter[Line] = field(default_factory=Counter)  # of its operations, without those of regions within
    calls: Counter[Line] = field(default_factory=Counter)  # the same, as lines of the functions that the kernel calls
    bytes: float = 0.0  # that they load and store, if no mask hinders them
    guessed: bool = False  # how often it is passed is not known
    entered: Array = 0.0  # how often, by program
    passed: Array = 0.0  # and how often in all

    def loop(self) -> Region | None:
        """The innermost around it, or itself."""
        return self if self.kind in ("for", "while") or self.parent is None else self.parent.loop()


class Operation(NamedTuple):
    name: str
    results: list[str]
    rest: str
    lines: tuple[Line, ...]  # of the source: the innermost one, that of the call, and so on
    bodies: list[tuple[Region, list[Any]]]


# --- reading -------------------------------------------------------------------------------------------------------

LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)")
OPERATION = re.compile(r'^(?:%([\w.]+)(?::(\d+))? = )?"?([a-z_]+\.[a-z_.0-9]+)"?(.*)$')


def read(text: str) -> tuple[list[str], list[Operation], list[Region]]:
    """The parameters, the operations and the regions of the one function in the IR."""
    locations = dict(LOCATION.findall(text))

    @cache
    def resolve(location: str) -> tuple[Line, ...]:
        """Lines of source: the innermost one, that of the call, and so on."""
        if match := re.match(r'"([^"]*)":(\d+):\d+$', location):
            return ((match[1].rpartition("/")[2], int(match[2])),)
        inner = re.findall(r"#loc\d*", location)[:2]
        return tuple(line for name in inner for line in resolve(locations.get(name, "")))

    def lines_of(row: str) -> tuple[Line, ...]:
        found = re.search(r"loc\((.*)\)[^()]*$", row)
        return resolve(found[1]) if found else ()

    rows = iter(text[text.index("tt.func") :].splitlines())
    parameters = re.findall(r"%([\w.]+): ", next(rows))
    regions = [Region("kernel")]

    def block(region: Region) -> tuple[list[Operation], str]:
        """As far as the row that ends it, and that row."""
        out: list[Operation] = []
        for row in map(str.strip, rows):
            if row.startswith("}"):
                return out, row
            if (match := OPERATION.match(row)) is None:
                continue
            lines, bodies, end = lines_of(row), [], row
            kind = {"scf.for": "for", "scf.while": "while", "scf.if": "then"}.get(match[3], "")
            while end.endswith("{"):
                inner = Region(kind, region)
                operations, end = block(inner)
                lines = lines_of(end)
                bodies.append((inner, operations))
                if kind:  # a reduction has none
                    regions.append(inner)
                kind = "else" if kind == "then" else kind
            for inner, _ in bodies:
                inner.line = lines[0] if lines else None
            region.lines.update(lines[:1])
            region.calls.update(lines[-2:-1])
            if match[3] in ("tt.load", "tt.store") and (pointers := POINTERS.search(match[4])):
                region.bytes += math.prod(map(int, re.findall(r"\d+", pointers[1]))) * int(pointers[2]) / 8
            results = [f"{match[1]}#{n}" for n in range(int(match[2]))] if match[2] else [match[1]] if match[1] else []
            rest = match[4].rpartition(" loc(")[0] or match[4]
            out.append(Operation(match[3], results, rest, lines, bodies))
        return out, ""

    return parameters, block(regions[0])[0], regions


# --- computing -----------------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "andi": np.bitwise_and, "ori": np.bitwise_or,
    "xori": np.bitwise_xor, "remsi": np.fmod, "remui": np.fmod, "minsi": np.minimum, "maxsi": np.maximum,
    "minui": np.minimum, "maxui": np.maximum, "shli": np.left_shift, "shrsi": np.right_shift, "shrui": np.right_shift,
    "divsi": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)),
    "divui": lambda a, b: a // np.maximum(b, 1),
}  # fmt: skip
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
SAME = ("extsi", "extui", "trunci", "index_cast", "splat", "expand_dims", "broadcast", "reshape", "trans")
POINT = re.compile(r"(\b|x)b?f\d+")


def known(*values: Value) -> bool:
    return not any(isinstance(x, str) for x in values)


def either(a: Value, b: Value) -> Value:
    """What is one of the two, nobody knows which."""
    if known(a, b):
        return a if np.all(a == b) else "int"
    return "float" if "float" in [x for x in (a, b) if not known(x)] else "int"


class Count:
    """Runs a kernel on what is known, and leaves in its regions how often each program passes them."""

    def __init__(self, launch: Launch, rules: Known) -> None:
        parameters, operations, self.regions = read(launch.compiled.asm["ttir"])
        self.launch, self.rules, self.grid = launch, rules, (*launch.grid, 1, 1)[:3]
        programs = np.arange(math.prod(self.grid))
        x, y, _ = self.grid
        self.ids = (programs % x, programs // x % y, programs // (x * y))
        signature = launch.compiled.src.signature  # parts of tuples are constants
        names = [name for name, kind in signature.items() if isinstance(kind, str) and kind != "constexpr"]
        self.values: dict[str, Value] = {}
        for parameter, name in zip(parameters, names, strict=True):
            value = launch.arguments[name]
            kind = "float" if isinstance(value, float) else "int"
            self.values[parameter] = np.array(int(value)) if isinstance(value, int) else kind
        for region in self.regions:
            region.entered = region.passed = np.zeros(len(programs))
        self.regions[0].entered = self.regions[0].passed = np.ones(len(programs))
        self.run(operations, np.ones(len(programs)))

    def run(self, operations: list[Operation], weight: Array) -> list[Value]:
        """What the block yields. ``weight``: how often it is passed, by program, behind an axis for each loop."""
        special = {"scf.for": self.loop, "scf.while": self.repeat, "scf.if": self.branch}
        for operation in operations:
            operands = [self.values.get(x, "int") for x in re.findall(r"%([\w.#]+)", operation.rest)]
            if operation.name == "scf.yield":
                return operands
            if operation.name in special:
                results = special[operation.name](operation, weight)
            else:
                results = [self.compute(operation, operands)] * len(operation.results)
            self.values |= zip(operation.results, results, strict=False)
        return []

    def compute(self, operation: Operation, operands: list[Value]) -> Value:
        name, rest = operation.name.partition(".")[2], operation.rest
        kind = rest.rpartition("->")[2].rpartition(" : ")[2]
        point = POINT.search(kind) or "float" in [x for x in operands if not known(x)]
        unknown = "float" if point else "int"
        if name == "constant" and not point and (match := re.search(r"(-?\d+|true|false)>?( :|$)", rest)):
            return np.array({"true": 1, "false": 0}[match[1]] if match[1].isalpha() else int(match[1]))
        if name in ("get_program_id", "get_num_programs"):
            axis = "xyz".index(rest.split()[0])
            return self.ids[axis] if name == "get_program_id" else np.array(self.grid[axis])
        if name in ("load", "reduce"):
            text = "".join(self.launch.source(line) for line in operation.lines[:3])
            found = [np.array(x) for word, x in self.rules.loaded if word in text]
            if found or name == "load":
                return found[0] if found else "float" if POINT.search(kind) else "int"
        if name == "reduce" and known(*operands):
            same = re.search("max|min", operation.bodies[0][1][0].name) or not np.any(operands[0])
            return operands[0] if same else "int"
        if name in SAME:
            return operands[0]
        if name == "cmpi" and known(*operands):
            return COMPARE[rest.split(",")[0].strip()[-2:]](*operands).astype(np.int64)
        if name == "select":
            return self.choose(*operands)
        if name in BINARY and known(*operands):
            with np.errstate(all="ignore"):
                return BINARY[name](*operands)
        if one := [x for x in operands if known(x)]:
            if name == "minsi":  # a bound is better than nothing
                return one[0]
            if name == "andi" and (not np.any(one[0]) or re.search(r"(\b|x)i1\b", kind)):
                return one[0] if unknown == "int" or self.rules.passes else one[0] * 0
        return unknown

    def decided(self, condition: Value) -> Array:
        return condition if known(condition) else np.array(int(condition == "int" or self.rules.passes))

    def choose(self, condition: Value, yes: Value, no: Value) -> Value:
        condition = self.decided(condition)
        if np.all(condition) or not np.any(condition):
            return yes if np.all(condition) else no
        return np.where(condition != 0, yes, no) if known(yes, no) else either(yes, no)

    def branch(self, operation: Operation, weight: Array) -> list[Value]:
        name = re.findall(r"%([\w.#]+)", operation.rest)[0]
        condition = self.decided(self.values.get(name, "int"))
        out = []
        for (region, operations), taken in zip(operation.bodies, (condition != 0, condition == 0), strict=False):
            mine = weight * taken
            region.entered = region.passed = self.by_program(mine)
            out.append(self.run(operations, mine) if mine.any() else [])
        if len(out) == 2 and all(out):
            return [self.choose(condition, a, b) for a, b in zip(*out, strict=True)]
        return next((x for x in out if x), ["int"] * len(operation.results))

    def loop(self, operation: Operation, weight: Array) -> list[Value]:
        (region, operations), rest = operation.bodies[0], operation.rest
        index, *bounds = re.findall(r"%([\w.#]+)", rest)[:4]
        low, high, step = (self.values.get(x, "int") for x in bounds)
        low = np.array(0) if known(high) and not known(low) else low
        mine, at = weight, "int"
        region.guessed = not known(low, high, step)
        if not region.guessed:
            trips = np.broadcast_to(np.maximum(-(-(high - low) // step), 0), weight.shape)
            mine, most = weight * trips, int(trips.max())
            if most * weight.size <= LARGEST:
                n = np.arange(most).reshape(-1, *[1] * weight.ndim)
                mine, at = weight * (n < trips), low + n * step
        region.entered, region.passed = self.by_program(weight), self.by_program(mine)
        carried = re.search(r"iter_args\((.*?)\)", rest)
        names = re.findall(r"%([\w.]+) = %([\w.#]+)", carried[1]) if carried else []
        values, before = [self.values.get(first, "int") for _, first in names], ""
        passes = 0
        while mine.any() and repr(values) != before:  # until it is known what stays the same
            before, passes = repr(values), passes + 1
            self.values |= {index: at, **dict(zip((name for name, _ in names), values, strict=True))}
            after = self.run(operations, mine)
            values = after if passes == 1 else [either(a, b) for a, b in zip(values, after, strict=True)]
        return [x if np.ndim(x) <= weight.ndim else "int" for x in values]  # the last of a series is not known

    def repeat(self, operation: Operation, weight: Array) -> list[Value]:
        mine = weight * dict(self.rules.times).get(self.launch.kernel, 1)
        for region, operations in operation.bodies:
            region.guessed = True
            region.entered, region.passed = self.by_program(weight), self.by_program(mine)
            self.run(operations, mine)
        first = (self.values.get(x, "int") for x in re.findall(r"= %([\w.#]+)", operation.rest))
        return [either(x, "int") for x in first]

    def by_program(self, weight: Array) -> Array:
        return weight.reshape(-1, weight.shape[-1]).sum(0)
