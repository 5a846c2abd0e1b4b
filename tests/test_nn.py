"""The heads as modules: scores by the layout that their docstrings give, loss and decoding by these scores."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch

import flashpointer as fp
from flashpointer.agreement import Agreement, relative_error
from flashpointer.spans import to_dense

from .conftest import Place
from .processes import in_ranks

BATCH, LENGTH, HIDDEN, HEADS, SIZE = 4, 7, 12, 3, 8
HEAD_TYPES = {
    "global": fp.nn.GlobalPointer,
    "efficient": fp.nn.EfficientGlobalPointer,
    "hidden": lambda *a, **k: fp.nn.EfficientGlobalPointer(*a, bias_from="hidden", **k),
}
every_head = pytest.mark.parametrize("kind", HEAD_TYPES)
OPTIONS: list[dict[str, Any]] = [{}, {"rope": False, "tril_mask": False}, {"max_width": 3}, {"bias": False}]


def make(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return HEAD_TYPES[kind](HIDDEN, HEADS, SIZE, **options).to(device, dtype)


def batch(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Sentences without padding, with a hole, of one token, of none; spans in valid and invalid cells, one twice."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 2], mask[1, 5:], mask[2, 1:], mask[3] = 0, 0, 0, 0
    spans = [
        [0, 0, 1, 3],
        [1, 2, 0, 4],
        [0, 0, 1, 3],
        [0, 2, 6, 6],
        [2, 1, 0, 0],
        [1, 0, 2, 3],
        [3, 0, 1, 2],
        [0, 1, 4, 2],
    ]
    hidden = torch.randn(BATCH, LENGTH, HIDDEN).to(device, dtype)
    return {"hidden": hidden, "mask": mask.to(device), "spans": torch.tensor(spans, device=device)}


def scores_by_hand(head: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The scores by the layout of the state dict, column by column."""
    weights, cells = head.state_dict(), []

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    p = linear("dense" if "dense.weight" in weights else "p_dense", hidden)
    for h in range(HEADS):
        first = 2 * SIZE * h if "dense.weight" in weights else 0
        q, k = p[..., first : first + SIZE], p[..., first + SIZE : first + 2 * SIZE]
        start = end = None
        if "q_dense.weight" in weights:
            b = linear("q_dense", hidden if head.bias_from == "hidden" else p) / 2
            start, end = b[:, None, :, 2 * h], b[:, None, :, 2 * h + 1]
        options = {"rope": head.rope, "tril_mask": head.tril_mask, "max_width": head.max_width}
        cells.append(fp.reference.pointer_scores(q, k, start, end, mask=mask, **options))
    return torch.cat(cells, dim=1)


def agree(what: str, head: Any, compute: Any, epsilon: float) -> None:
    """compute(head), which takes the head's dtype to be its inputs', is as near to float64 as eager is."""
    with fp.use_backend("reference"):
        truth, eager = compute(copy.deepcopy(head).double()), compute(head)
    for i, (ours, baseline, exact) in enumerate(zip(compute(head), eager, truth, strict=True)):
        result = Agreement(f"{what} {i}", relative_error(ours, exact), relative_error(baseline, exact), epsilon)
        assert result.ok, result


@every_head
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scores(place: Place, kind: str, options: dict[str, Any]) -> None:
    head, inputs = make(kind, place.device, **options), batch(place.device)
    scores = head(inputs["hidden"], inputs["mask"])
    assert scores.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert relative_error(scores, scores_by_hand(head, inputs["hidden"], inputs["mask"])) < 1e-5


@every_head
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients(place: Place, dtype: torch.dtype, kind: str, options: dict[str, Any]) -> None:
    """Those of the eager formula, and every parameter gets one."""
    if place.small and dtype != torch.float32:
        pytest.skip("the ops' own tests ask the interpreter for the other dtypes")
    inputs = batch(place.device, dtype)
    head = make(kind, place.device, dtype, **options)

    def compute(module: Any) -> list[torch.Tensor]:
        hidden = inputs["hidden"].to(next(module.parameters()).dtype).requires_grad_()
        loss = module.loss(hidden, inputs["spans"], inputs["mask"])
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, *module.parameters()])]

    agree("loss, gradient", head, compute, 1e-13 if dtype == torch.float64 else max(1e-6, torch.finfo(dtype).eps))
    assert all(grad.abs().max() > 0 for grad in compute(head)[1:])


@every_head
def test_loss_is_the_dense_loss_of_each_plane(place: Place, kind: str) -> None:
    head, inputs = make(kind, place.device), batch(place.device)
    planes = head(inputs["hidden"], inputs["mask"]).flatten(2)
    labels = to_dense(inputs["spans"], BATCH, HEADS, LENGTH).flatten(2)
    expected = fp.reference.zlpr_loss(planes, labels, reduction="none")
    losses = head.loss(inputs["hidden"], inputs["spans"], inputs["mask"], reduction="none")
    assert losses.shape == (BATCH, HEADS)
    assert relative_error(losses, expected) < 1e-6
    assert torch.equal(losses[3], torch.zeros_like(losses[3]))  # nothing but padding
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
        loss = head.loss(inputs["hidden"], inputs["spans"], inputs["mask"], reduction)
        assert relative_error(loss, value) < 1e-6


@every_head
def test_no_spans_and_no_sentences(place: Place, kind: str) -> None:
    head, none = make(kind, place.device), torch.zeros(0, 4, dtype=torch.int64, device=place.device)
    assert head.loss(torch.randn(2, LENGTH, HIDDEN, device=place.device), none) > 0
    for shape in ((0, LENGTH, HIDDEN), (2, 0, HIDDEN)):
        hidden = torch.randn(shape, device=place.device)
        assert head(hidden).shape == (shape[0], HEADS, shape[1], shape[1])
        head.loss(hidden, none).backward()
        spans, scores = head.decode(hidden)
        assert (spans.shape, scores.shape) == ((0, 4), (0,))


@every_head
@pytest.mark.parametrize("threshold", [0.0, 0.3, -torch.inf])
def test_decode(place: Place, kind: str, threshold: float) -> None:
    head, inputs = make(kind, place.device), batch(place.device)
    scores = head(inputs["hidden"], inputs["mask"])
    spans, found = head.decode(inputs["hidden"], inputs["mask"], threshold)
    assert spans.dtype == torch.int64
    assert torch.equal(spans, (scores > threshold).nonzero())
    torch.testing.assert_close(found, scores[scores > threshold])
    assert not found.requires_grad
    assert 0 < len(spans) <= HEADS * (28 + 10 + 1)  # sentences of 7, 4, 1 and 0 tokens


@every_head
@pytest.mark.parametrize("dtype_name", ["bool", "int32", "uint8", "float32"])
def test_a_mask_of_any_dtype(place: Place, kind: str, dtype_name: str) -> None:
    head, inputs = make(kind, place.device), batch(place.device)
    mask = inputs["mask"].to(getattr(torch, dtype_name))
    assert torch.equal(head(inputs["hidden"], mask), head(inputs["hidden"], inputs["mask"]))


@every_head
def test_positions(place: Place, kind: str) -> None:
    """Only their differences count; and each sentence may have its own."""
    head, hidden = make(kind, place.device), torch.randn(2, LENGTH, HIDDEN, device=place.device)
    spans = torch.tensor([[0, 1, 2, 3]], device=place.device)
    places = torch.arange(LENGTH, device=place.device)
    apart = torch.stack([places + 5, 3 * places])
    assert relative_error(head(hidden, positions=apart)[0], head(hidden)[0]) < 1e-5
    assert relative_error(head(hidden, positions=apart)[1], head(hidden)[1]) > 1e-3
    expected = torch.cat(
        [head.loss(hidden[i : i + 1], spans[i:], reduction="none", positions=apart[i]) for i in (0, 1)]
    )
    assert relative_error(head.loss(hidden, spans, reduction="none", positions=apart), expected) < 1e-6
    found = torch.cat([head.decode(hidden[i : i + 1], positions=apart[i])[1] for i in (0, 1)])
    assert relative_error(head.decode(hidden, positions=apart)[1], found) < 1e-5


@every_head
def test_the_op_gets_views(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """q and k of one storage, start and end of another: nothing is copied between the linear layers and the op."""
    seen: list[torch.Tensor | None] = []
    monkeypatch.setattr("flashpointer.nn.pointer_scores", lambda q, k, start, end, **_: seen.extend((q, k, start, end)))
    make(kind)(batch()["hidden"])
    q, k, start, end = seen
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert q.untyped_storage().nbytes() == 4 * (q.numel() + k.numel())
    if start is not None:
        assert start.untyped_storage().data_ptr() == end.untyped_storage().data_ptr()
        assert start.untyped_storage().nbytes() == 4 * (start.numel() + end.numel())


# --- what people do with modules ------------------------------------------------------------------------------------


@every_head
def test_autocast(place: Place, kind: str) -> None:
    half = torch.float16 if place.backend == "triton" else torch.bfloat16
    head, inputs = make(kind, place.device), batch(place.device)
    with torch.autocast(place.device, half):
        scores = head(inputs["hidden"], inputs["mask"])
        loss = head.loss(inputs["hidden"], inputs["spans"], inputs["mask"])
        head.loss(inputs["hidden"].to(half), inputs["spans"])  # as an encoder under autocast gives it
    assert (scores.dtype, loss.dtype) == (half, torch.float32)
    assert relative_error(loss.detach(), head.loss(inputs["hidden"], inputs["spans"], inputs["mask"]).detach()) < 0.02
    loss.backward()
    for parameter in head.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@every_head
def test_fullgraph(place: Place, kind: str) -> None:
    """Compiled for the first batch, and then once for all sizes."""
    if place.small:
        pytest.skip("one compiled process is enough")
    head = make(kind, place.device)
    torch._dynamo.reset()
    scores, loss = (torch.compile(f, fullgraph=True) for f in (head, head.loss))
    for size, length in ((2, 5), (3, 9), (4, 12)):
        hidden = torch.randn(size, length, HIDDEN, device=place.device)
        mask = torch.ones(size, length, dtype=torch.int64, device=place.device)
        mask[1, 3:] = 0
        spans = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1]], device=place.device)
        with torch._dynamo.config.patch(error_on_recompile=size == 4):
            assert relative_error(scores(hidden, mask), head(hidden, mask)) < 1e-5
            grads = []
            for compute in (loss, head.loss):
                value = compute(hidden, spans, mask)
                grads.append([value.detach(), *torch.autograd.grad(value, list(head.parameters()))])
            assert all(relative_error(ours, truth) < 1e-5 for ours, truth in zip(*grads, strict=True))


@every_head
def test_names_in_the_state_dict(kind: str) -> None:
    linears = ["dense"] if kind == "global" else ["p_dense", "q_dense"]
    head = make(kind)
    assert list(head.state_dict()) == [f"{name}.{what}" for name in linears for what in ("weight", "bias")]
    assert list(make(kind, bias=False).state_dict()) == [f"{name}.weight" for name in linears]
    sizes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    if kind == "global":
        assert sizes["dense.weight"] == (2 * HEADS * SIZE, HIDDEN)
    else:
        assert sizes["p_dense.weight"] == (2 * SIZE, HIDDEN)
        assert sizes["q_dense.weight"] == (2 * HEADS, HIDDEN if kind == "hidden" else 2 * SIZE)


@every_head
def test_copies(kind: str) -> None:
    head, hidden = make(kind), batch()["hidden"]
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    loaded = make(kind)
    loaded.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), torch.load(file, weights_only=False), loaded):
        assert torch.equal(other(hidden), head(hidden))
        assert repr(other) == repr(head)
    other.reset_parameters()
    assert not torch.equal(other(hidden), head(hidden))


@every_head
def test_half(place: Place, kind: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        if place.serves(dtype):
            head, inputs = make(kind, place.device).to(dtype), batch(place.device, dtype)
            assert head(inputs["hidden"]).dtype == dtype
            assert head.loss(inputs["hidden"], inputs["spans"], inputs["mask"]).dtype == torch.float32


def test_repr() -> None:
    head = fp.nn.EfficientGlobalPointer(HIDDEN, HEADS, max_width=9, bias_from="hidden")
    for part in ("heads=3", "head_size=64", "rope=True", "tril_mask=True", "max_width=9", "bias_from='hidden'"):
        assert part in repr(head)


@in_ranks(2)
def test_data_parallel(rank: int, ranks: int) -> None:
    """Each rank's half of the batch must give the gradient of the whole."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Embedding(50, HIDDEN)
            self.head = fp.nn.EfficientGlobalPointer(HIDDEN, HEADS, SIZE)

        def forward(self, tokens: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
            return self.head.loss(self.encoder(tokens), spans, tokens != 0)

    model, tokens = Model(), torch.randint(50, (4, LENGTH))
    spans = torch.tensor([[0, 1, 2, 3], [2, 0, 1, 1], [3, 2, 0, 5]])
    whole = copy.deepcopy(model)
    whole(tokens, spans).backward()
    own = spans[spans[:, 0] // 2 == rank] - torch.tensor([2 * rank, 0, 0, 0])
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(tokens[2 * rank : 2 * rank + 2], own).backward()
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert relative_error(parameter.grad, expected.grad) < 1e-5


# --- heads without parameters -------------------------------------------------------------------------------------


@every_head
def test_a_replica_of_data_parallel(kind: str) -> None:
    """As nn.DataParallel makes it on each GPU, which Hugging Face's Trainer uses by itself: without parameters."""
    head, inputs = make(kind), batch()

    def replica(module: Any) -> Any:
        copied = module._replicate_for_data_parallel()
        copied._modules = {name: replica(child) for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1.0)
        return copied

    copied = replica(head)
    assert not list(copied.parameters())
    for what in (lambda h: h.loss(**inputs), lambda h: h(inputs["hidden"]), lambda h: h.decode(inputs["hidden"])[0]):
        assert torch.equal(what(copied), what(head))
    copied.loss(**inputs).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    with pytest.raises(ValueError, match=r"hidden takes torch.float32, as the weights are"):
        copied(inputs["hidden"].double())


@every_head
def test_a_quantized_head(kind: str) -> None:
    """Its layers have no parameters, and a method for a weight."""
    head, inputs = make(kind), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(head), {torch.nn.Linear}, dtype=torch.qint8)
    assert not list(quantized.parameters())
    expected, (spans, _) = head.loss(**inputs), quantized.decode(inputs["hidden"], inputs["mask"])
    assert abs(quantized.loss(**inputs) / expected - 1) < 0.05
    assert spans.tolist() == (quantized(inputs["hidden"], inputs["mask"]) > 0).nonzero().tolist()


@every_head
def test_scripting_is_refused_in_one_sentence(kind: str) -> None:
    """Also where the head is a part of what is scripted."""
    head = make(kind)
    sentence = f"{type(head).__name__}: torch.jit.script takes no head, whose ops are Python; torch.export does"
    for module in (head, torch.nn.Sequential(head)):
        with warnings.catch_warnings(), pytest.raises(RuntimeError) as refusal:
            warnings.simplefilter("ignore")  # newer versions warn of TorchScript itself
            torch.jit.script(module)
        assert str(refusal.value) == sentence


@every_head
def test_traced_scores(kind: str) -> None:
    """At another shape than that of the trace."""
    head = make(kind).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(head, (torch.randn(2, 7, HIDDEN), torch.ones(2, 7, dtype=torch.int64)))
        hidden, mask = torch.randn(3, 12, HIDDEN), (torch.rand(3, 12) < 0.7).long()
        torch.testing.assert_close(traced(hidden, mask), head(hidden, mask))


@in_ranks(2)
def test_fsdp1_with_its_defaults(rank: int, ranks: int) -> None:
    """FSDP1 by its defaults keeps one flat parameter and leaves the layers tensors that are none."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Model(torch.nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.head = make(kind)

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.head.loss(**inputs)

    for kind in HEAD_TYPES:
        model, inputs = Model(kind), batch()
        expected = model(**inputs).item()
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        loss = sharded(**inputs)
        loss.backward()
        assert abs(loss.item() / expected - 1) < 1e-6
        assert any(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in sharded.parameters())


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GlobalPointer", "EfficientGlobalPointer"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 0}, "hidden_size takes an int of at least 1; got int 0"),
        ({"heads": 2.0}, "heads takes an int of at least 1; got float 2.0"),
        ({"head_size": 7}, "head_size takes an even int of at most 256; got int 7"),
        ({"head_size": 258}, "head_size takes an even int of at most 256; got int 258"),
        ({"max_width": 0}, "max_width takes an int of at least 1, or None; got int 0"),
        ({"rope": "yes"}, "rope takes a bool; got str 'yes'"),
        ({"tril_mask": None}, "tril_mask takes a bool; got NoneType None"),
    ],
)
def test_errors_of_construction(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(fp.nn, name)(**{"hidden_size": HIDDEN, "heads": HEADS, **arguments})


def test_error_of_bias_from() -> None:
    with pytest.raises(ValueError, match="bias_from takes 'projection' or 'hidden'; got str 'keras'"):
        fp.nn.EfficientGlobalPointer(HIDDEN, HEADS, bias_from="keras")


HIDDEN_STATES, SPANS = torch.randn(2, LENGTH, HIDDEN), torch.zeros(1, 4, dtype=torch.int64)


@every_head
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden": None}, TypeError, r"hidden takes a floating-point tensor \[B, N, 12\]; got NoneType"),
        ({"hidden": HIDDEN_STATES.long()}, TypeError, "hidden takes a floating-point tensor .* got a torch.int64"),
        ({"hidden": HIDDEN_STATES[..., :5]}, ValueError, r"hidden takes \[B, N, 12\]; got .*\(2, 7, 5\)"),
        ({"hidden": HIDDEN_STATES[0]}, ValueError, r"hidden takes \[B, N, 12\]; got .*\(7, 12\)"),
        ({"hidden": HIDDEN_STATES.half()}, ValueError, "hidden takes torch.float32, as the weights are, or autocast"),
        ({"mask": torch.ones(2, 5)}, ValueError, r"mask must be \[B, N\]"),
        ({"positions": torch.ones(LENGTH)}, TypeError, "positions takes an integer tensor"),
        ({"spans": SPANS[0]}, ValueError, r"spans must be an int64 tensor of rows .*\[S, 4\], or"),
        ({"spans": SPANS + 6}, ValueError, r"spans takes rows .* below \(2, 3, 7, 7\)"),
        ({"reduction": "max"}, ValueError, "reduction takes one of"),
    ],
)
def test_errors(kind: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind).loss(**{"hidden": HIDDEN_STATES, "spans": SPANS, **arguments})
