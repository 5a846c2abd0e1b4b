"""Peak memory, in units of one tensor of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import run

from .problems import OPS, problem


def peak(function: Any, inputs: dict[str, Any], differentiate: tuple[str, ...], device: str) -> int:
    """The most bytes allocated at once beyond those at the start."""
    run(function, inputs, differentiate)  # what is allocated once only
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(function, inputs, differentiate)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(function, inputs, differentiate)
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_measure_measures(device: str) -> None:
    """x * 2 and its sum with 1 live at once beside the gradient's ones: two tensors of the size of x."""
    x = torch.randn(1 << 22, device=device)
    assert 2.0 <= peak(lambda x: (x * 2 + 1).sum(), {"x": x}, (), device) / x.nbytes < 2.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(512, 8192), (1 << 16, 60), (4, 1 << 20)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_linear_and_small(op: str, shape: tuple[int, ...], device: str) -> None:
    """Forward and backward hold one gradient for each argument that has one, and a few tiles: no copy of the labels."""
    inputs = problem(op, shape, device=device)
    size = inputs["scores"].nbytes
    tiles = 12 * 2**20 + (size // 16 if op == "sparse_zlpr_loss" else 0)
    assert peak(getattr(fp, op), inputs, OPS[op], device) <= len(OPS[op]) * size + tiles
    assert peak(getattr(fp, op), inputs, (), device) <= tiles
    assert peak(getattr(fp.reference, op), inputs, OPS[op], device) > 3 * len(OPS[op]) * size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_never_upcast_whole(half: torch.dtype, device: str) -> None:
    inputs = problem("zlpr_loss", (2048, 8192), half, device)
    inputs["reduction"] = "sum"  # backward has something to scale
    scaled = lambda **inputs: 3 * fp.zlpr_loss(**inputs)  # noqa: E731
    assert peak(scaled, inputs, ("scores",), device) <= inputs["scores"].nbytes + 12 * 2**20
