"""Fresh random inputs for every op, by the op's name and the shape of its scores."""

from __future__ import annotations

from typing import Any

import torch

# Each op with the arguments that are differentiated.
OPS = {"zlpr_loss": ("scores",), "sparse_zlpr_loss": ("scores",), "zlpr_kl_div": ("scores", "other")}


def problem(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    scores = (4 * torch.randn(shape, device=device)).to(dtype)
    if op == "zlpr_loss":
        return {"scores": scores, "labels": torch.rand(shape, device=device) < 0.1}
    if op == "sparse_zlpr_loss":
        return {"scores": scores, "positives": positives(shape, 6, device)}
    return {"scores": scores, "other": (scores + torch.randn(shape, device=device)).to(dtype)}


def positives(shape: tuple[int, ...], listed: int, device: str) -> torch.Tensor:
    """Lists [..., listed] with repetitions and padding, of every negative index."""
    classes = shape[-1]
    lists = torch.randint(-max(1, classes // 4), max(classes, 1), (*shape[:-1], listed), device=device)
    return lists if classes > 0 else -1 - lists.abs()
