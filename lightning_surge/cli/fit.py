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

from lightning_surge.cli.command import Command, CommandError
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.read import MIXED, Columns, RunTable, read_tables
from lightning_surge.tables.values import number

if TYPE_CHECKING:
    from lightning_surge.tables.fit import GridFit, Unfitted

__all__ = ["FIT"]

FIGURES = (".png", ".svg", ".pdf")
MAX_FITS = 64
"""Fits, and panels of a figure, that are made without being asked for one by one."""
PATIENCE = 3.0
"""Seconds between lines of progress."""

EXAMPLES = """\
examples:
  lightning-surge fit sweep.csv
      a header and one run per row: batch_size, lr, loss, and seed if there are several; the usual names of
      W&B, MLflow, Optuna and Ray are known too; an empty field is a run that failed
  lightning-surge fit to_target.csv --figure surge.png
      with steps or examples to a target loss, which give the critical batch size too; one fit for each
      value of a column target
  lightning-surge fit wandb.csv --lr-column config.lr --where optimizer=adamw --by width --at 4096
      one fit for each width, and the learning rate at a batch size
  zcat sweep.json.gz | lightning-surge fit - --loss-column val_acc --maximize --json > fit.json
      CSV, JSON, JSON lines or Parquet from a pipe; the largest accuracy is the best; for programs
  lightning-surge fit published.csv --tuned
      one learning rate for each batch size, as in a published table of tuned runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "table", help="CSV, JSON, JSON lines or Parquet, one run per row; - is standard input"
    )
    columns = parser.add_argument_group("columns, if not found by their usual names")
    for role in Columns._fields:
        columns.add_argument(f"--{role.replace('_', '-')}-column", metavar="NAME")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--where", action="append", default=[], type=_condition, metavar="COLUMN=VALUE",
        help="only runs with this value; may be repeated, and values of one column are alternatives",
    )  # fmt: skip
    rows.add_argument(
        "--by", action="append", default=[], metavar="COLUMN",
        help="a fit for each value of this column; may be repeated",
    )  # fmt: skip
    rows.add_argument("--target", type=float, action="append", help="only runs to this loss; may be repeated")
    parser.add_argument("--maximize", action="store_true", help="larger is better, as of an accuracy")
    parser.add_argument(
        "--measure", choices=("loss", "steps"), help="what counts; default: the loss if there is one"
    )
    parser.add_argument(
        "--law", action="append", choices=tuple(LAWS), metavar="NAME",
        help=f"fit only this law; may be repeated; one of {', '.join(LAWS)}",
    )  # fmt: skip
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="the only learning rate of a batch size is its best one, tuned before",
    )
    parser.add_argument(
        "--at", action="append", default=[], type=_batch_size, metavar="BATCH_SIZE",
        help="say the learning rate at this batch size; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap",
        type=_count,
        default=200,
        metavar="N",
        help="repetitions for the intervals; default: 200",
    )
    parser.add_argument("--seed", type=_count, default=0, help="seed of the repetitions; default: 0")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/fitting.md lists the keys)")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=f"draw it; {', '.join(f'*{each}' for each in FIGURES)}"
    )


def run(options: argparse.Namespace) -> None:
    """Read, fit, print, draw."""
    from lightning_surge.cli.fit_report import as_json, as_text
    from lightning_surge.tables.fit import Unfitted, fit_grid

    _check_figure(options.figure)
    named = Columns(**{role: getattr(options, f"{role}_column") for role in Columns._fields})
    selected = {name: getattr(options, name) for name in ("measure", "where", "by", "maximize")}
    try:
        tables = read_tables(options.table, named, **selected)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    parts = [part for table in tables for part in _chosen(table, options.target)]
    if len(parts) > MAX_FITS:
        raise CommandError(
            f"Expected at most {MAX_FITS} fits, got {len(parts)}: choose with --target or --where."
        )
    found: list[GridFit | Unfitted] = []
    progress = _progress(len(parts))
    for index, (target, part) in enumerate(parts):
        try:
            found.append(
                fit_grid(
                    part,
                    laws=options.law or tuple(LAWS),
                    tuned=options.tuned,
                    bootstrap=options.bootstrap,
                    seed=options.seed,
                    at=options.at,
                    progress=progress(index),
                )
            )
        except ValueError as error:
            mixed = [
                f"Expected runs of one setup, but {note}" for note in part.notes if note.startswith(MIXED)
            ]
            found.append(Unfitted(target, part.group, ". ".join([*mixed, str(error)])))
    fits = [each for each in found if not isinstance(each, Unfitted)]
    runs = sum(table.lrs.size for table in tables)
    if not fits:
        failures = [each for each in found if isinstance(each, Unfitted)]
        labels = [", ".join(f"{name} {value}" for name, value in _labels(each).items()) for each in failures]
        pairs = zip(labels, failures, strict=True)
        raise CommandError(
            "\n".join(f"{label}: {each.reason}" if label else each.reason for label, each in pairs)
        )
    name = "standard input" if options.table == "-" else options.table
    if options.figure is not None:
        _draw(fits, options.figure, f"{Path(name).name}: {runs:,} runs")
    if options.json:
        document = as_json(found, name, runs, options.bootstrap, options.seed)
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print(as_text(found, name, runs, options.bootstrap), end="")


def _labels(part: GridFit | Unfitted) -> dict[str, str]:
    """What tells one fit from the others."""
    return dict(part.group) | ({} if part.target is None else {"target": f"{part.target:.5g}"})


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not column.strip() or not equals:
        raise argparse.ArgumentTypeError(f"expected COLUMN=VALUE, got {text!r}")
    return column.strip(), value


def _batch_size(text: str) -> float:
    value = number(text)
    if value is None or not 1 <= value < 1e30:
        raise argparse.ArgumentTypeError(f"expected a batch size >= 1, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return int(text)


def _chosen(table: RunTable, wanted: list[float] | None) -> list[tuple[float | None, RunTable]]:
    """The targets asked for; a value need not have all the digits of the table's."""
    from lightning_surge.tables.fit import split_targets

    parts = split_targets(table)
    if wanted is None:
        return parts
    if table.targets is None:
        raise CommandError(
            "Expected a table with a column of targets and --measure steps, got --target without them: leave "
            "--target out, or name the column with --target-column."
        )
    near = [[part for part in parts if math.isclose(part[0] or 0.0, value, rel_tol=1e-3)] for value in wanted]
    if [] in near:
        there = ", ".join(f"{target:.5g}" for target, _ in parts[:20])
        missing = wanted[near.index([])]
        raise CommandError(f"Expected --target among {there}, got {missing:g}: choose one of them.")
    return list({part[0]: part for each in near for part in each}.values())


def _progress(parts: int) -> Callable[[int], Callable[[int, int], None]]:
    """Lines on standard error, once it takes long."""
    last = time.monotonic()

    def of_part(index: int) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > PATIENCE:
                last = time.monotonic()
                print(f"fitted {index * total + done:,} of {parts * total:,} repetitions", file=sys.stderr)

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


def _draw(fits: list[GridFit], path: Path, title: str) -> None:
    from lightning_surge.tables.figure import draw_fits

    try:
        draw_fits(fits, title).savefig(path)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"Expected --figure FILE that can be written, got {str(path)!r}: {error}."
        ) from error


FIT = Command("fit", "fit laws of the optimal learning rate to a table of runs", EXAMPLES, add_arguments, run)
