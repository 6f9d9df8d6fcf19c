"""`lightning-surge fit`: laws of the optimal learning rate from a table of runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_surge.cli.command import Command, CommandError
from lightning_surge.tables.read import Columns, RunTable, read_table

if TYPE_CHECKING:
    from lightning_surge.tables.fit import GridFit, Unfitted

__all__ = ["FIT"]

# Those of families.LAWS, whose import takes a second that --help need not wait for.
LAW_NAMES = (
    "measured",
    "adam",
    "sgd",
    "sgd_sqrt",
    "adam_eq22",
    "sgd_eq22",
    "sgd_sqrt_eq22",
    "sqrt",
    "linear",
    "constant",
)
FIGURES = (".png", ".svg", ".pdf")
MAX_TARGETS = 24
"""Fits, and panels of a figure, that are made without being asked for one by one."""
PATIENCE = 3.0
"""Seconds between lines of progress."""

EXAMPLES = """\
examples:
  lightning-surge fit sweep.csv
      a header and one run per row: batch_size, lr, loss, and seed if there are several
  lightning-surge fit to_target.csv --figure surge.png
      with steps or examples to a target loss, which give the critical batch size too;
      an empty field is a run that never got there; one fit for each value of a column target
  lightning-surge fit wandb.csv --lr-column config.lr --loss-column val/loss --seed-column Name
      columns by other names
  lightning-surge fit sweep.parquet --law measured --law adam --bootstrap 1000 --json > fit.json
      two of the laws, narrower noise in the intervals, for programs
  lightning-surge fit published.csv --tuned
      one learning rate for each batch size, as in a published table of tuned runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("table", type=Path, help="CSV, or Parquet (*.parquet, *.pq); one run per row")
    columns = parser.add_argument_group("columns")
    for role, default in Columns()._asdict().items():
        columns.add_argument(
            f"--{role.replace('_', '-')}-column", default=default, metavar="NAME", help=f"default: {default}"
        )
    parser.add_argument(
        "--measure", choices=("loss", "steps"), help="what to make smallest; default: loss if there is one"
    )
    parser.add_argument(
        "--target", type=float, action="append", help="fit only the runs to this loss; may be repeated"
    )
    parser.add_argument(
        "--law",
        action="append",
        choices=LAW_NAMES,
        metavar="NAME",
        help=f"fit only this law; may be repeated; one of {', '.join(LAW_NAMES)}",
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="the only learning rate of a batch size is its best one, tuned by whoever ran it",
    )
    parser.add_argument(
        "--bootstrap",
        type=_count,
        default=200,
        metavar="N",
        help="repetitions for the intervals; default: 200",
    )
    parser.add_argument("--seed", type=_count, default=0, help="of the repetitions; default: 0")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/fitting.md lists the keys)")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=f"draw it; {', '.join(f'*{each}' for each in FIGURES)}"
    )


def run(options: argparse.Namespace) -> None:
    """Read, fit, print, draw."""
    from lightning_surge.cli.fit_report import as_json, as_text
    from lightning_surge.tables.fit import Unfitted, fit_grid

    _check_figure(options.figure)
    names = {role: getattr(options, f"{role}_column") for role in Columns._fields}
    try:
        table = read_table(options.table, Columns(**names), measure=options.measure)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    parts = _chosen(table, options.target)
    found: list[GridFit | Unfitted] = []
    progress = _progress(len(parts))
    for index, (target, part) in enumerate(parts):
        try:
            found.append(
                fit_grid(
                    part,
                    laws=options.law or LAW_NAMES,
                    tuned=options.tuned,
                    bootstrap=options.bootstrap,
                    seed=options.seed,
                    progress=progress(index),
                )
            )
        except ValueError as error:
            found.append(Unfitted(target, str(error)))
    fits = [each for each in found if not isinstance(each, Unfitted)]
    if not fits:
        failures = [each for each in found if isinstance(each, Unfitted)]
        raise CommandError(
            "\n".join(text if target is None else f"target {target:g}: {text}" for target, text in failures)
        )
    if options.figure is not None:
        _draw(fits, options.figure)
    if options.json:
        document = as_json(found, table, str(options.table), options.bootstrap, options.seed)
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print(as_text(found, table, str(options.table), options.bootstrap), end="")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value


def _chosen(table: RunTable, wanted: list[float] | None) -> list[tuple[float | None, RunTable]]:
    """The targets asked for; a value need not have all the digits of the table's."""
    from lightning_surge.tables.fit import split_targets

    count = 1 if table.targets is None else np.unique(table.targets).size
    if wanted is None and count > MAX_TARGETS:
        raise CommandError(
            f"Expected at most {MAX_TARGETS} targets, got {count}: choose some with --target, or name "
            "another column with --target-column."
        )
    parts = split_targets(table)
    if wanted is None:
        return parts
    if table.targets is None:
        raise CommandError(
            "Expected a table with a column of targets and --measure steps, got --target without them: leave "
            "--target out, or name the column with --target-column."
        )
    chosen: list[tuple[float | None, RunTable]] = []
    for value in wanted:
        matches = [
            part for part in parts if part[0] is not None and math.isclose(part[0], value, rel_tol=1e-3)
        ]
        if not matches:
            there = ", ".join(f"{target:.5g}" for target, _ in parts[:20])
            raise CommandError(f"Expected --target among {there}, got {value:g}: choose one of them.")
        chosen += [part for part in matches if part[0] not in [each for each, _ in chosen]]
    return chosen


def _progress(parts: int) -> Callable[[int], Callable[[int, int], None]]:
    """Lines on standard error, once it takes long."""
    last = time.monotonic()

    def of_part(index: int) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > PATIENCE:
                last = time.monotonic()
                print(f"fitted {index * total + done} of {parts * total} repetitions", file=sys.stderr)

        return tell

    return of_part


def _check_figure(path: Path | None) -> None:
    """Refuse what cannot be drawn before time is spent on fits."""
    if path is None:
        return
    if path.suffix.lower() not in FIGURES:
        raise CommandError(
            f"Expected --figure with one of the endings {', '.join(FIGURES)}, got {str(path)!r}: rename it."
        )
    if not path.parent.is_dir() or path.is_dir():
        raise CommandError(f"Expected --figure FILE in an existing directory, got {str(path)!r}: create it.")


def _draw(fits: list[GridFit], path: Path) -> None:
    from lightning_surge.tables.figure import draw_fits

    try:
        draw_fits(fits).savefig(path)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"Expected --figure FILE that can be written, got {str(path)!r}: {error}."
        ) from error


FIT = Command(
    name="fit",
    summary="fit laws of the optimal learning rate to a table of runs",
    examples=EXAMPLES,
    add_arguments=add_arguments,
    run=run,
)
