"""docs/serving.md: exported heads and decoding, in their own process and in a fresh one, at other shapes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import flashpointer as fp

from .conftest import Place
from .test_memory import peak

HIDDEN, HEADS, SIZE = 16, 3, 8
HEAD_TYPES = {"global": fp.nn.GlobalPointer, "efficient": fp.nn.EfficientGlobalPointer}
DYNAMIC = {0: Dim("batch"), 1: Dim("length")}
SHAPES = [(1, 1), (1, 5), (2, 1), (5, 70), (0, 4), (2, 0)]
every_head = pytest.mark.parametrize("kind", HEAD_TYPES)


class Scores(torch.nn.Module):
    def __init__(self, kind: str = "efficient") -> None:
        super().__init__()
        self.head = HEAD_TYPES[kind](HIDDEN, HEADS, SIZE)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.head(hidden, mask)


class Decode(Scores):
    def __init__(self, kind: str = "efficient", **options: Any) -> None:
        super().__init__(kind)
        self.options = options

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.head.decode(hidden, mask, **self.options)


def inputs(batch: int = 3, length: int = 17, width: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, length // 2 :] = 0
    return torch.randn(batch, length, width), mask


@contextmanager
def backend(name: str) -> Iterator[None]:
    with fp.use_backend(name), torch.no_grad():
        yield


def export(module: torch.nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(module, inputs(), dynamic_shapes=(DYNAMIC, DYNAMIC), strict=strict)


def ops_of(program: torch.export.ExportedProgram) -> set[str]:
    """The registered ops of this package in a graph, submodules included."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    targets = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return {target for target in targets if "flashpointer" in target}


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_same(served: Any, module: torch.nn.Module) -> None:
    """At all shapes what the module gives."""
    found = 0
    with torch.no_grad():
        for shape in SHAPES:
            arguments = inputs(*shape)
            for ours, expected in zip(tensors(served(*arguments)), tensors(module(*arguments)), strict=True):
                torch.testing.assert_close(ours, expected)
                found += len(expected)
    assert found > 0


@every_head
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("by", ["tiled", "reference"])
def test_scores(kind: str, by: str, strict: bool) -> None:
    module = Scores(kind)
    with backend(by):
        program = export(module, strict)
    assert ops_of(program) == ({"flashpointer.pointer_scores.default"} if by == "tiled" else set())
    assert_same(program.module(), module)


@every_head
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.5},
        {"top_k": 2},
        {"max_spans": 7},
        {"non_overlapping": True},
        {"padded": True},
        {"padded": True, "top_k": 2, "max_spans": 7},
        {"one_label": True, "threshold": [0.5, 0.0, -1.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["tiled", "reference"])
@pytest.mark.filterwarnings("ignore:pointer_decode")
def test_decode(kind: str, by: str, options: dict[str, Any]) -> None:
    module = Decode(kind, **options)
    with backend(by):
        program = export(module)
        plain = by == "reference" and not {"non_overlapping", "one_label"} & set(options)
        assert ops_of(program) == (set() if plain else {"flashpointer.pointer_decode.default"})
        assert_same(program.module(), module)


def test_decode_of_weights_that_require_gradients() -> None:
    module = Decode()
    served = export(module).module()
    assert_same(served, module)
    assert not served(*inputs())[1].requires_grad


def test_autocast_in_forward() -> None:
    class Autocast(Decode):
        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(hidden, mask)

    module = Autocast()
    served, arguments = export(module).module(), inputs()
    spans, scores = served(*arguments)
    expected_spans, expected_scores = module(*arguments)
    assert scores.dtype == torch.bfloat16
    assert torch.equal(spans, expected_spans) and torch.equal(scores, expected_scores)


def test_an_exported_program_decodes_in_linear_memory() -> None:
    """The scores would take 50 MB."""
    module = Decode()
    with torch.no_grad():
        module.head.q_dense.bias -= 20
        served, (hidden, mask) = export(module).module(), inputs(1, 2048)
        decode = lambda **arguments: served(*arguments.values())[1]  # noqa: E731
        assert peak(decode, {"hidden": hidden, "mask": mask}, (), "cpu") < 10e6


@pytest.mark.parametrize(
    "options",
    [
        ([0.0], None, False, False, False, None, False),
        ([0.0], 2, False, False, False, None, False),
        ([0.0], None, True, False, False, None, False),
        ([0.0], None, False, True, True, None, False),
        ([0.0], None, False, False, False, 5, False),
        ([0.5, 0.0, -1.0], None, False, False, False, None, False),
        ([0.0], None, False, False, False, None, True),
    ],
)
@pytest.mark.filterwarnings("ignore:pointer_decode")
def test_opcheck(place: Place, options: tuple[Any, ...]) -> None:
    q, k, start, end = (torch.randn(shape, device=place.device) for shape in [(2, 9, 8)] * 2 + [(2, 3, 9)] * 2)
    mask = torch.rand(2, 9, device=place.device) < 0.9
    problem = (mask, None, True, True, None, 0.3, 3)
    arguments = (q, k, start, end, *problem, *options, place.backend)
    torch.library.opcheck(torch.ops.flashpointer.pointer_decode.default, arguments)


# --- in a fresh process -----------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
{first}
path, expected = sys.argv[1], torch.load(sys.argv[2])
for arguments, results in expected:
    served = {load}
    with torch.no_grad():
        found = served(*arguments)
    for ours, theirs in zip(found, results, strict=True):
        torch.testing.assert_close(ours, theirs)
assert ("flashpointer" in sys.modules) == {imported}
"""
EXPORTED = "torch.export.load(path).module()"
COMPILED = "torch._inductor.aoti_load_package(path)"


def serve(path: Path, module: torch.nn.Module, load: str, imported: bool) -> None:
    """Loads a program in a fresh process, with this package or without, and runs it at all shapes."""
    with torch.no_grad():
        expected = [(arguments, module(*arguments)) for arguments in (inputs(*shape) for shape in SHAPES)]
    torch.save(expected, path.with_suffix(".expected"))
    script = LOAD.format(first="import flashpointer" if imported else "", load=load, imported=imported)
    command = [sys.executable, "-c", script, str(path), str(path.with_suffix(".expected"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def decoder(plain: bool) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    module = Decode()
    with backend("reference" if plain else "tiled"):
        return module, export(module)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_fresh_process(tmp_path: Path, plain: bool) -> None:
    module, program = decoder(plain)
    torch.export.save(program, tmp_path / "program.pt2")
    serve(tmp_path / "program.pt2", module, EXPORTED, imported=not plain)
    if not plain:
        with pytest.raises(AssertionError, match="deserializ"):
            serve(tmp_path / "program.pt2", module, EXPORTED, imported=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("plain", [False, True])
def test_compiled_ahead_of_time(tmp_path: Path, plain: bool) -> None:
    module, program = decoder(plain)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    serve(Path(path), module, COMPILED, imported=not plain)
