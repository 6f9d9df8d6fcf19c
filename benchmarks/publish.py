"""Copy committed result tables into README.md and docs, so that they cannot drift apart.

python -m benchmarks.publish            # rewrite
python -m benchmarks.publish --check    # exit 1 if something would change

A page marks a table as `<!-- results: FILE -->`, or a section of a file as `<!-- results: FILE#HEADING -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md", "docs/support.md")
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every marked table replaced by the file, or the section of it, that is named."""
    return MARKED.sub(lambda match: f"{match[1]}\n{named(match[2])}\n{match[3]}", text)


def named(place: str) -> str:
    """The text of a file, or of what is under one of its headings."""
    path, _, heading = place.partition("#")
    text = (ROOT / path).read_text()
    if heading:
        _, found, text = f"\n{text}".partition(f"\n## {heading}\n\n")
        if not found:
            raise LookupError(f"Expected a heading '## {heading}' in {path}, found none.")
        text = text.partition("\n\n## ")[0].rstrip("\n") + "\n"
    return text


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if something would change"
    )
    options = parser.parse_args()
    stale = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        if filled(text) != text:
            stale.append(name)
            if not options.check:
                page.write_text(filled(text))
    print(("stale: " if options.check else "rewritten: ") + (", ".join(stale) or "nothing"))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
