"""The ops inside what people train with: autocast, loss scaling, checkpointing, DDP, FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashpointer as fp
from flashpointer.agreement import compare, relative_error

from .conftest import Place
from .problems import OPS, problem
from .processes import in_ranks

every_op = pytest.mark.parametrize("op", OPS)


def loss_of(op: str, scores: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return getattr(fp, op)(**{**inputs, "scores": scores, **({"other": scores + 1} if "other" in inputs else {})})


@every_op
def test_autocast(place: Place, op: str) -> None:
    """Scores of half precision come in as they are, a float32 loss goes out, and the weights get their gradient."""
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    layer = nn.Linear(8, 50).to(place.device)
    inputs = problem(op, (16, 50), device=place.device)
    hidden = torch.randn(16, 8, device=place.device)
    with torch.autocast(place.device, half):
        scores = layer(hidden)
        assert scores.dtype == half
        loss = loss_of(op, scores, inputs)
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0


@every_op
def test_a_loss_scaler_steps(place: Place, op: str) -> None:
    """As torch.amp.GradScaler does: scaled loss, gradient unscaled in float32, no overflow and no underflow."""
    inputs = problem(op, (64, 50), torch.float16, place.device)
    scores = inputs["scores"].requires_grad_()
    (loss_of(op, scores, inputs) * 65536.0).backward()
    exact = scores.detach().double().requires_grad_()
    other = {"other": exact + 1} if "other" in inputs else {}
    getattr(fp.reference, op)(**{**inputs, "scores": exact, **other}).backward()
    assert relative_error(scores.grad.double() / 65536.0, exact.grad) < 2e-3


@every_op
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_loss_scaler_lifts_what_is_small(place: Place, op: str, reduction: str) -> None:
    """Gradients of rows that are learned, which in float16 have few digits or none, unless they are scaled first."""
    inputs = problem(op, (8, 50), torch.float16, place.device)
    inputs["scores"] = inputs["scores"] / 4 - 15
    if op == "zlpr_kl_div":
        inputs["other"] = inputs["scores"] + 1
    else:
        labels = "labels" if op == "zlpr_loss" else "positives"
        inputs[labels] = torch.full_like(inputs[labels], False if op == "zlpr_loss" else -1)
    upstream = torch.full((8,) if reduction == "none" else (), 4096.0, device=place.device)
    for result in compare(op, {**inputs, "reduction": reduction}, differentiate=OPS[op], upstream=upstream):
        assert result.ok, result


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(place: Place, op: str, reentrant: bool) -> None:
    inputs = problem(op, (4, 50), device=place.device)
    grads = []
    for checkpointed in (False, True):
        scores = inputs["scores"].clone().requires_grad_()

        def step(s: torch.Tensor) -> torch.Tensor:
            return loss_of(op, 2 * s, inputs)

        loss = checkpoint(step, scores, use_reentrant=reentrant) if checkpointed else step(scores)
        (3 * loss).backward()
        grads.append(scores.grad)
    assert torch.equal(*grads)


@every_op
def test_saved_tensors_may_be_packed(place: Place, op: str) -> None:
    """Offloading hooks hand backward another tensor than forward saved."""
    inputs = problem(op, (4, 50), device=place.device)
    grads = []
    for hooks in (False, True):
        scores = inputs["scores"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks((lambda x: x.clone()) if hooks else (lambda x: x), lambda x: x):
            loss = 3 * loss_of(op, scores, inputs)
        loss.backward()
        grads.append(scores.grad)
    assert torch.equal(*grads)


def test_training_learns_the_labels(place: Place) -> None:
    """A linear classifier on separable data reaches a small loss, and decodes by score > 0."""
    hidden = torch.randn(64, 32, device=place.device)
    labels = (hidden @ torch.randn(32, 10, device=place.device)) > 4
    layer = nn.Linear(32, 10).to(place.device)
    criterion = fp.nn.ZLPRLoss()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(20 if place.small else 200):
        optimizer.zero_grad()
        loss = criterion(layer(hidden), labels)
        loss.backward()
        optimizer.step()
    if not place.small:
        assert loss < 0.2
        assert ((layer(hidden) > 0) == labels).float().mean() > 0.99


@in_ranks(2)
def test_data_parallel(rank: int, ranks: int) -> None:
    """Each rank's half of the batch, through DDP or FSDP2, must give the gradient of the whole."""
    from torch.distributed.fsdp import fully_shard

    for kind in ("ddp", "fsdp2"):
        layer, whole = nn.Linear(8, 50), nn.Linear(8, 50)
        whole.load_state_dict(layer.state_dict())
        hidden, labels = torch.randn(16, 8), torch.rand(16, 50) < 0.1
        fp.zlpr_loss(whole(hidden), labels).backward()
        if kind == "ddp":
            model: nn.Module = nn.parallel.DistributedDataParallel(layer)
        else:
            model = fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        half = slice(8 * rank, 8 * rank + 8)
        fp.zlpr_loss(model(hidden[half]), labels[half]).backward()
        grad = layer.weight.grad
        grad = grad.full_tensor() if kind == "fsdp2" else grad
        assert relative_error(grad, whole.weight.grad) < 1e-6
