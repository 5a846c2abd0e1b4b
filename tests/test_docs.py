"""The pages: their Python runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import flashpointer as fp
from benchmarks import pages

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a block may import that the tests do not need.
EXTRAS = {Requirement(r).name for r in metadata.requires("flashpointer") or [] if "integrations" in r}

INTEGRATIONS = ROOT / "docs" / "integrations.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks_of(page: Path) -> list[Any]:
    """The page's blocks of Python, compiled; a traceback names the page and its line."""
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == len(re.findall(r"^\s*```\s*py", text, re.MULTILINE)), "a block would not be run"
    return [compile("\n" * text.count("\n", 0, b.start(1)) + b[1], str(page), "exec") for b in blocks]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != INTEGRATIONS], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each block with what the ones before it have defined; those for libraries that are absent are not."""
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    absent = set()
    for block in blocks_of(page):
        try:
            exec(block, namespace)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            absent.add(error.name)
    if absent:
        pytest.skip(f"all but the blocks that need {', '.join(sorted(absent))}, of the extra integrations")


LIBRARIES = ("transformers", "accelerate", "peft", "lightning", "bert4torch", "timm")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_integration_of_a_library_runs(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After the first block, which they share."""
    pytest.importorskip(library, reason=f"needs {library}, perhaps of the extra integrations", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    shared, *blocks = blocks_of(INTEGRATIONS)
    (block,) = (block for block in blocks if library in block.co_names)
    assert len(blocks) == len(LIBRARIES)
    namespace: dict[str, Any] = {}
    exec(shared, namespace)
    exec(block, namespace)


def test_each_block_of_the_readme_runs_alone() -> None:
    blocks = blocks_of(README)
    assert blocks
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("page", pages.tables(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.filled(text, pages.tables()[page]) == text


def test_every_public_name_is_in_the_api_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(fp.__all__) | {"hf"} == set(re.findall(r"^::: flashpointer\.(\w+)$", text, re.MULTILINE))


def prose(page: Path) -> str:
    """Without blocks of code, in which brackets and hashes are no links and headings."""
    return re.sub(r"^\s*```.*?^\s*```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "code", prose(page))
    for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), f"{target}#{anchor}"
