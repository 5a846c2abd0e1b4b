"""What is built holds every subpackage, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    [f"flashpointer/{p.relative_to(ROOT / 'python/flashpointer')}" for p in (ROOT / "python").rglob("*.py")]
    + [f"flashpointer/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")]
    + ["flashpointer/py.typed"]
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_holds_every_module(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if not n.split("/")[0].endswith(".dist-info")) == MODULES
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_the_sdist_holds_every_module(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for path in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/zlpr_loss.py"):
        assert path in names


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True)
    code = (
        "import flashpointer, flashpointer.kernels, sys; print(flashpointer.__file__, flashpointer.kernels.__file__); "
    )
    code += "from flashpointer.__main__ import main; sys.exit(main())"
    # -S: without the site module the checkout's editable install is not there to be found instead.
    site_packages = str(Path(torch.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), site_packages])}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[0].count(str(target)) == 2
