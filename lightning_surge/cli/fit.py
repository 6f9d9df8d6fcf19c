"""`lightning-surge fit`: laws of the optimal learning rate from a table of runs."""

from __future__ import annotations

import argparse
import json
import math
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
"""Seconds until a bar on a terminal shows how far the repetitions are."""

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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("columns, if not found by their usual names").add_argument
    for role in Columns._fields:
        add(f"--{role.replace('_', '-')}-column", metavar="NAME")
    add = parser.add_argument_group("rows, by options that may be repeated").add_argument
    add("--where", action="append", default=[], type=_condition, metavar="COLUMN=VALUE",
        help="only runs with this value; values of one column are alternatives")  # fmt: skip
    add("--by", action="append", default=[], metavar="COLUMN", help="a fit for each value of this column")
    add("--target", type=float, action="append", help="only runs to this loss")
    add = parser.add_argument
    add("table", help="CSV, JSON, JSON lines or Parquet, one run per row; - is standard input")
    add("--maximize", action="store_true", help="larger is better, as of an accuracy")
    add("--measure", choices=("loss", "steps"), help="what counts; default: the loss if there is one")
    add("--law", action="append", choices=tuple(LAWS), metavar="NAME",
        help=f"fit only this law; may be repeated; one of {', '.join(LAWS)}")  # fmt: skip
    add(
        "--tuned",
        action="store_true",
        help="the only learning rate of a batch size is its best, tuned before",
    )
    add("--at", action="append", default=[], type=_batch_size, metavar="BATCH_SIZE",
        help="say the learning rate at this batch size; may be repeated")  # fmt: skip
    add(
        "--bootstrap",
        type=_count,
        default=200,
        metavar="N",
        help="repetitions for the intervals; default: 200",
    )
    add("--seed", type=_count, default=0, help="seed of the repetitions; default: 0")
    add("--json", action="store_true", help="print JSON (docs/fitting.md lists the keys)")
    add("--figure", type=Path, metavar="FILE", help=f"draw it; *{', *'.join(FIGURES)}")


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


def _run(options: argparse.Namespace) -> None:
    """Read, fit, print, draw."""
    from tqdm import tqdm  # a dependency of Lightning

    from lightning_surge.cli.fit_report import as_json, as_text
    from lightning_surge.tables.fit import Unfitted, fit_grid

    path: Path | None = options.figure
    if path is not None and (path.suffix.lower() not in FIGURES or path.is_dir() or not path.parent.is_dir()):
        raise CommandError(
            f"Expected --figure to end in {', '.join(FIGURES)} and be in an existing directory, got "
            f"{str(path)!r}: rename it, or make the directory."
        )
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
    with tqdm(total=len(parts) * options.bootstrap, leave=False, delay=PATIENCE, disable=None) as bar:
        how = {name: getattr(options, name) for name in ("tuned", "bootstrap", "seed", "at")}
        for target, part in parts:
            try:
                found.append(fit_grid(part, laws=options.law or tuple(LAWS), progress=bar.update, **how))
            except ValueError as error:
                mixed = [f"Expected runs of one setup, but {n}" for n in part.notes if n.startswith(MIXED)]
                found.append(Unfitted(target, part.group, ". ".join([*mixed, str(error)])))
    fits = [each for each in found if not isinstance(each, Unfitted)]
    if not fits:
        raise CommandError("\n".join(map(_reason, found)))
    name = "standard input" if options.table == "-" else options.table
    runs = sum(table.lrs.size for table in tables)
    if path is not None:
        _draw(fits, path, f"{Path(name).name}: {runs:,} runs")
    if options.json:
        document = as_json(found, name, runs, options.bootstrap, options.seed)
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print(as_text(found, name, runs, options.bootstrap), end="")


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


def _reason(failure: GridFit | Unfitted) -> str:
    group = [f"{name} {value}" for name, value in failure.group.items()]
    label = ", ".join(group + ([] if failure.target is None else [f"target {failure.target:.5g}"]))
    reason: str = failure.reason  # type: ignore[union-attr]
    return f"{label}: {reason}" if label else reason


def _draw(fits: list[GridFit], path: Path, title: str) -> None:
    from lightning_surge.tables.figure import draw_fits

    try:
        draw_fits(fits, title).savefig(path)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"Expected --figure to be a file that can be written, got {error}.") from error


FIT = Command(
    "fit", "fit laws of the optimal learning rate to a table of runs", EXAMPLES, _add_arguments, _run
)
