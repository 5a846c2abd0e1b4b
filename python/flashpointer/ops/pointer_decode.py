"""``pointer_decode``: the spans above a threshold, without most of the scores."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from typing import Any

import torch

from .. import backends, reference
from ..problem import Problem
from ..spans.padded import pad
from . import _checks, _pointer, _register

OP = "pointer_decode"


def pointer_decode(
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
    threshold: float = 0.0,
    top_k: int | None = None,
    non_overlapping: bool = False,
    max_spans: int | None = None,
    padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spans whose score, as ``pointer_scores`` gives it, is above the threshold.

    The scores are not stored, and few are computed: where a bound shows that a block of cells of a head has nothing
    above the threshold, it is skipped. Memory is linear in the length of a sentence and in the number of spans. On a
    GPU it waits for the device once, to learn how many there are, and ``torch.compile`` breaks its graph for that. A
    graph of ``torch.export`` holds it as one op. On the meta device it finds nothing.

    Args:
        q, k, start, end, mask, rope, tril_mask, max_width, scale, positions: as for ``pointer_scores``.
        threshold: 0 is where the loss puts it; -inf gives every valid span whose score is finite. Scores are compared
            in float32 (float64 for float64), before they are rounded to the dtype of q.
        top_k: of each head of a sentence at most so many, the best; of equal ones the first.
        non_overlapping: for flat entities: in each sentence, over all heads, the best span, then the best that shares
            no token with it, and so on. This runs on the CPU.
        max_spans: at most so many in all, before ``non_overlapping``: the first in the order below. A warning says so.
            An untrained model has millions of spans above 0; this bounds the memory that they take.
        padded: batch-first, as ``flashpointer.spans.pad`` makes them, for what splits, pads or gathers batches.

    Returns:
        ``(spans, scores)``: int64 ``[S, 4]``, sorted rows (batch, head, start, end), end inclusive; and the score
        ``[S]`` of each in the dtype of q, whose probability is roughly ``sigmoid(2 * score)``. Padded ``[B, P, 3]``,
        rows (head, start, end), and ``[B, P]``, with -100 behind those of a sentence. Neither has a gradient.

    Raises:
        TypeError, ValueError: for an argument of wrong type, shape, device or value.
        RuntimeError: inside a transform of torch.func.

    References:
        arXiv:2208.03054, as for ``pointer_scores``; https://kexue.fm/archives/8373 (greedy flat decoding is usual).
    """
    q, k, start, end, problem, heads = _pointer.check(
        OP, q, k, start, end, mask=mask, positions=positions, rope=rope, tril_mask=tril_mask, max_width=max_width,
        scale=scale,
    )  # fmt: skip
    if not _checks.is_number(threshold):
        raise ValueError(f"{OP}: threshold takes a number; got {_checks.describe(threshold)}")
    for name, limit in (("top_k", top_k), ("max_spans", max_spans)):
        if limit is not None and not _checks.is_int(limit, 1):
            raise ValueError(f"{OP}: {name} takes an int of at least 1, or None; got {_checks.describe(limit)}")
    for name, flag in (("non_overlapping", non_overlapping), ("padded", padded)):
        _checks.check_flag(OP, name, flag)
    if any(map(_checks.is_batched, (q, k, start, end, mask, positions))):
        raise RuntimeError(f"{OP}: torch.func.vmap is not supported, for each sample has its own number of spans")
    backend = _checks.choose_backend(OP, q, k, start, end)
    options = (float(threshold), top_k, non_overlapping, max_spans, padded, backend)
    if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():  # torch.export traces
        q, k, start, end = (None if x is None else x.detach() for x in (q, k, start, end))  # type: ignore[assignment]
        spans, scores = _op(q, k, start, end, *problem, heads, *options)
        return spans, scores
    # A graph breaks here, for how many spans there are is not known before. A decorator would import the compiler.
    decode = torch.compiler.disable(_decode) if torch.compiler.is_compiling() else _decode  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return decode(q, k, start, end, problem, heads, *options)


def _decode(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, threshold: float, top_k: int | None, non_overlapping: bool, max_spans: int | None,
    padded: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = problem._replace(mask=_pointer.kept_tokens(OP, problem.mask, look=True))
    with _checks.without_autocast(q):
        cells, scores, count = _cells(q, k, start, end, problem, heads, threshold, max_spans, top_k, backend)
    if count > len(cells):
        warnings.warn(
            f"{OP}: {count:,} spans are above the threshold {threshold:g}; the first {max_spans:,} are returned, as "
            "max_spans asks. A higher threshold or top_k leaves fewer, and so does a model that has been trained.",
            stacklevel=3,
        )
    length = max(1, q.shape[-2])
    row = cells // length
    plane = row // length
    spans = torch.stack([plane // heads, plane % heads, row % length, cells % length], dim=1)
    if non_overlapping and len(spans) > 0:
        kept = _greedy(spans, scores).to(spans.device)
        spans, scores = spans[kept], scores[kept]
    scores = scores.to(q.dtype)
    return pad(spans, len(q), scores) if padded else (spans, scores)


def _cells(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, threshold: float, max_spans: int | None, top_k: int | None, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, int]:  # fmt: skip
    if q.device.type == "meta":  # which has shapes alone, and this one depends on values
        return q.new_empty(0, dtype=torch.int64), q.new_empty(0), 0
    if backend == "reference":
        return reference.pointer_decode(q, k, start, end, problem, threshold, max_spans, top_k)
    q, k = _pointer.per_head(q, k)
    if backend == "tiled" or top_k is not None:  # which the tiles prune while they go
        decode = backends.implementation(OP, "tiled").decode
        return decode(q, k, start, end, heads, problem, threshold, max_spans, top_k)  # type: ignore[no-any-return]
    decode = backends.implementation(OP, backend).decode
    return decode(q, k, start, end, heads, problem, threshold, max_spans)  # type: ignore[no-any-return]


def _greedy(spans: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Which spans stay, in order, where the better one of two that overlap does: of equal ones the first."""
    rows = spans.tolist()
    taken: dict[int, list[tuple[int, int]]] = {}
    kept = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        sentence, _, first, last = rows[i]
        first, last = min(first, last), max(first, last)
        there = taken.setdefault(sentence, [])
        place = bisect_left(there, (first, last))
        if (place > 0 and there[place - 1][1] >= first) or (place < len(there) and there[place][0] <= last):
            continue
        there.insert(place, (first, last))
        kept.append(i)
    return torch.tensor(sorted(kept), dtype=torch.int64)


# --- registration, for torch.export ----------------------------------------------------------------------------------


def _fake(q: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, padded, _ = arguments
    count = torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], count) if padded else (count,)
    return q.new_empty((*shape, 3 if padded else 4), dtype=torch.int64), q.new_empty(shape)


_op = _register.register_pointer_op(
    "pointer_decode(Tensor q, Tensor k, Tensor? start, Tensor? end, Problem problem, SymInt heads, float threshold,"
    " int? top_k, bool non_overlapping, int? max_spans, bool padded, str backend) -> (Tensor spans, Tensor scores)",
    _decode,
    _fake,
)
