"""What a call costs beside its arithmetic, forward and backward, on a CPU.

First what wrapping a Python function as an op costs, in the ways that PyTorch offers: the function and its gradient are
a multiplication of one number, so that nearly all of the time is the wrapper's. Then what the host does for a step of
``pointer_loss`` on a GPU: checks, autograd, launchers and Triton, all but the driver's own launches, which are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

import flashpointer

from . import zlpr_loss
from .measure import Run, Timing, interleave, run_of
from .suite import Contender

SECONDS = 1.0
CPU = torch.device("cpu")


def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


def custom_op() -> Callable[[torch.Tensor], torch.Tensor]:
    backward = torch.library.custom_op("benchmarks::custom_twice_backward", twice, mutates_args=())
    forward = torch.library.custom_op("benchmarks::custom_twice", twice, mutates_args=())
    forward.register_autograd(lambda ctx, grad: backward(grad))
    return forward


def low_level(library: torch.library.Library) -> Callable[[torch.Tensor], torch.Tensor]:
    for name in ("twice", "twice_backward"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, twice, "CompositeExplicitAutograd")
    backward = torch.ops.benchmarks.twice_backward.default
    torch.library.register_autograd("benchmarks::twice", lambda ctx, grad: backward(grad), lib=library)
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.ops.benchmarks.twice.default
    return forward


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return twice(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return twice(grad)


def table() -> Table:
    """Microseconds a call, and how many of them the wrapper adds."""
    x = torch.randn((), requires_grad=True)
    size = (16, 28)
    inputs = zlpr_loss.make_inputs(size, torch.float32, CPU)
    inputs["scores"].requires_grad_()
    library = torch.library.Library("benchmarks", "FRAGMENT")  # what it registers lasts as long as it does

    bare = "the bare function"
    functions = {
        bare: twice,
        "torch.library.custom_op, register_autograd": custom_op(),
        "torch.library.Library, register_autograd": low_level(library),
        "torch.autograd.Function": Twice.apply,
    }
    losses = {
        "flashpointer.reference.zlpr_loss": flashpointer.reference.zlpr_loss,
        "flashpointer.zlpr_loss": flashpointer.zlpr_loss,
    }
    runs: dict[str, Run] = {k: run_of(Contender(f), [{"x": x}], ("x",)) for k, f in functions.items()}
    runs |= {f"{k}, {size[0]} x {size[1]}": run_of(Contender(f), [inputs], ("scores",)) for k, f in losses.items()}
    timings = {k: t for k, t in interleave(runs, CPU, SECONDS).items() if isinstance(t, Timing)}

    result = Table(
        "forward + backward, one call", title=f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for column in ("median, µs", "20 % to 80 %", "added, µs"):
        result.add_column(column, justify="right")
    for name, t in timings.items():
        added = f"{(t.median - timings[bare].median) * 1e6:.1f}" if name in functions and name != bare else ""
        result.add_row(name, f"{t.median * 1e6:.1f}", f"{t.low * 1e6:.1f} to {t.high * 1e6:.1f}", added)
    return result


def launches() -> Table:
    """Microseconds of a step of ``pointer_loss`` through the real launchers, compiled for a chip that is not there."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from flashpointer import backends, kernels
    from flashpointer.ops import _checks
    from tests import chips

    from . import pointer_loss

    def look_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch(self, *arguments, grid=grid, warmup=True, **options)  # which does all but launch

    size, launch = (16, 9, 1, 128, 64), JITFunction.run
    inputs = pointer_loss.make_inputs(size, torch.bfloat16, CPU)
    names = [name for name in ("q", "k", "start", "end") if name in inputs]
    for name in names:
        inputs[name].requires_grad_()
    assert kernels  # where Triton is absent the import fails here
    driver.set_active(chips._NamedDriver("sm_90"))
    with (
        patch.object(JITFunction, "run", look_up),
        patch.object(backends, "why_not_triton", lambda device, dtype: None),
        patch.object(_checks, "can_look", lambda values: False),  # as on a GPU, where to look is to wait
        patch.object(torch.cuda, "device_of", lambda x: nullcontext()),
        flashpointer.use_backend("triton"),
    ):
        run = run_of(Contender(flashpointer.pointer_loss), [inputs], tuple(names))
        timing = interleave({"step": run}, CPU, SECONDS)["step"]
    assert isinstance(timing, Timing), timing
    result = Table("a step's host time, launches left out", "median, µs", "20 % to 80 %", title="pointer_loss")
    result.add_row(
        "B16 H9 N128 D64, bfloat16", f"{timing.median * 1e6:.0f}", f"{timing.low * 1e6:.0f} to {timing.high * 1e6:.0f}"
    )
    return result
