"""The corpus of nasty problems: every backend gives the answers that formulas written apart gave in float64."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import Agreement, relative_error, run

from . import corpus
from .conftest import Place

ROWS = [json.loads(line) for line in corpus.FILE.read_text(encoding="utf-8").splitlines()]
every_row = pytest.mark.parametrize("row", ROWS, ids=[f"{row['op']}: {row['name']}" for row in ROWS])
FLOATS = ("scores", "other", "labels", "q", "k", "start", "end", "span_labels")
INTEGERS = ("positives", "spans")


def tensors(row: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Rows of scores become [1, C]; spans [S, 4], where there may be none."""
    inputs = {}
    for name, value in row["inputs"].items():
        if not isinstance(value, list):
            inputs[name] = value
            continue
        kind = dtype if name in FLOATS else torch.int64 if name in INTEGERS else torch.bool
        x = torch.tensor(value, dtype=kind, device=device)
        inputs[name] = x.view(-1, 4) if name == "spans" else x.unsqueeze(0) if x.dim() == 1 and len(x) > 8 else x
    if row["op"] != "pointer_loss":
        inputs = {name: x.view(1, -1) for name, x in inputs.items()}
    return {**inputs, "reduction": "none"}


def evaluate(op: Any, row: dict[str, Any], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return run(op, tensors(row, dtype, device), tuple(name for name in row["answer"] if name != "loss"))


def answers(row: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    shaped = row["answer"] if row["op"] == "pointer_loss" else {name: [x] for name, x in row["answer"].items()}
    return {name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in shaped.items()}


def largest_score(row: dict[str, Any]) -> float:
    inputs = tensors(row, torch.float64, "cpu")
    if row["op"] == "pointer_loss":
        names = ("q", "k", "start", "end", "mask", "rope", "tril_mask", "max_width")
        inputs = {"scores": fp.reference.pointer_scores(**{name: inputs[name] for name in names})}
    scores = inputs["scores"]
    return max([0.0, *scores[scores.isfinite()].abs().tolist()])


@every_row
def test_it_gives_the_answer(place: Place, row: dict[str, Any]) -> None:
    """To twice eager's own error in the same dtype, and the rounding of the largest score: exp makes that a relative
    error of its term, and eager's of the few terms that count may by chance be next to none."""
    truth, rounding = answers(row, place.device), largest_score(row)
    for dtype in filter(place.serves, (torch.float32, torch.float64)):  # its inputs are float32 numbers
        eager = evaluate(getattr(fp.reference, row["op"]), row, dtype, place.device)
        ours = evaluate(getattr(fp, row["op"]), row, dtype, place.device)
        epsilon = max(1e-13 if dtype == torch.float64 else 1e-6, torch.finfo(dtype).eps * rounding)
        for (what, exact), baseline, x in zip(truth.items(), eager, ours, strict=True):
            result = Agreement(what, relative_error(x, exact), relative_error(baseline, exact), epsilon)
            if math.isinf(result.eager_error):  # eager itself is wrong there
                assert result.error <= epsilon, result
            assert result.ok, result


@every_row
def test_the_oracle_gives_the_answer(row: dict[str, Any]) -> None:
    """The eager formulas in float64, which every other test asks, against formulas that share no line with them. Both
    are exact to the spacing of float64 at 1, that of their logarithms and of terms that cancel in a gradient."""
    ours = evaluate(getattr(fp.reference, row["op"]), row, torch.float64, "cpu")
    for x, exact in zip(ours, answers(row, "cpu").values(), strict=True):
        size = exact[exact.isfinite()].norm().item()
        rounding = torch.finfo(torch.float64).eps * x.numel() ** 0.5 / size if size > 0 else 0.0
        assert relative_error(x, exact) < 1e-12 + 4 * rounding


def test_the_file_is_what_its_formulas_make() -> None:
    """To the last digits, which another C library may round otherwise."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, float):
            return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-30)
        return a == b

    made = json.loads(json.dumps(list(corpus.problems())))
    assert len(made) == len(ROWS)
    for a, b in zip(made, ROWS, strict=True):
        assert same(a, b), a["name"]
