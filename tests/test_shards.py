"""Losses whose classes are sharded over ranks, against the loss of the whole."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import flashpointer as fp
from flashpointer import backends
from flashpointer.agreement import judge, relative_error, run
from flashpointer.ops import _shards

from .conftest import DTYPES, Place
from .problems import positives, problem, soft_labels
from .processes import in_ranks
from .test_memory import peak

# --- in one process: log-sums of parts merge, on every backend ------------------------------------------------------


def labels_of(kind: str, shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    labels = soft_labels(shape, device) if kind == "soft" else torch.rand(shape, device=device) < 0.1
    if kind != "bool":
        labels = labels.float() if kind == "soft" else labels.to(torch.int64)
        labels[torch.rand(shape, device=device) < 0.1] = -100
    return labels


def in_parts(place: Place, cuts: list[int], scores: torch.Tensor, labels: torch.Tensor, mask: Any) -> Any:
    """Loss and gradient of each row as ranks compute them that have the classes between the cuts."""
    module = backends.implementation("zlpr_loss", place.backend)
    parts = [
        [None if x is None else x[None, :, start:stop] for x in (scores, labels, mask)]
        for start, stop in itertools.pairwise(cuts)
    ]
    merged = _shards.merged(torch.stack([torch.stack(_shards.merged(module.shard_log_sums(*x))) for x in parts]))
    grads = [module.shard_gradient(*x, torch.stack(merged), 1.0)[0] for x in parts]
    return _shards.value(merged), torch.cat(grads, -1)


CASES = ["usual", "large", "one of +100 in the last shard", "-inf", "no negatives", "+inf", "learned", "learned well"]


@pytest.mark.parametrize("kind", ["bool", "int64", "soft"])
@pytest.mark.parametrize("classes, case", [*((30, case) for case in CASES), (9000, "usual")])
def test_parts_of_a_row_add_up_to_it(place: Place, dtype: torch.dtype, classes: int, kind: str, case: str) -> None:
    scores = 4 * torch.randn(3, classes, device=place.device)
    labels = labels_of(kind, (3, classes), place.device)
    mask = torch.rand(3, classes, device=place.device) < 0.8
    mask[2, : classes // 2] = False  # a shard with nothing in it
    if case == "large":
        scores = scores.sign() * (100.0 if dtype == torch.float64 else 1e4)  # where the oracle's logarithm is exact
    elif case == "one of +100 in the last shard":
        scores[1, -1], labels[1, -1], mask[1, -1] = 100.0, 0, True
    elif case == "-inf":
        scores[torch.rand_like(scores) < 0.5] = -torch.inf
    elif case == "no negatives":
        labels[:] = 1
    elif case == "+inf":
        scores[0, 0], labels[0, 0], mask[0, 0] = torch.inf, 0, True
    elif case == "learned":
        scores = torch.where(labels == 1, 30.0, -30.0) + torch.randn_like(scores)
    elif case == "learned well":  # an exponential without a pivot of its own would be off by 3e-6
        scores = torch.where(labels == 1, 60.0, -60.0) + torch.randn_like(scores)
    scores = scores.to(dtype)
    cuts = [0, classes // 3, classes // 3, classes - 1, classes]  # one is empty, one has a single class
    loss, grad = in_parts(place, cuts, scores, labels, mask)
    inputs = {"scores": scores, "labels": labels, "mask": mask, "reduction": "none"}
    for result in judge("zlpr_loss", inputs, [loss, grad]):
        assert result.ok, result
    assert grad.dtype == dtype


# --- in two and three processes --------------------------------------------------------------------------------------

COUNTS = (2, 3)


def cuts_of(ranks: int) -> list[list[int]]:
    """Where shards of 50 classes begin and end: uneven; empty ones, the last one a single class."""
    return [[0, 20, 50], [0, 50, 50], [0, 49, 50]] if ranks == 2 else [[0, 20, 27, 50], [0, 0, 50, 50], [0, 9, 49, 50]]


def own(x: torch.Tensor | None, cuts: list[int], rank: int) -> torch.Tensor | None:
    """The classes of this rank; of a mask that all classes share, it."""
    return x if x is None or x.shape[-1] == 1 else x[..., cuts[rank] : cuts[rank + 1]]


def of_all_ranks(x: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, x)
    return everybody


def agree(rank: int, cuts: list[int], op: str, inputs: dict[str, Any], upstream: torch.Tensor | None = None) -> None:
    """Of the whole ``inputs`` each rank takes its own: the loss must be that of the whole, of the same bits everywhere,
    and the gradients of all ranks that of the whole."""
    shard = {name: own(x, cuts, rank) if name in ("scores", "labels", "mask") else x for name, x in inputs.items()}
    if op == "sparse_zlpr_loss":
        shard["first_class"] = cuts[rank]
    loss, grad = run(getattr(fp, op), {**shard, "group": dist.group.WORLD}, ("scores",), upstream)
    losses = of_all_ranks(loss)
    assert all(torch.equal(loss.nan_to_num(7.0), other.nan_to_num(7.0)) for other in losses)
    for result in judge(op, inputs, [loss, torch.cat(of_all_ranks(grad), -1)], upstream=upstream):
        assert result.ok, result


@in_ranks(*COUNTS)
def test_loss_and_gradient_are_those_of_the_whole(rank: int, ranks: int) -> None:
    shape = (2, 3, 50)
    for dtype in DTYPES:
        for kind in ("bool", "int64", "soft"):
            for cuts in cuts_of(ranks):
                scores, labels = (4 * torch.randn(shape)).to(dtype), labels_of(kind, shape)
                for mask in (None, torch.rand(shape) < 0.7, torch.rand(2, 1, 1) < 0.5):
                    inputs = {"scores": scores, "labels": labels, "mask": mask, "reduction": "none"}
                    agree(rank, cuts, "zlpr_loss", inputs, torch.randn(2, 3))
                for reduction in ("sum", "mean"):
                    inputs = {"scores": scores, "labels": labels, "reduction": reduction}
                    agree(rank, cuts, "zlpr_loss", inputs, torch.tensor(3.0))


@in_ranks(*COUNTS)
def test_lists_of_positives(rank: int, ranks: int) -> None:
    """Indices into all classes; those of other ranks are theirs."""
    for dtype in DTYPES:
        for cuts in cuts_of(ranks):
            for listed in (positives((4, 50), 6, "cpu"), torch.tensor([[49], [0], [-1], [20]])):
                inputs = {"scores": torch.randn(4, 50).to(dtype), "positives": listed, "reduction": "none"}
                agree(rank, cuts, "sparse_zlpr_loss", inputs, torch.randn(4))
                agree(rank, cuts, "sparse_zlpr_loss", {**inputs, "ignore_index": 0, "mask": torch.rand(4, 50) < 0.7})


@in_ranks(*COUNTS)
def test_no_rows_and_no_classes(rank: int, ranks: int) -> None:
    for shape in ((0, 50), (4, 0)):
        cuts = [min(cut, shape[1]) for cut in cuts_of(ranks)[0]]
        for reduction in ("none", "mean"):
            inputs = {"scores": torch.randn(shape), "labels": torch.zeros(shape), "reduction": reduction}
            agree(rank, cuts, "zlpr_loss", inputs)


@in_ranks(*COUNTS)
def test_nan_stays_in_its_row(rank: int, ranks: int) -> None:
    """And reaches all ranks."""
    scores, labels, cuts = torch.randn(3, 50), torch.rand(3, 50) < 0.1, cuts_of(ranks)[0]
    scores[1, 49], scores[2, 0] = torch.nan, torch.inf
    labels[2, 0] = False
    losses = fp.zlpr_loss(own(scores, cuts, rank), own(labels, cuts, rank), reduction="none", group=dist.group.WORLD)
    assert losses.isfinite().tolist() == [True, False, False] and losses[1].isnan() and losses[2] == torch.inf


@in_ranks(*COUNTS)
def test_ranks_need_not_all_differentiate(rank: int, ranks: int) -> None:
    """Backward communicates nothing: the last rank needs no gradient, and the first goes through it twice."""
    scores, labels, cuts = torch.randn(3, 50), torch.rand(3, 50) < 0.1, cuts_of(ranks)[0]
    whole = run(fp.zlpr_loss, {"scores": scores, "labels": labels}, ("scores",))
    shard = own(scores, cuts, rank).clone().requires_grad_(rank < ranks - 1)
    loss = fp.zlpr_loss(shard, own(labels, cuts, rank), group=dist.group.WORLD)
    assert relative_error(loss, whole[0]) < 1e-6
    if rank < ranks - 1:
        grads = [torch.autograd.grad(loss, shard, retain_graph=rank == 0)[0] for _ in range(2 if rank == 0 else 1)]
        assert all(relative_error(grad, own(whole[1], cuts, rank)) < 1e-6 for grad in grads)
    with torch.no_grad():
        assert torch.equal(fp.zlpr_loss(shard, own(labels, cuts, rank), group=dist.group.WORLD), loss)


@in_ranks(*COUNTS)
def test_one_collective_of_four_numbers_a_row(rank: int, ranks: int) -> None:
    """But for the one that compares the numbers of rows, on a CPU."""
    shard = torch.randn(3, 5, requires_grad=True)
    with mock.patch.object(_shards, "_collective", wraps=torch.ops._c10d_functional) as collective:
        fp.zlpr_loss(shard, shard > 1, group=dist.group.WORLD).backward()
    assert [call[0] for call in collective.method_calls] == ["all_gather_into_tensor", "wait_tensor"] * 2
    assert [call[1][0].shape for call in collective.method_calls[::2]] == [(1,), (4, 3)]


@in_ranks(2)
def test_a_shard_takes_the_memory_of_its_gradient(rank: int, ranks: int) -> None:
    for op in ("zlpr_loss", "sparse_zlpr_loss"):
        inputs = {**problem(op, (512, 4096)), "group": dist.group.WORLD}
        size, tiles = inputs["scores"].nbytes, 4 * 2**20
        assert peak(getattr(fp, op), inputs, ("scores",), "cpu") <= size + tiles
        assert peak(getattr(fp, op), inputs, (), "cpu") <= tiles


@in_ranks(*COUNTS)
def test_second_derivatives_are_refused(rank: int, ranks: int) -> None:
    shard = torch.randn(3, 5, requires_grad=True)
    loss = fp.zlpr_loss(shard, shard > 1, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="zlpr_loss: second derivatives are not supported"):
        torch.autograd.grad(loss, shard, create_graph=True)


@in_ranks(*COUNTS)
def test_a_group_of_some_ranks(rank: int, ranks: int) -> None:
    """Not the first ones, nor in a row: the order is that of the group."""
    members = [0, ranks - 1]
    group = dist.new_group(members)
    scores, labels = torch.randn(3, 50), torch.rand(3, 50) < 0.1
    if rank in members:
        cuts = [0, 30, 50]
        here = members.index(rank)
        loss = fp.zlpr_loss(own(scores, cuts, here), own(labels, cuts, here), group=group)
        assert relative_error(loss, fp.zlpr_loss(scores, labels)) < 1e-6
        listed = torch.tensor([[49], [3], [25]])
        whole = fp.sparse_zlpr_loss(scores, listed)
        assert relative_error(fp.sparse_zlpr_loss(scores[:, 25 * here :][:, :25], listed, group=group), whole) < 1e-6
    else:
        with pytest.raises(TypeError, match=r"zlpr_loss: group takes a torch.distributed.ProcessGroup that this rank"):
            fp.zlpr_loss(scores, labels, group=group)


@in_ranks(*COUNTS)
def test_other_rows_raise_on_all_ranks(rank: int, ranks: int) -> None:
    scores = torch.randn(3 + (rank == 0), 5)
    for op, given in (("zlpr_loss", scores > 1), ("sparse_zlpr_loss", torch.zeros(len(scores), 2).long())):
        with pytest.raises(
            ValueError, match=rf"{op}: scores must have the same rows on all ranks .*; got .* of \[4, 3"
        ):
            getattr(fp, op)(scores, given, group=dist.group.WORLD)
    weight, group = torch.randn(7, 5), dist.group.WORLD
    for op, options in (("linear_zlpr_loss", {"positives": given}), ("linear_topk", {"k": 2})):
        with pytest.raises(ValueError, match=rf"{op}: hidden must have the same rows on all ranks .* of \[4, 3"):
            getattr(fp, op)(scores, weight, **options, group=group)
    with pytest.raises(ValueError, match=r"linear_topk: k must be the same on all ranks of the group; got \[2, 1"):
        fp.linear_topk(scores[:3], weight, k=1 + (rank == 0), group=group)


@in_ranks(*COUNTS)
def test_shards_that_do_not_fit_raise_on_all_ranks(rank: int, ranks: int) -> None:
    scores, listed = torch.randn(3, 4 + (rank == 0)), torch.tensor([[-1], [3], [2]])
    for first in (None, 6 * rank, 3 * rank, 4 * rank + 1, 0):  # overlaps and gaps; 0 alone is right of the first
        with pytest.raises(ValueError, match=r"sparse_zlpr_loss: first_class takes .*; got the shards \['"):
            fp.sparse_zlpr_loss(scores, listed, group=dist.group.WORLD, first_class=first)
    first = 4 * rank + (rank > 0)
    assert fp.sparse_zlpr_loss(scores, listed, group=dist.group.WORLD, first_class=first).isfinite()
    with pytest.raises(ValueError, match=f"positives takes class indices below {4 * ranks + 1}"):
        fp.sparse_zlpr_loss(scores, listed + 4 * ranks, group=dist.group.WORLD, first_class=first)


class Layer(nn.Module):
    """Of 50 classes, or of this rank's, with its loss in forward, where wrappers act."""

    def __init__(self, weight: torch.Tensor, **options: Any) -> None:
        super().__init__()
        self.weight, self.options = nn.Parameter(weight.clone()), options

    def forward(self, hidden: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
        return fp.linear_zlpr_loss(hidden, self.weight, listed, **self.options)


@in_ranks(*COUNTS)
def test_a_layer_inside_ddp_and_fsdp2(rank: int, ranks: int) -> None:
    """The batch is split, and the weight whole while it is used: FSDP2's module gathers it."""
    weight, hidden, listed = torch.randn(50, 8), torch.randn(ranks, 8), torch.randint(50, (ranks, 3))
    whole = Layer(weight)
    whole(hidden, listed).backward()
    for kind in ("ddp", "fsdp2"):
        layer = Layer(weight)
        if kind == "ddp":
            model: nn.Module = nn.parallel.DistributedDataParallel(layer)
        else:
            model = fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
        model(hidden[rank : rank + 1], listed[rank : rank + 1]).backward()
        grad = layer.weight.grad.full_tensor() if kind == "fsdp2" else layer.weight.grad
        assert relative_error(grad, whole.weight.grad) < 1e-6


@in_ranks(*COUNTS)
def test_sharded_classes_behind_a_wrapped_encoder(rank: int, ranks: int) -> None:
    """DDP and FSDP2 take the mean of the gradients that reach the encoder from each rank's classes, where their sum is
    wanted. linear_zlpr_loss has summed them before, so that the mean is right. Checkpointed, the forward of backward
    communicates again, on all ranks."""
    cuts, inputs = cuts_of(ranks)[0], torch.randn(4, 8)
    weight, listed, labels = torch.randn(50, 8), torch.randint(50, (4, 3)), torch.rand(4, 50) < 0.1
    shard, group = own(weight.t(), cuts, rank).t(), {"group": dist.group.WORLD}
    encoder = nn.Linear(8, 8)
    for loss_of, options, sums in (
        (lambda h, w, **k: fp.zlpr_loss(h @ w.t(), own(labels, cuts, rank) if k else labels, **k), {}, False),
        (lambda h, w, **k: fp.linear_zlpr_loss(h, w, listed, **k), {"first_class": cuts[rank]}, True),
    ):
        whole = torch.autograd.grad(loss_of(encoder(inputs), weight), encoder.weight)[0]
        for kind in ("ddp", "fsdp2"):
            copied = copy.deepcopy(encoder)
            if kind == "ddp":
                model: nn.Module = nn.parallel.DistributedDataParallel(copied)
            else:
                model = fully_shard(copied, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
            for checkpointed in (False, True):
                model.zero_grad()
                hidden, arguments = model(inputs), {**group, **options}
                if checkpointed:
                    loss = checkpoint(functools.partial(loss_of, **arguments), hidden, shard, use_reentrant=False)
                else:
                    loss = loss_of(hidden, shard, **arguments)
                loss.backward()
                grad = copied.weight.grad.full_tensor() if kind == "fsdp2" else copied.weight.grad
                assert relative_error(grad * (1 if sums else ranks), whole) < 1e-6


@in_ranks(*COUNTS)
def test_compiled(rank: int, ranks: int) -> None:
    cuts = cuts_of(ranks)[0]

    def step(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fp.zlpr_loss(2 * scores, labels, group=dist.group.WORLD) * 3

    def listed_step(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        return fp.sparse_zlpr_loss(2 * scores, positives, group=dist.group.WORLD, first_class=cuts[rank]) * 3

    for function, name in ((step, "labels"), (listed_step, "positives")):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for rows in (3, 4, 5):
            scores = torch.randn(rows, 50)
            labels = own(torch.rand(rows, 50) < 0.1, cuts, rank) if name == "labels" else torch.randint(50, (rows, 2))
            inputs = {"scores": own(scores, cuts, rank), name: labels}
            expected = run(function, inputs, ("scores",))
            for ours, truth in zip(run(compiled, inputs, ("scores",)), expected, strict=True):
                assert relative_error(ours, truth) < 1e-6


@pytest.mark.parametrize("op", ["zlpr_loss", "sparse_zlpr_loss"])
def test_opcheck(place: Place, op: str) -> None:
    """Of the parts that communicate nothing."""
    scores, labels = problem(op, (4, 3, 20), device=place.device).values()
    ops, extra = torch.ops.flashpointer, (-1,) if op == "sparse_zlpr_loss" else ()
    sums = 1 + torch.rand(4, 12, device=place.device)
    arguments = (scores, labels, torch.rand(4, 3, 20, device=place.device) < 0.8, sums)
    for reduction in ("none", "mean"):
        options = (reduction, place.backend, *extra)
        upstream = torch.rand((4, 3) if reduction == "none" else (), device=place.device)
        torch.library.opcheck(getattr(ops, f"{op}_sharded_backward").default, (*arguments, upstream, *options))
        scores.requires_grad_()
        torch.library.opcheck(getattr(ops, f"{op}_sharded").default, (*arguments, *options))
        scores.requires_grad_(False)


WRONG_GROUPS = [1, "a group", torch.ones(2)]


@pytest.mark.parametrize("op", ["zlpr_loss", "sparse_zlpr_loss"])
def test_errors(op: str) -> None:
    inputs = problem(op, (2, 5))
    for group in WRONG_GROUPS:
        with pytest.raises(TypeError, match=f"{op}: group takes a torch.distributed.ProcessGroup .*, or None; got "):
            getattr(fp, op)(**inputs, group=group)
    if op == "sparse_zlpr_loss":
        with pytest.raises(ValueError, match=f"{op}: first_class takes None where group is None; got int 3"):
            fp.sparse_zlpr_loss(**inputs, first_class=3)


@in_ranks(2)
def test_the_reference_takes_no_group(rank: int, ranks: int) -> None:
    with fp.use_backend("reference"):
        for op in ("zlpr_loss", "sparse_zlpr_loss"):
            with pytest.raises(ValueError, match=f"{op}: group takes None under the reference backend"):
                getattr(fp, op)(**problem(op, (2, 5)), group=dist.group.WORLD)
