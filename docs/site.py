"""Hooks of mkdocs, which knows docs/ alone: an image from elsewhere in the repository is taken along; of a link to any
other file there the text is left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    images = {link["path"] for page in files.documentation_pages() for link in _images(page.content_string)}
    for path in sorted(images):
        files.append(File.generated(config, f"images/{Path(path).name}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(
        lambda link: f"![{link['text']}](images/{Path(link['path']).name})" if link["image"] else link["text"], markdown
    )


def _images(markdown: str) -> list[re.Match[str]]:
    return [link for link in OUTSIDE.finditer(markdown) if link["image"]]
