"""What is wrong gets one line that names the op, the argument, what it got and what it takes, however large it is."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import flashpointer as fp

from .problems import LINEAR_OPS, OPS, any_problem

WRONG: dict[str, Any] = {
    "a long list": [0] * 1_000_000,
    "a long string": "no tensor " * 100_000,
    "an array": np.zeros((1000, 1000)),
    "something of many lines": type("Many", (), {"__repr__": lambda self: "line\n" * 1000})(),
    "a sparse tensor": torch.eye(7).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "a complex tensor": torch.ones(2, 3, 7, dtype=torch.complex64),
}
ALL_OPS = [*OPS, *LINEAR_OPS, "linear_topk", "pointer_scores", "pointer_loss", "pointer_decode"]


def problem(op: str) -> dict[str, Any]:
    if op == "linear_topk":
        inputs = any_problem("linear_zlpr_loss")
        return {"k": 3, **{name: inputs[name] for name in ("hidden", "weight", "bias")}}
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


LISTS = [[("PER", 0, 1)]]
STATE = fp.nn.EfficientGlobalPointer(8, 3, 4).state_dict()
ONE = {"spans": torch.zeros(1, 4).long(), "heads": ["PER"]}
SIZES = {"heads": 3, "head_size": 4}
CALLABLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "GlobalPointer": (fp.nn.GlobalPointer, {"hidden_size": 8, "heads": 3}),
    "EfficientGlobalPointer": (fp.nn.EfficientGlobalPointer, {"hidden_size": 8, "heads": 3}),
    "ZLPRLoss": (fp.nn.ZLPRLoss, {}),
    "LinearZLPR": (fp.nn.LinearZLPR, {"hidden_size": 8, "classes": 3}),
    "from_lists": (fp.spans.from_lists, {"sentences": LISTS, "heads": ["PER"]}),
    "from_offsets": (fp.spans.from_offsets, {"sentences": LISTS, "offset_mapping": [[(0, 2)]], "heads": ["PER"]}),
    "from_words": (fp.spans.from_words, {"sentences": LISTS, "word_ids": [[0, 1]], "heads": ["PER"]}),
    "from_tags": (fp.spans.from_tags, {"tags": [["B-PER"]]}),
    "join_words": (fp.spans.join_words, {"words": [["a", "b"]], "entities": LISTS}),
    "from_utf16": (fp.spans.from_utf16, {"sentences": LISTS, "texts": ["ab"]}),
    "to_entities": (fp.spans.to_entities, {**ONE, "offset_mapping": [[(0, 2)]], "texts": ["ab"]}),
    "to_words": (fp.spans.to_words, {**ONE, "word_ids": [[0]], "words": [["a"]]}),
    "from_dense": (fp.spans.from_dense, {"labels": torch.ones(1, 1, 2, 2)}),
    "to_dense": (fp.spans.to_dense, {"spans": torch.zeros(1, 4).long(), "batch": 1, "heads": 1, "length": 1}),
    "pad": (fp.spans.pad, {"spans": torch.zeros(1, 4).long(), "batch": 1}),
    "flatten": (fp.spans.flatten, {"spans": torch.zeros(1, 1, 3).long()}),
    "from_padded": (fp.spans.from_padded, {"labels": torch.zeros(1, 1, 1, 2).long()}),
    "collate": (fp.spans.collate, {"examples": [{"input_ids": [1, 2], "spans": []}], "heads": ["PER"]}),
    "SpanF1": (fp.metrics.SpanF1, {"heads": ["PER"]}),
    "to_flashpointer": (fp.convert.to_flashpointer, {"state_dict": STATE, "layout": "keras", **SIZES}),
    "from_flashpointer": (fp.convert.from_flashpointer, {"state_dict": STATE, "layout": "keras", **SIZES}),
    "use_backend": (lambda name: fp.use_backend(name).__enter__(), {"name": "tiled"}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_of_what_else_there_is(name: str, wrong: str) -> None:
    function, right = CALLABLES[name]
    of_lists = (
        "sentences",
        "entities",
        "tags",
        "names",
        "examples",
        "heads",
        "lengths",
        "texts",
        "offset_mapping",
        "word_ids",
        "words",
        "windows",
    )
    for argument in inspect.signature(function).parameters:
        if (wrong == "a long list" and argument in of_lists) or (
            wrong == "a long string" and argument in ("prefix", "key")
        ):
            continue  # which may be right
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**right, argument: WRONG[wrong]})
        message = str(caught.value)
        assert message.startswith(name), message
        assert argument.removesuffix("s") in message or name == "use_backend", message
        assert "\n" not in message
        assert len(message) < 300, message


@pytest.mark.parametrize("name", [name for name in CALLABLES if name[0].islower() and name != "use_backend"])
def test_the_default_device_is_not_asked(name: str) -> None:
    """What is made of lists is on the CPU, and what is made of tensors where they are."""
    function, right = CALLABLES[name]
    expected = pytree.tree_leaves(function(**right))
    with torch.device("meta"):
        made = pytree.tree_leaves(function(**right))
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_the_default_device_does_not_count() -> None:
    gold = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 3]])
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            of = fp.metrics.SpanF1(["PER"])
            of.update(gold[:1], gold)
            of.compute_metrics(SimpleNamespace(predictions=gold.numpy(), label_ids=gold.numpy()), compute_result=False)
        counts.append(of.counts)
    assert torch.equal(*counts) and counts[0].tolist() == [[3, 3, 4], [3, 3, 4]]


def test_linear_zlpr_names_what_it_is_given() -> None:
    head = fp.nn.LinearZLPR(4, 5)
    for wrong, error in ((torch.randn(2, 3), ValueError), (torch.tensor(1.0), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match=r"^LinearZLPR: hidden takes a floating-point tensor \[..., 4\]; got "):
            head(wrong)


def test_a_sparse_or_nested_tensor_is_told_what_to_become() -> None:
    inputs = problem("zlpr_loss")
    assert refused("zlpr_loss", {**inputs, "scores": WRONG["a sparse tensor"]}).endswith("to_dense() makes a dense one")
    nested = refused("zlpr_loss", {**inputs, "scores": WRONG["a nested tensor"]})
    assert nested.endswith("torch.nested.to_padded_tensor() and a mask make a dense one")


# --- the meta device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_the_meta_device_has_the_shapes(op: str, backend: str | None) -> None:
    inputs, differentiable = problem(op), ("q", "k", "scores", "other", "start", "end", "hidden", "weight")
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with fp.use_backend(backend or "tiled"):
        if op == "pointer_decode":  # how many there are depends on values
            spans, scores = fp.pointer_decode(**on_meta, non_overlapping=True)
            assert spans.shape == (0, 4) and spans.dtype == torch.int64
            assert scores.shape == (0,) and scores.dtype == inputs["q"].dtype
            assert fp.pointer_decode(**on_meta, padded=True)[0].shape == (2, 0, 3)
            return
        if op == "linear_topk":
            for x, y in zip(fp.linear_topk(**on_meta), fp.linear_topk(**inputs), strict=True):
                assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)
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
    assert module.loss(hidden, torch.empty(2, 5, 3, dtype=torch.int64, device="meta"), mask).shape == ()
    assert module.decode(hidden, mask)[0].shape == (0, 4)
