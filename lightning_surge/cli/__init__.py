# PYTHON_ARGCOMPLETE_OK
"""`lightning-surge`: what can be asked on the command line, before a run and after it.

Results go to standard output, progress and complaints to standard error; the exit status is 0 where the
question was answered, 1 where cells of a sweep failed, 2 where there is no answer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from traceback import extract_tb

from lightning_surge import __version__
from lightning_surge.cli.command import Command, Parser
from lightning_surge.cli.fit import FIT
from lightning_surge.cli.runs import ADVISE, PLOT
from lightning_surge.cli.sweep import SWEEP

COMMANDS: tuple[Command, ...] = (SWEEP, FIT, PLOT, ADVISE)
# In every message that the package means for users.
OWN_WORDS = ("Expected ", "pip install ", " --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, from the words after the program's name; return the exit status."""
    try:
        try:
            options = _parse(arguments)
            status: int = options.run(options) or 0
        finally:
            # Also after --help: what cannot be written is told here, not by Python on its way out.
            print(end="", flush=True)
    except KeyboardInterrupt:
        return 130
    except UnicodeEncodeError as error:
        what = f"an output that can hold {error.object[error.start]!a}, got one in {error.encoding}"
        words = f"Expected {what}: set PYTHONIOENCODING=utf-8:surrogateescape."
    except (OSError, ValueError, ModuleNotFoundError) as error:
        words = _line(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # Python would write what is left once more when it ends, and complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # whoever read the results has seen enough
                return 0
    else:
        return status
    print(f"lightning-surge: {words}", file=sys.stderr)
    return 2


def _line(error: Exception) -> str:
    """An error in words; where it was raised, too, unless it is the package's own, with a remedy."""
    words = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"Expected files that can be read and an output that can be written, got {error}: check paths, "
            "permissions and space."
        )
    if type(error).__module__.startswith("lightning_surge.") or any(own in words for own in OWN_WORDS):
        return words
    place = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}, line {place.lineno}: {words}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="lightning-surge",
        description="Choose batch sizes and learning rates from measurements, before a run and after it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = parsers.add_parser(
            command.name, help=command.summary, description=command.summary, epilog=command.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    options: argparse.Namespace
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the command's own help knows what there is
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options
