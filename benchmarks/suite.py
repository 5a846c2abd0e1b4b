"""What a benchmark is: an op declares itself in the file of its name, and nothing else knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import flashpointer
from flashpointer.agreement import Agreement, compare

Inputs = dict[str, torch.Tensor]
Loss = Callable[..., torch.Tensor]
PASSES = {"forward + backward": True, "forward": False}  # with backward?

# The first is the one that counts: what the device is trained in. The others are for the full sweep.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Shape:
    """A size, and why it is worth measuring."""

    size: tuple[int, ...]
    why: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return " x ".join(f"{n:,}" for n in self.size)


@dataclass(frozen=True)
class Op:
    """An op's declaration. The first line of the rival's docstring says what the rival is."""

    name: str
    shapes: tuple[Shape, ...]
    quick: tuple[tuple[int, ...], ...]  # the sizes of --quick
    make_inputs: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]  # random, by argument name
    differentiate: tuple[str, ...]
    rival: Callable[..., object]
    axes: str = "rows x classes"  # what the label of a size counts
    label: Callable[[tuple[int, ...]], str] = lambda size: " x ".join(f"{n:,}" for n in size)
    options: tuple[tuple[str, Any], ...] = ()  # that every contender takes, besides the inputs
    rival_inputs: Callable[[Inputs], Inputs] = lambda inputs: inputs  # what the rival takes in their place
    # of a size, the numbers that the op returns: written in forward, and their gradients read in backward
    outputs: Callable[[tuple[int, ...]], int] = lambda size: 1
    # (inputs, with backward?) of the matrix products that no implementation can do without: none if bound by memory
    matrix_flops: Callable[[Inputs, bool], float] = lambda inputs, backward: 0.0
    eager: Loss | None = None  # the formula, where it is not the reference of the op's name
    agreement: Callable[[Inputs], list[Agreement]] | None = None  # where it is not a matter of numbers alone


@dataclass(frozen=True)
class Contender:
    function: Callable[..., Any]
    inputs: Callable[[Inputs], Inputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Case:
    """An op at one shape and dtype on one device."""

    op: Op
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.op.name} {self.shape} {dtype_name(self.dtype)}"

    def passes(self) -> dict[str, bool]:
        return {name: backward for name, backward in PASSES.items() if self.op.differentiate or not backward}

    def inputs(self) -> Inputs:
        inputs = self.op.make_inputs(self.shape.size, self.dtype, self.device)
        return {k: v.requires_grad_() if k in self.op.differentiate else v for k, v in inputs.items()}

    def agreement(self) -> list[Agreement]:
        if self.op.agreement is not None:
            return self.op.agreement(self.inputs())
        return compare(self.op.name, self.inputs(), differentiate=self.op.differentiate)

    def contenders(self) -> dict[str, Contender]:
        eager, rival, ours = (
            partial(function, **dict(self.op.options))
            for function in (
                self.op.eager or getattr(flashpointer.reference, self.op.name),
                self.op.rival,
                getattr(flashpointer, self.op.name),
            )
        )
        return {
            "eager": Contender(eager),
            # Static shapes are its best case. A half-compiled loss is an error; a decoder cannot be one graph.
            "compile": Contender(torch.compile(eager, fullgraph=bool(self.op.differentiate), dynamic=False)),
            "rival": Contender(rival, self.op.rival_inputs),
            "ours": Contender(ours),
        }

    def least_bytes(self, inputs: Inputs, backward: bool) -> int:
        """The least memory traffic of any implementation: each input read once, the output written once; with backward
        its gradient read once, and each gradient of an input written once. What an implementation stores between
        forward and backward is not counted."""
        outputs = self.op.outputs(self.shape.size) * self.dtype.itemsize
        gradients = outputs + sum(inputs[name].nbytes for name in self.op.differentiate) if backward else 0
        return sum(x.nbytes for x in inputs.values()) + outputs + gradients


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ops() -> dict[str, Op]:
    """The declarations: of each public op that has a file of its name here."""
    names = [name for name in flashpointer.__all__ if Path(__file__).with_name(f"{name}.py").exists()]
    return {name: import_module(f".{name}", __package__).OP for name in names}


def cases(chosen: Iterable[Op], device: torch.device, quick: bool) -> list[Case]:
    return [
        Case(op, shape, dtype, device)
        for op in chosen
        for dtype in DTYPES[device.type][: 1 if quick else None]
        for shape in op.shapes
        if device.type in shape.devices and (not quick or shape.size in op.quick)
    ]
