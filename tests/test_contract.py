"""The promises that every op keeps: one test each, over all ops."""

from __future__ import annotations

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import compare, relative_error, run

from .conftest import Place
from .problems import OPS, problem

every_op = pytest.mark.parametrize("op", OPS)


@every_op
def test_upstream_gradients(place: Place, dtype: torch.dtype, op: str) -> None:
    """One a row, of stride 0, zero, transposed; and not 1 after a reduction."""
    inputs = problem(op, (4, 3, 50), dtype, place.device)
    for upstream in (torch.randn(4, 3), torch.tensor(3.0).expand(4, 3), torch.zeros(4, 3), torch.randn(3, 4).t()):
        for result in compare(
            op, {**inputs, "reduction": "none"}, differentiate=OPS[op], upstream=upstream.to(place.device)
        ):
            assert result.ok, result
    for reduction in ("sum", "mean"):
        upstream = torch.tensor(1024.0, device=place.device)
        for result in compare(op, {**inputs, "reduction": reduction}, differentiate=OPS[op], upstream=upstream):
            assert result.ok, result


@every_op
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_retained_graph_gives_the_same_gradient_again(place: Place, op: str, reduction: str) -> None:
    inputs = problem(op, (4, 50), device=place.device)
    scores = inputs["scores"].requires_grad_()
    loss = getattr(fp, op)(**inputs, reduction=reduction)
    upstream = torch.full_like(loss, 0.3)
    first = torch.autograd.grad(loss, scores, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(loss, scores, 2 * upstream, retain_graph=True)[0]
    last = torch.autograd.grad(loss, scores, upstream)[0]
    assert relative_error(second, 2 * first) < 1e-6
    assert relative_error(last, first) < 1e-6
    assert first.abs().max() > 0


@every_op
def test_gradients_accumulate(place: Place, op: str) -> None:
    """Twice into one .grad: what backward handed out must not be what it writes next."""
    inputs = problem(op, (4, 50), device=place.device)
    scores = inputs["scores"].requires_grad_()
    getattr(fp, op)(**inputs).backward()
    once = scores.grad.clone()
    (3 * getattr(fp, op)(**inputs)).backward()
    assert relative_error(scores.grad, 4 * once) < 1e-6


@every_op
def test_second_derivatives_are_refused(place: Place, op: str) -> None:
    inputs = problem(op, (3, 5), device=place.device)
    scores = inputs["scores"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: second derivatives are not supported"):
        torch.autograd.grad(getattr(fp, op)(**inputs), scores, create_graph=True)


@every_op
def test_the_reference_has_second_derivatives(op: str) -> None:
    inputs = problem(op, (3, 5), torch.float64)
    scores = inputs["scores"].requires_grad_()
    with fp.use_backend("reference"):
        first = torch.autograd.grad(getattr(fp, op)(**inputs), scores, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), scores)[0].abs().max() > 0


@every_op
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0,), (0, 0)], ids=str)
def test_nothing_to_do(place: Place, op: str, shape: tuple[int, ...], reduction: str) -> None:
    """No rows or no classes: loss 0, the mean's too, and a gradient of the right shape."""
    inputs = problem(op, shape, device=place.device)
    scores = inputs["scores"].requires_grad_()
    loss = getattr(fp, op)(**inputs, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.shape == shape


@every_op
@pytest.mark.parametrize("classes", [28, 9000, 20000])
def test_nan_stays_in_its_row(place: Place, op: str, classes: int) -> None:
    inputs = {**problem(op, (3, classes), device=place.device), "reduction": "none"}
    clean = run(getattr(fp, op), inputs, ("scores",))
    inputs["scores"][1, classes // 2] = torch.nan
    loss, grad = run(getattr(fp, op), inputs, ("scores",))
    assert loss[1].isnan()
    assert grad[1].isnan().any()
    assert torch.equal(loss[[0, 2]], clean[0][[0, 2]]) or relative_error(loss[[0, 2]], clean[0][[0, 2]]) < 1e-6
    assert relative_error(grad[[0, 2]], clean[1][[0, 2]]) < 1e-6


@every_op
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("classes", [28, 9000, 20000])
def test_masked_cells_count_for_nothing(place: Place, op: str, classes: int, garbage: float) -> None:
    """A row with garbage where it is masked, and one that is masked whole."""
    inputs = {**problem(op, (3, classes), device=place.device), "reduction": "none"}
    inputs["mask"] = torch.rand(3, classes, device=place.device) < 0.7
    inputs["mask"][1] = False
    clean = run(getattr(fp, op), inputs, OPS[op])
    for name in OPS[op]:
        inputs[name] = inputs[name].masked_fill(~inputs["mask"], garbage)
    loss, *grads = run(getattr(fp, op), inputs, OPS[op])
    assert loss[1] == 0
    assert relative_error(loss, clean[0]) < 1e-6
    for grad, clean_grad in zip(grads, clean[1:], strict=True):
        assert torch.equal(grad[~inputs["mask"]], torch.zeros_like(grad[~inputs["mask"]]))
        assert relative_error(grad, clean_grad) < 1e-6


@every_op
def test_bitwise_repeatable(place: Place, op: str) -> None:
    for shape in ((16, 28), (3, 983), (3, 20000)):
        inputs = {**problem(op, shape, device=place.device), "reduction": "none"}
        first = run(getattr(fp, op), inputs, OPS[op])
        for _ in range(2 if place.small else 50):
            assert all(map(torch.equal, first, run(getattr(fp, op), inputs, OPS[op])))


@every_op
def test_gradcheck(op: str) -> None:
    for reduction in ("none", "mean"):
        inputs = {**problem(op, (2, 3, 7), torch.float64), "reduction": reduction, "mask": torch.rand(2, 1, 7) < 0.8}
        names = OPS[op]

        def function(*values: torch.Tensor, inputs=inputs, names=names) -> torch.Tensor:
            return getattr(fp, op)(**{**inputs, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@every_op
def test_one_gradient_of_two(place: Place, op: str) -> None:
    """Only what requires a gradient gets one."""
    inputs = problem(op, (3, 50), device=place.device)
    everything = run(getattr(fp, op), inputs, OPS[op])[1:]
    for name, expected in zip(OPS[op], everything, strict=True):
        assert torch.equal(run(getattr(fp, op), inputs, (name,))[1], expected)
