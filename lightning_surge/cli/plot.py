"""`lightning-surge plot`: one run as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_surge.cli.command import Command, CommandError, save_figure
from lightning_surge.runs.plots import plot_run
from lightning_surge.runs.run_log import RunLog, read_run

__all__ = ["PLOT", "RUN_HELP", "choose_group", "read"]

FORMATS = (".png", ".svg")
RUN_HELP = "directory of a run, an event file, a metrics.csv, a .wandb file, or a database of MLflow"


def read(path: str) -> RunLog:
    """A run, with notes on how it was read on standard error; raises `CommandError` if it cannot be read."""
    try:
        run = read_run(path)
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    for note in run.notes:
        print(f"lightning-surge: {note}", file=sys.stderr)
    return run


def choose_group(run: RunLog, group: str | None) -> str | None:
    """The optimizer or parameter group asked for, or the first; None if there is one, which has no name."""
    names = [*run.optimizers, *(name for name in run.groups if name not in run.optimizers)]
    if group is not None and group not in names:
        rule, what = (
            (f"one of {', '.join(names)}", "") if names else ("no --group", " with one parameter group")
        )
        raise CommandError(
            f"Expected {rule}, got --group {group} for a run{what}: leave it out or choose another."
        )
    if not names:
        return None
    wanted = names[0] if group is None else group
    chosen = next((name for name in run.groups if name == wanted or name.startswith(f"{wanted}/")), wanted)
    if group != chosen:
        kind = "parameter group" if chosen not in run.optimizers else "optimizer"
        among = [name for name in names if group is None or name.startswith(f"{group}/")]
        print(f"lightning-surge: showing the {kind} {chosen} of {', '.join(among)}", file=sys.stderr)
    return chosen


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="RUN", help=RUN_HELP)
    add("--output", type=Path, metavar="FILE", help="a .png or .svg; default: surge.png beside the logs")
    add("--group", metavar="G", help="optimizer or parameter group whose learning rates are shown")
    add("--x", choices=("steps", "examples"), default="steps", help="what the x axis counts")
    add("--title", help="a line above the charts; default: the path of the run, and the group")


def _run(options: argparse.Namespace) -> None:
    output: Path | None = options.output
    if output is not None and output.suffix.lower() not in FORMATS:
        raise CommandError(
            f"Expected --output to end in {' or '.join(FORMATS)}, got --output {output}: rename it, or use "
            "TensorBoard for charts to zoom into."
        )
    run = read(options.path)
    group = choose_group(run, options.group)
    source = Path(run.source)
    output = output or (source if source.is_dir() else source.parent) / "surge.png"
    title: str = options.title or (run.source if group is None else f"{run.source}, {group}")
    save_figure(lambda: plot_run(run, group=group, title=title, x=options.x), "--output", output)
    print(output)


SUMMARY = "Draw a run: learning rates, batch size against the peak, what decided, the factor and the law."
EXAMPLES = """examples:
  lightning-surge plot lightning_logs/version_3
  lightning-surge plot lightning_logs --output run.svg --x examples"""
PLOT = Command("plot", SUMMARY, EXAMPLES, _add_arguments, _run)
