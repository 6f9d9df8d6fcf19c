"""What a command is made of, and how its words are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

__all__ = ["Command", "CommandError", "Parser"]


class CommandError(Exception):
    """The question cannot be answered: rule, value, remedy. Shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reads options by their whole names, and complains in one line: scripts outlive abbreviations.

    Example:
        >>> parser = Parser(prog="lightning-surge plot")
        >>> _ = parser.add_argument("--output")
        >>> parser.parse_args(["--out", "a.png"])
        Traceback (most recent call last):
        lightning_surge.cli.command.CommandError: unrecognized arguments: --out a.png; see lightning-surge plot --help
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Args:
            message: what is wrong with them.

        Raises:
            CommandError: always.
        """
        raise CommandError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse says nothing where its help cannot be written.
        print(message, end="", file=file)


class Command(NamedTuple):
    """One word after `lightning-surge`.

    Attributes:
        name: the word.
        summary: one line.
        examples: lines to try, shown under `--help`.
        add_arguments: declares its arguments.
        run: answers; prints results to standard output.
    """

    name: str
    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
