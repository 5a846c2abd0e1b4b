"""The model: machine code is read as it stands, loops cost what they must, programs pass them as often as they do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from . import model  # noqa: E402
from .model import cases, launches, machine, programs, sass  # noqa: E402

H100 = machine.MACHINES["sm_90"]
compiled = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process interprets")

# A loop of five instructions between two others. The upper bits of the second word of each are its stall count, and the
# scoreboards that it sets and waits for.
SASS = """
.text.some_kernel:
	//## File "/somewhere/some.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
.L_x_1:
	//## File "/somewhere/some.py", line 5
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
                                                                     /* 0x000ea8000c1e1d00 */
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;  /* 0x000000060408723c */
                                                                     /* 0x004fee0000041808 */
	//## File "/somewhere/some.py", line 4
        /*0030*/                   ISETP.GE.AND P0, PT, R0, R1, PT ; /* 0x000000010000720c */
                                                                     /* 0x000fe20003f06270 */
        /*0040*/              @!PT LDS RZ, [RZ] ;                    /* 0x00000000ffff7984 */
                                                                     /* 0x000fe20000000800 */
        /*0050*/              @!P0 BRA `(.L_x_1) ;                   /* 0xffffffec00008947 */
                                                                     /* 0x000fea000383ffff */
        /*0060*/                   EXIT ;                            /* 0x000000000000794d */
                                                                     /* 0x000fea0003800000 */
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);                    /* 0xfffffffc00fc7947 */
                                                                     /* 0x000fc0000383ffff */
"""


def test_machine_code_is_read_with_what_the_compiler_has_scheduled() -> None:
    code = sass.parse(SASS)
    assert [i.name for i in code] == ["LDC", "LDG", "HMMA", "ISETP", "LDS", "BRA", "EXIT"]
    load, product = code[1:3]
    assert (load.stall, load.write, load.wait) == (4, 2, 0)  # its result sets scoreboard 2,
    assert (product.stall, product.wait) == (7, 1 << 2)  # for which the product waits
    assert [i.line for i in code[:4]] == [("some.py", 3), ("some.py", 5), ("some.py", 5), ("some.py", 4)]
    assert [bool(i.matrix) for i in code] == [False, False, True, False, False, False, False]
    assert [i.off for i in code].index(True) == 4
    assert machine.width(load.op) == 16


def test_loops_are_found_and_the_way_through_them() -> None:
    flow = sass.Flow(sass.parse(SASS))
    (loop,) = flow.loops
    assert [i.name for i in flow.own(loop)] == ["LDG", "HMMA", "ISETP", "LDS", "BRA"]
    assert len(flow.path(loop, lambda loop: 1, lambda i: 1.0)) == 5
    lengths = [len(flow.path(None, lambda loop, n=n: n, lambda i: 1.0)) for n in (0, 1, 3)]
    assert lengths == [2, 2 + 5, 2 + 5 * 3]


def instruction(op: str, operands: str = "", stall: int = 1, write: int = 7, wait: int = 0) -> sass.Instruction:
    return sass.Instruction(0, "", op, operands, None, stall, write, 7, wait, None)


def cycles(trace: list[sass.Instruction], warps: int, blocks: int, repeat: int) -> float:
    return machine.simulate(trace, H100, warps, [0.0] * blocks, machine.LATENCY["global"], repeat)


def test_a_loop_takes_as_long_as_its_stalls_its_latency_or_its_busiest_unit() -> None:
    chain = [instruction("FFMA", stall=4)] * 10
    assert cycles(chain, 4, 1, 5) == 10 * 4 * 5
    assert cycles(chain, 4, 4, 5) == pytest.approx(10 * 4 * 5, abs=4)  # four warps fill the gaps of one
    assert cycles(chain, 4, 8, 5) == pytest.approx(2 * 10 * 4 * 5, abs=8)  # eight do not fit them
    wait = [instruction("LDG.E", write=0), instruction("FADD", wait=1, stall=4)]
    each = machine.steady(wait, H100, 4, 1, machine.LATENCY["global"], [0.0])
    assert each == machine.LATENCY["global"] + 4 * 128 / H100.l2 + 4  # the bytes of four warps, and the stall
    quarter = [instruction("MUFU.EX2")] * 20
    many = machine.steady(quarter, H100, 4, 4, machine.LATENCY["global"], [0.0, 0.5])
    assert many == pytest.approx(4 * 20 * 8, rel=0.05)  # 32 threads on 4 lanes


def test_blocks_of_few_warps_are_spread_over_the_schedulers() -> None:
    assert machine.place(4, 3) == [0, 1, 2]
    assert machine.place(8, 2) == [0, 0, 1, 1]
    assert machine.place(1, 4) == [0]
    assert machine.place(1, 5) == [0, 4]
    assert machine.place(2, 3) == [0, 2]
    busy = [instruction("FFMA")] * 100
    assert cycles(busy, 1, 4, 1) == cycles(busy, 1, 1, 1)
    assert cycles(busy, 1, 8, 1) == pytest.approx(2 * cycles(busy, 1, 4, 1), rel=0.05)


@triton.jit
def multiply_row(x, out, row, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    own = tl.load(x + row * BLOCK * BLOCK + at)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for first in range(row * BLOCK, length, BLOCK):
        total = tl.dot(own, tl.load(x + first * BLOCK + at), acc=total)
    tl.store(out + row * BLOCK * BLOCK + at, total)


@triton.jit
def triangle_kernel(x, out, length, BLOCK: tl.constexpr):
    """A row of tiles of an upper triangle to a program, and one program beside them."""
    row = tl.program_id(0) - 1
    if row < 0:
        tl.store(out - 1, 1.0)
    else:
        multiply_row(x, out, row, length, BLOCK)


@compiled
@pytest.mark.parametrize("chip, matrix", [("sm_90", "4 HGMMA"), ("sm_80", "32 HMMA")])
def test_the_roles_of_a_kernel_and_the_trips_of_its_loop(chip: str, matrix: str) -> None:
    """A product of 64 x 64 x 64 is 4 of 64 x 64 x 16 for four warps together, or 32 of 16 x 8 x 16 for each."""
    x, out = torch.zeros(256, 64, dtype=torch.bfloat16), torch.zeros(256, 64)
    with launches.launches_for(chip, [x]) as noted:
        triangle_kernel[(5,)](x, out, 256, BLOCK=64, num_warps=4)
    modelled = launches.model(noted[0], machine.MACHINES[chip], programs.Known(), 0.0)
    beside, rows = sorted(modelled.roles, key=lambda role: role.programs)
    assert (beside.programs, beside.iterations, beside.matrix) == (1, 0.0, "")
    assert beside.instructions < 40  # it does not go the others' way
    assert (rows.name, rows.programs, rows.iterations) == ("multiply_row", 4, (4 + 3 + 2 + 1) / 4)
    assert rows.matrix == matrix
    assert modelled.spills == 0
    assert modelled.busiest_us <= modelled.us < 100


@triton.jit
def sum_kernel(x, out, count, stride):
    lane = tl.arange(0, 32)
    total = tl.zeros([32], dtype=tl.float32)
    for _ in range(count):
        total += tl.load(x + lane)
        x += stride
    tl.store(out + lane, total)


@compiled
@pytest.mark.parametrize("count", [3, 16])
def test_a_loop_that_the_compiler_unrolls_is_passed_less_often(count: int) -> None:
    x = torch.zeros(32 * count)
    with launches.launches_for("sm_90", [x]) as noted:
        sum_kernel[(1,)](x, torch.zeros(32), count, 32, num_warps=1)
    modelled = launches.model(noted[0], H100, programs.Known(), 0.0)
    (role,) = modelled.roles
    assert role.iterations * role.loads == count
    assert modelled.bytes == (count + 1) * 32 * 4


@compiled
def test_the_command_says_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "CASES", (cases.rows("zlpr_kl_div", "", 64, 256, torch.float32),))
    shown: list[Any] = []
    assert model.main("sm_90", ["zlpr_kl_div"], tmp_path, shown.append) == 0
    assert model.NOTE in shown[0] and any(model.NOTE in str(getattr(x, "title", "")) for x in shown)
    record = json.loads((tmp_path / "model-sm_90.json").read_text())
    assert record["what"] == "modelled, not measured"
    (case,) = record["cases"]
    assert set(case["passes"]) == {"forward", "backward"}
    assert all(0 < of_pass["floor_us"] < of_pass["us"] < 1000 for of_pass in case["passes"].values())


@compiled
def test_the_product_of_a_linear_loss_is_modelled() -> None:
    """Rows whose E is kept, and others."""
    result = model.run(cases.Linear("", 600, 320, 640, torch.bfloat16), "sm_90")
    launches = result["passes"]["forward"]["launches"]
    products = [launch for launch in launches if launch.kernel == "exponentials_kernel"]
    assert len(products) == 2
    assert all(product.roles[0].matrix.endswith("HGMMA") and product.roles[0].iterations == 10 for product in products)


@compiled
def test_a_kernel_that_is_not_understood_gets_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("a loop is missing")

    monkeypatch.setattr(model, "model", fail)
    case = cases.rows("zlpr_kl_div", "", 64, 256, torch.float32)
    result = model.run(case, "sm_90")
    rows = [row for launch in result["passes"]["forward"]["launches"] for row in model.rows(launch, case.cells)]
    assert rows and all("not understood" in row[0] and "a loop is missing" in row[0] for row in rows)
    assert model.table([result], "zlpr_kl_div", H100).row_count > 0


def test_without_the_disassembler_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    shown: list[Any] = []
    assert model.main("sm_90", ["zlpr_loss"], tmp_path, shown.append) == 1
    assert len(shown) == 1 and "nvdisasm" in shown[0] and "\n" not in shown[0]
