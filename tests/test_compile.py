"""The registered ops under opcheck and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import relative_error, run

from .conftest import Place
from .problems import OPS, problem

every_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize(
    "dtype_name, reduction, with_grad",
    [("float32", "mean", True), ("float32", "none", True), ("float16", "mean", True), ("float32", "mean", False)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", ["zlpr_loss", "sparse_zlpr_loss"])
def test_opcheck(place: Place, op: str, masked: bool, dtype_name: str, reduction: str, with_grad: bool) -> None:
    scores, labels = problem(op, (4, 3, 20), getattr(torch, dtype_name), place.device).values()
    mask = torch.rand(4, 3, 20, device=place.device) < 0.8 if masked else None
    extra = (-100,) if op == "sparse_zlpr_loss" else ()
    arguments = (scores.requires_grad_(with_grad), labels, mask, reduction, with_grad, place.backend, *extra)
    torch.library.opcheck(getattr(torch.ops.flashpointer, op).default, arguments)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_zlpr_kl_div(place: Place, masked: bool) -> None:
    scores, other = problem("zlpr_kl_div", (4, 3, 20), device=place.device).values()
    mask = torch.rand(4, 3, 20, device=place.device) < 0.8 if masked else None
    upstream = torch.tensor(2.0, device=place.device)
    ops = torch.ops.flashpointer
    for needed in ((True, True), (True, False)):
        arguments = (scores, other, mask, upstream, "mean", *needed, place.backend)
        torch.library.opcheck(ops.zlpr_kl_div_backward.default, arguments)
    arguments = (scores.requires_grad_(), other.requires_grad_(), mask, "none", place.backend)
    torch.library.opcheck(ops.zlpr_kl_div.default, arguments)


def test_opcheck_transposed(place: Place) -> None:
    """The fake must promise the strides that the op delivers, not those of its input."""
    scores = torch.randn(20, 4, device=place.device).t().requires_grad_()
    labels = torch.rand(20, 4, device=place.device).t() < 0.3
    torch.library.opcheck(torch.ops.flashpointer.zlpr_loss.default, (scores, labels, None, "mean", True, place.backend))


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fullgraph(place: Place, op: str, dynamic: bool, reduction: str) -> None:
    """Inside a graph with work before and after, at changing shapes."""
    if place.small:
        pytest.skip("one compiled process is enough: opcheck traces the interpreted kernels")

    def step(**inputs: Any) -> torch.Tensor:
        inputs["scores"] = inputs["scores"] * 2
        return getattr(fp, op)(**inputs) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):  # one graph for all
        for shape in ((4, 20), (9, 33), (7, 41)):
            inputs = {**problem(op, shape, device=place.device), "reduction": reduction}
            inputs["mask"] = torch.rand(shape, device=place.device) < 0.8
            expected = run(step, dict(inputs), OPS[op])
            for ours, truth in zip(run(compiled, inputs, OPS[op]), expected, strict=True):
                assert relative_error(ours, truth) < 1e-6


@every_op
def test_the_backend_is_part_of_the_graph(op: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(fp, op), fullgraph=True)
    inputs = problem(op, (4, 20))
    values = []
    for backend in ("tiled", "reference"):
        with fp.use_backend(backend):
            values.append(compiled(**inputs))
    assert relative_error(values[0], values[1]) < 1e-6
