"""What a command is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Command", "CommandError"]


class CommandError(Exception):
    """The question cannot be answered: rule, value, remedy. Shown without a traceback."""


class Command(NamedTuple):
    """One word after `lightning-surge`.

    Attributes:
        name: the word.
        summary: one line.
        examples: lines to try, shown under `--help`.
        add_arguments: declares its arguments.
        run: answers; prints results to standard output; returns the exit status, None for 0.
    """

    name: str
    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
