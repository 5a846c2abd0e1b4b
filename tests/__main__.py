"""``python -m tests``: the whole suite, in two processes, for Triton either compiles or interprets in one process.

Arguments go to both pytest runs. ``python -m tests --triton 3.6.0 3.8.0`` runs the compile-only tests instead, on each
of these versions of Triton, downloaded beside the installed one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTHING_SELECTED = 5


def pytest(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


def both_processes(arguments: list[str]) -> int:
    codes = [pytest(*arguments, TRITON_INTERPRET="0"), pytest(*arguments, TRITON_INTERPRET="1")]
    if all(code == NOTHING_SELECTED for code in codes):
        return NOTHING_SELECTED
    return max(code for code in codes if code != NOTHING_SELECTED)


def compile_only(versions: list[str]) -> int:
    worst = 0
    for version in versions:
        folder = ROOT / ".triton-versions" / version
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
        print(f"\nTriton {version}", flush=True)
        worst = max(worst, pytest("tests/test_compile_only.py", PYTHONPATH=str(folder), EXPECTED_TRITON=version))
    return worst


if __name__ == "__main__":
    if sys.argv[1:2] == ["--triton"]:
        sys.exit(compile_only(sys.argv[2:] or ["3.6.0", "3.7.1", "3.8.0", "3.9.0"]))
    sys.exit(both_processes(sys.argv[1:]))
