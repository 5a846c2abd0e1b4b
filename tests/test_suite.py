"""``python -m tests``: what the exit statuses of its two processes come to."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from . import __main__ as suite

ABORTED, NONE = -6, suite.NOTHING_SELECTED


@pytest.mark.parametrize(
    "interpreting, compiling, whole",
    [(0, 0, 0), (0, 1, 1), (1, 0, 1), (ABORTED, 0, ABORTED), (0, ABORTED, ABORTED), (NONE, 0, 0), (NONE, NONE, NONE)],
)
def test_one_process_that_fails_is_a_failure(
    interpreting: int, compiling: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = {"1": interpreting, "0": compiling}

    def start(*arguments: str, **environment: str) -> Mock:
        return Mock(wait=Mock(return_value=statuses[environment["TRITON_INTERPRET"]]))

    monkeypatch.setattr(suite, "start", start)
    assert suite.both_processes([]) == whole
