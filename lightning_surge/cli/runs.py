"""`lightning-surge plot` and `lightning-surge advise`: one run as a picture, and how to go on with it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lightning_surge.cli.command import Command, check_figure
from lightning_surge.runs.advice import advise, run_state
from lightning_surge.runs.log_files import read_run
from lightning_surge.runs.plots import plot_run
from lightning_surge.runs.report import describe, document
from lightning_surge.runs.run_log import RunLog


def _read(path: str, group: str | None) -> tuple[RunLog, str | None]:
    """A run, and the optimizer or parameter group asked for, or the first; None if one has no name.

    Notes on what was chosen are printed to standard error.
    """
    run = read_run(path)
    for note in run.notes:
        print(f"lightning-surge: {note}", file=sys.stderr)
    names = [*run.optimizers, *(name for name in run.groups if name not in run.optimizers)]
    if group is not None and group not in names:
        rule = f"one of {', '.join(names)}" if names else "no --group"
        raise ValueError(f"Expected {rule}, got --group {group}: leave it out or choose another.")
    if not names:
        return run, None
    wanted = names[0] if group is None else group
    chosen = next((name for name in run.groups if name == wanted or name.startswith(f"{wanted}/")), wanted)
    if group != chosen:
        kind = "parameter group" if chosen not in run.optimizers else "optimizer"
        among = [name for name in names if group is None or name.startswith(f"{group}/")]
        print(f"lightning-surge: showing the {kind} {chosen} of {', '.join(among)}", file=sys.stderr)
    return run, chosen


def _of_a_run(parser: argparse.ArgumentParser) -> None:
    kinds = "directory of a run, an event file, a metrics.csv, a .wandb file, or a database of MLflow"
    parser.add_argument("path", metavar="RUN", help=kinds)
    parser.add_argument("--group", metavar="G", help="optimizer or parameter group that is asked about")


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    _of_a_run(parser)
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="png, svg or pdf; default: surge.png beside the logs")
    add("--x", choices=("steps", "examples"), default="steps", help="what the x axis counts")
    add("--title", help="a line above the charts; default: the path of the run, and the group")


def _plot(options: argparse.Namespace) -> None:
    check_figure("--output", options.output)
    run, group = _read(options.path, options.group)
    source = Path(run.source)
    output = options.output or (source if source.is_dir() else source.parent) / "surge.png"
    title: str = options.title or (run.source if group is None else f"{run.source}, {group}")
    plot_run(run, group=group, title=title, x=options.x).savefig(output)
    print(output)


def _advise_arguments(parser: argparse.ArgumentParser) -> None:
    _of_a_run(parser)
    add = parser.add_argument
    add("--batch-size", type=float, nargs="+", default=[], metavar="B", help="further sizes, in examples")
    add("--step", type=int, help="optimizer step to ask at, within the run; default: the last")
    add("--json", action="store_true", help="the same as JSON, null where a number is not finite")


def _advise(options: argparse.Namespace) -> None:
    run, group = _read(options.path, options.group)
    answer = advise(run_state(run, step=options.step, group=group), options.batch_size)
    print(json.dumps(document(answer), indent=2) if options.json else describe(answer))


PLOT = Command(
    "plot",
    "Draw a run: learning rates, batch size against the peak, what decided, the factor and the law.",
    """examples:
  lightning-surge plot lightning_logs/version_3
  lightning-surge plot lightning_logs --output run.svg --x examples""",
    _plot_arguments,
    _plot,
)
ADVISE = Command(
    "advise",
    "Say which batch size and learning rate to go on with, what doubling costs, how sure that is.",
    """examples:
  lightning-surge advise lightning_logs/version_3
  lightning-surge advise lightning_logs --batch-size 128 512 --step 2000
  lightning-surge advise logs/metrics.csv --json""",
    _advise_arguments,
    _advise,
)
