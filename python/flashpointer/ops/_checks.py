"""Errors that name the argument, what it got and what it takes."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import backends

REDUCTIONS = ("none", "sum", "mean")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def short(value: object) -> str:
    """The repr of what a user gave, on one line of at most 120 characters."""
    line = " ".join(reprlib.repr(value).split())
    return line if len(line) <= 120 else f"{line[:58]}...{line[-59:]}"


def describe(value: object) -> str:
    """What an error says of an argument it refuses, in one line however long the argument is."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {short(value)}"
    if value.is_nested:
        return f"a nested {value.dtype} tensor on {value.device}"
    layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"


def check_tensor(op: str, name: str, value: object, takes: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless ``value`` is a dense tensor of one of ``dtypes``."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} takes {takes}; got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        instead = "torch.nested.to_padded_tensor() and a mask make" if value.is_nested else "to_dense() makes"
        raise TypeError(f"{op}: {name} takes {takes}; got {describe(value)}: {instead} a dense one")


def as_tensor(x: Any) -> torch.Tensor:
    """Itself, or what a list or an array of another library is on the CPU, whatever the default device."""
    return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, device="cpu")


def can_look(values: torch.Tensor) -> bool:
    """Whether to look at values costs nothing: on a GPU it is to wait for the stream, and done on demand. Tensors of
    tracers and of vmap have no values."""
    if type(values) is not torch.Tensor or is_batched(values):
        return False
    return values.device.type == "cpu" or (backends.CHECK_INDICES and values.device.type != "meta")


def is_int(value: object, least: int) -> bool:
    """A number of at least so much, and no more than an op can take; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def is_number(value: object) -> bool:
    """Of any sign and size, but for NaN."""
    return is_int(value, -(2**63)) or (isinstance(value, float) and value == value)


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} takes a bool; got {describe(value)}")


def check_scores(op: str, scores: object, name: str = "scores") -> None:
    check_tensor(op, name, scores, "a floating-point tensor [..., classes]", FLOATS)
    assert isinstance(scores, torch.Tensor)
    if scores.dim() == 0:
        raise ValueError(f"{op}: {name} takes at least one dimension, the classes; got {describe(scores)}")


def check_spans(op: str, spans: object, name: str = "spans") -> None:
    takes = "int64 tensor of rows (batch, head, start, end), [S, 4], or (head, start, end), [B, P, 3]"
    if isinstance(spans, tuple) and hasattr(spans, "spans"):
        raise TypeError(f"{op}: {name} takes an {takes}; got {type(spans).__name__}, whose .spans is one")
    check_tensor(op, name, spans, f"an {takes}", [torch.int64])
    assert isinstance(spans, torch.Tensor)
    if (spans.dim(), spans.shape[-1] if spans.dim() else 0) not in ((2, 4), (3, 3)):
        raise ValueError(f"{op}: {name} must be an {takes}; got {describe(spans)}")


def check_device(op: str, name: str, value: torch.Tensor, first: torch.Tensor, of_first: str = "scores") -> None:
    if value.device != first.device:
        raise ValueError(f"{op}: {name} must be on {first.device}, where {of_first} is; got {describe(value)}")


def check_no_grad(op: str, name: str, value: torch.Tensor, instead: str) -> None:
    if value.requires_grad:
        raise ValueError(f"{op}: {name} takes no gradient, but got a tensor that requires one; {instead}")


def check_lists(op: str, positives: object, ignore_index: object, first: torch.Tensor, of_first: str) -> None:
    """Raises TypeError or ValueError unless positives are lists [..., P] beside the first tensor, [..., D], and
    ignore_index can be an index of theirs."""
    check_tensor(op, "positives", positives, "an integer tensor of class indices [..., P]", INTEGERS)
    assert isinstance(positives, torch.Tensor)
    if positives.shape[:-1] != first.shape[:-1] or positives.dim() != first.dim():
        takes = f"[..., P] with the leading shape of {of_first}, {tuple(first.shape[:-1])}"
        raise ValueError(f"{op}: positives must be {takes}; got {describe(positives)}")
    check_device(op, "positives", positives, first, of_first)
    if not is_int(ignore_index, -(2**63)):
        raise TypeError(f"{op}: ignore_index takes an int; got {describe(ignore_index)}")


def check_indices(op: str, positives: torch.Tensor, ignore_index: int, classes: int, of: str) -> None:
    """Raises ValueError for an index beyond the last of the classes, those of ``of``; on a GPU, where to look is to
    wait, on demand."""
    if positives.numel() == 0 or not can_look(positives):
        return
    if int(positives.max()) >= classes:
        positives = positives.long()  # their dtype may be too small for the number of classes, or for ignore_index
        takes = f"class indices below {classes}, the classes of {of}, or negative ones for padding"
        refuse(op, "positives", takes, positives, (positives >= classes) & (positives != ignore_index))


def wrong_labels(labels: torch.Tensor) -> torch.Tensor:
    """Where they are neither in [0, 1] nor -100."""
    if labels.dtype == torch.uint8:  # for which 156 is -100
        return labels > 1
    return ~(((labels >= 0) & (labels <= 1)) | (labels == -100))


def refuse(op: str, name: str, takes: str, values: torch.Tensor, wrong: torch.Tensor) -> None:
    """Raises ValueError for the first of the values that is wrong, if one is."""
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} takes {takes}; got {values[where].item()} at {where}")


def check_mask(op: str, mask: object, scores: torch.Tensor) -> torch.Tensor | None:
    """The mask expanded to the shape of the scores."""
    if mask is None:
        return None
    check_tensor(
        op, "mask", mask, "a bool tensor, False where a cell is left out (of 0 and 1 use mask == 1)", [torch.bool]
    )
    assert isinstance(mask, torch.Tensor)
    check_device(op, "mask", mask, scores)
    lead = scores.dim() - mask.dim()
    if lead < 0 or any(m not in (1, s) for m, s in zip(mask.shape, scores.shape[lead:], strict=True)):
        raise ValueError(
            f"{op}: mask must broadcast to the shape of scores, {tuple(scores.shape)}; got {describe(mask)}"
        )
    return mask.expand(scores.shape)


def check_reduction(op: str, reduction: object) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction takes one of {', '.join(map(repr, REDUCTIONS))}; got {describe(reduction)}")


def choose_backend(op: str, *tensors: torch.Tensor | None) -> str:
    """The backend that serves a call; the first tensor decides, as the others are like it.

    Raises:
        RuntimeError: inside a transform that would give derivatives of 0, or an error from the depths of PyTorch.
    """
    backend = backends.choose(tensors[0])  # type: ignore[arg-type]
    if backend == "reference":
        return backend
    if forward_ad._current_level >= 0 and _any_dual(tensors):
        raise RuntimeError(
            f"{op}: forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) are not supported; "
            "flashpointer.use_backend('reference') has them"
        )
    transforms = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if transforms and any(map(_is_transformed, tensors)):
        raise RuntimeError(
            f"{op}: torch.func.grad, vjp, jacrev and hessian are not supported; "
            "take torch.autograd.grad, or flashpointer.use_backend('reference')"
        )
    return backend


def _any_dual(tensors: Sequence[torch.Tensor | None]) -> bool:
    if torch.compiler.is_compiling():  # which cannot look
        return True
    inner = map(_of_no_batch, tensors)
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inner)  # type: ignore[no-untyped-call]


def _is_transformed(x: torch.Tensor | None) -> bool:
    inner = _of_no_batch(x)
    return inner is not None and torch._C._functorch.is_gradtrackingtensor(inner)


def _of_no_batch(x: torch.Tensor | None) -> torch.Tensor | None:
    """What vmap inside of another transform has wrapped."""
    while x is not None and torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether any is one of many under vmap, or is_grads_batched, which is an older vmap."""
    if torch.compiler.is_compiling():  # which cannot ask
        return False
    asked = torch._C._functorch
    for x in tensors:  # noqa: SIM110 (a loop, and no generator: this runs before every call)
        if x is not None and (asked.is_batchedtensor(x) or asked.is_legacy_batchedtensor(x)):
            return True
    return False


def in_autocast(x: torch.Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # meta has none, and raises


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """For what computes in float32, which autocast would round."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else contextlib.nullcontext()
