"""docs/tutorial.md promises a tagger in under 60 lines of Python; test_docs.py runs it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"


def test_it_is_under_sixty_lines() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert 0 < len(lines) < 60
    assert "assert f1 > 0.95" in lines
