"""``pointer_decode``: the spans above a threshold, without most of the scores."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from .. import backends, reference
from ..problem import Problem
from ..spans.padded import pad, pad_in_order
from . import _checks, _dtensor, _pointer, _register

OP = "pointer_decode"


@_dtensor.of_sentences("q", "k", "start", "end", "mask", "positions", ragged=True)
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
    threshold: float | Sequence[float] | torch.Tensor = 0.0,
    top_k: int | None = None,
    non_overlapping: bool = False,
    non_crossing: bool = False,
    one_label: bool = False,
    max_spans: int | None = None,
    padded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spans whose score, as ``pointer_scores`` gives it, is above the threshold.

    The scores are not stored, and few are computed: where a bound shows that a block of cells of a head has nothing
    above the threshold, it is skipped. Memory is linear in the length of a sentence and in the number of spans. On a
    GPU it waits for the device, to learn how many there are, and ``torch.compile`` breaks its graph for that: once, and
    once more for each option behind max_width that is not the default. A graph of ``torch.export`` holds it as one op;
    under the reference backend and without non_overlapping, non_crossing and one_label, as PyTorch's own ops on stored
    scores, which ONNX has too. On the meta device it finds nothing.

    Tensors may be DTensors that are sharded by sentences: docs/distributed.md.

    Args:
        q, k, start, end, mask, rope, tril_mask, max_width, scale, positions: as for ``pointer_scores``.
        threshold: 0 is where the loss puts it; -inf gives every valid span whose score is finite. Scores are compared
            in float32 (float64 for float64), before they are rounded to the dtype of q. Or one for each head, ``[H]``:
            a sequence, or a tensor. The kernels search above the least of them.
        top_k: of each head of a sentence at most so many, the best; of equal ones the first.
        non_overlapping: for flat entities: in each sentence, over all heads, the best span, then the best that shares
            no token with it, and so on. This runs on the CPU.
        non_crossing: for nested entities: likewise, but two may share tokens if one lies within the other, or both are
            the same tokens of two heads.
        one_label: of the spans of all heads on the same tokens the best, of equal ones that of the first head.
        max_spans: at most so many in all, before these three: the first in the order below. A warning says so.
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
    thresholds = _thresholds(threshold, heads)
    for name, limit in (("top_k", top_k), ("max_spans", max_spans)):
        if limit is not None and not _checks.is_int(limit, 1):
            raise ValueError(f"{OP}: {name} takes an int of at least 1, or None; got {_checks.describe(limit)}")
    choice = {"non_overlapping": non_overlapping, "non_crossing": non_crossing, "one_label": one_label}
    for name, flag in {**choice, "padded": padded}.items():
        _checks.check_flag(OP, name, flag)
    if _checks.is_batched(q, k, start, end, mask, positions):
        raise RuntimeError(f"{OP}: torch.func.vmap is not supported, for each sample has its own number of spans")
    backend = _checks.choose_backend(OP, q, k, start, end)
    options: tuple[Any, ...] = (thresholds, top_k, *choice.values(), max_spans, padded, backend)
    if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():  # torch.export traces
        q, k, start, end = (None if x is None else x.detach() for x in (q, k, start, end))  # type: ignore[assignment]
        if backend == "reference" and not any(choice.values()):  # PyTorch's own ops alone, which ONNX has too
            return _decode(q, k, start, end, problem, heads, *options)
        if torch.onnx.is_in_onnx_export():
            takes = f"flashpointer.use_backend('reference') and none of {', '.join(choice)}"
            raise RuntimeError(f"{OP}: torch.onnx.export takes {takes}")
        spans, scores = _op(q, k, start, end, *problem, heads, *options)
        return spans, scores
    # A graph breaks here, for how many spans there are is not known before. A decorator would import the compiler.
    decode = torch.compiler.disable(_decode) if torch.compiler.is_compiling() else _decode  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return decode(q, k, start, end, problem, heads, *options)


def _thresholds(given: Any, heads: int) -> list[float]:
    """One for all heads, or one for each."""
    try:
        listed = given.tolist() if hasattr(given, "tolist") else given
    except RuntimeError:  # a sparse, nested or meta tensor
        listed = None
    listed = [listed] if isinstance(listed, (int, float)) else listed
    several = isinstance(listed, Sequence) and not isinstance(listed, (str, bytes)) and len(listed) in (1, heads)
    if not several or not all(map(_checks.is_number, listed)):
        takes = f"a number, or one for each of {heads} heads"
        raise ValueError(f"{OP}: threshold takes {takes}; got {_checks.describe(given)}")
    return list(map(float, listed))


def _decode(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, threshold: list[float], top_k: int | None, non_overlapping: bool, non_crossing: bool, one_label: bool,
    max_spans: int | None, padded: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = problem._replace(mask=_pointer.kept_tokens(OP, problem.mask, look=True))
    with _checks.without_autocast(q):
        cells, scores, count = _cells(q, k, start, end, problem, heads, threshold, max_spans, top_k, backend)
    traced = torch.compiler.is_compiling()  # how many there are is then a symbol
    if not traced and count > len(cells):
        above = f"the threshold {threshold[0]:g}" if len(threshold) == 1 else "the thresholds of their heads"
        warnings.warn(
            f"{OP}: {count:,} spans are above {above}; the first {max_spans:,} are returned, as "
            "max_spans asks. A higher threshold or top_k leaves fewer, and so does a model that has been trained.",
            stacklevel=4,
        )
    length = max(1, q.shape[-2])
    row = cells // length
    plane = row // length
    sentence = plane // heads
    # No remainders: in ONNX a symbol divides, and leaves none.
    spans = torch.stack([sentence, plane - sentence * heads, row - plane * length, cells - row * length], dim=1)
    spans, scores = choose(spans, scores, non_overlapping, non_crossing, one_label)
    scores = scores.to(q.dtype)
    if not padded:
        return spans, scores
    return (pad_in_order if traced else pad)(spans, q.shape[0], scores)


def _cells(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, end: torch.Tensor | None, problem: Problem,
    heads: int, threshold: list[float], max_spans: int | None, top_k: int | None, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, int]:  # fmt: skip
    if q.device.type == "meta":  # which has shapes alone, and this one depends on values
        return q.new_empty(0, dtype=torch.int64), q.new_empty(0), 0
    if backend == "reference":
        return reference.pointer_decode(q, k, start, end, problem, threshold, max_spans, top_k)
    least = min(threshold, default=0.0)
    several = any(x > least for x in threshold)
    if backend == "triton" and top_k is None:
        decode = backends.implementation(OP, backend).decode
        cells, scores, count = decode(*_pointer.per_head(q, k), start, end, heads, problem, least, max_spans)
        if not several:
            return cells, scores, count
        if count == len(cells):
            above = scores > scores.new_tensor(threshold)[cells // q.shape[-2] ** 2 % heads]
            cells, scores = cells[above], scores[above]
            return cells, scores, len(cells)
        # Else it has cut among what the thresholds of some heads would not have let pass.
    tiles = backends.implementation(OP, "tiled").decode  # which heed top_k and each head's threshold while they go
    return tiles(q, k, start, end, heads, problem, threshold, max_spans, top_k)  # type: ignore[no-any-return]


# --- choosing among them ---------------------------------------------------------------------------------------------
# Each gives the indices of the spans that stay, in order, where the better one of two does: of equal ones the first.


def choose(
    spans: torch.Tensor, scores: torch.Tensor, non_overlapping: bool = False, non_crossing: bool = False,
    one_label: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of flat spans and their scores the best, as the options of ``pointer_decode`` say."""
    choices = ((one_label, _best_labels), (non_crossing, _best_nested), (non_overlapping, _best_flat))
    for best in [best for wanted, best in choices if wanted and len(spans) > 0]:
        kept = best(spans, scores)
        spans, scores = spans[kept], scores[kept]
    return spans, scores


def _best_labels(spans: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of all heads on the same tokens."""
    order, place = scores.sort(descending=True, stable=True).indices, torch.arange(len(scores), device=scores.device)
    rank = torch.empty_like(order).index_copy_(0, order, place)
    _, of = spans[:, [0, 2, 3]].unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    best = torch.full_like(rank, len(rank)).scatter_reduce_(0, of, rank, "amin")
    return (rank == best[of]).nonzero().squeeze(1)


def _best_nested(spans: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of two that share tokens, unless one lies within the other."""
    rows = spans.tolist()
    taken: dict[int, tuple[dict[int, int], dict[int, int]]] = {}
    kept = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        sentence, _, first, last = rows[i]
        first, last = min(first, last), max(first, last)
        # The furthest of those that start, or end, at a token.
        last_from, first_to = taken.setdefault(sentence, ({}, {}))
        if any(last_from.get(token, 0) > last for token in range(first + 1, last + 1)):
            continue
        if any(first_to.get(token, first) < first for token in range(first, last)):
            continue
        last_from[first], first_to[last] = max(last, last_from.get(first, 0)), min(first, first_to.get(last, first))
        kept.append(i)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=spans.device)


def _best_flat(spans: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of two that overlap."""
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
    return torch.tensor(sorted(kept), dtype=torch.int64, device=spans.device)


# --- registration, for torch.export ----------------------------------------------------------------------------------


def _fake(q: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, padded, _ = arguments
    count = torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], count) if padded else (count,)
    return q.new_empty((*shape, 3 if padded else 4), dtype=torch.int64), q.new_empty(shape)


_op = _register.register_pointer_op(
    "pointer_decode(Tensor q, Tensor k, Tensor? start, Tensor? end, Problem problem, SymInt heads, float[] threshold,"
    " int? top_k, bool non_overlapping, bool non_crossing, bool one_label, int? max_spans, bool padded, str backend)"
    " -> (Tensor spans, Tensor scores)",
    _decode,
    _fake,
)
