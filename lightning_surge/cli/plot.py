"""`lightning-surge plot`: one run as a picture, or as a page to zoom in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_surge.cli.command import Command, CommandError
from lightning_surge.pages import run_page
from lightning_surge.plots import plot_run
from lightning_surge.run_logs import RunLog, RunLogError, read_run

__all__ = ["PLOT", "choose_group", "read"]

FORMATS = (".png", ".svg", ".html")


def read(path: str) -> RunLog:
    """A run, with notes on how it was read on standard error.

    Args:
        path: what the user gave.

    Returns:
        The run.

    Raises:
        CommandError: if it cannot be read.
    """
    try:
        run = read_run(path)
    except (RunLogError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    for note in run.notes:
        print(f"lightning-surge: {note}", file=sys.stderr)
    return run


def choose_group(run: RunLog, group: str | None) -> str | None:
    """The parameter group asked for; the first of several if none was.

    Args:
        run: what it logged.
        group: name, or None.

    Returns:
        The name; None if the run has one group only.

    Raises:
        CommandError: if there is no such group.
    """
    names = ", ".join(run.groups)
    if group is None and run.groups:
        print(f"lightning-surge: showing the parameter group {run.groups[0]} of {names}", file=sys.stderr)
        return run.groups[0]
    if group is not None and group not in run.groups:
        has = f"one of {names}" if names else "no --group, since this run has one parameter group"
        raise CommandError(f"Expected {has}, got --group {group}: leave it out or choose another.")
    return group


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="directory of a run, or its event file or metrics.csv")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png, .svg or .html file; surge.png beside the logs if left out",
    )
    parser.add_argument("--group", metavar="G", help="parameter group whose learning rates are shown")
    parser.add_argument("--x", choices=("steps", "examples"), default="steps", help="what the x axis counts")
    parser.add_argument("--title", help="a line above the charts; the path of the run if left out")


def _run(options: argparse.Namespace) -> None:
    output: Path | None = options.output
    if output is not None and output.suffix.lower() not in FORMATS:
        raise CommandError(
            f"Expected --output to end in {', '.join(FORMATS)}, got --output {output}: the ending says the "
            "format."
        )
    run = read(options.path)
    group = choose_group(run, options.group)
    source = Path(run.source)
    output = output or (source if source.is_dir() else source.parent) / "surge.png"
    title = run.source if options.title is None else options.title
    try:
        if output.suffix.lower() == ".html":
            output.write_text(run_page(run, group=group, title=title, x=options.x), encoding="utf-8")
        else:
            plot_run(run, group=group, title=title, x=options.x).savefig(output)
    except (RunLogError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"Expected --output to be a file that can be written, got {error}: make its directory first, or "
            "name another."
        ) from error
    print(output)


PLOT = Command(
    name="plot",
    summary="Draw a run: learning rates, batch size against the peak, what decided, the law through time.",
    examples=(
        "examples:\n"
        "  lightning-surge plot lightning_logs/version_3\n"
        "  lightning-surge plot lightning_logs --output run.html --x examples\n"
        "  lightning-surge plot logs/metrics.csv --output run.svg"
    ),
    add_arguments=_add_arguments,
    run=_run,
)
