"""What stands beside the bare products: all contenders give one loss and the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashpointer.agreement import relative_error

from . import products
from .linear_zlpr_loss import LAYER, OP, make_inputs
from .suite import Shape


@pytest.mark.parametrize("name", ["ours", "compile", "sparse", "chunks"])
def test_the_contenders_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several chunks, the last one shorter; each class is listed once, for others than ours count it twice."""
    monkeypatch.setattr(products, "CHUNK", 70)
    inputs = make_inputs((5, 8, 200), torch.float32, torch.device("cpu"))
    once = torch.stack([torch.randperm(200)[:16] for _ in range(5)])
    inputs["positives"] = once.where(inputs["positives"] >= 0, -1)
    results = []
    for function in (products.functions()[name], products.functions()["eager"]):
        leaves = {key: x.detach().requires_grad_() if key in LAYER else x for key, x in inputs.items()}
        loss = function(**leaves)
        results.append([loss, *torch.autograd.grad(loss, [leaves[key] for key in LAYER])])
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-5


def test_measured_told_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "OP", products.dataclasses.replace(OP, shapes=(Shape((6, 16, 3000), ""),)))
    found = products.measure(torch.device("cpu"), 0.01, lambda _: None, quick=False)
    console = Console(width=150, record=True)
    console.print(products.table(found))
    told = console.export_text()
    assert "6 x 16 x 3,000" in told and all(name in told for name in (products.PRODUCTS, *products.functions()))
    (case,) = json.loads(products.write(tmp_path, found, {"device": "here"}).read_text())["cases"]
    assert case["size"] == [6, 16, 3000]
    assert 0 < case["contenders"]["ours"]["time"]["median"] < 10
    # Without the gradients eager has the scores, labels and their like, and ours a tile at most.
    assert case["contenders"]["eager"]["peak"] > 4 * 6 * 3000
