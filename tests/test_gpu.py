"""What only a GPU can show: no synchronisation, capture in a CUDA graph, the right device. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import compare, run

from .conftest import INTERPRETED
from .problems import OPS, problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="this process interprets")]
every_op = pytest.mark.parametrize("op", OPS)


def step(op: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Forward and backward of a scaled loss."""
    return run(getattr(fp, op), inputs, OPS[op], torch.full((), 1024.0, device="cuda"))


@every_op
@pytest.mark.parametrize("shape", [(64, 983), (64, 20000), (2, 1000000)], ids=str)
def test_nothing_waits_for_the_gpu(op: str, shape: tuple[int, int]) -> None:
    inputs = problem(op, shape, torch.bfloat16, "cuda")
    step(op, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(op, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
@pytest.mark.parametrize("shape", [(64, 983), (64, 20000), (2, 1000000)], ids=str)
def test_a_captured_step_replays_on_new_inputs(op: str, shape: tuple[int, int]) -> None:
    inputs = problem(op, shape, torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(op, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, inputs)
    for name, fresh in problem(op, shape, torch.bfloat16, "cuda").items():
        inputs[name].copy_(fresh)
    graph.replay()
    assert all(map(torch.equal, captured, step(op, inputs)))


@every_op
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 28), (1024, 983), (256, 30938), (8, 1000000), (4096, 8192)], ids=str)
def test_real_sizes(op: str, shape: tuple[int, int], half: torch.dtype) -> None:
    for result in compare(op, problem(op, shape, half, "cuda"), differentiate=OPS[op]):
        assert result.ok, result


@every_op
def test_200_runs_are_bitwise_equal(op: str) -> None:
    for shape in ((1024, 983), (8, 1000000)):
        inputs = problem(op, shape, torch.bfloat16, "cuda")
        first = step(op, inputs)
        assert all(all(map(torch.equal, first, step(op, inputs))) for _ in range(200))


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts(op: str) -> None:
    for result in compare(op, problem(op, (64, 983), torch.float32, "cuda:1"), differentiate=OPS[op]):
        assert result.ok, result
