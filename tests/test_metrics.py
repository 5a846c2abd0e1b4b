"""SpanF1 against counting sets of tuples; in parts, in both forms, across ranks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashpointer as fp
from flashpointer.metrics import SpanF1

from .processes import run

TYPES = ["PER", "LOC", "ORG"]
Row = tuple[int, int, int, int]

some_rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=12)


def tensor(rows: list[Row]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def by_hand(found: set[Any], gold: set[Any]) -> dict[str, float]:
    right = len(found & gold)
    precision, recall = right / max(1, len(found)), right / max(1, len(gold))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def expected(found: list[Row], gold: list[Row]) -> dict[str, float]:
    result = by_hand(set(found), set(gold))
    of_types = [by_hand(*({row for row in rows if row[1] == h} for rows in (found, gold))) for h in range(len(TYPES))]
    occurring = [of for h, of in enumerate(of_types) if any(row[1] == h for row in found + gold)]
    boundaries = by_hand(*({(b, m, n) for b, _, m, n in rows} for rows in (found, gold)))
    for name in ("precision", "recall", "f1"):
        result[f"macro_{name}"] = sum(of[name] for of in occurring) / max(1, len(occurring))
        result[f"boundary_{name}"] = boundaries[name]
        result |= {f"{name}/{kind}": of[name] for kind, of in zip(TYPES, of_types, strict=True)}
    return result


@given(found=some_rows, gold=some_rows, forms=st.tuples(st.booleans(), st.booleans()))
def test_counts(found: list[Row], gold: list[Row], forms: tuple[bool, bool]) -> None:
    """Micro, macro, by type, of boundaries; duplicates, either form."""
    f1 = SpanF1(TYPES)
    f1.update(
        *(fp.spans.pad(tensor(x), 4) if padded else tensor(x) for x, padded in zip((found, gold), forms, strict=True))
    )
    assert f1.compute() == pytest.approx(expected(found, gold))


@given(found=some_rows, gold=some_rows)
def test_parts_add_up(found: list[Row], gold: list[Row]) -> None:
    """Sentence by sentence, each with its own numbering, in one metric and in several that are merged."""
    whole, one, several = SpanF1(TYPES), SpanF1(TYPES), SpanF1(TYPES)
    whole.update(tensor(found), tensor(gold))
    for b in range(4):
        part = [tensor([(0, *row[1:]) for row in rows if row[0] == b]) for rows in (found, gold)]
        one.update(*part)
        other = SpanF1(TYPES)
        other.update(*part)
        assert several.merge(other) is several
    assert torch.equal(one.counts, whole.counts) and torch.equal(several.counts, whole.counts)
    whole.reset()
    assert not whole.counts.any()


def test_the_type_counts_and_the_boundaries_do_without_it() -> None:
    f1 = SpanF1({"PER": 0, "LOC": 2})
    f1.update(tensor([(0, 0, 1, 2), (0, 2, 3, 4)]), tensor([(0, 2, 1, 2), (0, 2, 3, 4)]))
    result = f1.compute()
    assert (result["f1"], result["boundary_f1"], result["f1/PER"]) == (0.5, 1.0, 0.0)
    assert result["f1/LOC"] == pytest.approx(2 / 3) and result["macro_f1"] == pytest.approx(1 / 3)


def test_nothing() -> None:
    f1 = SpanF1(TYPES)
    f1.update(tensor([]), torch.zeros(2, 0, 3, dtype=torch.int64))
    assert set(f1.compute().values()) == {0.0}
    assert SpanF1([]).compute()["f1"] == 0.0


def _merged_step(rank: int) -> None:
    torch.manual_seed(0)
    batches = [[torch.randint(0, 3, (9, 4)) for _ in range(2)] for _ in range(3)]  # of which rank 1 has one
    whole, own = SpanF1(TYPES), SpanF1(TYPES)
    for i, batch in enumerate(batches):
        whole.update(*batch)
        if i % 2 == rank:
            own.update(*batch)
    before = copy.deepcopy(own)
    merged = own.all_reduce()
    assert torch.equal(merged.counts, whole.counts) and merged.compute() == whole.compute()
    assert torch.equal(own.counts, before.counts) and not torch.equal(own.counts, whole.counts)  # may go on counting


@pytest.mark.slow
def test_ranks_add_up() -> None:
    run(2, _merged_step)


def test_predictions_of_trainer() -> None:
    """All at once, or batch by batch; of a model with one output or several; arrays or tensors."""
    gold, found = (fp.spans.pad(torch.randint(0, 3, (20, 4)), 4) for _ in range(2))
    f1 = SpanF1(TYPES)
    f1.update(found, gold)
    expected = f1.compute()
    compute = SpanF1(TYPES).compute_metrics
    scores = numpy.zeros((4, 5))
    for predictions in (found.numpy(), (found.numpy(), scores)):
        assert compute(SimpleNamespace(predictions=predictions, label_ids=gold.numpy())) == expected
    for i in range(4):
        part = SimpleNamespace(predictions=found[i : i + 1], label_ids=gold[i : i + 1])
        assert compute(part, compute_result=i == 3) == (expected if i == 3 else {})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"found": [[0, 0, 0, 0]]}, TypeError, r"found takes an int64 tensor .*\[B, P, 3\]; got list"),
        ({"gold": torch.zeros(2, 3)}, TypeError, r"gold takes an int64 tensor .*; got a torch.float32"),
        ({"gold": torch.zeros(2, 3).long()}, ValueError, r"gold must be an int64 tensor .*; got .*\(2, 3\)"),
        ({"found": tensor([(0, 3, 0, 0)])}, ValueError, r"found takes rows .* of 3 heads; got \(0, 3, 0, 0\)"),
        ({"found": tensor([(0, -1, 0, 0)])}, ValueError, r"found takes rows .* of 3 heads; got \(0, -1, 0, 0\)"),
        ({"found": torch.zeros(3, 1, 3).long()}, ValueError, r"found takes the 2 sentences of gold; got .*\(3, 1, 3\)"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^SpanF1: {message}"):
        SpanF1(TYPES).update(**{"found": tensor([]), "gold": torch.zeros(2, 1, 3).long(), **arguments})


def test_metrics_of_other_types_are_not_merged() -> None:
    for other in (SpanF1(["PER"]), 3):
        with pytest.raises(ValueError, match=r"^SpanF1: other takes a SpanF1 of the same heads; got "):
            SpanF1(TYPES).merge(other)  # type: ignore[arg-type]
