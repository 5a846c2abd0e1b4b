"""The quick cases under pytest-benchmark: ours beside the eager formula, timed only if they agree."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from flashpointer.agreement import Agreement

from .measure import run_of
from .suite import Case, cases, ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def agreement(case: Case) -> list[Agreement]:
    return case.agreement()


@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("contender", ["eager", "ours"])
@pytest.mark.parametrize("case", cases(ops().values(), DEVICE, quick=True), ids=str)
def test_forward_and_backward(case: Case, contender: str, benchmark: BenchmarkFixture) -> None:
    for measured in agreement(case):
        assert measured.ok, measured
    run = run_of(case.contenders()[contender], [case.inputs()], case.op.differentiate)

    def step() -> None:
        run(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark(step)
