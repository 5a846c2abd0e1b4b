"""A mask of tokens keeps where it is 1 and nowhere else: an additive one, as attention layers take it, is an error."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flashpointer as fp
from flashpointer import backends
from flashpointer.ops import _checks

from .conftest import Place
from .problems import pointer_problem

LENGTHS = [7, 5]


def evaluate(op: str, inputs: dict[str, Any]) -> Any:
    value = getattr(fp, op)(**inputs)
    return value[0] if op == "pointer_decode" else value


def problem(op: str, device: str) -> dict[str, Any]:
    inputs = pointer_problem("pointer_loss" if op == "pointer_loss" else "pointer_scores", device=device)
    return {**inputs, "mask": torch.arange(7, device=device) < torch.tensor(LENGTHS, device=device).unsqueeze(1)}


every_pointer_op = pytest.mark.parametrize("op", ["pointer_scores", "pointer_loss", "pointer_decode"])


def additive(kept: torch.Tensor, dropped: float) -> torch.Tensor:
    return torch.zeros(kept.shape, device=kept.device).masked_fill(~kept, dropped)


@every_pointer_op
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dropped", [-torch.inf, torch.finfo(torch.float32).min, -1e4, torch.nan, -100.0, 0.5])
def test_another_mask_is_an_error(place: Place, op: str, dropped: float, backend: str | None) -> None:
    if place.device != "cpu":
        pytest.skip("on a GPU nobody looks")
    inputs = problem(op, place.device)
    inputs["mask"] = additive(inputs["mask"], dropped)
    message = (
        rf"^{op}: mask takes 1 \(or True\) .*; got {dropped} at \(1, 5\)\. Of an additive mask.* mask == 0 makes one$"
    )
    with (
        fp.use_backend(backend or place.backend),
        pytest.raises(ValueError, match=message.replace("e+", r"e\+")),
    ):
        evaluate(op, inputs)


@every_pointer_op
@pytest.mark.parametrize(
    "mask_dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_ones_and_zeros_of_any_dtype(place: Place, op: str, mask_dtype: torch.dtype) -> None:
    inputs = problem(op, place.device)
    expected = evaluate(op, inputs)
    assert torch.equal(evaluate(op, {**inputs, "mask": inputs["mask"].to(mask_dtype)}), expected)


@every_pointer_op
@pytest.mark.parametrize("dropped", [-torch.inf, -1e4, torch.nan, -100.0])
def test_where_nobody_looks_nothing_is_inverted(place: Place, op: str, dropped: float) -> None:
    """As on a GPU: a number counts as kept only where it is 1."""
    inputs = problem(op, place.device)
    kept = inputs["mask"]
    strange = torch.where(kept, 1.0, torch.full((), dropped, device=place.device))
    with patch.object(_checks, "can_look", lambda values: False):
        assert torch.equal(evaluate(op, {**inputs, "mask": strange}), evaluate(op, inputs))
        nothing = evaluate(op, {**inputs, "mask": torch.zeros_like(kept)})
        assert torch.equal(evaluate(op, {**inputs, "mask": additive(kept, dropped)}), nothing)


@every_pointer_op
def test_flashpointer_check_makes_it_an_error_on_a_gpu(place: Place, op: str) -> None:
    inputs = problem(op, place.device)
    inputs["mask"] = additive(inputs["mask"], -torch.inf)
    with patch.object(backends, "CHECK_INDICES", True), pytest.raises(ValueError, match="got -inf at"):
        evaluate(op, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["pointer_scores", "pointer_loss"])
def test_a_compiled_model_raises_too(op: str) -> None:
    inputs = problem(op, "cpu")
    compiled = torch.compile(lambda mask: evaluate(op, {**inputs, "mask": mask}), fullgraph=True)
    assert torch.equal(compiled(inputs["mask"].float()), evaluate(op, inputs))
    with pytest.raises(ValueError, match=f"{op}: mask takes 1"):
        compiled(additive(inputs["mask"], -torch.inf))


@every_pointer_op
def test_where_there_are_no_values_nobody_looks(place: Place, op: str) -> None:
    """Masks of integers, as tokenizers give them, in tracers, under vmap and on the meta device."""
    inputs = problem(op, place.device)
    inputs["mask"] = inputs["mask"].long()
    if place.backend == "tiled":  # the kernels, forced here, serve no such device
        evaluate(op, {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    if op == "pointer_decode":
        return
    names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]

    def of_tensors(*tensors: torch.Tensor) -> torch.Tensor:
        return evaluate(op, {**inputs, **dict(zip(names, tensors, strict=True))})

    expected = evaluate(op, inputs)
    tensors = [inputs[name] for name in names]
    with FakeTensorMode() as mode:
        assert of_tensors(*map(mode.from_tensor, tensors)).shape == expected.shape
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(of_tensors, tracing_mode=mode, _allow_non_fake_inputs=True)(*tensors)
        assert torch.equal(traced(*tensors), expected)
    if op == "pointer_scores":
        masks = torch.stack([inputs["mask"], torch.ones_like(inputs["mask"])])
        many = torch.func.vmap(lambda mask: evaluate(op, {**inputs, "mask": mask}))(masks)
        assert torch.equal(many, torch.stack([evaluate(op, {**inputs, "mask": mask}) for mask in masks]))
