"""Read a table of runs: one row per run, with its batch size, its learning rate and how it ended.

A run ended either with a final loss, or by reaching a target loss after some number of steps. Blanks, NaN,
infinities and words such as `None` or `diverged` stand for a run that diverged or never reached the target;
so does a `status` of `diverged` or `not_reached`. Runs that were killed, ran out of memory, failed or are not
done yet say nothing about their learning rate and are left out.

Sources become DataFrames in `files`; columns get their roles, and cells become numbers, in `columns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from lightning_surge.checking.arguments import choice, optional, switch
from lightning_surge.checking.libraries import needed
from lightning_surge.tables.columns import (
    OUTCOMES,
    WORDS,
    Columns,
    as_text,
    find_column,
    find_columns,
    has_decimal_commas,
    numbers,
    settings_within,
    shown,
)

if TYPE_CHECKING:
    import pandas as pd

FloatArray = npt.NDArray[np.float64]
Measure = Literal["loss", "steps"]

LIMIT = 1e30
"""No batch size, learning rate or count is beyond it, or below its inverse; a loss beyond it has diverged."""
FEWEST_STEPS = 0.5
"""No run is shorter, even if its steps were interpolated; below, examples are counted in another unit."""
SILENT = WORDS["silent_statuses"].split()
"""Statuses that say nothing about the learning rate, of `lightning-surge sweep` and of other programs."""
UNFINISHED = ("diverged", "not_reached")  # statuses that say that a learning rate is no good
MIXED = "runs that differ in"  # begins the note that matters most
REMEDIES = {
    "batch_size": "write the examples behind one optimizer step, or leave the row out with --where",
    "lr": "write the learning rate, or leave the row out with --where",
    "target": "write the loss to reach",
}
"""What to do with a cell that cannot be read, by role; an outcome may be blank."""


class RunTable(NamedTuple):
    """Runs as arrays of one length; in outcomes smaller is better, and infinite is a run that failed."""

    measure: Measure  # what outcomes are: final losses, or steps to the target
    batch_sizes: FloatArray  # examples behind one optimizer step, positive
    lrs: FloatArray  # positive
    outcomes: FloatArray
    seeds: npt.NDArray[np.int64] | None = None  # equal for runs that share a seed, as codes from 0
    targets: FloatArray | None = None  # the loss to reach, for steps
    notes: tuple[str, ...] = ()  # what a reader should know about the reading
    maximize: bool = False  # whether larger was better in the table: outcomes are its values times -1
    group: Mapping[str, str] = {}  # values that these runs share, by the columns that divided the table

    def at(self, rows: npt.NDArray[np.bool_ | np.intp]) -> RunTable:
        """The runs in some rows, by flags or by places."""
        arrays = ("batch_sizes", "lrs", "outcomes", "seeds", "targets")
        return self._replace(
            **{name: array[rows] for name in arrays if (array := getattr(self, name)) is not None}
        )


def read_table(
    source: str | Path, columns: Columns | None = None, *, measure: Measure | None = None
) -> RunTable:
    r"""Read one table of runs.

    Args:
        source: a file of CSV, JSON, JSON lines or Parquet; `-` is standard input.
        columns: names of its columns; those left out are found by their usual names.
        measure: what counts, where a table has both; by default the loss if there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if pandas, or pyarrow for Parquet, is not installed.
        ValueError: if it is no table, a role's column is missing or ambiguous, or a value is out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "runs.csv"
        ...     _ = path.write_text("bs,lr,examples\n8,0.1,800\n16,0.1,\n")
        ...     table = read_table(path)
        >>> table.measure, table.outcomes.tolist(), table.notes
        ('steps', [100.0, inf], ("columns: batch_size from 'bs'",))
    """
    return read_tables(source, columns, measure=measure)[0]


def read_tables(
    source: str | Path,
    columns: Columns | None = None,
    *,
    measure: Measure | None = None,
    where: Sequence[tuple[str, str]] = (),
    by: Sequence[str] = (),
    maximize: bool = False,
) -> list[RunTable]:
    """Read a table, select runs and divide them.

    Args:
        source: a table, as for `read_table`, which also says what is raised.
        columns: names of its columns, as for `read_table`.
        measure: what counts, as for `read_table`.
        where: columns and values that a run must have; several values of one column are alternatives.
        by: columns by whose values the runs are divided, such as the size of the model.
        maximize: whether larger outcomes are better, as of an accuracy.

    Returns:
        A table for each combination of values, in their order; one without `by`.
    """
    optional(choice, "measure", measure, get_args(Measure))
    switch("maximize", maximize)
    name = "standard input" if str(source) == "-" else str(source)
    with needed("Reading a table needs pandas", "'lightning-surge[fit]'"):
        from lightning_surge.tables.files import read_frame
    frame = read_frame(source)
    maximize = maximize or frame.attrs.get("maximize", False)  # studies say so
    frame = _selected(frame, where)
    if frame.empty:
        raise ValueError(f"Expected at least one row, got none in {name!r}: add runs under the header.")
    by = [find_column(frame, column, "--by") for column in by]
    named = columns or Columns()
    roles, notes = find_columns(frame.drop(columns=by), named, name, measure=measure, maximize=maximize)
    frame = _telling(frame, roles, name, notes)
    if not by:
        return [_runs(frame, roles, measure, maximize, notes)]
    groups = frame.groupby(list(as_text(frame, *by).to_numpy().T))
    return [
        _runs(rows, roles, measure, maximize, notes)._replace(
            group=dict(zip(by, map(str, values), strict=True))
        )
        for values, rows in sorted(groups, key=lambda group: [_order(value) for value in group[0]])
    ]


def _order(value: Any) -> tuple[float, str]:
    """Numbers by size, then words."""
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return math.inf, str(value)


def _selected(frame: pd.DataFrame, where: Sequence[tuple[str, str]]) -> pd.DataFrame:
    wanted: dict[str, list[str]] = {}
    for column, value in where:
        wanted.setdefault(find_column(frame, column, "--where"), []).append(value.strip())
    for column, values in wanted.items():
        text = as_text(frame, column)[column]
        kept = text.map(_order).isin(list(map(_order, values)))
        if not kept.any():
            there = shown(sorted(text.unique(), key=_order))
            raise ValueError(
                f"Expected --where {column}=VALUE among {there}, got {shown(values)}: choose one of them."
            )
        frame = frame[kept]
    return frame


def _telling(frame: pd.DataFrame, roles: Mapping[str, str], source: str, notes: list[str]) -> pd.DataFrame:
    """The rows that are not blank, and whose status is not silent."""
    outcome = next(roles[role] for role in OUTCOMES if role in roles)
    cells = as_text(frame, roles["batch_size"], roles["lr"], outcome)
    blank = cells.isin(["", "nan", "NaN", "None", "null"]).all(axis=1)
    if blank.any():
        notes.append(f"rows left out, since they are blank: {int(blank.sum())}")
    place = roles.get("status", outcome)
    words = as_text(frame[~blank], place)[place].str.lower().str.replace(" ", "_")
    words = words.where(words.isin(SILENT if "status" in roles else WORDS["silent_outcomes"].split()))
    if words.notna().any():
        counts = words.value_counts().to_dict()
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in SILENT if kind in counts)
        remedy = "run them again; lightning-surge sweep does with --retry-failed"
        if words.notna().all():
            raise ValueError(f"Expected runs that finished, got {kinds} in {source!r}: {remedy}.")
        notes.append(f"rows left out, since they say nothing about their learning rates: {kinds}; {remedy}")
    if blank.all():
        raise ValueError(f"Expected at least one run, got blank rows in {source!r}: fill them in.")
    return frame[~blank][words.isna()]


def _runs(
    frame: pd.DataFrame, roles: Mapping[str, str], measure: Measure | None, maximize: bool, said: list[str]
) -> RunTable:
    counted = [role for role in ("steps", "examples") if role in roles]
    if measure is None:
        # A target says what steps and examples are for, and then losses repeat for each of them.
        measure = "loss" if "loss" in roles and not (counted and "target" in roles) else "steps"
    maximize = maximize and measure == "loss"
    notes = list(said)
    batch_sizes = _read(frame, roles, "batch_size", low=1.0)
    lrs = _read(frame, roles, "lr", low=1 / LIMIT)
    if measure == "loss":
        outcomes = _read(frame, roles, "loss")
        if counted and "status" not in roles:
            notes.append("the table has steps as well as losses: --measure steps fits those")
    else:
        outcomes = _read(frame, roles, counted[0], batch_sizes=batch_sizes)
    with np.errstate(invalid="ignore"):
        outcomes = np.where(np.abs(outcomes) < LIMIT, outcomes * (-1 if maximize else 1), np.inf)
    if "status" in roles:
        outcomes[as_text(frame, roles["status"])[roles["status"]].isin(UNFINISHED)] = np.inf
    cell = [roles[role] for role in ("batch_size", "lr", "seed", "target") if role in roles]
    used = [name for role, name in roles.items() if role != "examples" or measure == "steps"]
    differing, apart = settings_within(frame, cell, used)
    if differing:
        remedy = " ".join(f"--by {quote(column)}" for column in apart)
        again = as_text(frame, *cell).duplicated().any()
        what = "averaged as if they were seeds" if again else "fitted as one grid"
        which = f"{MIXED} {shown(differing)} are {what}"
        notes.insert(
            0, f"{which}: pass {remedy} for a fit of each, or --where {quote(apart[0])}=VALUE for one"
        )
    seeds = targets = None
    if "seed" in roles:
        # Codes by the sorted labels, so that the order of the rows does not matter.
        seeds = np.unique(as_text(frame, roles["seed"]), return_inverse=True)[1].ravel().astype(np.int64)
    if "target" in roles and measure == "steps":
        targets = _read(frame, roles, "target", low=-LIMIT)
    table = RunTable(measure, batch_sizes, lrs, outcomes, seeds, targets, tuple(notes), maximize)
    if measure == "loss" and "target" in roles:
        # The loss of a run stands there once for each target.
        run = as_text(frame, *(roles[role] for role in ("batch_size", "lr", "loss", "seed") if role in roles))
        goal = as_text(frame, roles["target"])[roles["target"]]
        return table.at((goal == goal.groupby(list(run.to_numpy().T)).transform("first")).to_numpy())
    return table


def _read(
    frame: pd.DataFrame,
    roles: Mapping[str, str],
    role: str,
    *,
    low: float | None = None,
    batch_sizes: FloatArray | None = None,
) -> FloatArray:
    """A column as numbers: at least `low` and finite, or else steps, if need be from examples."""
    name, remedy = roles[role], REMEDIES.get(role, "leave the field blank for a run that failed")
    # Commas stand in front of fractions as they do in the learning rates, but for counts.
    commas = role != "batch_size" and batch_sizes is None and has_decimal_commas(frame[roles["lr"]])
    values, wrong = numbers(frame[name], commas=commas)
    rule = f"numbers in column {name!r}"
    if not wrong.any() and low is not None:
        wrong, rule = ~((values >= low) & (values < LIMIT)), f"{low:g} <= {name} < {LIMIT:g}"
    elif not wrong.any() and batch_sizes is not None:
        wrong, rule = values <= 0, f"{name} > 0, or blank for a run that failed"
        if not wrong.any():
            values = values / batch_sizes if role == "examples" else values
            wrong, rule = values < FEWEST_STEPS, f"runs of at least one step in column {name!r}"
            remedy = "count in the unit of the batch size, and not in epochs or thousands"
    if wrong.any():
        place = int(np.argmax(wrong))
        text = str(frame[name].iloc[place])
        raise ValueError(
            f"Expected {rule}, got {text[:40] + '...' if len(text) > 40 else text!r} on {frame.index.name} "
            f"{frame.index[place]}: {remedy}."
        )
    return values
