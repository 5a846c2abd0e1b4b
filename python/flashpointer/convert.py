"""State dicts of other projects' GlobalPointer heads to ours and back: exact permutations of rows and columns. ::

    weights = to_flashpointer(torch.load("model.pt"), "keras", heads=10, head_size=64, prefix="head.")
    fp.nn.EfficientGlobalPointer(768, heads=10, head_size=64).load_state_dict(weights)

Projects lay out the two linear layers of an Efficient GlobalPointer in four ways. Which columns of the first one's
output are q and k (of size D), and which of the second one's are the biases of head h:

==============  =========================  ========================  =============================================
layout          q, k                       biases                    of
==============  =========================  ========================  =============================================
"bert4torch"    first D, last D            2h start, 2h + 1 end      bert4torch 0.6 and later, FlashPointer
"keras"         even columns, odd columns  2h end, 2h + 1 start      bert4keras, JunnYu, PaddleNLP, powerycy
"keras-hidden"  even columns, odd columns  2h end, 2h + 1 start      AdaSeq, xhw205: the second one reads the encoder
"ark-nlp"       first D, last D            h end, H + h start        ark-nlp
==============  =========================  ========================  =============================================

Neither names nor shapes tell them apart: bert4keras and bert4torch both have p_dense and q_dense. So the caller names
the layout. The one linear layer of a GlobalPointer is the same everywhere, and passes through.

Early versions of ark-nlp and powerycy turn the two numbers of a pair by different angles, which is not RoPE. Weights
trained with them convert, but give other scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .ops import _checks


def _halves(n: int) -> torch.Tensor:
    """Where two parts of n rows are, ``[2, n]``, if one follows the other."""
    return torch.arange(2 * n, device="cpu").view(2, n)


def _pairs(n: int) -> torch.Tensor:
    """Where they are if their rows alternate."""
    return torch.arange(2 * n, device="cpu").view(n, 2).t()


class _Layout(NamedTuple):
    names: tuple[tuple[str, ...], ...]
    """What the projects call the two linear layers."""
    qk: Callable[[int], torch.Tensor]
    biases: Callable[[int], torch.Tensor]
    end_first: bool
    hidden: bool = False
    """Whether the second layer reads the encoder's hidden states."""


_EFFICIENT, _GLOBAL = ("p_dense", "q_dense"), ("dense",)
_KERAS = (_EFFICIENT, ("linear_1", "linear_2"), ("dense1", "dense2"))
_HIDDEN = (("dense_1", "dense_2"), ("token_inner_embed_ffn", "type_score_ffn"))
_LAYOUTS = {
    "bert4torch": _Layout((_EFFICIENT,), _halves, _pairs, end_first=False),
    "keras": _Layout(_KERAS, _pairs, _pairs, end_first=True),
    "keras-hidden": _Layout(_HIDDEN, _pairs, _pairs, end_first=True, hidden=True),
    "ark-nlp": _Layout((("dense_1", "dense_2"),), _halves, _halves, end_first=True),
}


def to_flashpointer(
    state_dict: Mapping[str, Any],
    layout: str,
    *,
    heads: int,
    head_size: int,
    prefix: str = "",
    names: Sequence[str] | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """What ``nn.GlobalPointer`` or ``nn.EfficientGlobalPointer`` loads, from the state dict of another project.

    Args:
        state_dict: of the head or of a whole model: tensors or arrays by name. What else is in it, such as an encoder
            or tables of angles, is left out.
        layout: ``"bert4torch"``, ``"keras"``, ``"keras-hidden"`` (for ``bias_from="hidden"``) or ``"ark-nlp"``.
        heads, head_size: the sizes of the head.
        prefix: what the names of the head's layers start with, such as ``"head."``.
        names: of its linear layers, in the order they are applied, where no project of this layout has them.
        transposed: whether weights are stored (in, out), as Keras and Paddle do.

    Returns:
        New tensors: ``p_dense.weight``, ``p_dense.bias``, ``q_dense.weight`` and ``q_dense.bias``, or ``dense.weight``
        and ``dense.bias`` of a GlobalPointer; no bias where state_dict has none.

    Raises:
        ValueError: for an unknown layout; for a state dict that does not hold, by these names, the linear layers of
            exactly one head; for weights of other sizes.
    """
    op = "to_flashpointer"
    known = _known(op, layout)
    _check(op, state_dict, prefix, names, transposed)
    theirs = _find(op, state_dict, prefix, (*known.names, _GLOBAL) if names is None else (tuple(names),))
    ours = _GLOBAL if len(theirs) == 1 else _EFFICIENT
    linears = _linears(op, state_dict, [prefix + name for name in theirs], known, heads, head_size, transposed)
    result = {}
    for name, (weight, bias, rows, columns) in zip(ours, linears, strict=True):
        result[f"{name}.weight"] = weight[rows][:, columns]
        if bias is not None:
            result[f"{name}.bias"] = bias[rows]
    return result


def from_flashpointer(
    state_dict: Mapping[str, Any],
    layout: str,
    *,
    heads: int,
    head_size: int,
    prefix: str = "",
    names: Sequence[str] | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """What another project's head loads, from the state dict of ours: the inverse of ``to_flashpointer``.

    Args:
        state_dict: of an ``nn.GlobalPointer`` or ``nn.EfficientGlobalPointer``.
        layout, heads, head_size: as for ``to_flashpointer``.
        prefix: what the names in the result start with.
        names: of the linear layers in the result. By default ``dense``; ``p_dense`` and ``q_dense`` in the layouts
            ``"bert4torch"`` and ``"keras"``; ``dense_1`` and ``dense_2`` in the others.
        transposed: whether weights are to be stored (in, out), as Keras and Paddle do.

    Returns:
        New tensors.

    Raises:
        ValueError: as for ``to_flashpointer``.
    """
    op = "from_flashpointer"
    known = _known(op, layout)
    _check(op, state_dict, prefix, names, transposed)
    ours = _find(op, state_dict, "", (_EFFICIENT, _GLOBAL))
    theirs = tuple(names or (known.names[0] if ours == _EFFICIENT else ours))
    if len(theirs) != len(ours):
        raise ValueError(f"{op}: names takes one for each of {_listed(ours)}; got {_checks.describe(names)}")
    result = {}
    linears = _linears(op, state_dict, ours, known, heads, head_size)
    for name, (weight, bias, rows, columns) in zip(theirs, linears, strict=True):
        weight = weight[rows.argsort()][:, columns.argsort()]
        result[f"{prefix}{name}.weight"] = weight.t().contiguous() if transposed else weight
        if bias is not None:
            result[f"{prefix}{name}.bias"] = bias[rows.argsort()]
    return result


def _known(op: str, layout: str) -> _Layout:
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise ValueError(f"{op}: layout takes one of {', '.join(map(repr, _LAYOUTS))}; got {_checks.describe(layout)}")
    return _LAYOUTS[layout]


def _check(op: str, state_dict: object, prefix: object, names: object, transposed: object) -> None:
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise TypeError(f"{op}: state_dict takes tensors by name; got {_checks.describe(state_dict)}")
    if not isinstance(prefix, str):
        raise TypeError(f"{op}: prefix takes a str; got {_checks.describe(prefix)}")
    listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(x, str) for x in names)
    if names is not None and not listed:
        raise TypeError(f"{op}: names takes a list of names, or None; got {_checks.describe(names)}")
    _checks.check_flag(op, "transposed", transposed)


def _find(
    op: str, state_dict: Mapping[str, Any], prefix: str, candidates: tuple[tuple[str, ...], ...]
) -> tuple[str, ...]:
    """The one of the candidates, each the names of a head's linear layers, that state_dict holds under the prefix."""
    found = [names for names in candidates if all(f"{prefix}{name}.weight" in state_dict for name in names)]
    if len(found) != 1:
        telling = {name for names in candidates for name in names} - {"dense"}  # which encoders have too
        keys = [key for key in state_dict if telling.intersection(key.split("."))] or list(state_dict)
        takes = f"the weights of {', or of '.join(map(_listed, candidates))}, with the prefix {_checks.short(prefix)}"
        got = _brief(", ".join(keys[-10:]) or "nothing")
        raise ValueError(
            f"{op}: state_dict takes {takes}, one of these; got {got}. The layouts are {', '.join(map(repr, _LAYOUTS))}"
        )
    return found[0]


def _linears(
    op: str,
    state_dict: Mapping[str, Any],
    names: Sequence[str],
    layout: _Layout,
    heads: int,
    head_size: int,
    transposed: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """Of each linear layer the weight, the bias, and which of their rows and of their columns each of ours is."""
    for size_name, size in (("heads", heads), ("head_size", head_size)):
        if not _checks.is_int(size, 1):
            raise ValueError(f"{op}: {size_name} takes an int of at least 1; got {_checks.describe(size)}")
    weights = [_checks.as_tensor(state_dict[f"{name}.weight"]) for name in names]
    if transposed:
        weights = [weight.transpose(0, -1) for weight in weights]
    hidden = torch.arange(weights[0].shape[-1], device="cpu")
    if len(names) == 1:
        places = [(torch.arange(2 * heads * head_size, device="cpu"), hidden)]
    else:
        projection, biases = layout.qk(head_size).flatten(), layout.biases(heads)
        start_end = (biases.flip(0) if layout.end_first else biases).t().flatten()
        places = [(projection, hidden), (start_end, hidden if layout.hidden else projection)]
    for name, weight, (rows, columns) in zip(names, weights, places, strict=True):
        bias = state_dict.get(f"{name}.bias")
        bias = None if bias is None else _checks.as_tensor(bias)
        shape = (len(rows), len(columns))
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            raise ValueError(
                f"{op}: {name} of {heads} heads of size {head_size} takes a weight {shape} and a bias {shape[:1]}; got "
                f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
                + (", transposed" if transposed else "; if it is stored (in, out), set transposed")
            )
        yield weight, bias, rows, columns


def _listed(names: Sequence[str]) -> str:
    return _brief(" and ".join(names))


def _brief(text: str) -> str:
    """On one line of at most 160 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:80]}...{line[-77:]}"
