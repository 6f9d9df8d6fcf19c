"""What a command is made of, how its words are read, and what it says as JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, is_dataclass
from functools import partialmethod
from typing import Any, NamedTuple, NoReturn

__all__ = ["Command", "CommandError", "Parser", "aligned", "plain"]


class CommandError(Exception):
    """The question cannot be answered: rule, value, remedy. Shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reads options by their whole names, since scripts outlive abbreviations, and complains in one line.

    Example:
        >>> Parser(prog="lightning-surge").parse_args(["--red"])
        Traceback (most recent call last):
        lightning_surge.cli.command.CommandError: unrecognized arguments: --red; see lightning-surge --help
    """

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


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int]) -> list[str]:
    """Columns of equal width, to the right but for those named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in cells))
    return [line.rstrip() for line in lines]


def plain(value: Any) -> Any:
    """What JSON can hold: records by the names of their fields, null for numbers that are not finite.

    Example:
        >>> plain({"peak": (math.inf, 2.0)})
        {'peak': [None, 2.0]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
