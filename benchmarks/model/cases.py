"""What is modelled: ops at sizes that GPUs are bought for, through the public functions and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import flashpointer

from .. import suite
from .programs import Known

BF16, FP32 = torch.bfloat16, torch.float32
SHORT = {BF16: "bf16", FP32: "fp32"}
SPANS = 5  # listed, a sentence
LISTED = 16  # positives, a row


class Case(NamedTuple):
    op: str
    title: str
    size: tuple[int, ...]  # as in the file of the op
    dtype: torch.dtype
    inputs: Callable[[], suite.Inputs]
    rules: Known = Known()
    cells: int = 0  # that are read one by one, if they are

    def passes(self) -> Iterator[tuple[str, Callable[[suite.Inputs], object]]]:
        """In order: forward, then backward of what forward gave."""
        names = suite.ops()[self.op].differentiate
        left: list[torch.Tensor] = []

        def forward(inputs: suite.Inputs) -> None:
            given = {k: v.requires_grad_() if k in names else v for k, v in inputs.items()}
            out = getattr(flashpointer, self.op)(**given)
            if names:
                left.append(out)

        def backward(inputs: suite.Inputs) -> None:
            torch.autograd.grad(left, [inputs[name] for name in names], [torch.empty_like(x) for x in left])

        yield "forward", forward
        if names:
            yield "backward", backward

    def least(self, inputs: suite.Inputs) -> dict[str, tuple[float, float]]:
        """Of each pass and of both: bytes and floating-point operations of matrix products that no implementation can
        do without. That of zlpr_loss makes the gradient in forward."""
        op = suite.ops()[self.op]
        case = suite.Case(op, suite.Shape(self.size, ""), self.dtype, torch.device("cpu"))
        outputs = op.outputs(self.size) * self.dtype.itemsize
        one, two = (case.least_bytes(inputs, backward) for backward in (False, True))
        one_flops, two_flops = (op.matrix_flops(inputs, backward) for backward in (False, True))
        if self.op in ("zlpr_loss", "sparse_zlpr_loss"):
            return {"forward": (two, 0.0), "backward": (0.0, 0.0), "step": (two, 0.0)}
        backward = two - outputs, two_flops - one_flops
        return {"forward": (one, one_flops), "backward": backward, "step": (two, two_flops)}


def tokens(batch: int, heads: int, length: int, dtype: torch.dtype) -> suite.Inputs:
    """Numbers are never looked at."""
    inputs = {name: torch.zeros(batch, length, 64, dtype=dtype) for name in ("q", "k")}
    inputs |= {name: torch.zeros(batch, heads, length, dtype=dtype) for name in ("start", "end")}
    return {**inputs, "mask": torch.ones(batch, length, dtype=torch.bool)}


def pointer(op: str, title: str, batch: int, heads: int, length: int, dtype: torch.dtype, passes: bool = False) -> Case:
    def inputs() -> suite.Inputs:
        more = {"spans": torch.zeros(SPANS * batch, 4, dtype=torch.int64)} if op == "pointer_loss" else {}
        return {**tokens(batch, heads, length, dtype), **more}

    title = f"{title}B{batch} H{heads} N{length} {SHORT[dtype]}"
    # A sentence's last kept token is its last one, and no row is unsafe. A while loop over what passes counts heads.
    times = (("count_kernel", heads), ("write_kernel", heads // 4)) if passes else ()
    rules = Known((("extent", length), ("unsafe_counts", 0)), passes, times)
    return Case(op, title, (batch, heads, 1, length, 64), dtype, inputs, rules)


def rows(op: str, title: str, rows: int, classes: int, dtype: torch.dtype, labels: torch.dtype = torch.bool) -> Case:
    def inputs() -> suite.Inputs:
        scores = torch.zeros(rows, classes, dtype=dtype)
        if op == "zlpr_kl_div":
            return {"scores": scores, "other": scores.clone()}
        if op == "sparse_zlpr_loss":
            return {"scores": scores, "positives": torch.zeros(rows, LISTED, dtype=torch.int64)}
        return {"scores": scores, "labels": torch.zeros(rows, classes, dtype=labels)}

    title = f"{rows} x {classes} {SHORT[dtype]}{title}"
    return Case(op, title, (rows, classes), dtype, inputs, cells=rows * classes)


class Linear(NamedTuple):
    """As a Case: linear_zlpr_loss forward, whose product is its own. Those of backward are the library's."""

    title: str
    rows: int
    size: int  # D
    classes: int
    dtype: torch.dtype
    op: str = "linear_zlpr_loss"
    rules: Known = Known((("cells.bounds", 0),))  # few tiles have a listed cell
    cells: int = 0

    def inputs(self) -> suite.Inputs:
        inputs = {"hidden": torch.zeros(self.rows, self.size, dtype=self.dtype)}
        inputs["weight"] = torch.zeros(self.classes, self.size, dtype=self.dtype)
        inputs["bias"] = torch.zeros(self.classes, dtype=self.dtype)
        return {**inputs, "positives": torch.zeros(self.rows, LISTED, dtype=torch.int64)}

    def passes(self) -> Iterator[tuple[str, Callable[[suite.Inputs], object]]]:
        def forward(inputs: suite.Inputs) -> None:
            inputs["weight"].requires_grad_()
            flashpointer.linear_zlpr_loss(**inputs)

        yield "forward", forward

    def least(self, inputs: suite.Inputs) -> dict[str, tuple[float, float]]:
        flops = 2.0 * self.rows * self.size * self.classes
        return {"forward": (sum(x.nbytes for x in inputs.values()), flops)}


CASES: tuple[Case | Linear, ...] = (
    pointer("pointer_loss", "X: ", 16, 9, 128, BF16),
    pointer("pointer_loss", "S: ", 16, 50, 512, BF16),
    pointer("pointer_loss", "L: ", 8, 100, 1024, BF16),
    pointer("pointer_loss", "S: ", 16, 50, 512, FP32),
    rows("zlpr_loss", ", bool labels", 8192, 8192, BF16),
    rows("zlpr_loss", ", bool labels", 8192, 4096, BF16),
    rows("zlpr_loss", ", bool labels", 8192, 983, BF16),
    rows("zlpr_loss", ", soft labels", 8192, 8192, BF16, BF16),
    rows("zlpr_loss", ", soft labels", 8192, 8192, FP32, FP32),
    rows("sparse_zlpr_loss", "", 8192, 8192, BF16),
    rows("zlpr_kl_div", "", 8192, 8192, BF16),
    pointer("pointer_scores", "", 8, 10, 256, BF16),
    pointer("pointer_scores", "", 16, 50, 512, BF16),
    pointer("pointer_decode", "nothing passes: ", 32, 50, 512, BF16),
    pointer("pointer_decode", "every tile passes: ", 32, 50, 512, BF16, passes=True),
    Linear("4096 x 768 x 500,000 bf16", 4096, 768, 500_000, BF16),
)
