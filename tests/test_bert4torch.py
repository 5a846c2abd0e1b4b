"""Side by side with bert4torch, where it is installed: its checkpoints load, and score, train and decode alike."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version

import flashpointer as fp
from flashpointer.agreement import relative_error
from flashpointer.convert import to_flashpointer
from flashpointer.spans import from_dense

from .conftest import Place

layers = pytest.importorskip("bert4torch.layers", reason="compares with bert4torch", exc_type=ImportError)
losses = pytest.importorskip("bert4torch.losses", exc_type=ImportError)
if Version(version("bert4torch")) < Version("0.6"):
    pytest.skip("the Efficient GlobalPointer of bert4torch before 0.6 does not work with RoPE", allow_module_level=True)

BATCH, LENGTH, HIDDEN, HEADS, SIZE = 4, 11, 16, 3, 8
every_head = pytest.mark.parametrize("name", ["GlobalPointer", "EfficientGlobalPointer"])
every_option = pytest.mark.parametrize("rope, tril", [(True, True), (True, False), (False, True), (False, False)])


def pair(place: Place, name: str, rope: bool, tril: bool) -> tuple[Any, Any]:
    """Theirs, and ours with its weights."""
    theirs = getattr(layers, name)(HIDDEN, HEADS, SIZE, RoPE=rope, tril_mask=tril).to(place.device)
    ours = getattr(fp.nn, name)(HIDDEN, HEADS, SIZE, rope=rope, tril_mask=tril).to(place.device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, device=place.device)
    lengths = torch.tensor([LENGTH, 6, 1, 0], device=place.device)
    return hidden, (torch.arange(LENGTH, device=place.device) < lengths[:, None]).long()


@every_head
@every_option
def test_scores(place: Place, name: str, rope: bool, tril: bool) -> None:
    """Where a span can be; elsewhere theirs are -inf, -1e12, or -1e12 divided."""
    (theirs, ours), (hidden, mask) = pair(place, name, rope, tril), batch(place)
    places = torch.randint(100, (BATCH, LENGTH), device=place.device)
    for masked in (mask, None):
        for positions in (None, places):
            expected, scores = theirs(hidden, masked, positions), ours(hidden, masked, positions)
            assert torch.equal(scores == -torch.inf, expected < -1e10)
            assert relative_error(scores, torch.where(expected < -1e10, -torch.inf, expected)) < 1e-5


@every_head
@every_option
def test_dense_loss(place: Place, name: str, rope: bool, tril: bool) -> None:
    (theirs, ours), (hidden, mask) = pair(place, name, rope, tril), batch(place)
    hidden.requires_grad_()
    scores = theirs(hidden, mask)
    labels = (torch.rand_like(scores) < 0.1) & (scores > -1e10)  # theirs is infinite for labels elsewhere
    planes = (scores.view(BATCH * HEADS, -1), labels.view(BATCH * HEADS, -1).float())
    expected = losses.MultilabelCategoricalCrossentropy()(*planes).mean()
    loss = ours.loss(hidden, from_dense(labels), mask)
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    grads = torch.autograd.grad(loss, [hidden, *ours.parameters()])
    for grad, truth in zip(grads, torch.autograd.grad(expected, [hidden, *theirs.parameters()]), strict=True):
        assert relative_error(grad, truth) < 1e-5


@every_head
@every_option
def test_decode(place: Place, name: str, rope: bool, tril: bool) -> None:
    (theirs, ours), (hidden, mask) = pair(place, name, rope, tril), batch(place)
    expected = []
    for i, scores in enumerate(theirs(hidden, mask).detach().cpu().numpy()):
        expected += [[i, *map(int, cell)] for cell in zip(*(scores > 0).nonzero(), strict=True)]
    spans, found = ours.decode(hidden, mask)
    assert spans.tolist() == expected
    assert relative_error(found, theirs(hidden, mask)[spans.unbind(1)].detach()) < 1e-5


@every_head
def test_conversion_changes_nothing(name: str) -> None:
    weights = getattr(layers, name)(HIDDEN, HEADS, SIZE).state_dict()
    converted = to_flashpointer(weights, "bert4torch", heads=HEADS, head_size=SIZE)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[key], weights[key]) for key in weights)
