"""What a command is made of, and how its words are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CommandError(Exception):
    """The question cannot be answered: rule, value, remedy. Shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reads options by their whole names, since scripts outlive abbreviations, and complains in one line."""

    __init__ = partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the words: raise a `CommandError` with the message and where to find help."""
        raise CommandError(f"{message}; see {self.prog} --help")

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


def save_figure(draw: Callable[[], Figure], option: str, path: Path) -> None:
    """Draw a figure and write it."""
    try:
        draw().savefig(path)
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"Expected {option} to be a file that can be written, got {error}: make its directory first, or "
            "name another."
        ) from error
