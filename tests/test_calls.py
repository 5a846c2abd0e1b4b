"""Calls of PyTorch that an op makes on a CPU: where a problem is small they are what it costs.

A call is an aten op that no other aten op made. It takes a few microseconds on a usual host and ten on a slow one,
whatever is in the tensors; the arithmetic of a sentence of 64 tokens is over in less time than twenty of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

import flashpointer as fp
from flashpointer.tiled._tiles import SMALL, small_on_one_thread

from .problems import CASES, OPS, POINTER_OPS, any_problem, op_of, problem
from .test_pointer_scores import tensors


def calls(function: Callable[[], Any]) -> list[str]:
    function()  # what is made once only
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("aten::") and not inner(event)]


def inner(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or inner(parent))


def of_op(op: str, inputs: dict[str, Any]) -> tuple[int, int]:
    """Of forward alone where nothing requires a gradient, and of forward and backward()."""
    function, names = getattr(fp, op), (OPS | POINTER_OPS).get(op, ())
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    forward = len(calls(lambda: function(**inputs)))
    leaves = [inputs[name].requires_grad_() for name in names]

    def step() -> None:
        value = function(**inputs)
        value.backward(upstream)
        for x in leaves:
            x.grad = None

    value = function(**inputs)
    upstream = torch.full_like(value, 0.3) if leaves and value.dim() > 0 else None
    return forward, len(calls(step)) if leaves else 0


def test_the_count_counts() -> None:
    """Each of two, and not what they call themselves."""
    x = torch.randn(3, 4)
    assert calls(lambda: torch.nn.functional.softplus(x @ x.mT)) == ["aten::mT", "aten::matmul", "aten::softplus"]


SPANS = torch.tensor([[0, 0, 1, 2], [0, 2, 1, 5], [1, 1, 0, 3], [1, 1, 2, 6], [0, 0, 1, 3], [1, 2, 5, 5]])
BATCH, PAIR = (16, 10, 64, 64), (2, 3, 8, 16)  # B, H, N, D


@pytest.mark.parametrize("mask", [None, torch.ones(16, 64, dtype=torch.bool)], ids=["no mask", "an idle mask"])
@pytest.mark.parametrize(
    "shape, shared, options, forward, both",
    [
        (PAIR, True, {}, 62, 108),
        (BATCH, True, {}, 62, 108),
        (PAIR, True, {"reduction": "none"}, 62, 130),
        (PAIR, False, {}, 64, 114),
    ],
    ids=str,
)
def test_pointer_loss(
    shape: tuple[int, int, int, int], shared: bool, options: dict[str, Any], forward: int, both: int, mask: Any
) -> None:
    """However many heads and tokens, in one tile; with two spans in one row."""
    if mask is not None:
        mask, forward, both = mask[: shape[0], : shape[2]], forward + 2, both + 4  # a look at it, in each pass
    inputs = {**tensors(shape, shared, torch.float32, "cpu"), "spans": SPANS, "mask": mask, **options}
    alone, together = of_op("pointer_loss", inputs)
    assert alone <= forward and together <= both, (alone, together)


def test_pointer_scores() -> None:
    alone, together = of_op("pointer_scores", tensors(PAIR, True, torch.float32, "cpu"))
    assert alone <= 50 and together <= 129, (alone, together)


def test_pointer_decode() -> None:
    """In one small tile, whatever is found."""
    inputs = tensors(PAIR, True, torch.float32, "cpu")
    for threshold in (1e9, 0.0):
        alone, _ = of_op("pointer_decode", {**inputs, "threshold": threshold})
        assert alone <= 40, alone


@pytest.mark.parametrize(
    "op, forward, both", [("zlpr_loss", 14, 19), ("sparse_zlpr_loss", 20, 25), ("zlpr_kl_div", 11, 20)]
)
def test_rows(op: str, forward: int, both: int) -> None:
    alone, together = of_op(op, problem(op, (16, 28)))
    assert alone <= forward and together <= both, (alone, together)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@small_on_one_thread(lambda cells, *_: cells)
def threads_for(cells: int, fails: bool = False) -> int:
    if fails:
        raise ValueError
    return torch.get_num_threads()


@pytest.mark.usefixtures("_two_threads")
def test_small_work_is_done_by_one_thread() -> None:
    """On both sides of the limit; and after an error too the threads are what they were, in other threads always."""
    assert (threads_for(SMALL), threads_for(SMALL + 1)) == (1, 2)
    with pytest.raises(ValueError):
        threads_for(1, True)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("case", CASES)
def test_every_small_op_keeps_to_one_thread(case: str) -> None:
    """All calls in which PyTorch or MKL could share out work, forward and backward."""
    (op, names), inputs = op_of(case), any_problem(case)
    leaves = [inputs[name].requires_grad_() for name in names]
    seen = []
    for name in ("exp", "sigmoid", "bmm", "baddbmm"):
        real = getattr(torch, name)
        patch_ = patch.object(
            torch, name, lambda *a, real=real, **k: (seen.append(torch.get_num_threads()), real(*a, **k))[1]
        )
        patch_.start()
    try:
        value = getattr(fp, op)(**inputs)
        torch.autograd.grad(value, leaves, torch.ones_like(value))
    finally:
        patch.stopall()
    assert set(seen) == {1}
