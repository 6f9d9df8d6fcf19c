"""`lightning-surge plot`: one run as a picture, or as a page to zoom in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_surge.cli.command import Command, CommandError
from lightning_surge.runs.series import RunLogError

if TYPE_CHECKING:
    from lightning_surge.runs.run_log import RunLog

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
    # Imported here: it needs scipy, which --help need not wait for.
    from lightning_surge.runs.run_log import read_run

    try:
        run = read_run(path)
    except (RunLogError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    for note in run.notes:
        print(f"lightning-surge: {note}", file=sys.stderr)
    return run


def choose_group(run: RunLog, group: str | None) -> str | None:
    """The optimizer or parameter group asked for; the first of several if none was.

    Args:
        run: what it logged.
        group: name, or None. Of an optimizer with several parameter groups the first one is taken.

    Returns:
        The name; None if the run has one optimizer with one group.

    Raises:
        CommandError: if there is no such group.
    """
    names = [*run.optimizers, *(name for name in run.groups if name not in run.optimizers)]
    if not names:
        if group is not None:
            raise CommandError(
                f"Expected no --group, since this run has one parameter group, got --group {group}: leave it "
                "out."
            )
        return None
    if group is not None and group not in names:
        raise CommandError(
            f"Expected one of {', '.join(names)}, got --group {group}: leave it out or choose another."
        )
    wanted = names[0] if group is None else group
    chosen = next((name for name in run.groups if name == wanted or name.startswith(f"{wanted}/")), wanted)
    if group != chosen:
        kind = "parameter group" if chosen not in run.optimizers else "optimizer"
        among = [name for name in names if group is None or name.startswith(f"{group}/")]
        print(f"lightning-surge: showing the {kind} {chosen} of {', '.join(among)}", file=sys.stderr)
    return chosen


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="directory of a run, or its event file or metrics.csv")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png, .svg or .html file; surge.png beside the logs if left out",
    )
    parser.add_argument(
        "--group", metavar="G", help="optimizer or parameter group whose learning rates are shown"
    )
    parser.add_argument("--x", choices=("steps", "examples"), default="steps", help="what the x axis counts")
    parser.add_argument(
        "--title", help="a line above the charts; the path of the run, and the group, if left out"
    )


def _run(options: argparse.Namespace) -> None:
    from lightning_surge.runs.pages import run_page
    from lightning_surge.runs.plots import plot_run

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
    title: str | None = options.title
    if title is None:
        title = run.source if group is None else f"{run.source}, {group}"
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
