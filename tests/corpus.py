"""Nasty problems of every loss, a row each, with the answers of formulas written apart: cell by cell, in Python's own
float64, their gradients by hand. ``corpus.jsonl`` keeps them, so that every backend, and a GPU, is asked the same.

    python -m tests.corpus    # makes it anew
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("corpus.jsonl")
INF, NAN = math.inf, math.nan
IGNORED = -100.0


# --- the formulas --------------------------------------------------------------------------------------------------


def log_one_plus_sum(exponents: list[float]) -> float:
    """log(1 + the sum of their exponentials), exact also where that sum is far below 1 or far beyond float64."""
    if any(map(math.isnan, exponents)):
        return NAN
    pivot = max([0.0, *exponents])
    if pivot == INF:
        return INF
    if pivot == 0.0:
        return math.log1p(math.fsum(map(math.exp, exponents)))
    return pivot + math.log(math.exp(-pivot) + math.fsum(math.exp(x - pivot) for x in exponents))


def exp_less(x: float, log_sum: float) -> float:
    """exp(x - log_sum), NaN for inf - inf as it is in eager PyTorch."""
    return 0.0 if x == -INF else math.exp(x - log_sum) if not (x == INF == log_sum) else NAN


def zlpr(scores: list[float], labels: list[float], kept: list[bool]) -> tuple[float, list[float]]:
    """The loss of one row, and its gradient."""
    negatives, positives = [], []
    for s, t, keep in zip(scores, labels, kept, strict=True):
        left_out = not keep or s == -INF or t == IGNORED
        negatives.append(-INF if left_out or t == 1 else s + math.log1p(-t))
        positives.append(-INF if left_out or t == 0 else -s + math.log(t))
    l_n, l_p = log_one_plus_sum(negatives), log_one_plus_sum(positives)
    gradient = [
        0.0 if a == b == -INF else exp_less(a, l_n) - exp_less(b, l_p)
        for a, b in zip(negatives, positives, strict=True)
    ]
    return l_n + l_p, gradient


def kl(scores: list[float], other: list[float], kept: list[bool]) -> tuple[float, list[float], list[float]]:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    total, by_scores, by_other = [], [], []
    for s, t, keep in zip(scores, other, kept, strict=True):
        if not keep or s == t == -INF:
            by_scores.append(0.0), by_other.append(0.0)
            continue
        f, g = sigmoid(s), sigmoid(t)
        total.append((f - g) * (s - t))
        by_scores.append(f - g + f * sigmoid(-s) * (s - t))
        by_other.append(g - f - g * sigmoid(-t) * (s - t))
    return math.fsum(total), by_scores, by_other


def turned(vector: list[float], position: int, sign: int = 1) -> list[float]:
    out = []
    for i in range(0, len(vector), 2):
        angle = sign * position * 10000.0 ** (-i / len(vector))
        x, y = vector[i : i + 2]
        out += [x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)]
    return out


def pointer(p: dict[str, Any]) -> dict[str, Any]:
    """Losses [B, H] of a problem without a reduction, and the gradients of their sum by q, k, start and end."""
    q, k, start, end, mask = (p[name] for name in ("q", "k", "start", "end", "mask"))
    batch, heads, length, size = len(q), len(start[0]), len(q[0]), len(q[0][0])
    scale = size**-0.5
    labels: dict[tuple[int, ...], float] = {}
    for span, label in zip(p["spans"], p["span_labels"] or [1.0] * len(p["spans"]), strict=True):
        labels.setdefault(tuple(span), label)
    d_q, d_k = ([[[0.0] * size for _ in range(length)] for _ in range(batch)] for _ in range(2))
    d_start, d_end = ([[[0.0] * length for _ in range(heads)] for _ in range(batch)] for _ in range(2))
    losses = [[0.0] * heads for _ in range(batch)]
    for b in range(batch):
        Q, K = ([turned(x, i) if p["rope"] else x for i, x in enumerate(vectors[b])] for vectors in (q, k))
        for h in range(heads):
            cells = [
                (m, n)
                for m in range(length)
                for n in range(length)
                if mask[b][m] and mask[b][n] and (m <= n or not p["tril_mask"]) and n - m < (p["max_width"] or length)
            ]
            x = [scale * math.fsum(map(float.__mul__, Q[m], K[n])) + start[b][h][m] + end[b][h][n] for m, n in cells]
            t = [labels.get((b, h, m, n), 0.0) for m, n in cells]
            losses[b][h], gradient = zlpr(x, t, [True] * len(x))
            for (m, n), g in zip(cells, gradient, strict=True):
                d_start[b][h][m] += g
                d_end[b][h][n] += g
                for i in range(size):
                    d_q[b][m][i] += scale * g * K[n][i]
                    d_k[b][n][i] += scale * g * Q[m][i]
        if p["rope"]:
            for d in (d_q, d_k):
                d[b] = [turned(x, i, -1) for i, x in enumerate(d[b])]
    return {"loss": losses, "q": d_q, "k": d_k, "start": d_start, "end": d_end}


# --- the problems --------------------------------------------------------------------------------------------------


def small(r: random.Random) -> float:
    """Log-uniform in [1e-38, 1], or 1 less that."""
    t = 10.0 ** r.uniform(-38, 0)
    return t if r.random() < 0.5 else 1 - t


def single(x: Any) -> Any:
    """Every number as float32 has it: what the answers are answers to."""
    if isinstance(x, dict):
        return {name: single(value) for name, value in x.items()}
    if isinstance(x, list):
        return list(map(single, x))
    return struct.unpack("f", struct.pack("f", x))[0] if isinstance(x, float) else x


SCORES: dict[str, Callable[[random.Random], float]] = {
    "ordinary": lambda r: r.gauss(0, 4),
    "learned": lambda r: r.choice([-1, 1]) * r.gauss(14, 2),
    "up to 1000": lambda r: r.uniform(-1000, 1000),
    "of 10,000": lambda r: r.choice([-1e4, 1e4]),
    "with -inf": lambda r: r.choice([-INF, r.gauss(0, 4)]),
    "far below": lambda r: r.gauss(-60, 20),
}
LABELS: dict[str, Callable[[random.Random], float]] = {
    "hard": lambda r: float(r.random() < 0.2),
    "hard, ignored": lambda r: r.choice([0.0, 0.0, 0.0, 1.0, IGNORED]),
    "soft": small,
    "soft, ignored": lambda r: r.choice([small(r), small(r), 0.0, 1.0, IGNORED]),
}


def row_problems(r: random.Random) -> Iterator[dict[str, Any]]:
    def one(name: str, scores: list[float], labels: list[float], kept: list[bool]) -> dict[str, Any]:
        inputs = single({"scores": scores, "labels": labels, "mask": kept})
        loss, gradient = zlpr(*inputs.values())
        return {"op": "zlpr_loss", "name": name, "inputs": inputs, "answer": {"loss": loss, "scores": gradient}}

    for score, label in ((-18.0, 1e-8), (-14.0, 1e-6), (-10.0, 1e-4)):
        yield one(f"a label of {label} beside an ignored one", [score, -3.0, 0.0], [label, 0.0, IGNORED], [True] * 3)
    scores = [r.gauss(-8, 3) for _ in range(20)]
    teacher = [1 / (1 + math.exp(-2 * s)) for s in scores]
    yield one("a teacher's sigmoid(2 s) beside an ignored one", [*scores, 0.0], [*teacher, IGNORED], [True] * 21)
    yield one(
        "two learned positives among many negatives", [14.0] * 2 + [-12.0] * 62, [1.0] * 2 + [0.0] * 62, [True] * 64
    )
    yield one("inf at a negative", [1.0, INF, -2.0], [0.0, 0.0, 1.0], [True] * 3)
    yield one("inf at a positive", [1.0, INF, -2.0], [0.0, 1.0, 1.0], [True] * 3)
    yield one("everything masked", [NAN, INF, 7.0], [7.0, 0.5, 1.0], [False] * 3)
    for s, score in SCORES.items():
        for t, label in LABELS.items():
            kept = [r.random() < 0.8 for _ in range(24)]
            values = [score(r) if keep else r.choice([NAN, INF, -INF, 1e30]) for keep in kept]
            yield one(f"{s} scores, {t} labels", values, [label(r) for _ in kept], kept)
    for s, score in SCORES.items():
        kept, pairs = [r.random() < 0.8 for _ in range(24)], [(score(r), score(r)) for _ in range(24)]
        if s == "with -inf":  # on both sides: on one alone the divergence is inf
            pairs = [(a, a) if -INF in (a, b) else (a, b) for a, b in pairs]
        first, second = map(list, zip(*pairs, strict=True))
        inputs = single({"scores": first, "other": second, "mask": kept})
        loss, by_scores, by_other = kl(*inputs.values())
        answer = {"loss": loss, "scores": by_scores, "other": by_other}
        yield {"op": "zlpr_kl_div", "name": f"{s} scores", "inputs": inputs, "answer": answer}
    for s in ("ordinary", "learned", "up to 1000"):
        values = single([SCORES[s](r) for _ in range(24)])
        listed = [3, 7, 3, -1, -100, 0, 23]
        loss, gradient = zlpr(values, [float(i in listed) for i in range(24)], [True] * 24)
        inputs = {"scores": values, "positives": listed}
        answer = {"loss": loss, "scores": gradient}
        yield {"op": "sparse_zlpr_loss", "name": f"{s} scores", "inputs": inputs, "answer": answer}


def pointer_problems(r: random.Random) -> Iterator[dict[str, Any]]:
    B, H, N, D = 2, 3, 9, 4

    def base(scale: float = 1.0) -> dict[str, Any]:
        def normal(*shape: int) -> Any:
            return [normal(*shape[1:]) for _ in range(shape[0])] if shape else scale * r.gauss(0, 1)

        spans = [[r.randrange(size) for size in (B, H, N, N)] for _ in range(7)]
        return {
            "q": normal(B, N, D), "k": normal(B, N, D), "start": normal(B, H, N), "end": normal(B, H, N),
            "spans": [*spans, spans[0]], "span_labels": None, "mask": [[True] * N for _ in range(B)],
            "rope": True, "tril_mask": True, "max_width": None,
        }  # fmt: skip

    cases: list[tuple[str, dict[str, Any]]] = [
        ("ordinary", base()),
        ("a band", {**base(), "max_width": 3}),
        ("no triangle, no RoPE", {**base(), "tril_mask": False, "rope": False}),
        ("a sentence of padding, one of holes", {**base(), "mask": [[False] * N, [i % 3 != 1 for i in range(N)]]}),
        ("soft labels", {**base(), "span_labels": [small(r) for _ in range(8)]}),
        ("soft and ignored", {**base(), "span_labels": [1.0, IGNORED, small(r), 0.0, IGNORED, 1.0, small(r), 0.3]}),
        ("large scores", base(6.0)),
        ("no spans", {**base(), "spans": []}),
        ("every cell of a head listed", {**base(), "spans": [[0, 1, m, n] for m in range(N) for n in range(N)]}),
    ]
    shadowed = base(0.1)
    for b in range(B):  # the largest product of a row stands where end is least
        shadowed["k"][b][5], shadowed["q"][b] = [40.0] * D, [[20.0] * D for _ in range(N)]
        for h in range(H):
            shadowed["end"][b][h][5] = -1600.0
    cases.append(("products in the shadow of a bias", {**shadowed, "rope": False}))
    for name, height in (("biases of +-1000", 1000.0), ("a bias of 60", 60.0)):
        p = base()
        p["start"][0][1][2], p["end"][0][1][4], p["end"][1][0][3] = height, -height, height
        cases.append((name, p))
    for name, value in (("inf in start", INF), ("-inf in start", -INF)):
        p = base()
        p["start"][0][1][2] = value
        cases.append((name, {**p, "rope": False}))
    for name, value in (("inf in end", INF), ("-inf in end", -INF), ("NaN in end", NAN)):
        p = base()
        p["end"][0][1][6] = value
        cases.append((name, {**p, "rope": False}))
    for name, p in cases:
        yield {"op": "pointer_loss", "name": name, "inputs": single(p), "answer": pointer(single(p))}


def problems() -> Iterator[dict[str, Any]]:
    r = random.Random(20221)
    yield from row_problems(r)
    yield from pointer_problems(r)


if __name__ == "__main__":
    with FILE.open("w", encoding="utf-8") as file:
        for row in problems():
            file.write(json.dumps(row) + "\n")
