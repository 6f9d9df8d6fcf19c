"""What a command is made of, and how its words are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

FIGURES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """Reads options by their whole names, since scripts outlive abbreviations, and complains in one line."""

    __init__ = partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the words: raise a `ValueError` with the message and where to find help."""
        raise ValueError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse says nothing where its help cannot be written.
        print(message, end="", file=file)


class Command(NamedTuple):
    """One word after `lightning-surge`."""

    name: str
    summary: str
    examples: str  # lines to try, shown under --help
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # prints results; returns the exit status, None for 0


def check_figure(option: str, path: Path | None) -> None:
    """Refuse a file that no figure can be written to, before there is one to write."""
    if path is not None and (path.suffix.lower() not in FIGURES or path.is_dir() or not path.parent.is_dir()):
        raise ValueError(
            f"Expected {option} to end in {', '.join(FIGURES)} and be in an existing directory, got "
            f"{str(path)!r}: rename it, or make the directory."
        )
