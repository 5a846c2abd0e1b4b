"""Fresh random inputs for every op, by the op's name and the shape of its scores."""

from __future__ import annotations

from typing import Any

import torch

import flashpointer as fp

# Each op on rows of scores with the arguments that are differentiated; then each on q and k, and on a linear layer.
OPS = {"zlpr_loss": ("scores",), "sparse_zlpr_loss": ("scores",), "zlpr_kl_div": ("scores", "other")}
POINTER_OPS = {op: ("q", "k", "start", "end") for op in ("pointer_scores", "pointer_loss")}
LINEAR_OPS = {"linear_zlpr_loss": ("hidden", "weight", "bias")}


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


def pointer_problem(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", shared: bool = True
) -> dict[str, Any]:
    """Two sentences of 7 tokens, the second one padded, in a band, and 3 heads."""
    B, H, N, D = 2, 3, 7, 8
    inputs = {name: torch.randn((B, N, D) if shared else (B, H, N, D), device=device).to(dtype) for name in ("q", "k")}
    inputs |= {name: torch.randn(B, H, N, device=device).to(dtype) for name in ("start", "end")}
    mask = torch.arange(N, device=device) < torch.tensor([[N], [5]], device=device)
    spans = torch.tensor([[0, 0, 1, 2], [0, 2, 1, 5], [1, 1, 0, 3], [1, 1, 2, 6], [0, 0, 1, 2]], device=device)
    options = {"mask": mask, "max_width": 5}
    return {**inputs, **options, "spans": spans} if op == "pointer_loss" else {**inputs, **options}


def linear_problem(dtype: torch.dtype = torch.float32, device: str = "cpu", soft: bool = False) -> dict[str, Any]:
    """Six rows of 5 numbers and 40 classes: more rows than numbers, so that not all of E is kept."""
    shapes = {"hidden": (2, 3, 5), "weight": (40, 5), "bias": (40,)}
    inputs = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    inputs["positives"] = positives((2, 3, 40), 6, device)
    if soft:
        inputs["positive_labels"] = torch.rand(2, 3, 6, device=device)
        inputs["positive_labels"][..., 1] = -100
    return inputs


# What cuts across ops is asked of each of these.
CASES = [
    *OPS,
    *(f"{op}, {heads} q and k" for op in POINTER_OPS for heads in ("shared", "own")),
    *(f"{op}, {labels} labels" for op in LINEAR_OPS for labels in ("hard", "soft")),
]


def op_of(case: str) -> tuple[str, tuple[str, ...]]:
    """The op of a case, and the arguments that are differentiated."""
    op = case.partition(",")[0]
    return op, (OPS | POINTER_OPS | LINEAR_OPS)[op]


def any_problem(case: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    op, _ = op_of(case)
    if op in LINEAR_OPS:
        return linear_problem(dtype, device, "soft" in case)
    return (
        pointer_problem(op, dtype, device, "own" not in case)
        if op in POINTER_OPS
        else problem(op, (2, 3, 7), dtype, device)
    )


def value_of(op: str, inputs: dict[str, Any]) -> torch.Tensor:
    """With 0 for -inf, the score of an invalid cell."""
    value: torch.Tensor = getattr(fp, op)(**inputs)
    return value.masked_fill(value == -torch.inf, 0.0)


def soft_labels(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As near to 0 and to 1 as may be: log-uniform in [1e-38, 1], as 1 less that, and exactly 0 and 1."""
    small = 10.0 ** (-38 * torch.rand(shape, dtype=torch.float64))
    labels = torch.where(torch.rand(shape) < 0.5, small, 1 - small)
    labels[torch.rand(shape) < 0.1] = 0.0
    labels[torch.rand(shape) < 0.1] = 1.0
    return labels.to(device, dtype)
