"""Copy committed result tables into README.md and docs, so that they cannot drift apart.

python -m benchmarks.publish            # rewrite
python -m benchmarks.publish --check    # exit 1 if something would change
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/theory.md", "docs/support-crashes.md")
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every marked table replaced by the file it names."""
    return MARKED.sub(lambda match: f"{match[1]}\n{(ROOT / match[2]).read_text()}\n{match[3]}", text)


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
