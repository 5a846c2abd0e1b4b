"""What is wrong gets one line that names the op, the argument, what it got and what it takes, however large it is."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import flashpointer as fp

from .problems import OPS, any_problem

WRONG: dict[str, Any] = {
    "a long list": [0] * 1_000_000,
    "a long string": "no tensor " * 100_000,
    "an array": np.zeros((1000, 1000)),
    "something of many lines": type("Many", (), {"__repr__": lambda self: "line\n" * 1000})(),
    "a sparse tensor": torch.eye(7).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "a complex tensor": torch.ones(2, 3, 7, dtype=torch.complex64),
}
ALL_OPS = [*OPS, "pointer_scores", "pointer_loss", "pointer_decode"]


def problem(op: str) -> dict[str, Any]:
    return any_problem("pointer_scores" if op == "pointer_decode" else op)


def refused(op: str, inputs: dict[str, Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(fp, op)(**inputs)
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", ALL_OPS)
def test_every_tensor_argument(op: str, wrong: str) -> None:
    parameters = inspect.signature(getattr(fp, op)).parameters.values()
    names = [p.name for p in parameters if "torch.Tensor" in str(p.annotation)]
    assert set(problem(op)) & set(names)
    for name in names:
        message = refused(op, {**problem(op), name: WRONG[wrong]})
        assert message.startswith(f"{op}: {name} takes "), message
        assert "got " in message
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize("wrong", [w for w in WRONG if "tensor" not in w])
@pytest.mark.parametrize("op", ALL_OPS)
def test_every_option(op: str, wrong: str) -> None:
    parameters = inspect.signature(getattr(fp, op)).parameters.values()
    names = [p.name for p in parameters if "torch.Tensor" not in str(p.annotation)]
    for name in names:
        message = refused(op, {**problem(op), name: WRONG[wrong]})
        assert message.startswith(f"{op}: {name} takes "), message
        assert "\n" not in message
        assert len(message) < 300


def test_a_sparse_or_nested_tensor_is_told_what_to_become() -> None:
    inputs = problem("zlpr_loss")
    assert refused("zlpr_loss", {**inputs, "scores": WRONG["a sparse tensor"]}).endswith("to_dense() makes a dense one")
    nested = refused("zlpr_loss", {**inputs, "scores": WRONG["a nested tensor"]})
    assert nested.endswith("torch.nested.to_padded_tensor() and a mask make a dense one")


# --- the meta device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_the_meta_device_has_the_shapes(op: str, backend: str | None) -> None:
    inputs, differentiable = problem(op), ("q", "k", "scores", "other", "start", "end")
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with fp.use_backend(backend or "tiled"):
        if op == "pointer_decode":  # how many there are depends on values
            spans, scores = fp.pointer_decode(**on_meta)
            assert spans.shape == (0, 4) and spans.dtype == torch.int64
            assert scores.shape == (0,) and scores.dtype == inputs["q"].dtype
            return
        leaves = [x.requires_grad_() for name, x in on_meta.items() if name in differentiable]
        value, expected = getattr(fp, op)(**on_meta), getattr(fp, op)(**inputs)
        assert value.device.type == "meta"
        assert value.shape == expected.shape and value.dtype == expected.dtype
        value.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.device.type == "meta" for x in leaves)


@pytest.mark.parametrize("head", [fp.nn.GlobalPointer, fp.nn.EfficientGlobalPointer])
def test_a_head_on_the_meta_device(head: Any) -> None:
    with torch.device("meta"):
        module, hidden = head(8, 3, 4), torch.empty(2, 6, 8)
        mask, spans = torch.ones(2, 6), torch.empty(5, 4, dtype=torch.int64)
    assert module(hidden, mask).shape == (2, 3, 6, 6)
    assert module.loss(hidden, spans, mask).shape == ()
    assert module.decode(hidden, mask)[0].shape == (0, 4)
