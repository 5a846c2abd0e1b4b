"""The formulas in eager PyTorch, as on a blackboard: the oracle in float64, and the baseline of every benchmark.

Differentiated by PyTorch. Computed in float32 at least, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .problem import flat_rows


def _upcast(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reduce(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and losses.numel() > 0 else losses.sum()


def _log_one_plus_sum_exp(exponents: torch.Tensor) -> torch.Tensor:
    """log(1 + sum_i exp(x_i)) over the last dimension."""
    zero = (
        torch.zeros_like(exponents[..., :1]) if exponents.shape[-1] else exponents.new_zeros((*exponents.shape[:-1], 1))
    )
    return torch.logsumexp(torch.cat([zero, exponents], dim=-1), dim=-1)


def zlpr_loss(
    scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """log(1 + sum_i (1 - t_i) exp(s_i)) + log(1 + sum_i t_i exp(-s_i)) of each row."""
    s = _upcast(scores)
    valid = s != -torch.inf
    if mask is not None:
        valid = valid & mask
    if labels.dtype != torch.bool:
        valid = valid & (labels != -100)
    s = s.masked_fill(~valid, 0.0)
    if labels.is_floating_point():
        t = labels.to(s.dtype).masked_fill(~valid, 0.0)
        negatives = torch.where(t < 1, s + torch.log1p(-t), -torch.inf)
        positives = torch.where(t > 0, -s + torch.log(t), -torch.inf)
    else:
        negatives = s.masked_fill(labels == 1, -torch.inf)
        positives = (-s).masked_fill(labels != 1, -torch.inf)
    negatives = negatives.masked_fill(~valid, -torch.inf)
    positives = positives.masked_fill(~valid, -torch.inf)
    return _reduce(_log_one_plus_sum_exp(negatives) + _log_one_plus_sum_exp(positives), reduction)


def sparse_zlpr_loss(
    scores: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """``zlpr_loss`` of the labels that ``positives`` lists."""
    listed = positives.long()
    keep = (listed >= 0) & (listed < scores.shape[-1]) & (listed != ignore_index)
    labels = torch.zeros((*scores.shape[:-1], scores.shape[-1] + 1), dtype=torch.bool, device=scores.device)
    labels = labels.scatter(-1, torch.where(keep, listed, scores.shape[-1]), True)[..., :-1]
    return zlpr_loss(scores, labels, mask, reduction)


def linear_zlpr_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    positives: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    positive_labels: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """``zlpr_loss`` of the scores hidden weight^T + bias, with the labels of the lists in a tensor of the same size."""
    scores = torch.matmul(_upcast(hidden), _upcast(weight).t())
    if bias is not None:
        scores = scores + _upcast(bias)
    rows, classes, listed = scores.shape[:-1], scores.shape[-1], positives.long()
    keep = (listed >= 0) & (listed < classes) & (listed != ignore_index)
    cell = torch.arange(rows.numel(), device=listed.device).view(*rows, 1) * classes + listed
    labels = _labels_of_cells(torch.where(keep, cell, scores.numel()), positive_labels, scores.numel())
    return zlpr_loss(scores, labels.view(scores.shape), reduction=reduction)


def zlpr_kl_div(
    scores: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """sum_i (sigmoid(s_i) - sigmoid(t_i)) (s_i - t_i) of each row."""
    s, t = _upcast(scores), _upcast(other)
    left_out = (s == -torch.inf) & (t == -torch.inf)
    if mask is not None:
        left_out = left_out | ~mask
    s, t = s.masked_fill(left_out, 0.0), t.masked_fill(left_out, 0.0)
    return _reduce(((torch.sigmoid(s) - torch.sigmoid(t)) * (s - t)).sum(-1), reduction)


def linear_topk(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of hidden W^T + bias in each row, and their classes; -inf and -1 behind the last class."""
    scores = _upcast(hidden) @ _upcast(weight).T
    if bias is not None:
        scores = scores + _upcast(bias)
    best = scores.sort(dim=-1, descending=True, stable=True)
    missing = (0, max(0, k - scores.shape[-1]))
    return tuple(
        torch.nn.functional.pad(x[..., :k], missing, value=filler)  # type: ignore[return-value]
        for x, filler in ((best.values, -torch.inf), (best.indices, -1))
    )


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE over adjacent pairs: the pair (x_2i, x_2i+1) turned by the angle ``position * 10000 ** (-2i / D)``.

    x ``[..., N, D]``; positions ``[N]``, or ``[B, N]`` for x ``[B, ..., N, D]``.
    """
    size = x.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size)
    angle = positions.to(torch.float64).unsqueeze(-1) * theta
    if positions.dim() == 2:
        angle = angle.view(angle.shape[0], *[1] * (x.dim() - 3), *angle.shape[1:])
    cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def valid_cells(
    length: int, mask: torch.Tensor | None, tril_mask: bool, max_width: int | None, device: torch.device
) -> torch.Tensor:
    """Which cells (start, end) may be spans: bool, broadcastable to ``[B, H, N, N]``."""
    start, end = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None, :]
    valid = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    if tril_mask:
        valid = valid & (start <= end)
    if max_width is not None:
        valid = valid & (end - start < max_width)
    if mask is not None:
        kept = mask.bool()
        valid = valid & kept[:, None, :, None] & kept[:, None, None, :]
    return valid


def pointer_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    rope: bool = True,
    tril_mask: bool = True,
    max_width: int | None = None,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * <R_m q_m, R_n k_n> + start_m + end_n, -inf where no span can be."""
    dtype, length = q.dtype, q.shape[-2]
    q, k = _upcast(q), _upcast(k)
    if mask is not None:  # before the product, whose backward would spread what a dropped token holds
        dropped = ~mask.bool().unsqueeze(-1)
        dropped = dropped if q.dim() == 3 else dropped.unsqueeze(1)
        q, k = q.masked_fill(dropped, 0.0), k.masked_fill(dropped, 0.0)
    if rope:
        positions = torch.arange(length, device=q.device) if positions is None else positions
        q, k = rotate(q, positions), rotate(k, positions)
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if scores.dim() == 3:
        scores = scores.unsqueeze(1)
    if start is not None:
        scores = scores + _upcast(start).unsqueeze(-1)
    if end is not None:
        scores = scores + _upcast(end).unsqueeze(-2)
    return scores.masked_fill(~valid_cells(length, mask, tril_mask, max_width, q.device), -torch.inf).to(dtype)


def pointer_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    spans: torch.Tensor,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    rope: bool = True,
    tril_mask: bool = True,
    max_width: int | None = None,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
    span_labels: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """``zlpr_loss`` of ``pointer_scores``, with the labels of the spans in a tensor of the same size."""
    options = {"mask": mask, "rope": rope, "tril_mask": tril_mask, "max_width": max_width, "scale": scale}
    scores = pointer_scores(q, k, start, end, positions=positions, **options)  # type: ignore[arg-type]
    return zlpr_loss(scores.flatten(2), _dense_labels(spans, span_labels, scores).flatten(2), reduction=reduction)


def _dense_labels(spans: torch.Tensor, span_labels: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """Labels of the shape of the scores. Spans outside fall into one cell behind the last, which is cut off."""
    (_, heads, length, _), cells = scores.shape, scores.numel()
    spans = flat_rows(spans)
    b, h, m, n = spans.unbind(1)
    inside = (spans >= 0).all(1) & (b < len(scores)) & (h < heads) & (m < length) & (n < length)
    cell = torch.where(inside, ((b * heads + h) * length + m) * length + n, cells)
    return _labels_of_cells(cell, span_labels, cells).view(scores.shape)


def _labels_of_cells(listed: torch.Tensor, labels: torch.Tensor | None, cells: int) -> torch.Tensor:
    """The labels [cells], of which a list has some: the first listing of a cell counts, and ``cells`` is none."""
    listed = listed.flatten()
    if labels is None:
        return torch.zeros(cells + 1, dtype=torch.bool, device=listed.device).index_fill(0, listed, True)[:cells]
    unlisted = torch.full((cells + 1,), len(listed), device=listed.device)
    order = torch.arange(len(listed), device=listed.device)
    first = unlisted.scatter_reduce(0, listed, order, "amin")
    return torch.cat([_upcast(labels.flatten()), labels.new_zeros(1)])[first[:cells]]


def pointer_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    problem: Any,
    threshold: Sequence[float],
    max_spans: int | None = None,
    top_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The cells of ``pointer_scores`` above the threshold, of all heads or of each, flat and sorted, their scores, and
    how many there are."""
    biases = (None if x is None else _upcast(x) for x in (start, end))
    scores = pointer_scores(_upcast(q), _upcast(k), *biases, **problem._asdict())
    above = scores > scores.new_tensor(threshold).view(-1, 1, 1)
    if top_k is not None:  # of those equal to the worst of the best the first: ONNX has no stable sort
        planes = scores.masked_fill(~above, -torch.inf).flatten(2)
        worst = planes.topk(torch.sym_min(top_k, planes.shape[-1])).values[..., -1:]  # type: ignore[no-untyped-call]
        better, equal = planes > worst, planes == worst
        room = top_k - better.sum(-1, keepdim=True)
        above &= (better | (equal & (equal.cumsum(-1) <= room))).view(scores.shape)
    cells = above.flatten().nonzero().squeeze(1)
    return cells[:max_spans], scores.flatten()[cells[:max_spans]], cells.shape[0]
