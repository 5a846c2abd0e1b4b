"""``python -m tests``: what the exit statuses of its processes come to."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from . import __main__ as suite

ABORTED, NONE = -6, suite.NOTHING_SELECTED


@pytest.mark.parametrize(
    "chips, rest, interpreted, whole",
    [
        (0, 0, 0, 0),
        (1, 0, 0, 1),
        (0, 1, 0, 1),
        (0, 0, 1, 1),
        (ABORTED, 0, 0, ABORTED),
        (0, 0, ABORTED, ABORTED),
        (NONE, NONE, 0, 0),
        (NONE, NONE, NONE, NONE),
    ],
)
def test_one_process_that_fails_is_a_failure(
    chips: int, rest: int, interpreted: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = {("chips", "0"): chips, ("rest", "0"): rest, ("rest", "1"): interpreted}

    def start(*arguments: str, **environment: str) -> Mock:
        return Mock(wait=Mock(return_value=statuses[environment["TESTED"], environment["TRITON_INTERPRET"]]))

    monkeypatch.setattr(suite, "start", start)
    assert suite.all_processes([]) == whole
