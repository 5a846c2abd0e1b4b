"""What Triton 3.3 lacks of what the kernels need. Without it 3.3 raises an error; what it compiles stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import triton.language as tl
from triton.compiler import code_generator


def mend() -> None:
    in_each = code_generator._apply_to_tuple_values

    def field(constant: tl.constexpr, name: str) -> Any:
        """Of a constant that is an object, where Triton asks the wrapped constant for it."""
        value = vars(constant).get("value")
        if not is_dataclass(value):
            raise AttributeError(name)
        return getattr(value, name)

    def in_each_or_none(values: Any, change: Callable[[Any], Any]) -> Any:
        """In an assigned tuple Triton unwraps a constant None, and then asks it for its type."""

        def kept(x: Any) -> Any:
            changed = change(x)
            return tl.constexpr(None) if changed is None else changed

        return in_each(values, kept)

    tl.constexpr.__getattr__ = field
    code_generator._apply_to_tuple_values = in_each_or_none
