"""The ops as modules."""

from __future__ import annotations

import torch

from .ops import _checks
from .ops.zlpr_loss import zlpr_loss


class ZLPRLoss(torch.nn.Module):
    """The ZLPR multi-label loss as a module: see ``flashpointer.zlpr_loss`` for shapes, dtypes and errors.

    Args:
        reduction: ``"none"``, ``"sum"`` or ``"mean"`` (over the rows).
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        _checks.check_reduction("ZLPRLoss", reduction)
        self.reduction = reduction

    def forward(self, scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of scores ``[..., C]`` under labels of the same shape and a mask that broadcasts to it."""
        return zlpr_loss(scores, labels, mask=mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
