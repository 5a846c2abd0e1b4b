"""Spans from and to tensors: dense labels, padded pairs."""

from __future__ import annotations

import torch

from ..ops import _checks
from ..problem import flat_rows


def from_dense(labels: torch.Tensor) -> torch.Tensor:
    """Spans from dense labels. On a GPU it waits for the device, to learn how many there are.

    Args:
        labels: ``[B, H, N, N]``, bool, or 0 and 1 of any integer or floating dtype: 1 at (batch, head, start, end).

    Returns:
        int64 ``[S, 4]`` on the device of labels, sorted by (batch, head, start, end).

    Raises:
        TypeError, ValueError: for labels of wrong type, shape or value.
    """
    op = "from_dense"
    takes = "a bool, integer or floating-point tensor [batch, heads, length, length]"
    _checks.check_tensor(op, "labels", labels, takes, (torch.bool, *_checks.INTEGERS, *_checks.FLOATS))
    if labels.dim() != 4 or labels.shape[2] != labels.shape[3]:
        raise ValueError(f"{op}: labels must be [batch, heads, length, length]; got {_checks.describe(labels)}")
    if labels.dtype != torch.bool:
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{op}: labels takes 0 and 1; got {labels[where].item()} at {where}")
    return labels.nonzero()


def to_dense(spans: torch.Tensor, batch: int, heads: int, length: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Dense labels from spans.

    Args:
        spans: int64 ``[S, 4]``, rows (batch, head, start, end), end inclusive, in any order; or batch-first ``[B, P,
            3]``, rows (head, start, end), one with a negative entry for padding. Duplicates count once.
        batch, heads, length: the sizes B, H, N of the result.
        dtype: of the result.

    Returns:
        ``[B, H, N, N]`` on the device of spans: 1 at (batch, head, start, end) of each span, else 0.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape, or a span outside the result. On a GPU, where to
            look is to wait, such a span is dropped, and so under ``torch.compile``; the environment variable
            ``FLASHPOINTER_CHECK=1`` makes it an error on a GPU too.
    """
    op, sizes = "to_dense", {"batch": batch, "heads": heads, "length": length}
    _checks.check_spans(op, spans)
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)):  # a union is none to torch.compile in PyTorch 2.8
            raise TypeError(f"{op}: {name} takes an int; got {_checks.describe(size)}")
        if size < 0:
            raise ValueError(f"{op}: {name} takes 0 or more; got {size}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype takes a torch.dtype; got {_checks.describe(dtype)}")
    if spans.dim() == 3 and spans.shape[0] != batch:
        raise ValueError(f"{op}: spans must be [{batch}, P, 3], as batch is {batch}; got {_checks.describe(spans)}")
    rows = flat_rows(spans)
    inside = _inside(rows, batch, heads, length)
    if _checks.can_look(spans) and not torch.compiler.is_compiling():
        wrong = ~inside if spans.dim() == 2 else ~inside & (rows >= 0).all(1)
        if wrong.any():
            where = int(wrong.nonzero()[0])
            raise ValueError(
                f"{op}: spans takes rows (batch, head, start, end) below ({batch}, {heads}, {length}, {length}); got "
                f"{tuple(rows[where].tolist())} at {where}"
            )
    return _fill(rows, inside, batch, heads, length, dtype)


def from_padded(labels: torch.Tensor, *, mask_zero: bool = False, ignore_index: int = -100) -> torch.Tensor:
    """Spans from the padded pairs that bert4keras and bert4torch use. On a GPU it waits for the device, to count them.

    Args:
        labels: integer ``[B, H, P, 2]``: pairs (start, end), end inclusive, for each sentence and head. A pair with a
            negative entry is padding.
        mask_zero: the pair (0, 0) is padding too, as those projects pad with ``mask_zero=True``.
        ignore_index: a pair with this entry is padding too.

    Returns:
        int64 ``[S, 4]`` on the device of labels, in the order of labels.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape.
    """
    op = "from_padded"
    _checks.check_tensor(op, "labels", labels, "an integer tensor [batch, heads, pairs, 2]", _checks.INTEGERS)
    if labels.dim() != 4 or labels.shape[3] != 2:
        raise ValueError(f"{op}: labels must be [batch, heads, pairs, 2]; got {_checks.describe(labels)}")
    if not _checks.is_int(ignore_index, -(2**63)):
        raise TypeError(f"{op}: ignore_index takes an int; got {_checks.describe(ignore_index)}")
    _checks.check_flag(op, "mask_zero", mask_zero)
    pairs = labels.long()
    padding = ((pairs < 0) | (pairs == ignore_index)).any(-1)
    if mask_zero:
        padding |= (pairs == 0).all(-1)
    where = (~padding).nonzero()
    return torch.cat([where[:, :2], pairs[where.unbind(1)]], dim=1)


def _inside(spans: torch.Tensor, batch: int, heads: int, length: int) -> torch.Tensor:
    """Which spans lie in labels of these sizes: compared column by column, as a tensor of limits would have to be
    copied to the device."""
    inside = (spans >= 0).all(1)
    for column, limit in zip(spans.unbind(1), (batch, heads, length, length), strict=True):
        inside &= column < limit
    return inside


def _fill(
    spans: torch.Tensor, inside: torch.Tensor, batch: int, heads: int, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Dense labels of the spans inside. The others go to one cell behind the last, which is then cut off."""
    cells = batch * heads * length * length
    b, h, start, end = spans.unbind(1)
    cell = torch.where(inside, ((b * heads + h) * length + start) * length + end, cells)
    labels = torch.zeros(cells + 1, dtype=dtype, device=spans.device)
    return labels.index_fill_(0, cell, 1)[:cells].view(batch, heads, length, length)
