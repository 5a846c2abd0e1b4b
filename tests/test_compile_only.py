"""The kernels compiled for real chips, which needs Triton but no GPU: no spill, shared memory that fits, wide loads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton", reason="Triton is not installed")

from flashpointer.kernels import (  # noqa: E402
    linear_zlpr_loss,
    pointer_decode,
    pointer_loss,
    pointer_scores,
    scale_rows,
    sparse_zlpr_loss,
    workspace,
    zlpr_kl_div,
    zlpr_loss,
)

from flashpointer.ops._checks import INTEGERS  # noqa: E402
from flashpointer.problem import Lists, Problem  # noqa: E402

from .chips import CHIPS, REGISTERS, Compiled, compiling_for  # noqa: E402
from .conftest import INTERPRETED  # noqa: E402
from .test_calls import calls  # noqa: E402

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(INTERPRETED, reason="this process interprets"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is at work; machines without one compile"),
]
on_every_chip = pytest.mark.parametrize("chip", CHIPS)


def compile_for(chip: str, launch: Callable[[], object]) -> list[Compiled]:
    with compiling_for(chip) as compiled:
        launch()
    assert compiled
    for kernel in compiled:
        assert kernel.spills == 0, f"{kernel.name} spills {kernel.spills} on {chip}"
        assert kernel.shared <= CHIPS[chip].shared_limit, f"{kernel.name} uses {kernel.shared} bytes shared on {chip}"
        assert kernel.registers <= REGISTERS, f"{kernel.name} needs {kernel.registers} registers for a block on {chip}"
    return compiled


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_a_spill_is_seen(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointer_scores, "all_registers", lambda: {"maxnreg": 48})
    q, k = torch.empty(2, 2, 1, 128, 64, dtype=torch.float32)
    problem = Problem(None, None, True, True, None, 0.125)
    with pytest.raises(AssertionError, match="scores_kernel spills"):
        compile_for(chip, lambda: pointer_scores.forward(q, k, None, None, 9, problem))


def test_the_version_under_test() -> None:
    if "EXPECTED_TRITON" in os.environ:
        assert Version(triton.__version__) == Version(os.environ["EXPECTED_TRITON"])


# A shape for each plan that plan() can pick: (rows, classes), of an odd row too. The last three: a sweep, a few splits,
# the most splits.
BLOCKS = [2**n for n in range(4, zlpr_loss.LONGEST_BLOCK.bit_length())]
SHAPES = [
    *((64, block) for block in BLOCKS),
    *((64, block - 1) for block in BLOCKS),
    *((2048, 16384), (256, 20000), (2, 2**23)),
]


@pytest.mark.parametrize("kind", ["bool", "packed", "integer", "soft"])
def test_the_shapes_reach_every_plan(kind: str) -> None:
    def plans(shapes: list[tuple[int, int]]) -> set[tuple[zlpr_loss.Plan, bool]]:
        return {(zlpr_loss.plan(*shape, kind)._replace(splits=0), shape[1] % 16 == 0) for shape in shapes}

    possible = plans([(r, c) for r in (1, 64, 5000) for c in range(1, zlpr_loss.LONGEST_BLOCK + 1, 7)])
    possible |= plans([(r, c) for r in (1, 64, 5000) for c in range(16, 40000, 112)])
    assert possible <= plans(SHAPES)
    assert [zlpr_loss.plan(*shape, kind).splits for shape in SHAPES[-3:]] == [1, 8, 1024]


def zlpr(shape: tuple[int, int], dtype: torch.dtype, labels: str, masked: bool, with_grad: bool) -> None:
    scores = torch.empty((1, *shape), dtype=dtype)
    mask = torch.empty(scores.shape, dtype=torch.bool) if masked else None
    if labels == "sparse":
        lists = torch.empty((1, shape[0], 5), dtype=torch.int64)
        sparse_zlpr_loss.forward(scores, lists, mask, 1.0, with_grad, -100)
    else:
        zlpr_loss.forward(scores, torch.empty(scores.shape, dtype=getattr(torch, labels)), mask, 1.0, with_grad)


@on_every_chip
@pytest.mark.parametrize(
    "scores_dtype, labels, masked, with_grad",
    [
        (torch.bfloat16, "bool", False, True),  # what most train with
        (torch.float32, "float32", True, True),  # the most registers
        (torch.float16, "sparse", True, True),
        (torch.float32, "int64", True, False),  # evaluation
    ],
    ids=["bool", "soft", "sparse", "integer"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zlpr_loss(
    chip: str, shape: tuple[int, int], scores_dtype: torch.dtype, labels: str, masked: bool, with_grad: bool
) -> None:
    compile_for(chip, lambda: zlpr(shape, scores_dtype, labels, masked, with_grad))


@pytest.mark.parametrize("integers", INTEGERS, ids=str)
def test_each_dtype_of_integers(integers: torch.dtype) -> None:
    """Labels and lists. Triton 3.9 compares no unsigned integer with a negative number."""
    scores = torch.empty((1, 64, 512))
    labels, lists = torch.empty(scores.shape, dtype=integers), torch.empty((1, 64, 5), dtype=integers)
    compile_for("sm_90", lambda: zlpr_loss.forward(scores, labels, None, 1.0, True))
    compile_for("sm_90", lambda: sparse_zlpr_loss.forward(scores, lists, None, 1.0, True, -100))
    hidden, weight = torch.empty(128, 64), torch.empty(512, 64)
    of_rows = Lists(torch.zeros((128, 5), dtype=integers), None, -100, 0)
    compile_for("sm_90", lambda: linear_zlpr_loss.forward(hidden, weight, None, of_rows, True))


@on_every_chip
@pytest.mark.parametrize("labels", ["bool", "float32", "sparse"])
@pytest.mark.parametrize("classes", [983, 20000])
def test_zlpr_loss_of_a_shard(chip: str, classes: int, labels: str) -> None:
    scores, sums = torch.empty((1, 64, classes), dtype=torch.bfloat16), torch.empty(4, 64)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    if labels == "sparse":
        module, given, extra = sparse_zlpr_loss, torch.empty((1, 64, 5), dtype=torch.int64), (-1,)
    else:
        module, given, extra = zlpr_loss, torch.empty(scores.shape, dtype=getattr(torch, labels)), ()
    compile_for(chip, lambda: module.shard_log_sums(scores, given, mask, *extra))
    compile_for(chip, lambda: module.shard_gradient(scores, given, mask, sums, 1.0, *extra))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("block", [b for b in BLOCKS if b >= 256])
def test_the_row_kernel_moves_16_bytes_at_a_time(chip: str, block: int) -> None:
    (kernel,) = compile_for(chip, lambda: zlpr((64, block), torch.bfloat16, "bool", False, True))
    assert kernel.count(r"LDG\.E\S*\.128") >= 1
    assert kernel.count(r"STG\.E\S*\.128") >= 1
    assert kernel.count(r"LDG\.E\S*\.U16") == 0  # no score of its own


@on_every_chip
@pytest.mark.parametrize("scores_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [*BLOCKS, 27, 983, 8191, 20000])  # each block; odd rows; chunks
def test_zlpr_kl_div(chip: str, classes: int, scores_dtype: torch.dtype) -> None:
    scores, other = torch.empty(2, 1, 64, classes, dtype=scores_dtype)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    compile_for(chip, lambda: zlpr_kl_div.forward(scores, other, mask))
    compile_for(chip, lambda: zlpr_kl_div.backward(scores, other, mask, torch.empty(64), 1.0, True, True))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_one_upstream_gradient_makes_one_long_row(chip: str) -> None:
    """Of rows of odd length too, whose own cells would each be a load of their own."""
    scores, other = torch.empty(2, 1, 64, 983, dtype=torch.bfloat16)
    upstream = torch.empty(()).expand(64)
    (kernel,) = compile_for(chip, lambda: zlpr_kl_div.backward(scores, other, None, upstream, 1.0, True, True))
    assert kernel.count(r"LDG\.E\S*\.128") >= 2
    assert kernel.count(r"STG\.E\S*\.128") >= 2
    assert kernel.count(r"(LD|ST)G\.E\S*\.U16") == 0


@on_every_chip
@pytest.mark.parametrize("scores_dtype", [torch.float16, torch.float32], ids=str)
def test_scale_rows(chip: str, scores_dtype: torch.dtype) -> None:
    grad = torch.empty(64, 4096, dtype=scores_dtype)
    for upstream in (torch.empty(64), torch.empty(())):
        compile_for(chip, lambda u=upstream: scale_rows.scale_(grad, u, 1.0))


@on_every_chip
@pytest.mark.parametrize("scores_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("head_size, length", [(16, 128), (20, 130), (64, 128), (64, 130), (128, 128), (256, 128)])
def test_pointer_scores(
    chip: str, head_size: int, length: int, shared: bool, scores_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 16 bytes, and others."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if chip == "gfx942" else None)
    q, k = torch.empty(2, 2, 1 if shared else 9, length, head_size, dtype=scores_dtype)
    start, end = torch.empty(2, 2, 9, length, dtype=scores_dtype)
    positions = torch.empty(2, length, dtype=torch.int64) if shared else None
    problem = Problem(torch.empty(2, length, dtype=torch.bool), positions, head_size != 128, True, 30, 0.125)
    turn, scores = compile_for(chip, lambda: pointer_scores.forward(q, k, start, end, 9, problem))
    assert [turn.name, scores.name] == ["turn_kernel", "scores_kernel"]
    assert scores.multiplies and not turn.multiplies
    grad = torch.empty(2, 9, length, length, dtype=scores_dtype)
    _, *sums, sweep = compile_for(chip, lambda: pointer_scores.backward(grad, q, k, True, True, problem))
    assert [kernel.name for kernel in (*sums, sweep)] == ["sum_kernel"] * shared + ["sweep_kernel"]
    assert sweep.multiplies


# Head sizes and heads that share q and k (1: none do) for each plan that plan() can pick.
LOSSES = [
    *((64, heads, torch.bfloat16) for heads in (1, 9, 30, 50, 100)),
    *((128, heads, torch.bfloat16) for heads in (1, 9, 30, 50, 100)),
    *((256, heads, torch.bfloat16) for heads in (1, 9)),
    *((size, heads, dtype) for dtype in (torch.float16, torch.float32) for size in (64, 128, 256) for heads in (1, 9)),
]


def test_the_losses_reach_every_plan() -> None:
    def plans(losses: Iterable[tuple[int, int, torch.dtype]]) -> set[tuple[workspace.Plan, int, torch.dtype]]:
        chosen = (workspace.tile_of(*loss, True, True, False) for loss in losses)
        return {(plan, tile.VECTOR.value, tile.DTYPE.value) for plan, tile in chosen}

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert plans(product(range(2, 257, 2), (1, 2, 9, 17, 33, 65, 129, 999), dtypes)) == plans(LOSSES)


@on_every_chip
@pytest.mark.parametrize("head_size, heads, scores_dtype", LOSSES, ids=str)
def test_pointer_loss(
    chip: str, head_size: int, heads: int, scores_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five launches from the inputs to all gradients; matrix instructions in both sweeps and for direct rows. Of an odd
    number of heads with padded spans. Longer sentences have longer blocks of tokens, and the same sweeps."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if chip == "gfx942" else None)
    own_heads, heads = (9, 9) if heads == 1 else (1, heads)
    q, k = torch.empty(2, 2, own_heads, 128, head_size, dtype=scores_dtype)
    start, end = torch.empty(2, 2, heads, 128, dtype=scores_dtype)
    padded = heads % 2 == 1
    spans = torch.empty((2, 20, 3) if padded else (40, 4), dtype=torch.int64)
    labels = torch.empty((2, 20) if padded else 40)
    problem = Problem(torch.empty(2, 128, dtype=torch.bool), None, True, True, 30, 0.125)

    def step() -> None:
        _, saved = pointer_loss.forward(q, k, start, end, spans, labels, heads, problem)
        pointer_loss.backward(torch.empty(2, heads), 1.0, saved, start, end, scores_dtype, problem)

    kernels = compile_for(chip, step)
    names = [kernel.name.removesuffix("_kernel") for kernel in kernels]
    assert names == ["prepare", "sweep", "combine", "sweep_back", "turn_back"]
    assert all(kernel.multiplies for kernel in kernels[1:])
    q, k = torch.empty(2, 2, own_heads, 512, head_size, dtype=scores_dtype)
    start, end = torch.empty(2, 2, heads, 512, dtype=scores_dtype)
    problem = problem._replace(mask=torch.empty(2, 512, dtype=torch.bool))
    compile_for(chip, lambda: pointer_loss.forward(q, k, start, end, spans, labels, heads, problem))


def test_what_takes_one_head_at_a_time_is_compiled_once() -> None:
    """For all numbers of heads, which in bfloat16 have plans of their own."""
    q, k = torch.empty(2, 2, 128, 64, dtype=torch.bfloat16)
    spans, problem = torch.empty((40, 4), dtype=torch.int64), Problem(None, None, True, True, None, 0.125)
    few, many = (
        compile_for("sm_90", lambda h=heads: pointer_loss.forward(q, k, None, None, spans, None, h, problem))
        for heads in (9, 50)
    )
    same = {a.name: a.key == b.key for a, b in zip(few, many, strict=True)}
    assert same == {"prepare_kernel": True, "sweep_kernel": False, "combine_kernel": True}


# Head sizes and dtypes for each plan that plan() can pick.
DECODES = [(size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in (16, 64, 128, 256)]
# Products of matrices, and one that is contracted with a sum.
MATRIX = {"sm_80": r"\bHMMA", "sm_90": r"\bHG?MMA", "sm_100": r"\bUTC\w*MMA|\bHMMA", "gfx942": r"\bv_mfma"}
FUSED = {chip: r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32" if chip == "gfx942" else r"\bFFMA" for chip in CHIPS}


def test_the_decodes_reach_every_plan() -> None:
    def plans(decodes: Iterable[tuple[int, torch.dtype]], heads: Iterable[int]) -> set[pointer_decode.Plan]:
        chosen = (pointer_decode.plan(size, h, dtype) for h in heads for size, dtype in decodes)
        return {plan._replace(chunk=0) if plan.block == 64 else plan for plan in chosen}

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    possible = plans(list(product((16, 64, 128, 256), dtypes)), range(1, 1000))
    assert possible == plans(DECODES, (1, 9))


@on_every_chip
@pytest.mark.parametrize("head_size, scores_dtype", DECODES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_pointer_decode(
    chip: str, head_size: int, shared: bool, scores_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting and writing must find the same: they multiply by the same instructions, and contract nothing."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if chip == "gfx942" else None)
    q, k = torch.empty(2, 2, 1 if shared else 9, 128, head_size, dtype=scores_dtype)
    start, end = torch.empty(2, 2, 9, 128, dtype=scores_dtype)
    band = 30 if shared else None  # without triangle and band nothing stands between product and sum
    problem = Problem(torch.empty(2, 128, dtype=torch.bool), None, True, shared, band, 0.123)
    # Nothing runs here, and the counts are what fills new memory: something is there to write.
    compiled = compile_for(chip, lambda: pointer_decode.decode(q, k, start, end, 9, problem, 0.0, 7))
    assert [kernel.name for kernel in compiled] == ["prepare_kernel", "count_kernel", "write_kernel"]
    counting, writing = (sorted(re.findall(MATRIX[chip] + r"\S*", kernel.assembly)) for kernel in compiled[1:])
    if chip == "sm_100" and Version(triton.__version__) < Version("3.4") and len(counting) > len(writing):
        writing = sorted(2 * writing)  # there each instruction of counting may stand twice
    assert counting == writing != []
    assert [kernel.count(FUSED[chip]) for kernel in compiled[1:]] == [0, 0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_nothing_that_is_optional(shared: bool) -> None:
    """Until Triton 3.6 a kernel may fail to compile that is given None in a tuple."""
    q, k = torch.empty(2, 2, 1 if shared else 9, 128, 64, dtype=torch.bfloat16)
    spans = torch.empty((40, 4), dtype=torch.int64)
    problem = Problem(None, None, False, False, None, 0.125)

    def step() -> None:
        pointer_scores.forward(q, k, None, None, 9, problem)
        pointer_scores.backward(torch.empty(2, 9, 128, 128, dtype=q.dtype), q, k, False, False, problem)
        pointer_decode.decode(q, k, None, None, 9, problem, 0.0, 7)
        _, saved = pointer_loss.forward(q, k, None, None, spans, None, 9, problem)
        pointer_loss.backward(torch.empty(2, 9), 1.0, saved, None, None, q.dtype, problem)

    assert len(compile_for("sm_90", step)) == 12 + shared


# Calls of PyTorch that launch nothing on a GPU.
NO_LAUNCH = {
    f"aten::{name}" for name in ("empty", "view", "slice", "select", "unsqueeze", "unbind", "t", "to", "reshape")
}


# Rows, D, classes and dtypes for each plan that plan() can pick. Vectors and classes whose number 16 divides, and not.
LINEARS = [
    (800, 768, 320, torch.bfloat16),
    (300, 100, 301, torch.float16),
    (200, 112, 320, torch.float32),
]


def test_the_linear_losses_reach_every_plan() -> None:
    def plans(linears: Iterable[tuple[bool, torch.dtype]]) -> set[linear_zlpr_loss.Plan]:
        return {linear_zlpr_loss.plan(*linear, hip=hip) for linear in linears for hip in (False, True)}

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert plans((size % 16 == 0, dtype) for _, size, _, dtype in LINEARS) == plans(product((False, True), dtypes))


@on_every_chip
@pytest.mark.parametrize("rows, size, classes, scores_dtype", LINEARS, ids=str)
def test_linear_zlpr_loss(
    chip: str, rows: int, size: int, classes: int, scores_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E is kept of some rows, and computed again of others. The loop multiplies what was on its way for iterations."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if chip == "gfx942" else None)
    hidden, weight = torch.empty(rows, size, dtype=scores_dtype), torch.empty(classes, size, dtype=scores_dtype)
    soft = classes % 16 == 0
    bias = None if soft else torch.empty(classes, dtype=scores_dtype)
    labels = torch.ones(rows, 2) if soft else None
    lists = Lists(torch.zeros(rows, 2, dtype=torch.int64), labels, -100, 0)

    def step() -> None:
        sums, listed, x, kept = linear_zlpr_loss.forward(hidden, weight, bias, lists, True)
        wanted = (True, True, bias is not None)
        arguments = (hidden, weight, bias, listed, x, kept, sums, torch.empty(rows), wanted, None)
        assert linear_zlpr_loss.backward(*arguments)[1] is kept

    kernels = compile_for(chip, step)
    names = [kernel.name.removesuffix("_kernel") for kernel in kernels]
    rule = linear_zlpr_loss.plan(size % 16 == 0, scores_dtype, chip == "gfx942")
    kept = size // rule.bm > 0  # a tile of rows at least, and here never all
    forward = ["number", "arrange", "bounds", "listed", *["exponentials", "merge"] * (1 + kept)]
    assert names == [*forward, "bounds", "scales", *["rescale"] * kept, "exponentials", "put"]
    copies = (rule.bm + rule.bn) * rule.bk * scores_dtype.itemsize // (16 * 32 * rule.num_warps)  # of an iteration
    for kernel in (kernel for kernel in kernels if kernel.name == "exponentials_kernel"):
        assert kernel.multiplies
        if chip != "gfx942" and size % 16 == 0:
            assert kernel.count(r"\bLDGSTS") >= rule.stages * copies


@pytest.mark.parametrize("classes", [320, 32_000])
def test_the_linear_loss_is_few_launches(classes: int) -> None:
    """However many classes: beside its ten kernels one sort, and PyTorch's calls for the products. On a GPU each is a
    launch, and more than a hundred of them took longer than the products of a middling layer."""
    hidden, weight = torch.zeros(64, 128), torch.zeros(classes, 128)
    lists = Lists(torch.zeros(64, 16, dtype=torch.int64), None, -100, 0)

    def step() -> None:
        sums, listed, x, kept = linear_zlpr_loss.forward(hidden, weight, weight[:, 0], lists, True)
        upstream, wanted = torch.zeros(64), (True, True, True)
        linear_zlpr_loss.backward(hidden, weight, weight[:, 0], listed, x, kept, sums, upstream, wanted, None)

    with compiling_for("sm_90") as compiled:
        made = calls(step)
    assert len(compiled) == 2 * 10  # the first time for what is made once only
    assert made.count("aten::sort") == 1
    assert len([call for call in made if call not in NO_LAUNCH]) <= 11, made
