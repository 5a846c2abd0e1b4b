"""The losses and the span heads as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .ops import _checks
from .ops.linear_topk import TopK, linear_topk
from .ops.linear_zlpr_loss import WeightGrad, linear_zlpr_loss
from .ops.pointer_decode import pointer_decode
from .ops.pointer_loss import pointer_loss
from .ops.pointer_scores import pointer_scores
from .ops.zlpr_loss import zlpr_loss

MAX_SPANS = 250_000


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


class LinearZLPR(torch.nn.Module):
    """A linear layer of very many classes whose loss, and whose best classes, do without their scores: see
    ``linear_zlpr_loss`` and ``linear_topk``. ::

        head = LinearZLPR(encoder.config.hidden_size, len(labels))
        loss = head.loss(pooled, positives)
        scores, classes = head.topk(pooled, k=5)

    The parameters have the names and the layout of ``torch.nn.Linear``, whose checkpoints load as they are.

    Args:
        hidden_size: the size of the hidden states, D.
        classes: their number, C; of classes that are sharded over ranks those of this one, perhaps 0.
        bias: whether there is one. It starts at -log C, where exp(s) over all classes sums to about 1: real labels were
            learned faster from there than from 0.

    Attributes:
        weight: ``[C, D]``, initialised as ``torch.nn.Linear`` does.
        bias: ``[C]``, or None.

    Raises:
        ValueError: for a wrong size.
    """

    def __init__(self, hidden_size: int, classes: int, bias: bool = True) -> None:
        super().__init__()
        for name, size, least in (("hidden_size", hidden_size, 1), ("classes", classes, 0)):
            if not _checks.is_int(size, least):
                raise ValueError(f"LinearZLPR: {name} takes an int of at least {least}; got {_checks.describe(size)}")
        _checks.check_flag("LinearZLPR", "bias", bias)
        self.hidden_size, self.classes = hidden_size, classes
        self.weight = torch.nn.Parameter(torch.empty(classes, hidden_size))
        self.bias = torch.nn.Parameter(torch.empty(classes)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters."""
        bound = self.hidden_size**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.constant_(self.bias, -math.log(max(1, self.classes)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scores ``[..., C]`` of hidden ``[..., D]``: all of them."""
        takes = f"a floating-point tensor [..., {self.hidden_size}]"
        _checks.check_tensor("LinearZLPR", "hidden", hidden, takes, _checks.FLOATS)
        if hidden.dim() == 0 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"LinearZLPR: hidden takes {takes}; got {_checks.describe(hidden)}")
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def loss(
        self,
        hidden: torch.Tensor,
        positives: torch.Tensor,
        positive_labels: torch.Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        *,
        group: dist.ProcessGroup | None = None,
        first_class: int | None = None,
        weight_grad: WeightGrad | None = None,
    ) -> torch.Tensor:
        """The ZLPR loss of the scores, without them: arguments, dtypes and errors are those of ``linear_zlpr_loss``."""
        options: dict[str, Any] = {"group": group, "first_class": first_class, "weight_grad": weight_grad}
        return linear_zlpr_loss(
            hidden, self.weight, positives, self.bias, positive_labels=positive_labels, reduction=reduction,
            ignore_index=ignore_index, **options,
        )  # fmt: skip

    def topk(
        self,
        hidden: torch.Tensor,
        k: int,
        threshold: float | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        first_class: int | None = None,
    ) -> TopK:
        """The best classes of each row and their scores: arguments, result and errors are those of ``linear_topk``."""
        options: dict[str, Any] = {"threshold": threshold, "group": group, "first_class": first_class}
        return linear_topk(hidden, self.weight, self.bias, k=k, **options)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, classes={self.classes}, bias={self.bias is not None}"


class _PointerHead(torch.nn.Module):
    """A span head: linear layers from hidden states to the arguments of ``pointer_scores``."""

    def __init__(
        self, hidden_size: int, heads: int, head_size: int, rope: bool, tril_mask: bool, max_width: int | None
    ) -> None:
        super().__init__()
        for name, size in {"hidden_size": hidden_size, "heads": heads, "head_size": head_size}.items():
            self._require(_is_size(size), name, "an int of at least 1", size)
        self._require(head_size % 2 == 0 and head_size <= 256, "head_size", "an even int of at most 256", head_size)
        self._require(max_width is None or _is_size(max_width), "max_width", "an int of at least 1, or None", max_width)
        for name, flag in {"rope": rope, "tril_mask": tril_mask}.items():
            self._require(isinstance(flag, bool), name, "a bool", flag)
        self.hidden_size, self.heads, self.head_size = hidden_size, heads, head_size
        self.rope, self.tril_mask, self.max_width = rope, tril_mask, max_width

    def reset_parameters(self) -> None:
        """Initialises the linear layers as ``torch.nn.Linear`` does."""
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The scores of all spans.

        Args:
            hidden: ``[B, N, hidden_size]``, the encoder's hidden states, in the dtype of the weights or under autocast.
            mask: ``[B, N]``, bool or 0 and 1, as the attention mask of a tokenizer: False for padding, and for any
                other token where no span may start or end.
            positions: ``[N]`` or ``[B, N]``, integer: the tokens' positions for RoPE; 0 to N - 1 by default.

        Returns:
            ``[B, heads, N, N]``: the score of each (start, end), end inclusive; -inf where no span can be. In the dtype
            of the weights, or of autocast.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape, device or value.
        """
        return pointer_scores(**self._arguments(hidden, mask, positions))

    def loss(
        self,
        hidden: torch.Tensor,
        spans: torch.Tensor,
        mask: torch.Tensor | None = None,
        reduction: str = "mean",
        positions: torch.Tensor | None = None,
        span_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The ZLPR loss of the scores, over the valid cells of each sentence and head, in memory linear in the length
        of a sentence: the scores are never stored.

        Args:
            hidden, mask, positions: as for ``forward``.
            spans: int64 ``[S, 4]``, rows (batch, head, start, end), end inclusive, in any order: ``flashpointer.spans``
                makes them. Or batch-first ``[B, P, 3]``, rows (head, start, end), one with a negative entry for
                padding. One that is listed twice counts once, and one on an invalid cell leaves both terms.
            reduction: ``"none"`` gives ``[B, heads]``; ``"sum"``; ``"mean"`` over ``B * heads``.
            span_labels: floating-point ``[S]``, or ``[B, P]``, in [0, 1]: soft labels of the spans, 1 by default; -100
                leaves the cell of a span out.

        Returns:
            float32, or float64 for float64 hidden states.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape, device or value.
        """
        return pointer_loss(
            spans=spans, span_labels=span_labels, reduction=reduction, **self._arguments(hidden, mask, positions)
        )

    @torch.no_grad()
    def decode(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        threshold: float | Sequence[float] | torch.Tensor = 0.0,
        positions: torch.Tensor | None = None,
        *,
        top_k: int | None = None,
        non_overlapping: bool = False,
        non_crossing: bool = False,
        one_label: bool = False,
        max_spans: int | None = MAX_SPANS,
        padded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The spans whose score is above the threshold, found without storing the scores. On a GPU it waits for the
        device, to learn how many there are.

        Args:
            hidden, mask, positions: as for ``forward``.
            threshold, top_k, non_overlapping, non_crossing, one_label, max_spans, padded: as for ``pointer_decode``. 0
                is where the loss puts the threshold. A head that was not trained finds half of all cells; so max_spans
                is 250,000 unless you say otherwise, and a warning says where it cuts. None for all.

        Returns:
            ``(spans, scores)``: int64 ``[S, 4]``, sorted rows (batch, head, start, end), end inclusive; and the score
            ``[S]`` of each, whose probability is roughly ``sigmoid(2 * score)``. Padded ``[B, P, 3]`` and ``[B, P]``.
            Neither has a gradient.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape, device or value.
        """
        options: dict[str, Any] = {
            "top_k": top_k, "non_overlapping": non_overlapping, "non_crossing": non_crossing, "one_label": one_label,
            "max_spans": max_spans, "padded": padded,
        }  # fmt: skip
        return pointer_decode(threshold=threshold, **options, **self._arguments(hidden, mask, positions))

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, heads={self.heads}, head_size={self.head_size}, rope={self.rope}, "
            f"tril_mask={self.tril_mask}, max_width={self.max_width}"
        )

    def __prepare_scriptable__(self) -> torch.nn.Module:  # a hook of torch.jit.script
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script takes no head, whose ops are Python; torch.export does"
        )

    def _arguments(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> dict[str, Any]:
        """What the pointer ops take, by name."""
        self._check_hidden(hidden)
        arguments = dict(zip(("q", "k", "start", "end"), self._pointers(hidden), strict=True))
        options = {"rope": self.rope, "tril_mask": self.tril_mask, "max_width": self.max_width}
        return {**arguments, **options, "mask": mask, "positions": positions}

    def _pointers(
        self, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """q, k, start and end, as views of what the linear layers give."""
        raise NotImplementedError

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        op, takes = type(self).__name__, f"[B, N, {self.hidden_size}]"
        _checks.check_tensor(op, "hidden", hidden, f"a floating-point tensor {takes}", _checks.FLOATS)
        self._require(hidden.dim() == 3 and hidden.shape[-1] == self.hidden_size, "hidden", takes, hidden)
        # The layer knows: a replica of DataParallel and what FSDP1 flattened have no parameters, and the weight of a
        # quantized layer is a method.
        weight = getattr(next(self.children()), "weight", None)
        weights = weight.dtype if isinstance(weight, torch.Tensor) else None
        where = hidden.device if weight is None or weights is None else weight.device
        self._require(hidden.device == where, "hidden", f"a tensor on {where}, where the weights are", hidden)
        if weights in _checks.FLOATS and not _checks.in_autocast(hidden):
            self._require(hidden.dtype == weights, "hidden", f"{weights}, as the weights are, or autocast", hidden)

    def _require(self, condition: bool, name: str, takes: str, got: object) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name} takes {takes}; got {_checks.describe(got)}")


def _is_size(value: object) -> bool:
    return _checks.is_int(value, 1)


class GlobalPointer(_PointerHead):
    """GlobalPointer: for each type of span a head with its own q and k, and ``q[start] . k[end]`` the score of a span.

    The parameters have the names and the layout of bert4torch, whose checkpoints load as they are, and
    ``flashpointer.convert`` reads others. ::

        head = GlobalPointer(encoder.config.hidden_size, heads=len(types))
        loss = head.loss(hidden, spans, attention_mask)
        spans, scores = head.decode(hidden, attention_mask)

    Under DDP, call ``loss`` in the forward of the model that is wrapped. A head that FSDP2 shards for itself, not with
    the model around it, takes ``torch.distributed.fsdp.register_fsdp_forward_method(head, "loss")``, as does decode.

    Args:
        hidden_size: the size of the hidden states.
        heads: the number of types of span, H.
        head_size: the size of q and k of a head, D: even, at most 256.
        rope: whether rotary position embeddings turn q and k, so that scores depend on the lengths of spans: for
            entities, but not for the pairs of tokens of a relation.
        bias: whether the linear layer has a bias.
        tril_mask: whether a span must end where it starts or later; False for such pairs.
        max_width: at most so many tokens from first to last, both counted; None for no limit.

    Attributes:
        dense: ``Linear(hidden_size, 2HD)``: columns ``[2Dh, 2Dh + D)`` of its output are q of head h, the next D k.

    Raises:
        ValueError: for a wrong size.

    References:
        Su et al. 2022, *Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition*,
        arXiv:2208.03054; https://kexue.fm/archives/8373
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_size: int = 64,
        rope: bool = True,
        bias: bool = True,
        tril_mask: bool = True,
        max_width: int | None = None,
    ) -> None:
        super().__init__(hidden_size, heads, head_size, rope, tril_mask, max_width)
        self._require(isinstance(bias, bool), "bias", "a bool", bias)
        self.dense = torch.nn.Linear(hidden_size, 2 * heads * head_size, bias)

    def _pointers(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        q, k = self.dense(hidden).unflatten(2, (self.heads, 2, self.head_size)).transpose(1, 2).unbind(3)
        return q, k, None, None


class EfficientGlobalPointer(_PointerHead):
    """Efficient GlobalPointer: q and k shared by all heads, which differ in their biases of start and end tokens.

    The score of a span is ``q[start] . k[end] / sqrt(D) + start_bias[h, start] + end_bias[h, end]``, where the biases
    are linear in q and k as they are before RoPE. It is used as ``GlobalPointer`` is, and likewise loads checkpoints of
    bert4torch (0.6 and later).

    Args:
        hidden_size, heads, head_size, rope, tril_mask, max_width: as for ``GlobalPointer``.
        bias: whether the linear layers have biases.
        bias_from: what the second linear layer reads: ``"projection"``, the output of the first, or ``"hidden"``, the
            hidden states, as AdaSeq and xhw205/Efficient-GlobalPointer-torch do.

    Attributes:
        p_dense: ``Linear(hidden_size, 2D)``: the first D columns of its output are q, the others k.
        q_dense: ``Linear(2D, 2H)``, or ``Linear(hidden_size, 2H)``: columns 2h and 2h + 1 of its output, halved, are
            the start and the end bias of head h.

    Raises:
        ValueError: for a wrong size or bias_from.

    References:
        arXiv:2208.03054, as for ``GlobalPointer``; https://kexue.fm/archives/8877
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_size: int = 64,
        rope: bool = True,
        bias: bool = True,
        tril_mask: bool = True,
        max_width: int | None = None,
        bias_from: str = "projection",
    ) -> None:
        super().__init__(hidden_size, heads, head_size, rope, tril_mask, max_width)
        self._require(isinstance(bias, bool), "bias", "a bool", bias)
        known = isinstance(bias_from, str) and bias_from in ("projection", "hidden")
        self._require(known, "bias_from", "'projection' or 'hidden'", bias_from)
        self.bias_from = bias_from
        self.p_dense = torch.nn.Linear(hidden_size, 2 * head_size, bias)
        self.q_dense = torch.nn.Linear(2 * head_size if bias_from == "projection" else hidden_size, 2 * heads, bias)

    def _pointers(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        projection = self.p_dense(hidden)
        q, k = projection.chunk(2, dim=2)
        biases = self.q_dense(projection if self.bias_from == "projection" else hidden) / 2
        start, end = biases.unflatten(2, (self.heads, 2)).transpose(1, 2).unbind(3)
        return q, k, start, end

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias_from={self.bias_from!r}"
