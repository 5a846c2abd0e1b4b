"""Spans in batch-first form, which libraries split, pad and gather like any other tensor; and back to flat ones."""

from __future__ import annotations

from typing import overload

import torch

from ..ops import _checks
from ..problem import flat_rows

PADDING = -100
"""What Transformers pads labels and predictions with."""


@overload
def pad(spans: torch.Tensor, batch: int) -> torch.Tensor: ...
@overload
def pad(spans: torch.Tensor, batch: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
def pad(
    spans: torch.Tensor, batch: int, values: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Batch-first spans from flat ones. On a GPU it waits for the device, to learn how many a sentence has.

    Args:
        spans: int64 ``[S, 4]``, rows (batch, head, start, end).
        batch: the number of sentences, B.
        values: ``[S]``, one for each span: its score, or its label.

    Returns:
        int64 ``[B, P, 3]`` on the device of spans: the rows (head, start, end) of each sentence, in the order given,
        then rows of -100; P is the number of spans of the sentence that has most. With values also these, ``[B, P]``,
        -100 for padding.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape, or a span of a sentence that is not there.
    """
    op = "pad"
    _check_flat(op, spans)
    if not _checks.is_int(batch, 0):
        raise ValueError(f"{op}: batch takes an int of at least 0; got {_checks.describe(batch)}")
    if values is not None:
        _check_values(op, values, spans)
    of, order = spans[:, 0].sort(stable=True)
    rank = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
    # one wait for all three
    first, last, most = torch.stack([of[0], of[-1], rank.max()]).tolist() if len(of) else (0, -1, -1)
    if first < 0 or last >= batch:
        wrong = first if first < 0 else last
        raise ValueError(f"{op}: spans takes rows of sentences 0 to {batch - 1}; got one of sentence {wrong}")
    shape = (batch, most + 1)
    padded = _placed(spans[order, 1:], of, rank, shape)
    return padded if values is None else (padded, _placed(values[order], of, rank, shape))


def pad_in_order(spans: torch.Tensor, batch: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad`` of spans sorted by sentence, for ``torch.export``: a graph without branches, in ops that ONNX has."""
    of = spans[:, 0]
    counts = torch.zeros(batch + 1, dtype=torch.int64, device=of.device).scatter_add(0, of, torch.ones_like(of))
    rank = torch.arange(of.shape[0], device=of.device) - (counts.cumsum(0) - counts)[of]
    most: int = counts.max().item()  # type: ignore[assignment]
    shape = (batch, most)
    return _placed(spans[:, 1:], of, rank, shape), _placed(values, of, rank, shape)


def _placed(rows: torch.Tensor, of: torch.Tensor, rank: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Each row at (of, rank) of a padded ``[B, P, ...]``."""
    padded = rows.new_full((*shape, *rows.shape[1:]), PADDING)
    padded[of, rank] = rows
    return padded


@overload
def flatten(spans: torch.Tensor) -> torch.Tensor: ...
@overload
def flatten(spans: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
def flatten(
    spans: torch.Tensor, values: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Flat spans from batch-first ones. On a GPU it waits for the device, to learn how many there are. Flat spans come
    back as they are, so that what takes both may begin with it.

    Args:
        spans: int64 ``[B, P, 3]``, rows (head, start, end); one with a negative entry is padding. Or ``[S, 4]``.
        values: ``[B, P]``, or ``[S]``, one for each row: the score of a span, or its label.

    Returns:
        int64 ``[S, 4]`` on the device of spans: rows (batch, head, start, end), sentence by sentence, in the order
        given. With values also these, ``[S]``.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape.
    """
    op = "flatten"
    _checks.check_spans(op, spans)
    if values is not None:
        _check_values(op, values, spans)
    if spans.dim() == 2:
        return spans if values is None else (spans, values)
    rows = flat_rows(spans)
    kept = (rows >= 0).all(1).nonzero().squeeze(1)
    return rows[kept] if values is None else (rows[kept], values.flatten()[kept])


def _check_flat(op: str, spans: torch.Tensor) -> None:
    takes = "an int64 tensor [S, 4]"
    _checks.check_tensor(op, "spans", spans, takes, [torch.int64])
    if spans.dim() != 2 or spans.shape[1] != 4:
        raise ValueError(f"{op}: spans takes {takes}; got {_checks.describe(spans)}")


def _check_values(op: str, values: torch.Tensor, spans: torch.Tensor) -> None:
    takes = f"a tensor {list(spans.shape[:-1])}, one for each row of spans, on their device"
    _checks.check_tensor(op, "values", values, takes, [*_checks.FLOATS, *_checks.INTEGERS])
    if values.shape != spans.shape[:-1] or values.device != spans.device:
        raise ValueError(f"{op}: values takes {takes}; got {_checks.describe(values)}")
