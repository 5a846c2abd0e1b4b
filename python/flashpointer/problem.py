"""What the pointer ops are told beside their tensors, and their spans: below ops and tiles, which both take it."""

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


SCHEMA = "Tensor? mask, Tensor? positions, bool rope, bool tril_mask, int? max_width, float scale"
"""Its fields in the schema of an op."""


FEW = 256
"""So many spans Python reads, checks and sorts in less time than PyTorch takes to be called."""


def flat_rows(spans: torch.Tensor) -> torch.Tensor:
    """Rows (batch, head, start, end) of spans [S, 4], or of [B, P, 3], where padding keeps its negative entry: nothing
    is counted, so a GPU is not waited for, and whoever drops impossible spans drops padding."""
    if spans.dim() == 2:
        return spans
    batch = torch.arange(spans.shape[0], device=spans.device).view(-1, 1, 1).expand(*spans.shape[:2], 1)
    return torch.cat([batch, spans], dim=2).flatten(0, 1)
