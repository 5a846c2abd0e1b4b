"""How an op becomes one of PyTorch's: its schema, what computes it, its shapes, its derivative.

An op is what ``torch.compile``, ``torch.export``, tracers, modes and tensor subclasses see of a computation. Where
there is none of these, a call goes past the dispatcher, as an autograd.Function of the same parts: of small tensors,
and on a GPU, the wrapper is a good part of the time. docs/performance.md has the measured table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext

from ..problem import SCHEMA, Problem
from . import _checks, _pointer

PLAIN = (torch.Tensor, torch.nn.Parameter)
_library: Any = torch.library.Library("flashpointer", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Registers ``flashpointer::<schema>`` for every device, and returns what calls it."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashpointer::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"flashpointer::{name}", backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.flashpointer, name).default

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = compute(*arguments)
            ctx.direct = True
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

    if backward is not None:
        Direct.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*arguments: Any) -> Any:
        if not _is_plain(arguments):
            return op(*arguments)
        if backward is None or not torch.is_grad_enabled():
            return compute(*arguments)
        return Direct.apply(*arguments)  # type: ignore[no-untyped-call]

    return call


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd has to know that this is an op: no tracer, mode, transform or subclass, and not the
    meta device, which the fake serves."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    for i in range(torch._C._len_torch_function_stack()):  # where set_default_device is, of whose factories we use none
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:
            return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for x in arguments:  # a loop, and no generator: this runs before and after every call
        if isinstance(x, torch.Tensor) and (
            type(x) not in PLAIN or x.is_meta or torch._C._functorch.is_legacy_batchedtensor(x)
        ):
            return False
    return True


def register_pointer_op(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., tuple[torch.Tensor | None, ...]] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Registers an op on q and k, in whose schema ``Problem problem`` stands for the fields of one.

    The op is called with the fields, ``op(q, k, *problem)``; ``compute`` and ``fake`` get a Problem in their place. For
    compute its mask is bool, looked at where that costs nothing: in here no transform and no tracer is in the way. And
    it runs without autocast, which would round what the tiles compute in float32.

    Args:
        save: (ctx, inputs, outputs) to the tensors that backward needs; it may leave other things on ctx.
        backward: (ctx, upstream, problem, tensors saved) to the gradients of the first arguments, of which those that
            nobody needs are dropped. upstream is that of the first output: the only one that has a gradient.
    """
    name, arguments = schema[: schema.index("(")], schema[schema.index("(") + 1 : schema.index(")")].split(", ")
    op = name.removesuffix("_with_gradient")  # what the user called
    place, fields = arguments.index("Problem problem"), len(Problem._fields)

    def pack(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        behind = place + fields
        return (*arguments[:place], Problem(*arguments[place:behind]), *arguments[behind:])

    def packed_compute(*arguments: Any) -> Any:
        mask = _pointer.kept_tokens(op, arguments[place], look=True)
        with _checks.without_autocast(arguments[0]):
            return compute(*pack((*arguments[:place], mask, *arguments[place + 1 :])))

    def packed_fake(*arguments: Any) -> Any:
        return fake(*pack(arguments))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert save is not None
        inputs = pack(inputs)
        problem: Problem = inputs[place]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(problem.mask, problem.positions, *save(ctx, inputs, output))
        ctx.problem = problem._replace(mask=None, positions=None)

    def padded_backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        assert backward is not None
        refuse_second_derivative(op)
        nothing = (None,) * (len(arguments) - 1 + fields)
        if upstream is None:
            return nothing
        mask, positions, *saved = ctx.saved_tensors
        grads = backward(ctx, upstream, ctx.problem._replace(mask=mask, positions=positions), saved)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if need else None for grad, need in needed), *nothing[len(grads) :])

    schema = schema.replace("Problem problem", SCHEMA)
    return register(schema, packed_compute, packed_fake, setup_context, None if backward is None else padded_backward)


def refuse_second_derivative(op: str) -> None:
    """Called in backward, where gradients are recorded only if somebody means to differentiate them again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: second derivatives are not supported (create_graph=True); "
            "flashpointer.use_backend('reference') has them"
        )


def wants_gradient(*inputs: torch.Tensor | None) -> bool:
    """Whether forward should compute a gradient. What vmap batches does not tell whether it requires one."""
    return torch.is_grad_enabled() and any(x is not None and (x.requires_grad or _checks.is_batched(x)) for x in inputs)


def wanted_again(ctx: Any, grad: torch.Tensor, upstream: torch.Tensor) -> bool:
    """Whether a backward must leave as it is a gradient that forward saved."""
    seen = not getattr(ctx, "direct", False)  # by who called the op, which returned it
    traced = type(grad) is not torch.Tensor  # by compiled autograd, which takes no mutation here and fuses the product
    return seen or traced or _checks.is_batched(upstream) or torch._C._autograd._get_current_graph_task_keep_graph()
