"""docs/serving.md: heads in ONNX Runtime, which computes and decodes at any batch and length as PyTorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_serving import DYNAMIC, Decode, Scores, backend, every_head, inputs, tensors

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"needs {library}, of the extra integrations", exc_type=ImportError)

SHAPES = [(1, 1), (2, 1), (1, 5), (5, 40), (0, 4)]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _seed(_fresh_and_poisoned: None) -> None:
    """Where a score is within a rounding error of the threshold, the two may differ: not from run to run."""
    torch.manual_seed(0)


def export(module: torch.nn.Module) -> Any:
    shapes = (DYNAMIC, DYNAMIC)
    return torch.onnx.export(module.eval(), inputs(), dynamo=True, dynamic_shapes=shapes, verbose=False)


def check(folder: Path, module: torch.nn.Module) -> None:
    """Exported at one shape, it gives at all others what the module gives by its tiles."""
    import onnxruntime

    path, found = folder / "module.onnx", 0
    with backend("reference"):
        export(module).save(path)
    session = onnxruntime.InferenceSession(path)
    for shape in SHAPES:
        hidden, mask = inputs(*shape)
        results = session.run(None, {"hidden": hidden.numpy(), "mask": mask.numpy()})
        with backend("tiled"):
            for ours, theirs in zip(results, tensors(module(hidden, mask)), strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), theirs)
                found += len(theirs)
    assert found > 0


@every_head
def test_scores(tmp_path: Path, kind: str) -> None:
    check(tmp_path, Scores(kind))


@every_head
def test_decode(tmp_path: Path, kind: str) -> None:
    check(tmp_path, Decode(kind))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": [0.5, 0.0, -1.0]},
        {"top_k": 2},
        {"max_spans": 7},
        {"padded": True},
        {"top_k": 4, "max_spans": 9, "padded": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:pointer_decode")
def test_options_of_decode(tmp_path: Path, options: dict[str, Any]) -> None:
    check(tmp_path, Decode(**options))


def test_of_equal_spans_the_first_are_best(tmp_path: Path) -> None:
    module = Decode(top_k=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0)
        module.head.q_dense.bias.fill_(1.0)
    check(tmp_path, module)


@pytest.mark.parametrize(
    "by, options",
    [("tiled", {}), ("reference", {"non_overlapping": True}), ("reference", {"one_label": True})],
)
def test_what_onnx_does_not_take_is_refused_in_one_sentence(by: str, options: dict[str, Any]) -> None:
    sentence = (
        "pointer_decode: torch.onnx.export takes flashpointer.use_backend('reference') and none of non_overlapping, "
        "non_crossing, one_label"
    )
    with backend(by), pytest.raises(torch.onnx.OnnxExporterError) as refusal:
        export(Decode(**options))
    assert str(refusal.value.__cause__) == sentence
