"""`lightning-surge fit`: laws of the optimal learning rate from a table of runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm  # a dependency of Lightning

from lightning_surge.cli.command import FIGURES, Command, check_figure
from lightning_surge.tables.columns import Columns, number
from lightning_surge.tables.figure import draw_fits
from lightning_surge.tables.fit import GridFit, Unfitted, fit_grid, split_targets
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.read import MIXED, read_tables
from lightning_surge.tables.report import describe, document

MAX_FITS = 64  # fits, and panels of a figure, that are made without being asked for one by one
PATIENCE = 3.0  # seconds until a bar on a terminal shows how far the repetitions are

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
    add("--tuned", action="store_true", help="a batch size's one learning rate is its best, tuned before")
    add("--at", action="append", default=[], type=_batch_size, metavar="BATCH_SIZE",
        help="say the learning rate at this batch size; may be repeated")  # fmt: skip
    add("--bootstrap", type=int, default=200, metavar="N", help="repetitions for the intervals (200)")
    add("--seed", type=int, default=0, help="seed of the repetitions (0)")
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


def _run(options: argparse.Namespace) -> None:
    """Read, fit, print, draw."""
    check_figure("--figure", options.figure)
    named = Columns(**{role: getattr(options, f"{role}_column") for role in Columns._fields})
    selected = {name: getattr(options, name) for name in ("measure", "where", "by", "maximize")}
    tables = read_tables(options.table, named, **selected)
    parts = [part for table in tables for part in split_targets(table, options.target)]
    if len(parts) > MAX_FITS:
        raise ValueError(
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
    fits = [each for each in found if isinstance(each, GridFit)]
    if not fits:
        raise ValueError("\n".join(str(each) for each in found))
    name = "standard input" if options.table == "-" else options.table
    runs = sum(table.lrs.size for table in tables)
    if options.figure is not None:
        draw_fits(fits, f"{Path(name).name}: {runs:,} runs").savefig(options.figure)
    if options.json:
        answer = document(found, table=name, runs=runs, seed=options.seed)
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        print(describe(found, f"{name}: {runs:,} runs"))


SUMMARY = "Fit laws of the optimal learning rate to a table of runs."
FIT = Command("fit", SUMMARY, EXAMPLES, _add_arguments, _run)
