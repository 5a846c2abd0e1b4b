"""Fused kernels, with autograd, for the ZLPR multi-label loss and GlobalPointer span heads.

    import flashpointer as fp

    loss = fp.zlpr_loss(scores, labels)

On a CUDA device the ops run as Triton kernels, elsewhere as tiled PyTorch: ``python -m flashpointer`` says which.
"""

from importlib.metadata import version as _version

from . import convert, metrics, nn, reference, spans
from .backends import use_backend
from .ops.linear_zlpr_loss import linear_zlpr_loss
from .ops.pointer_decode import pointer_decode
from .ops.pointer_loss import pointer_loss
from .ops.pointer_scores import pointer_scores
from .ops.sparse_zlpr_loss import sparse_zlpr_loss
from .ops.zlpr_kl_div import zlpr_kl_div
from .ops.zlpr_loss import zlpr_loss

__version__ = _version("flashpointer")
__all__ = [
    "convert",
    "linear_zlpr_loss",
    "metrics",
    "nn",
    "pointer_decode",
    "pointer_loss",
    "pointer_scores",
    "reference",
    "spans",
    "sparse_zlpr_loss",
    "use_backend",
    "zlpr_kl_div",
    "zlpr_loss",
]
