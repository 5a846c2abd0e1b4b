"""Derivatives by other ways than backward: each is right, or refused in one sentence. None is silently 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

import flashpointer as fp
from flashpointer.agreement import relative_error

from .conftest import Place
from .problems import LINEAR_OPS, OPS, POINTER_OPS, any_problem, value_of

DIFFERENTIABLE = OPS | POINTER_OPS | LINEAR_OPS
NOT_MANY_AT_ONCE = ("pointer_loss", "linear_zlpr_loss")  # whose arguments are of a batch already
every_op = pytest.mark.parametrize("op", DIFFERENTIABLE)


def of_each_argument(
    op: str, device: str, dtype: torch.dtype = torch.float32
) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """Of each argument that is differentiated the function of it alone, and its value."""
    inputs = any_problem(op, dtype, device)
    return [(lambda x, name=name: value_of(op, {**inputs, name: x}).sum(), inputs[name]) for name in DIFFERENTIABLE[op]]


def by_jvp(function: Any, x: torch.Tensor) -> torch.Tensor:
    return func.jvp(function, (x,), (torch.ones_like(x),))[1]


def by_dual_numbers(function: Any, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def of_a_leaf(function: Any, x: torch.Tensor) -> torch.Tensor:
    return by_jvp(function, x.clone().requires_grad_())


@every_op
@pytest.mark.parametrize("derivative", [by_jvp, by_dual_numbers, of_a_leaf])
def test_forward_mode_is_refused(place: Place, op: str, derivative: Any) -> None:
    for function, x in of_each_argument(op, place.device):
        with pytest.raises(RuntimeError, match=f"^{op}: forward-mode derivatives .*use_backend"):
            derivative(function, x)


@every_op
def test_forward_mode_of_something_else_is_no_matter(place: Place, op: str) -> None:
    (function, x), *_ = of_each_argument(op, place.device)
    with forward_ad.dual_level():
        assert torch.equal(function(x), function(x))


@every_op
def test_the_reference_has_forward_mode(op: str) -> None:
    """In float64, for the sum of a gradient may be ten thousand times smaller than its parts."""
    for function, x in of_each_argument(op, "cpu", torch.float64):
        backward = torch.autograd.grad(function(x.requires_grad_()), x)[0].sum()
        with fp.use_backend("reference"):
            assert relative_error(by_jvp(function, x.detach()), backward) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("op", ["zlpr_loss", "pointer_loss"])
def test_a_compiled_jvp_raises(op: str) -> None:
    """It was 0, silently."""
    (function, x), *_ = of_each_argument(op, "cpu")
    with pytest.raises(Exception, match="forward-mode derivatives"):
        torch.compile(lambda x: by_jvp(function, x), dynamic=False)(x)


@every_op
@pytest.mark.parametrize("transform", [func.grad, func.jacrev, func.hessian, lambda f: lambda x: func.vjp(f, x)[1]])
def test_torch_func_is_refused(place: Place, op: str, transform: Any) -> None:
    for function, x in of_each_argument(op, place.device):
        with pytest.raises(RuntimeError, match=f"^{op}: (torch.func.grad, vjp|forward-mode)"):
            transform(function)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_op
def test_vmap_is_a_loop(place: Place, op: str) -> None:
    """Values, and the gradients of what is outside."""
    for function, x in of_each_argument(op, place.device):
        if op in NOT_MANY_AT_ONCE:
            with pytest.raises(RuntimeError, match=rf"^{op}: torch\.func\.vmap is not supported"):
                func.vmap(function)(x.unsqueeze(0))
            continue
        many = torch.stack([x, torch.randn_like(x)]).requires_grad_()
        values = func.vmap(function)(many)
        looped = torch.stack([function(x) for x in many])
        assert relative_error(values, looped) < 1e-6
        upstream = torch.tensor([0.5, 3.0], device=place.device)
        ours, theirs = (torch.autograd.grad(v, many, upstream)[0] for v in (values, looped))
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_op
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_many_upstream_gradients_at_once(place: Place, op: str, reduction: str) -> None:
    """is_grads_batched, and jacobian(vectorize=True), which is made of it."""
    inputs, names = any_problem(op, device=place.device), DIFFERENTIABLE[op]
    if op != "pointer_scores":
        inputs["reduction"] = reduction
    leaves = [inputs[name].requires_grad_() for name in names]
    value = value_of(op, inputs)
    upstream = torch.randn(4, *value.shape, device=place.device)
    if op in NOT_MANY_AT_ONCE:
        with pytest.raises(
            RuntimeError, match=rf"^{op}: many upstream gradients at once \(is_grads_batched, vectorize\)"
        ):
            torch.autograd.grad(value, leaves, upstream, is_grads_batched=True)
        return
    looped = [torch.autograd.grad(value, leaves, u, retain_graph=True) for u in upstream]
    at_once = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True)
    for ours, *theirs in zip(at_once, *looped, strict=True):
        assert relative_error(ours, torch.stack(theirs)) < 1e-5


def test_decode_refuses_what_it_cannot_do(place: Place) -> None:
    inputs = any_problem("pointer_scores", device=place.device)
    q = inputs.pop("q")

    def decode(q: torch.Tensor) -> torch.Tensor:
        return fp.pointer_decode(q, **inputs)[1].sum()

    for transform, message in (
        (lambda f: lambda x: by_jvp(f, x), "forward-mode"),
        (func.grad, "torch.func.grad"),
        (lambda f: lambda x: func.vmap(f)(x.unsqueeze(0)), "torch.func.vmap is not supported"),
    ):
        with pytest.raises(RuntimeError, match=f"^pointer_decode: {message}"):
            transform(decode)(q)


@pytest.mark.parametrize("op, name", [("zlpr_loss", "labels"), ("pointer_loss", "span_labels")])
@pytest.mark.parametrize("derivative", [by_jvp, by_dual_numbers])
def test_labels_have_no_derivative_either_way(place: Place, op: str, name: str, derivative: Any) -> None:
    inputs = any_problem(op, device=place.device)
    labels = torch.rand_like(inputs["scores"]) if op == "zlpr_loss" else torch.rand(5, device=place.device)
    with pytest.raises(RuntimeError, match=f"^{op}: forward-mode derivatives"):
        derivative(lambda x: value_of(op, {**inputs, name: x}).sum(), labels)
    with pytest.raises(ValueError, match=f"{op}: {name} takes no gradient"):
        value_of(op, {**inputs, name: labels.requires_grad_()})


@every_op
def test_transforms_of_transforms_are_refused(place: Place, op: str) -> None:
    if op in NOT_MANY_AT_ONCE:
        return  # test_vmap_is_a_loop: whatever is inside of vmap
    for function, x in of_each_argument(op, place.device):
        many = torch.stack([x, x])
        with pytest.raises(RuntimeError, match=f"^{op}: torch.func.grad"):
            func.grad(lambda y, f=function: func.vmap(f)(y).sum())(many)
        with pytest.raises(RuntimeError, match=f"^{op}: forward-mode"):
            func.jvp(lambda y, f=function: func.vmap(f)(y), (many,), (torch.ones_like(many),))
