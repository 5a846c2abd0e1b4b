"""RoPE of the kernels and of tiled PyTorch against float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import relative_error
from flashpointer.problem import Problem

from .conftest import Place

SHAPES = [(1, 1, 1, 2), (2, 3, 70, 6), (2, 1, 5, 64), (1, 2, 9, 256), (2, 0, 5, 8), (0, 2, 5, 8), (2, 3, 0, 8)]


def turn(
    place: Place,
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rope: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """R q and R k, or where these are kernels', which leave them padded, views of them."""
    if place.backend == "triton":
        kernels = [importlib.import_module(f"flashpointer.kernels.{name}") for name in ("pointer_scores", "rotate")]
        batch, heads, length, size = q.shape
        _, tile = kernels[0].tile_of(size, 1, q.dtype, True, rope, "ieee")
        vectors = kernels[1].turned(q, k, None if mask is None else mask.view(torch.uint8), positions, tile)
        assert vectors.is_contiguous()
        vectors = vectors.view(2, batch, heads, *vectors.shape[2:])
        assert not vectors[..., length:, :].any() and not vectors[..., size:].any()
        return tuple(vectors[..., :length, :size])
    rotary = importlib.import_module("flashpointer.tiled._rotary")
    return rotary.turned(q, k, Problem(mask, positions, rope, True, None, 1.0)).unbind()


def there_and_back(
    place: Place, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if place.backend == "triton":  # which turn back what a sweep leaves: R^T (S R k) and R^T (S^T R q), of S = 1
        kernels = importlib.import_module("flashpointer.kernels.pointer_scores")
        grad = torch.eye(q.shape[2], device=q.device).expand(*q.shape[:2], -1, -1)
        problem = Problem(None, positions, True, True, None, 1.0)
        d_q, d_k, *_ = kernels.backward(grad, q, k, False, False, problem)
        return d_k, d_q
    rotary = importlib.import_module("flashpointer.tiled._rotary")
    vectors = torch.stack(turn(place, q, k, None, positions))
    return rotary.turned_back(vectors, Problem(None, positions, True, True, None, 1.0)).unbind()


def exact(x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    positions = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
    return fp.reference.rotate(x.double(), positions)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(place: Place, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    vectors = torch.randn(2, *shape, device=place.device).to(dtype)
    for x, turned in zip(vectors, turn(place, *vectors), strict=True):
        assert turned.is_contiguous() or place.backend == "triton"
        assert relative_error(turned, exact(x)) <= max(3e-7, torch.finfo(turned.dtype).eps)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("each", [True, False], ids=["each", "one"])
def test_far_positions(place: Place, each: bool, integer: torch.dtype) -> None:
    """cos and sin are those of float64 within 1e-6; positions of any strides."""
    x = torch.zeros(2, 1, 40, 64, device=place.device)
    x[..., ::2] = 1
    positions = torch.randint(min(100001, torch.iinfo(integer).max), (40, 4), device=place.device).to(integer)
    positions[0] = min(100000, torch.iinfo(integer).max)
    positions = positions.T[::2] if each else positions[:, 1]
    for turned in turn(place, x, x, positions=positions):
        assert (turned - exact(x, positions)).abs().max() < 1e-6


def test_negative_and_huge_positions(place: Place) -> None:
    x = torch.randn(1, 1, 5, 2, device=place.device)
    positions = torch.tensor([-1, -100000, 2**40, -(2**40), 3], device=place.device)
    assert (turn(place, x, x, positions=positions)[0] - exact(x, positions)).abs().max() < 1e-3


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "copy"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_dropped_tokens_are_zero(place: Place, garbage: float, rope: bool) -> None:
    mask = (torch.rand(40, 2, device=place.device) < 0.7).T
    clean = torch.randn(2, 2, 3, 40, 16, device=place.device)
    q, k = clean.masked_fill(~mask[:, None, :, None], garbage)
    for x, turned in zip(clean, turn(place, q, k, mask, rope=rope), strict=True):
        expected = (exact(x) if rope else x).masked_fill(~mask[:, None, :, None], 0.0)
        assert torch.equal(turned == 0, expected == 0)
        assert relative_error(turned, expected) < 3e-7


def test_strides(place: Place) -> None:
    """Views of one projection as the heads pass them, shared heads expanded, one of q and k with stride 2."""
    projection = torch.randn(2, 20, 3, 2, 16, device=place.device)
    q, k = projection.transpose(1, 2).unbind(3)
    pairs: list[Any] = [(q, k), (q[:, :1].expand(2, 3, 20, 16), k), (q[..., ::2], k[..., 8:]), (q.flip(2), k)]
    for pair in pairs:
        for x, turned in zip(pair, turn(place, *pair), strict=True):
            assert relative_error(turned, exact(x)) < 3e-7


def test_there_and_back(place: Place) -> None:
    q, k = torch.randn(2, 2, 3, 50, 12, device=place.device)
    for positions in (None, torch.randint(100000, (2, 50), device=place.device, dtype=torch.int32)):
        for x, back in zip((q, k), there_and_back(place, q, k, positions), strict=True):
            assert relative_error(back, x) < 3e-7


def test_angles_are_made_once_on_a_cpu() -> None:
    """Also by a first call under inference mode, whose tensors autograd would refuse later."""
    rotary = importlib.import_module("flashpointer.tiled._rotary")
    rotary._table.cache_clear()
    q = torch.randn(2, 1, 33, 8)
    for length in (33, 40, 64):
        with torch.inference_mode():
            turn(Place("cpu", "tiled"), q, q)
        q = torch.randn(2, 1, length, 8, requires_grad=True)
        turn(Place("cpu", "tiled"), q, q)[0].sum().backward()
    assert rotary._table.cache_info().misses == 1
