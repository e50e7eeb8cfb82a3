"""A hook of mkdocs: files of the site that lie elsewhere in the repository.

Pages link to one another as they lie there, so that the links lead somewhere in a checkout too;
here they are turned into the site's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"bench/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}
PICTURES = "bench/results"


def _site_path(link: str, folder: Path) -> str:
    """Where a file of the repository lies in the site; `folder` is that of the linking page."""
    path, hash_, anchor = link.partition("#")
    if not path or ":" in path:
        return link
    target = (folder / path).resolve()
    if not target.is_relative_to(ROOT):
        return link
    inside = target.relative_to(ROOT).as_posix()
    inside = PAGES.get(inside, inside).removeprefix("docs/").replace(PICTURES, "results")
    return inside + hash_ + anchor


def _turn_links(markdown: str, folder: Path) -> str:
    return re.sub(
        r"(\]\()([^)\s]+)(\))", lambda m: m[1] + _site_path(m[2], folder) + m[3], markdown
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = _turn_links((ROOT / source).read_text("utf-8"), (ROOT / source).parent)
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        name = f"results/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    generated = page.file.generated_by is not None
    return markdown if generated else _turn_links(markdown, ROOT / "docs")
