"""What the launches of ``pointer_loss`` leave each other: one tensor of bytes, opened group by group.

Inner tensors are padded, so that a tile needs no mask: vectors [padded N, VECTOR], tables [padded heads, padded N].
Tables that matrix products read are bfloat16 where q is, and else float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import PAD, TRITON, constant, float32_precision, power_of_two


@constant
class Tile:
    """Made on the host."""

    BM: Any  # rows and columns of a tile in the sweeps along the rows
    BN: Any
    BACK_BM: Any  # and along the columns, of the same width: a row's rho must cover the same columns everywhere
    FEW: Any  # columns of unsafe rows at a time in launch 3: as few registers as let it run all at once
    TOKENS: Any  # to a program that turns back
    HEADS: Any  # to a program: forward
    BACK_HEADS: Any  # and backward; heads are padded to a multiple of it
    SIZE: Any  # D
    VECTOR: Any  # D, padded to a power of two of at least LEAST_VECTOR
    CHUNK: Any  # of it, in products of q and k
    DTYPE: Any  # of vectors
    TABLE: Any  # of tables: bfloat16 has the range of float32, but float16 holds neither P, V, A nor their products
    PRECISION: Any  # of products whose operands are float32
    STAGES: Any
    TRIL: Any
    ROPE: Any


class Group(NamedTuple):
    """Of one group; the names in parentheses are those of the derivation."""

    q: Any  # [padded, VECTOR]: turned, 0 for dropped tokens
    k: Any
    exp_ends: Any  # [padded heads, padded], as a table: V
    weights: Any  # the same: A
    starts: Any  # the same in float32: -inf for dropped tokens
    ends: Any
    sums: Any  # of rows: P V^T, then each row's part in the loss
    unsafe: Any  # int32: the unsafe rows of each head
    pivots: Any  # [padded]: rho, in base 2
    largest_ends: Any  # [padded heads]: C
    l_n: Any
    l_p: Any
    unsafe_counts: Any  # int32
    extent: Any  # one more than the last kept token: a pointer
    spans: Any  # where its spans stand among the sorted ones, first and stop: a pointer
    scale: Any  # above 0: q has its sign


class Spans(NamedTuple):
    """The listed spans, sorted by key: group, start m, head h of the group, end n, in bit fields of an int64."""

    keys: Any  # [count]
    labels: Any  # [count], float32
    negatives: Any  # log-sum of what a span answers for
    positives: Any  # log t - s
    count: Any
    n_bits: Any  # of the fields m and n of a key
    h_bits: Any


SPAN_BYTES = tl.constexpr(20)


def workspace_bytes(groups: int, heads: int, length: int, count: int, tile: Tile) -> int:
    """Of Spans and of all Groups, in the order of their fields."""
    padded: int = (length + PAD.value - 1) // PAD.value * PAD.value
    planes = groups * padded_heads(heads, tile.BACK_HEADS.value)
    vector: int = 2 * tile.VECTOR.value * tile.DTYPE.value.primitive_bitwidth // 8
    tables: int = 2 * tile.TABLE.value.primitive_bitwidth // 8 + 4 * 4
    spans: int = (SPAN_BYTES.value * count + 63) // 64 * 64
    return spans + padded * (groups * (vector + 4) + planes * tables) + planes * 4 * 4 + groups * 3 * 4


def padded_heads(heads: int, multiple: int) -> int:
    return (heads + multiple - 1) // multiple * multiple


@triton.jit
def open_spans(workspace, count, n_bits, h_bits):
    keys = workspace.to(tl.pointer_type(tl.int64), bitcast=True)
    floats = (keys + count).to(tl.pointer_type(tl.float32), bitcast=True)
    return Spans(keys, floats, floats + count, floats + 2 * count, count, n_bits, h_bits)


@triton.jit
def open_group(workspace, count, group, scale, shape, tile):
    at = tl.cast(group, tl.int64)
    groups = tl.cast(shape.groups, tl.int64)
    tokens = groups * shape.padded
    cells = tokens * shape.padded_heads
    plane = shape.padded_heads * shape.padded
    vectors = workspace + (tl.cast(count, tl.int64) * SPAN_BYTES + 63) // 64 * 64
    vectors = vectors.to(tl.pointer_type(tile.DTYPE), bitcast=True)
    tables = (vectors + 2 * tokens * tile.VECTOR).to(tl.pointer_type(tile.TABLE), bitcast=True)
    floats = (tables + 2 * cells).to(tl.pointer_type(tl.float32), bitcast=True)
    pivots = floats + 4 * cells
    planes = pivots + tokens
    heads = planes + at * shape.padded_heads
    of_heads = groups * shape.padded_heads
    integers = (planes + 4 * of_heads).to(tl.pointer_type(tl.int32), bitcast=True)
    return Group(
        vectors + at * shape.padded * tile.VECTOR,
        vectors + (groups + at) * shape.padded * tile.VECTOR,
        tables + at * plane,
        tables + (groups + at) * plane,
        floats + at * plane,
        floats + (groups + at) * plane,
        floats + (2 * groups + at) * plane,
        (floats + (3 * groups + at) * plane).to(tl.pointer_type(tl.int32), bitcast=True),
        pivots + at * shape.padded,
        heads,
        heads + of_heads,
        heads + 2 * of_heads,
        (heads + 3 * of_heads).to(tl.pointer_type(tl.int32), bitcast=True),
        integers + at,
        integers + groups + 2 * at,
        scale,
    )


@triton.jit
def at_heads(table, h_first, first, HEADS: tl.constexpr, TOKENS: tl.constexpr, padded):
    """Where a table [padded heads, padded] has HEADS heads and TOKENS tokens: 128 heads of 2^24 tokens fit int32."""
    at = tl.arange(0, HEADS)[None, :] * padded + tl.arange(0, TOKENS)[:, None]
    return table + tl.cast(h_first, tl.int64) * padded + first + at  # [TOKENS, HEADS]


@triton.jit
def load_heads(table, h_first, first, HEADS: tl.constexpr, TOKENS: tl.constexpr, padded):
    """The same, transposed, which is how it lies."""
    at = tl.arange(0, HEADS)[:, None] * padded + tl.arange(0, TOKENS)[None, :]
    return tl.load(table + tl.cast(h_first, tl.int64) * padded + first + at)  # [HEADS, TOKENS]


# --- products over heads ---------------------------------------------------------------------------------------------


@triton.jit
def multiply_heads(a, b, tile):
    """a [rows, heads] b [heads, columns]; a single head needs no matrix product."""
    return a.to(tl.float32) * b.to(tl.float32) if a.shape[1] == 1 else tl.dot(a, b, input_precision=tile.PRECISION)


@triton.jit
def add_product(sums, p, table, tile):
    """sums [rows, heads] + p [rows, columns] table^T [columns, heads]"""
    if table.shape[0] == 1:
        sums += tl.sum(p * table.to(tl.float32), axis=1)[:, None]
    else:
        sums = tl.dot(p.to(tile.TABLE), tl.trans(table), acc=sums, input_precision=tile.PRECISION)
    return sums


# --- launch parameters -----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """See Tile. Warps: of the sweep, of combine where sentences are long, of the sweeps back, of turning back."""

    chunk: int
    bm: int
    bn: int
    back_bm: int
    few: int
    tokens: int
    heads: int
    back_heads: int
    num_warps: int
    combine_warps: int
    back_warps: int
    direct_warps: int
    stages: int


LEAN_TRITON = (3, 5)  # older ones hold both halves of what tf32x3 multiplies, and on AMD's chips more of everything


def most_heads(vector: int) -> int:
    """To a program, in bfloat16: the most with which no chip spills, by the version of Triton."""
    if TRITON < LEAN_TRITON:
        return 32 if vector == 128 else 64
    return 64 if vector == 128 and TRITON >= (3, 8) else 128


def plan(vector: int, heads: int, dtype: torch.dtype) -> Plan:
    """The launch parameters, by rule: the largest tiles that no chip spills."""
    if dtype == torch.bfloat16 and vector <= 128:
        heads = 1 if heads == 1 else min(most_heads(vector), max(16, power_of_two(heads)))
        direct_warps = 8 if vector == 128 else 4
        return Plan(
            vector, 64, 64, 16 if vector == 128 else 32, 16, 32, min(64, heads), heads, 4, 2, 4, direct_warps, 3
        )
    # Three operands where tf32x3 multiplies: small tiles, eight warps, and always 64 heads, as fewer would spill.
    heads = 1 if heads == 1 else 64
    if dtype == torch.float32 and vector > 64:
        chunk, few = (16, 16) if vector > 128 else (32, 32)
        return Plan(chunk, 32, 32, 32, few, 16, heads, heads, 8, 1, 8, 8, 2)
    few, combine_warps = (32, 1) if dtype == torch.float32 else (16, 2)
    return Plan(vector, 32, 32, 32, few, 16, heads, heads, 4, combine_warps, 8, 8, 2)


def halved(rule: Plan, vector: int) -> Plan:
    """For a compiler that is not lean."""
    chunk = 32 if vector == 256 else rule.chunk
    combine_warps = 2 if vector == 128 else rule.combine_warps
    return rule._replace(
        chunk=chunk, bm=rule.bm // 2, bn=rule.bn // 2, back_bm=16, few=16, combine_warps=combine_warps
    )  # fmt: skip


# Shorter ones would save little, for heads and latency decide; and what spills at 32 need not at 64.
LEAST_VECTOR = 64
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@cache
def tile_of(size: int, heads: int, dtype: torch.dtype, tril: bool, rope: bool, hip: bool) -> tuple[Plan, Tile]:
    vector = max(LEAST_VECTOR, power_of_two(size))
    rule = plan(vector, heads, dtype)
    if hip:  # where a warp is twice as wide, and shared memory 64 KiB
        stages = 2 if vector == 128 else rule.stages
        chunk = min(128, rule.chunk)
        rule = rule._replace(chunk=chunk, num_warps=4, back_warps=4, direct_warps=4, stages=stages)
    if TRITON < LEAN_TRITON and (hip or dtype == torch.float32):
        rule = halved(rule, vector)
    precision = float32_precision()
    if dtype == torch.float16 and precision == "tf32x3":
        precision = "tf32"  # which has all the digits of float16
    table = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    fields = (
        rule.bm, rule.bn, rule.back_bm, rule.few, rule.tokens, rule.heads, rule.back_heads, size, vector, rule.chunk,
        DTYPES[dtype], table, precision, rule.stages, tril, rope,
    )  # fmt: skip
    return rule, Tile(*map(tl.constexpr, fields))
