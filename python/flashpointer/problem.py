"""What ops and tiles both take, below them: what the pointer ops are told beside their tensors, their spans, the listed
classes of the linear loss, and the log-sums of the losses on rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What stays the same from forward to backward, and from tile to tile: see ``ops.pointer_scores``."""

    mask: torch.Tensor | None  # [B, N], bool; until the op computes, of any dtype
    positions: torch.Tensor | None  # [N] or [B, N], integer
    rope: bool
    tril_mask: bool
    max_width: int | None
    scale: float


def shape_per_head(shape: torch.Size) -> tuple[int, ...]:
    """B, own heads or 1, N, D of the shape of q: [B, N, D] or [B, H, N, D]."""
    return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])


SCHEMA = "Tensor? mask, Tensor? positions, bool rope, bool tril_mask, int? max_width, float scale"
"""Its fields in the schema of an op."""


FEW = 256
"""So many spans Python reads, checks and sorts in less time than PyTorch takes to be called."""


class LogSums(NamedTuple):
    """Both terms of the ZLPR loss of each row, over some of its classes: the sum of exponentials is S * exp(m), with
    m >= 0. The 1 beside it inside the logarithm is not counted in: it stands once, for all classes."""

    m_n: torch.Tensor  # [R], float32 (float64 for float64), as the others: of the negatives
    S_n: torch.Tensor
    m_p: torch.Tensor  # of the positives
    S_p: torch.Tensor


def log_one_plus(m: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """log(1 + S * exp(m)) of m >= 0, where S >= 1 if m > 0; to full precision where it is small."""
    return m + torch.log1p(S + torch.expm1(-m))


def flat_rows(spans: torch.Tensor) -> torch.Tensor:
    """Rows (batch, head, start, end) of spans [S, 4], or of [B, P, 3], where padding keeps its negative entry: nothing
    is counted, so a GPU is not waited for, and whoever drops impossible spans drops padding."""
    if spans.dim() == 2:
        return spans
    batch = torch.arange(spans.shape[0], device=spans.device).view(-1, 1, 1).expand(*spans.shape[:2], 1)
    return torch.cat([batch, spans], dim=2).flatten(0, 1)


class Lists(NamedTuple):
    """The positives of each row, as they are given."""

    positives: torch.Tensor  # int64 [R, P]: classes
    labels: torch.Tensor | None  # [R, P], 0 to 1
    ignore_index: int  # of padding
    first: int  # class of the shard


class Listed(NamedTuple):
    """The listed cells of rows and classes (a shard's), each once, sorted by class, then by row; in kernels by tile.

    There are n = R * P of them always, P of each row, however many count, so that nobody waits for their number: those
    that do not (padding, listed before, classes of other shards) stand last, at class C.
    """

    rows: torch.Tensor  # int64 [n]
    classes: torch.Tensor  # int64 [n], from the shard's first on: 0 .. C - 1, or C where there is no cell
    labels: torch.Tensor | None  # [n], 0 to 1, or negative for a cell to leave out of both terms; None: all are 1
