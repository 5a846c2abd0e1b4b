"""What the pages say of versions is what the package takes and what the tests try."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flashpointer.backends import OLDEST_TRITON

from .__main__ import TRITONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OLDEST, NEWEST = (version.rpartition(".")[0] for version in (TRITONS[0], TRITONS[-1]))


def requirements() -> dict[str, str]:
    """The oldest version of each that the package takes, as it is installed."""
    needed = map(Requirement, metadata.requires("flashpointer") or [])
    return {r.name: str(r.specifier).removeprefix(">=") for r in needed if r.name in ("torch", "triton")}


def test_one_oldest_triton() -> None:
    assert requirements()["triton"] == ".".join(map(str, OLDEST_TRITON)) == OLDEST


def test_the_pair_of_ci_is_among_them() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pinned["triton"] in TRITONS
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`constraints.txt` ({pinned['triton']})" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_whole_range(page: Path) -> None:
    """Any range of versions of Triton on it is that of the tests."""
    for first, last in re.findall(r"Triton (3\.\d+)(?:\.\d+)? to (3\.\d+)", page.read_text(encoding="utf-8")):
        assert (first, last) == (OLDEST, NEWEST)


def test_the_pages_name_the_range_and_the_oldest_torch() -> None:
    text = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
    for name in ("README.md", "CONTRIBUTING.md"):
        assert f"Triton {OLDEST} to {NEWEST}" in text[name]
    assert f"older than {OLDEST}" in text["README.md"]
    assert f"on {requirements()['torch']}, the oldest" in text["README.md"]
