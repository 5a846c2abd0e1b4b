"""``python -m flashpointer``: what is installed, which backend runs on each device, and whether every op is right.

Exit status 0 if every op agrees with its formula in float64 on every device and dtype, 1 otherwise.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import __version__, agreement, backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _zlpr_loss(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    scores = 4 * torch.randn(16, 983, device=device)
    return {"scores": scores.to(dtype), "labels": torch.rand(16, 983, device=device) < 0.02}


def _sparse_zlpr_loss(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    scores = 4 * torch.randn(16, 983, device=device)
    return {"scores": scores.to(dtype), "positives": torch.randint(-2, 983, (16, 9), device=device)}


def _zlpr_kl_div(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    scores = 4 * torch.randn(16, 983, device=device)
    return {"scores": scores.to(dtype), "other": (scores + torch.randn_like(scores)).to(dtype)}


def _linear_zlpr_loss(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"hidden": (24, 16), "weight": (983, 16), "bias": (983,)}
    layer = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    return {**layer, "positives": torch.randint(-2, 983, (24, 9), device=device)}


def _pointer_scores(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    vectors = {name: torch.randn(2, 100, 64, device=device).to(dtype) for name in ("q", "k")}
    biases = {name: torch.randn(2, 9, 100, device=device).to(dtype) for name in ("start", "end")}
    return {**vectors, **biases, "mask": torch.arange(100, device=device).expand(2, -1) < 80}


def _pointer_loss(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    spans = torch.stack([torch.randint(size, (30,), device=device) for size in (2, 9, 40, 40)], dim=1)
    spans[:, 3] += spans[:, 2]
    return {**_pointer_scores(device, dtype), "spans": spans}


# Each op with what makes its inputs and the arguments that are differentiated.
OPS: dict[str, tuple[Callable[[torch.device, torch.dtype], dict[str, Any]], tuple[str, ...]]] = {
    "zlpr_loss": (_zlpr_loss, ("scores",)),
    "sparse_zlpr_loss": (_sparse_zlpr_loss, ("scores",)),
    "zlpr_kl_div": (_zlpr_kl_div, ("scores", "other")),
    "linear_zlpr_loss": (_linear_zlpr_loss, ("hidden", "weight", "bias")),
    "pointer_scores": (_pointer_scores, ("q", "k", "start", "end")),
    "pointer_loss": (_pointer_loss, ("q", "k", "start", "end")),
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def main() -> int:
    print(f"flashpointer {__version__}, torch {torch.__version__}, triton {_version('triton')}", end=", ")
    print(f"python {platform.python_version()}, {platform.system()}")
    print("\nbackends")
    for device in _devices():
        print(f"  {_name(device)}")
        for dtype in DTYPES:
            try:
                backend, why = backends.explain(device, dtype)
            except ValueError as error:
                backend, why = "none", str(error)
            print(f"    {str(dtype).removeprefix('torch.'):9} {backend:10} {why}")
    print("\nself-check: relative error of loss and gradients against float64, and what is allowed")
    failed = 0
    for device in _devices():
        for op, (make_inputs, differentiate) in OPS.items():
            for dtype in DTYPES:
                where = f"{op:17} {device!s:7} {str(dtype).removeprefix('torch.'):9}"
                try:
                    results = agreement.compare(op, make_inputs(device, dtype), differentiate=differentiate)
                except Exception as error:  # whatever it is, it is a failure of this op alone: the next may pass
                    failed += 1
                    print(f"  FAIL  {where} {type(error).__name__}: {error}")
                    continue
                ok = all(result.ok for result in results)
                failed += not ok
                errors = ", ".join(f"{r.what} {r.error:.1e} <= {r.allowed:.1e}" for r in results)
                print(f"  {'pass' if ok else 'FAIL'}  {where} {errors if ok else '; '.join(map(str, results))}")
    print(f"\n{f'{failed} checks FAILED' if failed else 'all checks passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
