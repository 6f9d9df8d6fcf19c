"""Runs the Python blocks of a page from top to bottom, and writes what they print under them.

    python -m tests.code_blocks docs/tutorial.md

A block of the language `text` right after a Python block holds its output. The tests run the same code, and
compare the words of the output; its numbers depend on the machine.
"""

import contextlib
import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```$(\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One block of a page.

    Attributes:
        code: what to run.
        output: what the page says that it prints; None if it says nothing.
    """

    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page, by its path in the repository."""
    return [Block(match[1], match[3]) for match in PYTHON.finditer((ROOT / page).read_text())]


def run(code: str, names: dict[str, Any], page: str) -> str:
    """Run a block in a namespace; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), names)
    return printed.getvalue()


def main() -> None:
    """Rewrite the outputs of the pages named on the command line."""
    warnings.filterwarnings("ignore")
    for page in sys.argv[1:]:
        names: dict[str, Any] = {"__name__": Path(page).stem}

        def written(match: re.Match[str], names: dict[str, Any] = names, page: str = page) -> str:
            printed = run(match[1], names, page)
            block = f"```python\n{match[1]}```"
            return block if match[3] is None else f"{block}\n\n```text\n{printed}```"

        path = ROOT / page
        path.write_text(PYTHON.sub(written, path.read_text()))


if __name__ == "__main__":
    main()
