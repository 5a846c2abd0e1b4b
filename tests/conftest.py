"""Where the tests run: each test of an op names the fixtures ``place`` and perhaps ``dtype``, and then runs on every
backend that this process can offer: tiled PyTorch, kernels under Triton's interpreter, kernels on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

import flashpointer as fp

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Place(NamedTuple):
    device: str
    backend: str

    @property
    def small(self) -> bool:
        """Whether only small shapes are quick enough here."""
        return INTERPRETED

    def serves(self, dtype: torch.dtype) -> bool:
        if self.backend == "tiled":
            return True
        return dtype != torch.float64 and not (INTERPRETED and dtype == torch.bfloat16)


PLACES = [Place("cpu", "triton")] if INTERPRETED else [Place("cpu", "tiled")]
GPU_PLACES = [] if INTERPRETED else [Place("cuda", "triton"), Place("cuda", "tiled")]


def _param(place: Place, *more: object) -> object:
    name = "-".join([place.backend, place.device, *(str(m).removeprefix("torch.") for m in more)])
    marks = [pytest.mark.gpu] if place.device == "cuda" else []
    return pytest.param(place, *more, id=name, marks=marks)


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        import numpy
        import triton

        if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
            raise pytest.UsageError(
                f"the interpreter of Triton {triton.__version__} cannot run with NumPy {numpy.__version__}: "
                "install 'numpy<2.4', or Triton 3.7 or later"
            )
        from .interpreter import compute_as_chips

        compute_as_chips()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic, and says so
    # Inductor finds what it once compiled by the graph alone: not what another version of an op returned to it.
    folder = TemporaryDirectory(prefix="inductor-")
    config.add_cleanup(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    places = PLACES + GPU_PLACES
    if "dtype" in metafunc.fixturenames:
        pairs = [_param(p, d) for p in places for d in DTYPES if p.serves(d)]
        metafunc.parametrize("place, dtype", pairs)
    elif "place" in metafunc.fixturenames:
        metafunc.parametrize("place", [_param(p) for p in places])


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What a process that only compiles need not import."""
    if "rest" in os.environ.get("TESTED", "rest").split() or not collection_path.is_file():
        return None
    return "mark.compiled" not in collection_path.read_text(encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, deselected = [], []
    for item in items:
        wanted = not INTERPRETED or "place" in getattr(item, "fixturenames", ())
        if "TESTED" in os.environ:  # by one of the processes of python -m tests
            wanted = wanted and _part(item) in os.environ["TESTED"].split()
        (kept if wanted else deselected).append(item)
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items[:] = kept
    config.hook.pytest_deselected(items=deselected)


def _part(item: pytest.Item) -> str:
    """The chip that a test compiles for, or else the rest."""
    if item.get_closest_marker("compiled") is None:
        return "rest"
    callspec = getattr(item, "callspec", None)
    return "sm_90" if callspec is None else str(callspec.params.get("chip", "sm_90"))


@pytest.fixture(autouse=True)
def _fresh_and_poisoned() -> Iterator[None]:
    """Fresh random numbers, and NaN in every new tensor until something is written to it."""
    torch.manual_seed(torch.seed() % 2**31)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if "place" not in request.fixturenames:
        yield
        return
    with fp.use_backend(request.getfixturevalue("place").backend):
        yield
