"""Pages link to files outside of docs/ as a repository's view needs it; on the site those files come along.

A link is resolved in the repository. What lies in docs/ keeps its place on the site, everything else gets the
path that it has in the repository: `../benchmarks/demo/results/surge.png` becomes
`benchmarks/demo/results/surge.png`. A link to nothing is left as it is, and fails the strict build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that added pages link to."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = source_of(waiting.pop().src_uri)
        for link in LINK.findall(page.read_text()):
            target = Path(os.path.normpath(page.parent / link))
            if target.is_file() and files.get_file_from_path(place_of(target)) is None:
                file = File.generated(config, place_of(target), abs_src_path=str(target))
                files.append(file)
                waiting += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to the places on the site."""
    source, here = source_of(page.file.src_uri), Path(page.file.src_uri).parent

    def placed(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[1]))
        return os.path.relpath(place_of(target), here) if target.is_file() else match[1]

    return LINK.sub(placed, markdown)


def source_of(place: str) -> Path:
    """The file in the repository that a place on the site shows."""
    return DOCS / place if (DOCS / place).exists() else ROOT / place


def place_of(source: Path) -> str:
    """The place on the site of a file in the repository."""
    return source.relative_to(DOCS if source.is_relative_to(DOCS) else ROOT).as_posix()
