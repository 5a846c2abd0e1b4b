"""Compiling the kernels for real chips on a machine that has none.

A launcher runs as it is, on CPU tensors, under a driver that only names a chip: Triton specialises and compiles what it
would launch there, and hands it over instead of launching it. The compiler's own report then tells of spills, shared
memory and instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Chip(NamedTuple):
    target: GPUTarget
    shared_limit: int  # bytes a block may use


# As NVIDIA's assembler is given them, and as AMD's compiler makes them.
MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b|\bv_mfma")
REGISTERS = 1 << 16  # that a block may use, of NVIDIA's chips. Of a thread their number is rounded up to 8


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536),
}


class _NamedDriver:
    """A driver that can say which chip it stands for, and nothing else."""

    def __init__(self, chip: str) -> None:
        self._target = CHIPS[chip].target
        self._device = list(CHIPS).index(chip)  # Triton keeps one cache of compiled kernels a device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what its compiler says of it."""

    name: str
    key: str  # the same for launches of one compilation
    shared: int  # bytes
    spills: int  # bytes of local memory a thread; on AMD spilled vector registers as well
    registers: int  # of a block. On AMD's chips 0: there the compiler knows how many threads must fit
    multiplies: bool  # on the matrix units
    disassemble: Callable[[], str]  # which takes as long as compiling

    @cached_property
    def assembly(self) -> str:
        return self.disassemble()

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.assembly))


@contextmanager
def compiling_for(chip: str) -> Iterator[list[Compiled]]:
    """Inside, every kernel launch compiles for ``chip`` and is appended to the list; no output is written."""
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    reports: list[Compiled] = []
    active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    before = getattr(driver, active)
    driver.set_active(_NamedDriver(chip))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = launch
        setattr(driver, active, before)  # reset_active() would look for a real one
    reports += [_report(kernel) for kernel in compiled]


def _report(kernel: Any) -> Compiled:
    name, key, shared = kernel.metadata.name, kernel.hash, kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        # Scalar registers that do not suffice go to lanes of vector registers, not to memory, and are no spill here.
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
        return Compiled(name, key, shared, spills, 0, MATRIX.search(text) is not None, lambda: text)
    cubin = kernel.asm["cubin"]
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    spills = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    of_thread = max(int(n) for n in re.findall(r"\bREG:(\d+)", usage))
    registers = (of_thread + 7) // 8 * 8 * 32 * kernel.metadata.num_warps
    if spills and not re.search(r"\b(?:LDL|STL)\b", _cuobjdump(cubin, "-sass")):
        spills = 0  # a frame that no instruction reads or writes: Triton 3.9's assembler leaves some
    multiplies = MATRIX.search(kernel.asm["ptx"]) is not None
    return Compiled(name, key, shared, spills, registers, multiplies, lambda: _cuobjdump(cubin, "-sass"))


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
