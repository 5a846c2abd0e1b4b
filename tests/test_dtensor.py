"""Ops on DTensors: the values and gradients of the whole, placed as the arguments are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

import flashpointer as fp
from flashpointer.agreement import relative_error, run

from .problems import CASES, any_problem, op_of, problem
from .processes import in_ranks

COUNTS = (2, 3)


def placed(x: Any, mesh: Any, *placements: Any) -> Any:
    return distribute_tensor(x, mesh, placements) if isinstance(x, torch.Tensor) else x


def batched(case: str) -> dict[str, Any]:
    """Two sentences, or rows of two kinds: with three ranks, one has none. With a mask that is broadcast."""
    inputs = any_problem(case)
    if "spans" in inputs:
        inputs["spans"] = fp.spans.pad(inputs["spans"], 2)
    if "scores" in inputs:
        inputs["mask"] = torch.rand(1, 7) < 0.8
    return inputs


def agree(op: str, mesh: Any, inputs: dict[str, Any], placements: dict[str, Any], expected: Any) -> None:
    """The value, as many times as there are placements of it, and the gradients by what requires one."""
    differentiable = op_of(op)[1]
    whole = {k: x.clone().requires_grad_() if k in differentiable else x for k, x in inputs.items()}
    shards = {k: placed(x, mesh, *placements.get(k, placements[differentiable[0]])) for k, x in inputs.items()}
    for name in differentiable:
        shards[name].requires_grad_()
    value, truth = getattr(fp, op)(**shards), getattr(fp, op)(**whole)
    assert isinstance(value, DTensor) and value.placements == expected
    assert value.dtype == truth.dtype and value.shape == truth.shape
    assert relative_error(value.full_tensor().detach(), truth.detach()) < 1e-6
    upstream = torch.rand_like(truth)
    (value.full_tensor().nan_to_num(neginf=0.0) * upstream).sum().backward()
    (truth.nan_to_num(neginf=0.0) * upstream).sum().backward()
    for name in differentiable:
        grad = shards[name].grad
        assert grad.placements == shards[name].placements
        assert relative_error(grad.full_tensor(), whole[name].grad) < 1e-6


@in_ranks(*COUNTS)
def test_every_op_on_a_sharded_batch(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    for case in CASES:
        op = op_of(case)[0]
        if op == "linear_zlpr_loss":  # whose weights are no part of the batch: below
            continue
        for placement in (Shard(0), Replicate()):
            sharded = placement == Shard(0)
            placements = {
                op_of(op)[1][0]: [placement],
                **({"mask": [Replicate()]} if "scores" in batched(case) else {}),
            }
            reductions = [{}] if op == "pointer_scores" else [{"reduction": r} for r in ("none", "sum", "mean")]
            for options in reductions:
                reduced = options.get("reduction", "none") != "none"
                expected = (Partial() if sharded and reduced else placement,)
                agree(op, mesh, batched(case) | options, placements, expected)


@in_ranks(*COUNTS)
def test_rows_of_any_dimension(rank: int, ranks: int) -> None:
    """The second one of three; lists of positives, and a mask that has it too."""
    mesh = init_device_mesh("cpu", (ranks,))
    for op in ("zlpr_loss", "sparse_zlpr_loss", "zlpr_kl_div"):
        inputs = {**problem(op, (2, 5, 7)), "mask": torch.rand(5, 7) < 0.8}
        for reduction in ("none", "mean"):
            expected = (Shard(1) if reduction == "none" else Partial(),)
            placements = {"scores": [Shard(1)], "mask": [Shard(0)]}
            agree(op, mesh, {**inputs, "reduction": reduction}, placements, expected)


@in_ranks(*COUNTS)
def test_sharded_classes(rank: int, ranks: int) -> None:
    """7 of them: 4 and 3; 3, 3 and 1. And one, which leaves nothing for others."""
    mesh = init_device_mesh("cpu", (ranks,))
    for classes in (7, 1):
        for op in ("zlpr_loss", "sparse_zlpr_loss"):
            by_row = Replicate() if classes > 1 else Shard(1)
            for mask, placement in ((torch.rand(classes) < 0.8, Shard(0)), (torch.rand(3, 1) < 0.8, by_row)):
                inputs = {**problem(op, (2, 3, classes)), "mask": mask}
                placements = {"scores": [Shard(2)], "mask": [placement], "positives": [Replicate()]}
                for reduction in ("none", "sum", "mean"):
                    agree(op, mesh, {**inputs, "reduction": reduction}, placements, (Replicate(),))


@in_ranks(*COUNTS)
def test_two_dimensions_of_a_mesh(rank: int, ranks: int) -> None:
    """Rows over one, classes over the other; or one of them whole."""
    for shape in ((ranks, 1), (1, ranks)):
        mesh = init_device_mesh("cpu", shape)
        for placements, expected in (
            ([Shard(0), Shard(2)], (Partial(), Replicate())),
            ([Shard(1), Shard(0)], (Partial(), Partial())),
            ([Shard(0), Shard(0)], (Partial(), Partial())),
            ([Replicate(), Shard(0)], (Replicate(), Partial())),
        ):
            agree("zlpr_loss", mesh, problem("zlpr_loss", (4, 3, 7)), {"scores": placements}, expected)


@in_ranks(*COUNTS)
def test_a_layer_and_its_loss(rank: int, ranks: int) -> None:
    """By classes: 7 of them. By rows: 5. What each rank has whole has a gradient in parts, a rank's own in each."""
    mesh = init_device_mesh("cpu", (ranks,))
    whole = {"hidden": torch.randn(5, 8), "weight": torch.randn(7, 8), "bias": torch.randn(7)}
    listed = torch.randint(-1, 7, (5, 3))
    expected = run(fp.linear_zlpr_loss, {**whole, "positives": listed}, tuple(whole))
    by_class = {"hidden": Replicate(), "weight": Shard(0), "bias": Shard(0), "positives": Replicate()}
    by_row = {"hidden": Shard(0), "weight": Replicate(), "bias": Replicate(), "positives": Shard(0)}
    for placements, of_loss, of_grads in (
        (by_class, Replicate(), (Partial(), Shard(0), Shard(0))),
        (by_row, Partial(), (Shard(0), Partial(), Partial())),
    ):
        shards = {k: placed(x, mesh, placements[k]) for k, x in {**whole, "positives": listed}.items()}
        leaves = [shards[name].requires_grad_() for name in whole]
        loss = fp.linear_zlpr_loss(**shards)
        assert loss.placements == (of_loss,)
        grads = torch.autograd.grad(loss, leaves)
        assert [grad.placements[0] for grad in grads] == list(of_grads)
        for ours, truth in zip((loss, *grads), expected, strict=True):
            assert relative_error(ours.full_tensor(), truth) < 1e-6
        blocks: list[Any] = []
        taken: dict[str, Any] = {**shards, "weight_grad": lambda _, gradient, blocks=blocks: blocks.append(gradient)}
        if placements is by_row:  # of whose gradient each rank has a part
            with pytest.raises(ValueError, match=r"weight_grad takes None where hidden is sharded by rows.*got func"):
                fp.linear_zlpr_loss(**taken)
        else:
            fp.linear_zlpr_loss(**taken).backward()
            assert relative_error(torch.cat(blocks), grads[1].to_local()) < 1e-6


@in_ranks(*COUNTS)
def test_rows_that_were_gathered(rank: int, ranks: int) -> None:
    """Their gradient goes back in shards: PyTorch sums the parts of all ranks as it cuts them."""
    mesh = init_device_mesh("cpu", (ranks,))
    whole, listed = {"hidden": torch.randn(6, 8), "weight": torch.randn(7, 8)}, torch.randint(-1, 7, (6, 3))
    _, truth, _ = run(fp.linear_zlpr_loss, {**whole, "positives": listed}, tuple(whole))
    hidden, weight = (placed(x, mesh, Shard(0)).requires_grad_() for x in whole.values())
    gathered = hidden.redistribute(mesh, [Replicate()])
    (grad,) = torch.autograd.grad(fp.linear_zlpr_loss(gathered, weight, placed(listed, mesh, Replicate())), [hidden])
    assert grad.placements == (Shard(0),)
    assert relative_error(grad.full_tensor(), truth) < 1e-6


@in_ranks(*COUNTS)
def test_the_best_classes(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    layer = {"hidden": torch.randn(5, 8), "weight": torch.randn(7, 8), "bias": torch.randn(7)}
    expected = fp.linear_topk(**layer, k=3)
    for by_class in (False, True):
        shards = {
            k: placed(x, mesh, Shard(0) if by_class != (k == "hidden") else Replicate()) for k, x in layer.items()
        }
        found = fp.linear_topk(**shards, k=3)
        assert type(found) is type(expected)
        for ours, truth in zip(found, expected, strict=True):
            assert ours.placements == (Replicate() if by_class else Shard(0),)
            torch.testing.assert_close(ours.full_tensor(), truth)


@in_ranks(*COUNTS)
def test_decoding(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    inputs = {**any_problem("pointer_scores"), "padded": True}
    expected = fp.pointer_decode(**inputs)
    assert (expected[0][0] >= 0).sum() != (expected[0][1] >= 0).sum()  # ranks find more and less
    for placement in (Shard(0), Replicate()):
        found = fp.pointer_decode(**{name: placed(x, mesh, placement) for name, x in inputs.items()})
        for ours, truth in zip(found, expected, strict=True):
            assert ours.placements == (placement,) and torch.equal(ours.full_tensor(), truth)
    flat = {name: placed(x, mesh, Shard(0)) for name, x in inputs.items()} | {"padded": False}
    with pytest.raises(ValueError, match="pointer_decode: padded takes True where q is sharded by sentences"):
        fp.pointer_decode(**flat)


@in_ranks(*COUNTS)
def test_heads(rank: int, ranks: int) -> None:
    """Replicated weights get the gradients of the whole batch. PyTorch's linear layers take no uneven one."""
    mesh = init_device_mesh("cpu", (ranks,))
    for kind in (fp.nn.GlobalPointer, fp.nn.EfficientGlobalPointer):
        head, hidden, mask = kind(8, 3, 4), torch.randn(6, 5, 8), torch.rand(6, 5) < 0.8
        spans = torch.randint(0, 3, (6, 2, 3))
        head.loss(hidden, spans, mask).backward()
        expected = [parameter.grad.clone() for parameter in head.parameters()]
        head.zero_grad()
        shared = distribute_module(head, mesh)
        shared.loss(*(placed(x, mesh, Shard(0)) for x in (hidden, spans, mask))).backward()
        for parameter, truth in zip(shared.parameters(), expected, strict=True):
            assert relative_error(parameter.grad.full_tensor(), truth) < 1e-5


@in_ranks(*COUNTS)
def test_a_layer_whose_classes_are_sharded(rank: int, ranks: int) -> None:
    """As tensor parallelism shards it, by columns."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (ranks,))
    layer, hidden, labels = nn.Linear(8, 7), torch.randn(4, 8), torch.rand(4, 7) < 0.3
    fp.zlpr_loss(layer(hidden), labels).backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    fp.nn.ZLPRLoss()(layer(hidden), placed(labels, mesh, Shard(1))).backward()
    for parameter, truth in zip(layer.parameters(), expected, strict=True):
        assert relative_error(parameter.grad.full_tensor(), truth) < 1e-6


@in_ranks(2)
def test_compiled(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    compiled = torch.compile(fp.zlpr_loss, fullgraph=True, backend="aot_eager")
    inputs = problem("zlpr_loss", (3, 7))
    for placement in (Shard(0), Shard(1)):
        shards = {name: placed(x, mesh, placement) for name, x in inputs.items()}
        shards["scores"].requires_grad_()
        loss = compiled(**shards)
        assert relative_error(loss.full_tensor(), fp.zlpr_loss(**inputs)) < 1e-6
        (grad,) = torch.autograd.grad(loss, shards["scores"])
        assert torch.equal(
            grad.full_tensor(), torch.autograd.grad(fp.zlpr_loss(**shards), shards["scores"])[0].full_tensor()
        )


@in_ranks(2)
def test_what_is_placed_otherwise_is_told_how(rank: int, ranks: int) -> None:
    mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))

    def refused(op: str, message: str, placements: dict[str, Any], **options: Any) -> None:
        inputs = batched(f"{op}, shared") if op.startswith("pointer") else problem(op, (4, 6))
        for name, placement in placements.items():
            if placement is not None:
                inputs[name] = placed(inputs[name], other_mesh if len(placement) == 2 else mesh, *placement)
        names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and name not in placements]
        inputs |= {name: placed(inputs[name], mesh, Shard(0)) for name in names}
        with pytest.raises((TypeError, ValueError), match=f"^{op}: {re.escape(message)}") as caught:
            getattr(fp, op)(**{**inputs, **options})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    rows = "takes a DTensor that is replicated or sharded by rows"
    refused("zlpr_loss", f"scores {rows} or by classes; got (Partial(sum),): redistribute()", {"scores": [Partial()]})
    refused("zlpr_kl_div", f"scores {rows}; got (Shard(dim=1),): redistribute()", {"scores": [Shard(1)]})
    refused("sparse_zlpr_loss", f"positives {rows}", {"positives": [Shard(1)], "scores": [Shard(1)]})
    beside = "takes (Shard(dim=0),) beside scores of (Shard(dim=0),); got (Replicate(),): redistribute() makes it so"
    refused("zlpr_loss", f"labels {beside}", {"labels": [Replicate()]})
    refused("zlpr_loss", "labels takes a DTensor, as scores is one; got a torch.bool tensor", {"labels": None})
    refused("zlpr_loss", "scores takes a DTensor, as labels is one; got a torch.float32 tensor", {"scores": None})
    refused("zlpr_loss", "labels takes a DTensor on the mesh of scores; got one on ", {"labels": [Shard(0)] * 2})
    both = [Shard(1)] * 2
    refused("zlpr_loss", "scores takes a DTensor whose classes are sharded on one", {"scores": both, "labels": both})
    refused("zlpr_loss", "group takes None beside DTensors", {}, group=torch.distributed.group.WORLD)
    refused("sparse_zlpr_loss", "first_class takes None beside DTensors", {}, first_class=3)
    by_sentence = "takes a DTensor that is replicated or sharded by sentences, Shard(0); got (Shard(dim=1),)"
    refused("pointer_loss", f"q {by_sentence}: redistribute() makes one", {"q": [Shard(1)]})
    refused("pointer_loss", "start takes (Shard(dim=0),) beside q of (Shard(dim=0),)", {"start": [Replicate()]})
    flat = "spans takes batch-first [B, P, 3] where sentences are sharded, which flat spans [S, 4] count"
    refused("pointer_loss", flat, {}, spans=torch.zeros(1, 4, dtype=torch.int64))
    refused("pointer_loss", flat, {}, spans=placed(torch.zeros(1, 4, dtype=torch.int64), mesh, Replicate()))
    refused("pointer_loss", "k takes a floating-point tensor like q; got list", {}, k=[1.0])
    refused("pointer_loss", "q takes a floating-point tensor", {}, q=[1.0])
