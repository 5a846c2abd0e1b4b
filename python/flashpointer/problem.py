"""What the pointer ops are told beside their tensors: below ops and tiles, which both take it."""

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
