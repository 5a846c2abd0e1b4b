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
            for rank, outcome in enumerate(_outcomes(ranks)):
                assert outcome.get(name, "not reached") == "", f"rank {rank}:\n{outcome.get(name, 'not reached')}"

        del test.__wrapped__  # whose arguments pytest would take for fixtures
        test.step = step  # type: ignore[attr-defined]
        return test

    return decorate


def run(ranks: int, step: Callable[..., None], *arguments: object) -> None:
    """Runs ``step(rank, *arguments)`` in processes of its own; raises what it raises in any."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_member, (ranks, folder, step, arguments), nprocs=ranks)


def _member(rank: int, ranks: int, folder: str, step: Callable[..., None], arguments: tuple[object, ...]) -> None:
    # A rank that waits for one that has failed gives up.
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks, timeout=patience)
    step(rank, *arguments)
    dist.barrier()
    # Not by way of destroy_process_group and the interpreter's end: now and then a thread of gloo's outlives its
    # owner there, and the process aborts after all is done.
    os._exit(0)


@functools.cache
def _outcomes(ranks: int) -> list[dict[str, str]]:
    """Of each rank, by step, what it raised or nothing. After a failure a rank goes on no further."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Exception):  # which the steps themselves have told
            run(ranks, _steps, ranks, folder, _shared[ranks])
        files = [Path(folder, str(rank)) for rank in range(ranks)]
        return [torch.load(file) if file.exists() else {} for file in files]


def _steps(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    outcomes: dict[str, str] = {}
    torch.use_deterministic_algorithms(True)  # and with it NaN in every new tensor
    for name in names:
        module, _, step = name.partition(":")
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(module), step).step(rank, ranks)
        except BaseException:
            outcomes[name] = traceback.format_exc()
            raise
        else:
            outcomes[name] = ""
        finally:
            torch.save(outcomes, Path(folder, str(rank)))
