"""The choice of a backend, and a package that imports without Triton and without a driver."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import flashpointer as fp
from flashpointer import backends

from .conftest import CUDA, INTERPRETED

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"TRITON_INTERPRET": "0", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_rule() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert backends.explain(cpu, dtype)[0] == "tiled"
        assert backends.explain(gpu, dtype)[0] == ("triton" if backends._NO_TRITON is None else "tiled")
    assert backends.explain(gpu, torch.float64)[0] == "tiled"


def test_without_triton_a_gpu_is_served_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_NO_TRITON", "Triton is not installed")
    assert backends.explain(torch.device("cuda"), torch.float32) == ("tiled", "Triton is not installed")


@needs_triton
@pytest.mark.parametrize("version", ["3.2.0", "2.3.1", "3.2.0+git4b3bb1f8"])
def test_an_old_triton_is_not_used(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, reason = torch.device("cuda"), f"Triton {version} is installed, and the kernels need 3.3 or later"
    monkeypatch.setattr(backends.metadata, "version", {"triton": version}.__getitem__)
    monkeypatch.setattr(backends, "_NO_TRITON", backends._why_no_triton())
    assert backends.explain(gpu, torch.float32) == ("tiled", reason)
    with fp.use_backend("triton"), pytest.raises(ValueError, match=re.escape(reason)):
        backends.explain(gpu, torch.float32)


@needs_triton
@pytest.mark.parametrize("version", ["3.3.0", "3.10.0", "4.0.0+gitf9cdf582", None])
def test_a_new_triton_is_used(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(distribution: str) -> str:
        if version is None or distribution != "pytorch-triton":  # as that of a nightly PyTorch is called
            raise backends.metadata.PackageNotFoundError(distribution)
        return version

    monkeypatch.setattr(backends.metadata, "version", found)
    assert backends._why_no_triton() is None


def test_use_backend_nests_and_restores() -> None:
    scores = torch.zeros(1)
    with fp.use_backend("reference"):
        assert backends.choose(scores) == "reference"
        with pytest.raises(RuntimeError, match="inside"), fp.use_backend("tiled"):
            assert backends.choose(scores) == "tiled"
            raise RuntimeError("inside")
        assert backends.choose(scores) == "reference"
    assert backends.choose(scores) == "tiled"


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="use_backend takes one of 'reference', 'tiled', 'triton'; got 'cuda'"):
        fp.use_backend("cuda").__enter__()
    assert "FLASHPOINTER_BACKEND takes one of" in python("import flashpointer", FLASHPOINTER_BACKEND="tilde").stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves a CPU")
def test_triton_refuses_what_it_cannot_serve() -> None:
    scores, labels = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with fp.use_backend("triton"), pytest.raises(ValueError, match=r"'triton' is forced.*float32 on cpu.*CUDA devices"):
        fp.zlpr_loss(scores, labels)


def test_the_interpreter_refuses_what_it_computes_wrongly() -> None:
    code = "import torch; from flashpointer import backends as b; print(b.explain(torch.device('cpu'), torch.bfloat16))"
    result = python(code, TRITON_INTERPRET="1", FLASHPOINTER_BACKEND="triton")
    assert "interpreter computes bfloat16 wrongly" in result.stderr


def test_backward_keeps_the_backend_of_forward() -> None:
    scores, other = torch.randn(2, 2, 5, requires_grad=True)
    with fp.use_backend("tiled"):
        loss = fp.zlpr_kl_div(scores, other)
    with fp.use_backend("triton"):  # which could not serve a CPU
        loss.backward()


def test_the_environment_chooses() -> None:
    code = "import torch; from flashpointer import backends; print(backends.choose(torch.zeros(1)))"
    assert python(code, FLASHPOINTER_BACKEND="reference").stdout == "reference\n"
    assert python(code, FLASHPOINTER_BACKEND="").stdout == "tiled\n"


def test_import_asks_no_driver_and_loads_no_kernel() -> None:
    code = "import sys, torch; had = set(sys.modules); import flashpointer; new = set(sys.modules) - had; "
    code += "print([m for m in new if 'triton' in m or 'kernels' in m], torch.cuda.is_initialized())"
    result = python(code)
    assert result.stdout == "[] False\n", result.stderr


def test_works_where_triton_is_absent() -> None:
    code = """
import importlib.machinery, sys

class NoTriton(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path = [NoTriton if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import torch, flashpointer as fp
assert fp.backends._NO_TRITON == "Triton is not installed"
scores = torch.randn(2, 5, requires_grad=True)
fp.zlpr_loss(scores, scores > 0).backward()
print(scores.grad.shape, fp.backends.explain(torch.device("cuda"), torch.float32))
"""
    result = python(code)
    assert result.stdout == "torch.Size([2, 5]) ('tiled', 'Triton is not installed')\n", result.stderr


@pytest.mark.skipif(CUDA, reason="the expected lines are those of a machine without a GPU")
def test_self_check_passes() -> None:
    result = subprocess.run([sys.executable, "-m", "flashpointer"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks passed" in result.stdout
    assert "float64   tiled      the kernels run on CUDA devices" in result.stdout
    assert result.stdout.count("  pass  ") == 24


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_self_check_fails_where_an_op_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashpointer.__main__ import main

    right = fp.zlpr_loss
    monkeypatch.setattr(fp, "zlpr_loss", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert main() == 1
    assert "FAIL  zlpr_loss" in capsys.readouterr().out
    monkeypatch.setattr(fp, "zlpr_loss", lambda **_: 1 / 0)
    assert main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
