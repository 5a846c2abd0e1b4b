"""Triton's interpreter made quick, and to compute float32 as chips do, where that may be an infinite number.

A compiler makes one fma of a product and the sum that it goes into, rounded once, unless the launch forbids it. And a
matrix unit that has no float32 multiplies in three products of tf32, which has 11 binary digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

DEPTH = 16  # products to a sum of a matrix unit


def compute_as_chips() -> None:
    """From now on, in this process."""
    builder: Any = InterpreterBuilder
    builder.create_fmul = _product(builder.create_fmul)
    builder.create_fadd = _fma(builder.create_fadd, 1.0)
    builder.create_fsub = _fma(builder.create_fsub, -1.0)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_splat = _splat(builder.create_splat)
    if not hasattr(builder, "get_int1_ty"):  # in Triton 3.3
        builder.get_int1_ty = lambda self: tl.int1
    patched: set[frozenset[str]] = set()
    GridExecutor.__call__ = _launch(GridExecutor.__call__, patched)
    interpreter._patch_lang = _once(interpreter._patch_lang, patched)
    interpreter._get_np_dtype = _of_scalars(interpreter._get_np_dtype)
    _share_shapes()
    # It looks for an overflow after each sum and product of int32, and without ``debug`` says nothing of what it finds.
    made = interpreter.interpreter_builder
    made.options = replace(made.options, sanitize_overflow=False)


def _launch(launch: Callable[..., Any], patched: set[frozenset[str]]) -> Callable[..., Any]:
    def launched(self: Any, *args: Any, enable_fp_fusion: bool = True, **kwargs: Any) -> Any:
        InterpreterBuilder.fuses = enable_fp_fusion
        patched.clear()
        return launch(self, *args, **kwargs)

    return launched


def _once(patch_language: Callable[..., Any], patched: set[frozenset[str]]) -> Callable[..., Any]:
    """Of each launch: else each call of a helper puts the interpreter's functions into Triton's language anew, which
    took a third of the time."""
    seen_by: dict[int, frozenset[str]] = {}  # the modules of the language, of those that a module knows

    def once(function: Any) -> Any:
        known = function.__globals__
        if id(known) not in seen_by:
            seen_by[id(known)] = frozenset(x.__name__ for x in known.values() if x is tl or x is tl.core)
        if seen_by[id(known)] in patched:
            return None
        patched.add(seen_by[id(known)])
        return patch_language(function)

    return once


def _splat(plain: Callable[..., Any]) -> Callable[..., Any]:
    """What a comparison of int32 finds is bool, though Triton's interpreter notes that of int32: its splat would be no
    mask, of which version 3.9 complains."""

    def splat(self: Any, *type_and_value: Any) -> Any:
        out = plain(self, *type_and_value)
        if any(isinstance(x, TensorHandle) and x.data.dtype == np.bool_ for x in type_and_value):
            out.data = out.data != 0
        return out

    return splat


def _of_scalars(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Looked up: else each call makes a table of all of them, which took a tenth of the time."""
    of_number = cache(numpy_dtype)
    return lambda dtype: np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_number(dtype.scalar)


def _share_shapes() -> None:
    """Of the types of blocks, and of tensors: else each wraps, checks and prints its own anew, which took a third of
    the time."""
    plain_type, plain_tensor = tl.block_type.__init__, tl.tensor.__init__

    @cache
    def tensor_of(shape: tuple[int, ...]) -> Any:
        tensor, of = object.__new__(tl.tensor), tl.int1
        if shape:
            of = object.__new__(tl.block_type)
            plain_type(of, tl.int1, list(shape))
        plain_tensor(tensor, None, of)
        return tensor

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.like = like = tensor_of(tuple([s.value if type(s) is tl.constexpr else s for s in shape]))
        self.element_ty, self.shape, self.numel = element_ty, like.type.shape, like.type.numel

    def init_tensor(self: Any, handle: Any, of: Any) -> None:
        like = of.like if of.is_block() else tensor_of(())
        self.handle, self.type, self.dtype, self.shape, self.numel = handle, of, of.scalar, like.shape, like.numel

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor
    tl.block_type.name = name = cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    name.__set_name__(tl.block_type, "name")


def _product(multiply: Callable[..., Any]) -> Callable[..., Any]:
    def product(self: Any, a: Any, b: Any) -> Any:
        out = multiply(self, a, b)
        if self.fuses and out.data.dtype == np.float32:
            out.factors = a.data, b.data
        return out

    return product


def _fma(add: Callable[..., Any], sign: float) -> Callable[..., Any]:
    """a + sign * b, where a or b is a product: that is exact in float64, whose sum is rounded once, nearly."""

    def fma(self: Any, a: Any, b: Any) -> Any:
        first, second = getattr(a, "factors", None), getattr(b, "factors", None)
        if first is None and second is None:
            return add(self, a, b)
        with np.errstate(all="ignore"):
            if first is not None:
                out = first[0].astype(np.float64) * first[1] + sign * b.data.astype(np.float64)
            else:
                out = a.data + sign * (second[0].astype(np.float64) * second[1])
            return TensorHandle(out.astype(np.float32), a.dtype.scalar)

    return fma


def _tf32(x: np.ndarray) -> np.ndarray:
    """The nearest one."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _multiply(a: np.ndarray, b: np.ndarray, acc: np.ndarray | float = 0.0) -> np.ndarray:
    """As a matrix unit: sums of DEPTH products, exact but for the rounding of each of these to float32. NumPy's own
    depend on the shape, so that a score would have other last bits in another tile."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], DEPTH):
        acc = (a[..., k : k + DEPTH] @ b[..., k : k + DEPTH, :] + acc).astype(np.float32)
    return acc


def _dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, *more: Any) -> Any:
        if acc.data.dtype != np.float32:
            return plain(self, a, b, acc, input_precision, *more)
        with np.errstate(all="ignore"):
            if a.data.dtype != np.float32 or input_precision.name != "TF32x3":
                return TensorHandle(_multiply(a.data, b.data, acc.data), acc.dtype.scalar)
            a, b = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
            a_big, b_big = _tf32(a), _tf32(b)
            small = _multiply(a_big, b - b_big, _multiply(a - a_big, b_big))
            small[np.isnan(small)] = 0.0  # so does Triton, for inf has no small part
            return TensorHandle(_multiply(a_big, b_big, small) + acc.data, acc.dtype.scalar)

    return dot
