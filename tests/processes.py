"""Tests that several processes run together, the ranks of one process group.

To start processes takes seconds, so all tests of as many ranks share theirs: they run one after the other there, when
the first of them is asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SKIPPED = "skipped: "
_shared: dict[int, list[str]] = {}  # by the number of ranks the steps of all modules that are collected


def in_ranks(*counts: int) -> Callable[[Callable[[int, int], None]], Callable[..., None]]:
    """Makes a test of ``step(rank, ranks)``, once for each number of ranks. All ranks draw the same random numbers."""

    def decorate(step: Callable[[int, int], None]) -> Callable[..., None]:
        name = f"{step.__module__}:{step.__name__}"
        for ranks in counts:
            _shared.setdefault(ranks, []).append(name)

        @pytest.mark.slow
        @pytest.mark.parametrize("ranks", counts)
        @functools.wraps(step)
        def test(ranks: int) -> None:
            for rank, outcomes in enumerate(_outcomes(ranks)):
                outcome = outcomes.get(name, "not reached")
                if outcome.startswith(SKIPPED):
                    pytest.skip(outcome.removeprefix(SKIPPED))
                assert outcome == "", f"rank {rank}:\n{outcome}"

        del test.__wrapped__  # whose arguments pytest would take for fixtures
        test.step = step  # type: ignore[attr-defined]
        return test

    return decorate


@functools.cache
def _outcomes(ranks: int) -> list[dict[str, str]]:
    """Of each rank, by step, what it raised or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Exception):  # of a rank that died: its steps were not reached
            torch.multiprocessing.spawn(_member, (ranks, folder, _shared[ranks]), nprocs=ranks)
        files = [Path(folder, str(rank)) for rank in range(ranks)]
        return [torch.load(file) if file.exists() else {} for file in files]


def _member(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    # A rank that waits for one that has failed gives up.
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks, timeout=patience)
    store = dist.FileStore(f"{folder}/failed", ranks)
    outcomes: dict[str, str] = {}
    for name in names:
        outcomes[name] = _outcome(name, rank, ranks)
        torch.save(outcomes, Path(folder, str(rank)))
        store.set(f"{name} {rank}", str(bool(outcomes[name])))
        if len({store.get(f"{name} {other}") for other in range(ranks)}) > 1:
            break  # where some have failed and some have not, they no longer wait for the same thing
    # Not by way of destroy_process_group and the interpreter's end: now and then a thread of gloo's outlives its
    # owner there, and the process aborts after all is done.
    os._exit(0)


def _outcome(name: str, rank: int, ranks: int) -> str:
    module, _, step = name.partition(":")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # and with it NaN in every new tensor
    try:
        getattr(importlib.import_module(module), step).step(rank, ranks)
    except pytest.skip.Exception as skipped:
        return f"{SKIPPED}{skipped}"
    except BaseException:
        return traceback.format_exc()
    return ""
