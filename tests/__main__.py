"""``python -m tests``: the whole suite, in four processes, for Triton either compiles or interprets in one process.

They run side by side, and all but the first print when they are done. Arguments go to all pytest runs.
``python -m tests --triton 3.6.0 3.8.0`` compiles for chips on each of these versions of Triton instead, downloaded
beside the installed one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

ROOT = Path(__file__).parent.parent
NOTHING_SELECTED = 5
# Of each minor version that the package takes the newest one.
TRITONS = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")


# Processes beside the first, which has the rest without the interpreter.
BESIDE = {
    "With Triton's interpreter": {"TESTED": "rest", "TRITON_INTERPRET": "1"},
    "Compiled for sm_80 and sm_100": {"TESTED": "sm_80 sm_100", "TRITON_INTERPRET": "0"},
    "Compiled for sm_90 and gfx942": {"TESTED": "sm_90 gfx942", "TRITON_INTERPRET": "0"},
}


def start(*arguments: str, stdout: IO[bytes] | None = None, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=stdout, stderr=stdout)


def all_processes(arguments: list[str]) -> int:
    # A share of the cores each: a parallel loop waits long for a thread whose core another process has.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (1 + len(BESIDE)))))
    with ExitStack() as stack:
        runs = []
        for name, variables in BESIDE.items():
            output = stack.enter_context(TemporaryFile())
            run = start(*arguments, stdout=output, OMP_NUM_THREADS=threads, **variables)
            stack.callback(run.kill)
            runs.append((name, output, run))
        codes = [start(*arguments, TESTED="rest", TRITON_INTERPRET="0", OMP_NUM_THREADS=threads).wait()]
        for name, output, run in runs:
            codes.append(run.wait())
            output.seek(0)
            print(f"\n{name}", flush=True)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.flush()
    if all(code == NOTHING_SELECTED for code in codes):
        return NOTHING_SELECTED
    # The first failure, and a signal is negative.
    return next((code for code in codes if code not in (0, NOTHING_SELECTED)), 0)


def compile_only(versions: list[str]) -> int:
    failures = 0
    for version in versions:
        folder = ROOT / ".triton-versions" / version
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
        print(f"\nTriton {version}", flush=True)
        run = start("tests/test_compile_only.py", PYTHONPATH=str(folder), EXPECTED_TRITON=version)
        failures += run.wait() != 0
    return failures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--triton"]:
        sys.exit(compile_only(sys.argv[2:] or list(TRITONS)))
    sys.exit(all_processes(sys.argv[1:]))
