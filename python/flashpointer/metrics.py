"""Precision, recall and F1 of spans, counted batch by batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .ops import _checks
from .spans import _read, flatten
from .spans._read import Heads

OP = "SpanF1"


class SpanF1:
    """Precision, recall and F1 of spans. A span is right if its sentence, its type and both its ends are. ::

        f1 = SpanF1(["PER", "LOC"])
        for batch in loader:
            f1.update(head.decode(hidden, mask)[0], batch["spans"])
        f1.all_reduce().compute()["f1"]

    And for Transformers' Trainer, where the model returns the padded spans that it has found::

        Trainer(..., compute_metrics=SpanF1(["PER", "LOC"]).compute_metrics)

    Args:
        heads: a mapping from type to head index, or a sequence of types, where the position is the head index.

    Attributes:
        counts: int64 ``[H + 1, 3]`` on the CPU: how many spans are right, found and true, of each head; in the last row
            those of boundaries alone, whatever their type. Those of parts of the data add up to those of all of it.

    Raises:
        TypeError, ValueError: for heads that are neither.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = _read.table(OP, heads)
        self.reset()

    def reset(self) -> None:
        """As new."""
        rows = max(self.heads.values(), default=-1) + 2
        self.counts = torch.zeros(rows, 3, dtype=torch.int64, device="cpu")

    def update(self, found: torch.Tensor, gold: torch.Tensor) -> None:
        """Counts the spans of a batch. On a GPU it waits for the device.

        Args:
            found, gold: those that the model found, and the true ones: int64 ``[S, 4]`` or batch-first ``[B, P, 3]``,
                each in either form. One that is listed twice counts once.

        Raises:
            TypeError, ValueError: for a tensor of wrong type or shape, or a span of a head that is not there.
        """
        listed = [self._listed(name, spans) for name, spans in (("found", found), ("gold", gold))]
        if found.dim() == gold.dim() == 3 and found.shape[0] != gold.shape[0]:
            takes = f"the {gold.shape[0]} sentences of gold"
            raise ValueError(f"{OP}: found takes {takes}; got {_checks.describe(found)}")
        of_heads = [spans[:, 1].bincount(minlength=len(self.counts) - 1) for spans in _with_right(listed)]
        of_boundaries = [len(spans) for spans in _with_right([spans[:, [0, 2, 3]] for spans in listed])]
        self.counts[:-1] += torch.stack(of_heads, dim=1)
        self.counts[-1] += torch.tensor(of_boundaries, device="cpu")

    def merge(self, other: SpanF1) -> SpanF1:
        """Itself, with the spans that another one of the same types has counted."""
        if not isinstance(other, SpanF1) or other.heads != self.heads:
            raise ValueError(f"{OP}: other takes a SpanF1 of the same heads; got {_checks.describe(other)}")
        self.counts += other.counts
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SpanF1:
        """A new one, with the spans that all ranks of a process group have counted: each rank has to call it."""
        counts = self.counts
        if "nccl" in dist.get_backend(group):
            counts = counts.cuda()
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
        merged = SpanF1(self.heads)
        merged.counts = counts.cpu()
        return merged

    def compute(self) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` over all spans (micro); as ``macro_f1`` the mean over the types that
        occur, found or true; as ``boundary_f1`` that of spans whatever their type; as ``f1/PER`` that of a type: and so
        on. All are 0 over nothing.
        """
        scores = _scores(self.counts)
        of_heads, boundary, micro = scores[:-1], scores[-1], _scores(self.counts[:-1].sum(0))
        occurs = self.counts[:-1].any(1)
        macro = of_heads[occurs].sum(0) / occurs.sum().clamp(min=1)
        rows = {"{}": micro, "macro_{}": macro, "boundary_{}": boundary}
        rows |= {f"{{}}/{kind}": of_heads[head] for kind, head in self.heads.items()}
        names = ("precision", "recall", "f1")
        return {
            of.format(name): value for of, row in rows.items() for name, value in zip(names, row.tolist(), strict=True)
        }

    def compute_metrics(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """As ``Trainer(compute_metrics=)``: of all predictions, or with ``batch_eval_metrics`` batch by batch.

        Args:
            prediction: its ``predictions`` are the padded spans found, or the first of several outputs is; its
                ``label_ids`` the padded true ones: tensors or arrays.
            compute_result: whether this batch is the last one. Only then there is a result, and counting starts anew.
        """
        found, gold = prediction.predictions, prediction.label_ids
        found = found[0] if isinstance(found, (tuple, list)) else found
        self.update(_checks.as_tensor(found), _checks.as_tensor(gold))
        if not compute_result:
            return {}
        result = self.compute()
        self.reset()
        return result

    def _listed(self, name: str, spans: torch.Tensor) -> torch.Tensor:
        """The spans, flat, checked, on the CPU."""
        _checks.check_spans(OP, spans, name)
        listed, heads = flatten(spans).cpu(), len(self.counts) - 1
        wrong = (listed < 0).any(1) | (listed[:, 1] >= heads)
        if wrong.any():
            got = tuple(listed[wrong][0].tolist())
            raise ValueError(f"{OP}: {name} takes rows (batch, head, start, end) of {heads} heads; got {got}")
        return listed


def _with_right(listed: list[torch.Tensor]) -> list[torch.Tensor]:
    """The rows that found and gold share, then those of each: none twice."""
    found, gold = (rows.unique(dim=0) for rows in listed)  # type: ignore[no-untyped-call]
    rows, counts = torch.cat([found, gold]).unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
    return [rows[counts == 2], found, gold]


def _scores(counts: torch.Tensor) -> torch.Tensor:
    """Precision, recall and F1 [..., 3] of right, found and true ones [..., 3]."""
    right, found, gold = counts.double().unbind(-1)
    return torch.stack([right / found, right / gold, 2 * right / (found + gold)], dim=-1).nan_to_num(0.0)
