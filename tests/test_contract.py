"""The promises that every op keeps: one test each, over all ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashpointer as fp
from flashpointer.agreement import compare, relative_error, run
from flashpointer.ops import _register

from .conftest import Place
from .problems import CASES, OPS, any_problem, op_of, problem, value_of

every_op = pytest.mark.parametrize("op", OPS)
every_case = pytest.mark.parametrize("case", CASES)


def gradients(case: str, inputs: dict[str, Any], names: tuple[str, ...] | None = None) -> list[torch.Tensor]:
    """The value, and the gradients of all that is differentiated or of those named, under an upstream of 0.3."""
    op, differentiable = op_of(case)
    inputs = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in names or differentiable]
    value = value_of(op, inputs)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 0.3))]


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


@pytest.fixture
def _other_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@every_case
def test_defaults_of_dtype_and_device_are_not_asked(place: Place, case: str, request: pytest.FixtureRequest) -> None:
    """The tensors say which. Of rows enough for several tiles where those are quick."""
    inputs = any_problem(case, device=place.device)
    if "scores" in inputs and not place.small:
        inputs = problem(op_of(case)[0], (700, 700), device=place.device)
    expected = gradients(case, inputs)
    request.getfixturevalue("_other_defaults")
    assert all(map(torch.equal, gradients(case, inputs), expected))


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


# --- of every op, those on q and k too -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_retained_graph_gives_the_same_gradient_again(place: Place, case: str, reduction: str) -> None:
    (op, names), inputs = op_of(case), any_problem(case, device=place.device)
    if op != "pointer_scores":
        inputs["reduction"] = reduction
    leaves = [inputs[name].requires_grad_() for name in names]
    value = value_of(op, inputs)
    upstream = torch.full_like(value, 0.3)
    first, second = (torch.autograd.grad(value, leaves, x * upstream, retain_graph=True) for x in (1, 2))
    last = torch.autograd.grad(value, leaves, upstream)
    for x, y, z in zip(first, second, last, strict=True):
        assert relative_error(y, 2 * x) < 1e-6
        assert relative_error(z, x) < 1e-6
        assert x.abs().max() > 0


@every_case
def test_gradients_accumulate(place: Place, case: str) -> None:
    """Twice into one .grad: what backward handed out must not be what it writes next."""
    (op, names), inputs = op_of(case), any_problem(case, device=place.device)
    leaves = [inputs[name].requires_grad_() for name in names]
    value_of(op, inputs).sum().backward()
    once = [x.grad.clone() for x in leaves]
    (3 * value_of(op, inputs)).sum().backward()
    for x, y in zip(leaves, once, strict=True):
        assert relative_error(x.grad, 4 * y) < 1e-6


@every_case
def test_second_derivatives_are_refused(place: Place, case: str) -> None:
    op, names = op_of(case)
    for name in names:
        inputs = any_problem(case, device=place.device)
        x = inputs[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"^{op}: second derivatives are not supported"):
            torch.autograd.grad(value_of(op, inputs).sum(), x, create_graph=True)


@every_case
def test_the_reference_has_second_derivatives(case: str) -> None:
    (op, names), inputs = op_of(case), any_problem(case, torch.float64)
    x = inputs[names[0]].requires_grad_()
    with fp.use_backend("reference"):
        first = torch.autograd.grad(value_of(op, inputs).square().sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), x)[0].abs().max() > 0


@every_case
def test_only_what_needs_a_gradient_gets_one(place: Place, case: str) -> None:
    inputs = any_problem(case, device=place.device)
    everything = gradients(case, inputs)[1:]
    for name, expected in zip(op_of(case)[1], everything, strict=True):
        assert torch.equal(gradients(case, inputs, (name,))[1], expected)


@every_case
def test_inputs_stay_as_they_are(place: Place, case: str) -> None:
    (op, names), inputs = op_of(case), any_problem(case, device=place.device)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    value_of(op, {**inputs, **{name: inputs[name].requires_grad_() for name in names}}).sum().backward()
    assert all(torch.equal(x, inputs[name]) for name, x in before.items())


def _spread(x: Any, dim: int) -> Any:
    """The same numbers, but what the dimension counts lies so far apart that the last offset is 2^31 or more, while the
    stride fits 32 bits, as it would of itself make an offset of 64: only the pages that are touched exist."""
    if not isinstance(x, torch.Tensor) or x.dim() <= dim or x.shape[dim] < 2 or x.element_size() > 2:
        return x
    stride = min(2**31 - 4, -(-(2**31) // (x.shape[dim] - 1)))
    rest = x.select(dim, 0).contiguous()
    strides = [*rest.stride()[:dim], stride, *rest.stride()[dim:]]
    far = torch.empty(2**31 + stride + rest.numel(), dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
    return far.copy_(x)


def _outermost(x: Any, dim: int) -> Any:
    """The same numbers, packed, so that what the dimension counts lies farthest apart."""
    if not isinstance(x, torch.Tensor) or x.dim() <= dim:
        return x
    return x.movedim(dim, 0).contiguous().movedim(0, dim)


@every_case
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(place: Place, case: str, dim: int) -> None:
    if place.device == "cuda" and torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would touch all pages
    (op, names), problem = op_of(case), any_problem(case, torch.float16, place.device)
    # In the same order of dimensions, on which last bits of a library's product depend.
    near = {name: _outermost(x, dim) for name, x in problem.items()}
    far = {name: _spread(x, dim) for name, x in problem.items()}
    spread = [far[name] for name in names if far[name].dim() > dim]  # a bias of classes has one dimension
    assert spread and all(sum((n - 1) * by for n, by in zip(x.shape, x.stride(), strict=True)) >= 2**31 for x in spread)
    values = []
    for inputs in (near, far):
        leaves = [inputs[name].requires_grad_() for name in names]
        value = value_of(op, inputs)
        values.append([value, *torch.autograd.grad(value, leaves, torch.full_like(value, 0.3))])
    assert all(map(torch.equal, *values))


@every_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(place: Place, case: str, reentrant: bool) -> None:
    (op, names), inputs = op_of(case), any_problem(case, device=place.device)
    x = inputs.pop(names[0]).requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        return value_of(op, {**inputs, names[0]: 2 * x}).sum()

    expected = torch.autograd.grad(step(x), x)[0]
    checkpoint(step, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


class Seen(TorchDispatchMode):
    """The ops that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@every_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_past_the_dispatcher_it_is_the_same(place: Place, case: str, reduction: str) -> None:
    """Whoever watches sees an op, in backward too; where nobody does the same is computed without one."""
    (op, _), inputs = op_of(case), any_problem(case, device=place.device)
    if op != "pointer_scores":
        inputs["reduction"] = reduction
    plain = gradients(case, inputs)
    with Seen() as seen:
        watched = gradients(case, inputs)
    assert any(name.startswith(f"flashpointer::{op}") for name in seen.names)
    assert all(map(torch.equal, plain, watched))
    with patch.object(_register, "_is_plain", lambda arguments: False):
        assert all(map(torch.equal, plain, gradients(case, inputs)))
