"""The one place where the backend of a call is chosen, by device and dtype.

``reference``  the eager formula, differentiated by PyTorch: any device and dtype, memory of a dozen score tensors.
``tiled``      plain PyTorch, tile by tile: any device and dtype, linear memory.
``triton``     fused kernels: CUDA devices, float16, bfloat16 and float32.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from types import ModuleType

import torch

BACKENDS = ("reference", "tiled", "triton")
OLDEST_TRITON = (3, 3)  # 3.2 dies while it compiles a kernel


def _why_no_triton() -> str | None:
    """Found without importing it, which takes long. A Triton that no metadata tell of is taken to be new enough."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(distribution)
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
                oldest = ".".join(map(str, OLDEST_TRITON))
                return f"Triton {version} is installed, and the kernels need {oldest} or later"
    return None


# Read once: Triton itself reads its variable when it is imported, and a compiled graph cannot watch the environment.
_NO_TRITON = _why_no_triton()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHECK_INDICES = os.environ.get("FLASHPOINTER_CHECK") == "1"

_forced: str | None = None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot serve ``dtype`` on ``device``, or None where they can."""
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return "the kernels run on CUDA devices"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "the kernels compute in float32 and take float16, bfloat16 and float32"
    if _INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return _NO_TRITON


def explain(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves ``dtype`` on ``device``, and why.

    Raises:
        ValueError: ``triton`` is forced and cannot serve them.
    """
    obstacle = why_not_triton(device, dtype)
    if _forced is not None:
        if _forced == "triton" and obstacle is not None:
            raise ValueError(f"backend 'triton' is forced, but got {dtype} on {device.type}: {obstacle}")
        return _forced, "forced by use_backend or FLASHPOINTER_BACKEND"
    if device.type != "cuda":
        return "tiled", "the kernels run on CUDA devices"
    if obstacle is not None:
        return "tiled", obstacle
    return "triton", "fused kernels"


def choose(scores: torch.Tensor) -> str:
    """The backend that serves a call on ``scores``."""
    return explain(scores.device, scores.dtype)[0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: ``"reference"``, ``"tiled"`` or ``"triton"``.

    The choice is the process's, as the environment variable ``FLASHPOINTER_BACKEND`` is, not the thread's. A backward
    uses the backend that its forward used.

    Raises:
        ValueError: ``name`` is no backend; or, at a call inside the block, ``triton`` cannot serve its device or dtype.
    """
    global _forced
    before, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _known(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        got = " ".join(reprlib.repr(name).split())
        raise ValueError(f"{source} takes one of {', '.join(map(repr, BACKENDS))}; got {got}")
    return name


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that computes ``op``: it has one name in every folder."""
    folder = "kernels" if backend == "triton" else "tiled"
    return importlib.import_module(f"flashpointer.{folder}.{op}")


if os.environ.get("FLASHPOINTER_BACKEND"):
    _forced = _known(os.environ["FLASHPOINTER_BACKEND"], "FLASHPOINTER_BACKEND")
