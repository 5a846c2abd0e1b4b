"""The growth tool at toy sizes: both curves, every contender, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from . import growth, report
from .measure import measure_ceilings


def test_growth_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "CURVES", {"heads": [(1, 2, 16)], "tokens": [(1, 2, 16), (1, 2, 1 << 20)]})
    device = torch.device("cpu")
    curves = growth.measure(device, 0.01, lambda _: None, growth.QUICK)
    files = growth.write(
        tmp_path, curves, report.conditions(device, 0.0), measure_ceilings(device, {torch.float32}, 0.01)
    )
    assert all(file.stat().st_size > 0 for file in files)
    for points in json.loads(files[0].read_text())["curves"].values():
        (point,) = points  # the other is beyond --quick
        assert set(point["contenders"]) == set(growth.COLOURS)
        assert all(measured["time"]["median"] > 0 for measured in point["contenders"].values())
        assert 0 < point["share_of_matrix_floor"] < 1
