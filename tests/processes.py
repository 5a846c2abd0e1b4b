"""Two processes that make up a process group, as DDP and FSDP2 use them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_in_two(step: Callable[..., None], *arguments: object) -> None:
    """Runs ``step(rank, *arguments)`` in both; raises what it raises in either."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_member, (folder, step, arguments), nprocs=2)


def _member(rank: int, folder: str, step: Callable[..., None], arguments: tuple[object, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    step(rank, *arguments)
    dist.barrier()
    # Not by way of destroy_process_group and the interpreter's end: now and then a thread of gloo's outlives its
    # owner there, and the process aborts after all is done.
    os._exit(0)
