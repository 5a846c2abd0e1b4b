"""Checkpoints of other projects: each project's formula, written down on its own, against the converted module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import relative_error
from flashpointer.convert import from_flashpointer, to_flashpointer

BATCH, LENGTH, HIDDEN, HEADS, SIZE = 2, 9, 12, 3, 8
Weights = dict[str, torch.Tensor]


def turn(x: torch.Tensor) -> torch.Tensor:
    """RoPE: the pair (x_2i, x_2i+1) as a complex number, times exp(1j * position * 10000 ** (-2i / d))."""
    theta = 10000.0 ** (-2 * torch.arange(x.shape[-1] // 2).double() / x.shape[-1])
    angle = torch.outer(torch.arange(x.shape[-2]).double(), theta)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def score(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The formula that all share: q, k [B, N, d], start, end [B, N, H] before they are halved."""
    dot = torch.einsum("bmd,bnd->bmn", turn(q), turn(k)) / q.shape[-1] ** 0.5
    return dot[:, None] + start.mT[..., None] / 2 + end.mT[:, :, None] / 2


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]


def bert4torch(weights: Weights, names: tuple[str, str], hidden: torch.Tensor) -> torch.Tensor:
    p = linear(weights, names[0], hidden)
    b = linear(weights, names[1], p)
    return score(p[..., :SIZE], p[..., SIZE:], start=b[..., 0::2], end=b[..., 1::2])


def keras(weights: Weights, names: tuple[str, str], hidden: torch.Tensor) -> torch.Tensor:
    p = linear(weights, names[0], hidden)
    b = linear(weights, names[1], p)
    return score(p[..., 0::2], p[..., 1::2], start=b[..., 1::2], end=b[..., 0::2])


def keras_hidden(weights: Weights, names: tuple[str, str], hidden: torch.Tensor) -> torch.Tensor:
    p = linear(weights, names[0], hidden)
    b = linear(weights, names[1], hidden)
    return score(p[..., 0::2], p[..., 1::2], start=b[..., 1::2], end=b[..., 0::2])


def ark_nlp(weights: Weights, names: tuple[str, str], hidden: torch.Tensor) -> torch.Tensor:
    p = linear(weights, names[0], hidden)
    b = linear(weights, names[1], p)
    return score(p[..., :SIZE], p[..., SIZE:], start=b[..., HEADS:], end=b[..., :HEADS])


PROJECTS: list[tuple[str, tuple[str, str], Callable[..., torch.Tensor]]] = [
    ("bert4torch", ("p_dense", "q_dense"), bert4torch),
    ("keras", ("p_dense", "q_dense"), keras),
    ("keras", ("linear_1", "linear_2"), keras),
    ("keras", ("dense1", "dense2"), keras),
    ("keras-hidden", ("dense_1", "dense_2"), keras_hidden),
    ("keras-hidden", ("token_inner_embed_ffn", "type_score_ffn"), keras_hidden),
    ("ark-nlp", ("dense_1", "dense_2"), ark_nlp),
]
every_project = pytest.mark.parametrize("layout, names, formula", PROJECTS)
every_layout = pytest.mark.parametrize("layout", ["bert4torch", "keras", "keras-hidden", "ark-nlp"])


def checkpoint(layout: str, names: tuple[str, str]) -> Weights:
    inputs = HIDDEN if layout == "keras-hidden" else 2 * SIZE
    shapes = {names[0]: (2 * SIZE, HIDDEN), names[1]: (2 * HEADS, inputs)}
    weights = {f"{name}.weight": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    biases = {f"{name}.bias": torch.randn(shape[0], dtype=torch.float64) for name, shape in shapes.items()}
    return {**weights, **biases}


def convert(weights: Weights, layout: str, **more: Any) -> Weights:
    return to_flashpointer(weights, layout, heads=HEADS, head_size=SIZE, **more)


def efficient(layout: str) -> fp.nn.EfficientGlobalPointer:
    source = "hidden" if layout == "keras-hidden" else "projection"
    return fp.nn.EfficientGlobalPointer(HIDDEN, HEADS, SIZE, tril_mask=False, bias_from=source).double()


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@every_project
def test_scores_of_a_converted_checkpoint(
    layout: str, names: tuple[str, str], formula: Callable[..., torch.Tensor]
) -> None:
    weights, hidden = checkpoint(layout, names), torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    head = efficient(layout)
    head.load_state_dict(convert(weights, layout))
    assert relative_error(head(hidden), formula(weights, names, hidden)) < 1e-12


@every_project
def test_scores_of_what_other_projects_load(
    layout: str, names: tuple[str, str], formula: Callable[..., torch.Tensor]
) -> None:
    head, hidden = efficient(layout), torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    weights = from_flashpointer(head.state_dict(), layout, heads=HEADS, head_size=SIZE, names=names)
    assert relative_error(head(hidden), formula(weights, names, hidden)) < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.head."])
@every_project
def test_round_trip(
    layout: str, names: tuple[str, str], formula: Callable[..., torch.Tensor], prefix: str, transposed: bool
) -> None:
    weights = checkpoint(layout, names)
    if transposed:
        weights = {key: value.t().contiguous() if value.dim() == 2 else value for key, value in weights.items()}
    theirs = {prefix + key: value for key, value in weights.items()}
    options = {"heads": HEADS, "head_size": SIZE, "prefix": prefix, "transposed": transposed}
    ours = to_flashpointer(theirs, layout, **options)
    assert list(ours) == list(efficient(layout).state_dict())
    back = from_flashpointer(ours, layout, names=names, **options)
    assert same(back, theirs)
    assert all(value.is_contiguous() for value in (*ours.values(), *back.values()))


@every_layout
def test_global_pointers_pass_through(layout: str) -> None:
    head = fp.nn.GlobalPointer(HIDDEN, HEADS, SIZE)
    ours = head.state_dict()
    theirs = from_flashpointer(ours, layout, heads=HEADS, head_size=SIZE, prefix="head.")
    assert same(theirs, {f"head.{key}": value for key, value in ours.items()})
    assert same(convert(theirs, layout, prefix="head."), ours)


def test_default_names() -> None:
    expected = {"bert4torch": "p_dense q_dense", "keras": "p_dense q_dense", "ark-nlp": "dense_1 dense_2"}
    for layout, names in expected.items():
        written = from_flashpointer(efficient(layout).state_dict(), layout, heads=HEADS, head_size=SIZE)
        assert sorted(written) == sorted(f"{name}.{kind}" for name in names.split() for kind in ("weight", "bias"))


def test_a_layer_may_have_any_name_and_no_bias() -> None:
    weights = {key: value for key, value in checkpoint("keras", ("first", "second")).items() if "weight" in key}
    ours = convert(weights, "keras", names=["first", "second"])
    assert list(ours) == ["p_dense.weight", "q_dense.weight"]
    fp.nn.EfficientGlobalPointer(HIDDEN, HEADS, SIZE, bias=False).load_state_dict(ours)


def test_a_whole_model_of_arrays() -> None:
    """As Paddle and Keras give it: arrays, (in, out), an encoder beside the head."""
    theirs = checkpoint("keras", ("dense1", "dense2"))
    arrays = {f"head.{key}": value.t().numpy() if value.dim() == 2 else value.numpy() for key, value in theirs.items()}
    arrays |= {"encoder.output.dense.weight": torch.zeros(HIDDEN, HIDDEN), "head.rotary.sin": torch.zeros(5, 4)}
    ours = convert(arrays, "keras", prefix="head.", transposed=True)
    assert same(ours, convert(theirs, "keras"))


def test_the_result_is_new() -> None:
    head = fp.nn.GlobalPointer(HIDDEN, HEADS, SIZE)
    before = head.dense.weight.detach().clone()
    for value in convert(head.state_dict(), "bert4torch").values():
        value.zero_()
    assert torch.equal(head.dense.weight, before)


KERAS, HIDDEN_STATES = checkpoint("keras", ("p_dense", "q_dense")), checkpoint("keras-hidden", ("dense_1", "dense_2"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layout": "torch"}, "layout takes one of 'bert4torch', 'keras', 'keras-hidden', 'ark-nlp'; got str 'torch'"),
        (
            {"layout": "ark-nlp"},
            "state_dict takes the weights of dense_1 and dense_2, or of dense, .*; got p_dense.wei",
        ),
        ({"prefix": "head."}, "the prefix 'head.', one of these; got p_dense.weight, .*'keras-hidden', 'ark-nlp'"),
        ({"names": ["a", "b"]}, "state_dict takes the weights of a and b"),
        ({"state_dict": {}}, "got nothing"),
        ({"state_dict": {**KERAS, "dense.weight": KERAS["p_dense.weight"]}}, "takes the weights of .* one of these"),
        ({"heads": 4}, r"q_dense of 4 heads of size 8 takes a weight \(8, 16\) and a bias \(8,\); got \(6, 16\)"),
        ({"head_size": 6}, r"p_dense of 3 heads of size 6 takes a weight \(12, 12\)"),
        ({"heads": 0}, "heads takes an int of at least 1; got int 0"),
        ({"transposed": True}, r"takes a weight \(16, 16\) .*; got \(12, 16\) and \(16,\), transposed"),
        ({"state_dict": HIDDEN_STATES, "layout": "ark-nlp"}, r"dense_2 .* takes a weight \(6, 16\)"),
        ({"state_dict": {**KERAS, "q_dense.bias": torch.zeros(5)}}, r"a bias \(6,\); got \(6, 16\) and \(5,\)"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    valid = {"state_dict": KERAS, "layout": "keras", "heads": HEADS, "head_size": SIZE}
    with pytest.raises(ValueError, match=f"to_flashpointer: .*{message}"):
        to_flashpointer(**{**valid, **arguments})


def test_errors_of_the_inverse() -> None:
    with pytest.raises(ValueError, match="from_flashpointer: state_dict takes the weights of p_dense and q_dense, or"):
        from_flashpointer(HIDDEN_STATES, "keras-hidden", heads=HEADS, head_size=SIZE)
    with pytest.raises(ValueError, match="from_flashpointer: names takes one for each of p_dense and q_dense"):
        from_flashpointer(KERAS, "keras", heads=HEADS, head_size=SIZE, names=["dense"])
    with pytest.raises(ValueError, match=r"from_flashpointer: q_dense .* takes a weight \(6, 12\)"):
        from_flashpointer(KERAS, "keras-hidden", heads=HEADS, head_size=SIZE)
