"""``python -m tests``: what the exit statuses of its processes come to, and that they leave out no test."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from . import __main__ as suite

ABORTED, NONE = -6, suite.NOTHING_SELECTED


@pytest.mark.parametrize(
    "rest, beside, whole",
    [
        (0, (0, 0, 0), 0),
        (1, (0, 0, 0), 1),
        (0, (1, 0, 0), 1),
        (0, (0, 1, 0), 1),
        (0, (0, 0, 1), 1),
        (0, (ABORTED, 0, 0), ABORTED),
        (0, (0, 0, ABORTED), ABORTED),
        (NONE, (0, NONE, NONE), 0),
        (NONE, (NONE, NONE, NONE), NONE),
    ],
)
def test_one_process_that_fails_is_a_failure(
    rest: int, beside: tuple[int, ...], whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = iter([*beside, rest])  # which prints as it goes, and so is the last one

    def start(*arguments: str, **environment: str) -> Mock:
        return Mock(wait=Mock(return_value=next(started)))

    monkeypatch.setattr(suite, "start", start)
    assert suite.all_processes([]) == whole
    assert next(started, None) is None


def test_the_processes_share_all_tests() -> None:
    """Each is in one of them, and interpreted ones in another besides."""

    def collected(**environment: str) -> list[str]:
        files = ["tests/test_compile_only.py", "tests/test_rotate.py", "tests/test_suite.py"]
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
        inherited = {name: value for name, value in os.environ.items() if name != "TESTED"}
        run = subprocess.run(command, cwd=suite.ROOT, env=inherited | environment, capture_output=True, text=True)
        return [line for line in run.stdout.splitlines() if "::" in line]

    every = collected(TRITON_INTERPRET="0")
    rest = collected(TRITON_INTERPRET="0", TESTED="rest")
    interpreted, *chips = (collected(**variables) for variables in suite.BESIDE.values())
    assert len(every) > 100 and sorted(sum(chips, rest)) == sorted(every)
    assert all(part and all("test_compile_only" in name for name in part) for part in chips)
    assert interpreted and collected(TRITON_INTERPRET="1") == interpreted
