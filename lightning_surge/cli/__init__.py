"""`lightning-surge`: what can be asked on the command line, before a run and after it.

Results go to standard output, progress and complaints to standard error; the exit status is 0 where the
question was answered, 1 where cells of a sweep failed, 2 where there is no answer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_surge.cli.advise import ADVISE
from lightning_surge.cli.command import Command, CommandError
from lightning_surge.cli.fit import FIT
from lightning_surge.cli.plot import PLOT
from lightning_surge.cli.sweep import SWEEP

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Command, ...] = (SWEEP, FIT, PLOT, ADVISE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-surge",
        description="Choose batch sizes and learning rates from measurements, before a run and after it.",
    )
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = parsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=command.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options) or 0
        sys.stdout.flush()
    except CommandError as error:
        print(f"lightning-surge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the results has seen enough; Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
