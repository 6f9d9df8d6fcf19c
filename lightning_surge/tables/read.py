"""Read a table of runs: one row per run, with its batch size, its learning rate and how it ended.

A run ended either with a final loss, or by reaching a target loss after some number of steps. Values that are
blank, NaN or infinite stand for a run that diverged or never reached the target, and so does a row whose
`status`, as `lightning-surge sweep` writes it, is `diverged` or `not_reached`. Rows of cells that were
killed, ran out of memory or failed tell nothing, and are left out.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Columns", "Measure", "RunTable", "read_table"]

FloatArray = npt.NDArray[np.float64]
Measure = Literal["loss", "steps"]


LIMIT = 1e30
"""No batch size, learning rate or count is beyond it, or below its inverse; a loss beyond it has diverged."""


SILENT = ("out_of_memory", "killed", "failed")
"""Statuses of a sweep that say nothing about the learning rate."""
UNFINISHED = ("diverged", "not_reached")
"""And those that say that it is no good."""


class Columns(NamedTuple):
    """Names of a table's columns. Only the first two must be there, and one of the next three."""

    batch_size: str = "batch_size"
    lr: str = "lr"
    loss: str = "loss"
    steps: str = "steps"
    examples: str = "examples"
    seed: str = "seed"
    target: str = "target"
    status: str = "status"


class RunTable(NamedTuple):
    """Runs as arrays of one length.

    Attributes:
        measure: what `outcomes` are: final losses, or steps to the target.
        batch_sizes: examples behind one optimizer step, positive.
        lrs: learning rates, positive.
        outcomes: smaller is better; infinite for a run that failed.
        seeds: which runs share a seed, as codes from 0; None if the table does not say.
        targets: the loss to reach, for steps; None if the table has no such column.
        notes: what a reader should know about the reading.
    """

    measure: Measure
    batch_sizes: FloatArray
    lrs: FloatArray
    outcomes: FloatArray
    seeds: npt.NDArray[np.int64] | None = None
    targets: FloatArray | None = None
    notes: tuple[str, ...] = ()


def read_table(
    path: str | Path, columns: Columns | None = None, *, measure: Measure | None = None
) -> RunTable:
    r"""Read a CSV or Parquet file.

    CSV may be separated by commas, semicolons or tabs, and may begin with lines of comment (`#`). A file that
    ends in `.parquet` or `.pq` is read with pyarrow.

    Args:
        path: the file.
        columns: names of its columns; other columns are passed over.
        measure: what counts, where a table has both; by default the loss if there is one.

    Returns:
        The runs, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a directory.
        ModuleNotFoundError: if it is a Parquet file and pyarrow is not installed.
        ValueError: for a file that is empty or damaged, lacks a column, or holds values out of range.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "runs.csv"
        ...     _ = path.write_text("batch_size,lr,examples\n8,0.1,800\n16,0.1,\n")
        ...     table = read_table(path)
        >>> table.measure, table.outcomes.tolist()
        ('steps', [100.0, inf])
    """
    path, names = Path(path), Columns() if columns is None else columns
    if path.is_dir():
        raise IsADirectoryError(f"Expected a file, got the directory {str(path)!r}: name the table in it.")
    if not path.exists():
        raise FileNotFoundError(f"Expected an existing file, got {str(path)!r}: check the path.")
    found = _parquet(path) if path.suffix in (".parquet", ".pq") else _csv(path)
    if found.rows == 0:
        raise ValueError(f"Expected at least one row, got none in {str(path)!r}: add runs under the header.")
    return _runs(found, names, measure)


class _Source(NamedTuple):
    """An open table: its columns' names, the number of rows, and one column's values when asked for."""

    path: Path
    names: list[str]
    rows: int
    column: Callable[[str], Sequence[Any]]
    line: Callable[[int], str]


def _runs(source: _Source, names: Columns, measure: Measure | None) -> RunTable:
    present = set(source.names)
    for role in ("batch_size", "lr"):
        if (name := getattr(names, role)) not in present:
            raise ValueError(_missing(source, name, role))
    counted = names.steps in present or names.examples in present
    if measure is None:
        # A target says what steps and examples are for, and then losses repeat for each of them.
        measure = "loss" if names.loss in present and not (counted and names.target in present) else "steps"
    if measure == "loss" and names.loss not in present:
        raise ValueError(_missing(source, names.loss, "loss"))
    if measure == "steps" and not counted:
        raise ValueError(_missing(source, names.loss, "loss", names.steps, names.examples))

    notes: list[str] = []
    if names.status in present:
        source = _telling(source, names.status, notes)
    batch_sizes = _numbers(source, names.batch_size, positive=True)
    lrs = _numbers(source, names.lr, positive=True)
    if measure == "loss":
        outcomes = _numbers(source, names.loss)
        if counted and names.status not in present:
            notes.append("the table has steps as well as losses: --measure steps fits those")
    elif names.steps in present:
        outcomes = _numbers(source, names.steps, failed=True)
        if names.examples in present:
            ratio = _numbers(source, names.examples, failed=True) / (batch_sizes * outcomes)
            typical = float(np.median(ratio[np.isfinite(ratio)])) if np.isfinite(ratio).any() else 1.0
            if not 0.9 < typical < 1.1:
                notes.append(
                    f"examples are {typical:.3g} times steps x batch_size: count both in one unit; only the "
                    "steps are used"
                )
    else:
        outcomes = _numbers(source, names.examples, failed=True) / batch_sizes
    seeds = targets = None
    if names.seed in present:
        codes: dict[Any, int] = {}
        labels = source.column(names.seed)
        seeds = np.array([codes.setdefault(label, len(codes)) for label in labels], dtype=np.int64)
        # Codes by the sorted labels, so that the order of the rows does not matter.
        order = {codes[label]: index for index, label in enumerate(sorted(codes, key=str))}
        seeds = np.array([order[code] for code in range(len(order))], dtype=np.int64)[seeds]
    if names.target in present and measure == "steps":
        targets = _numbers(source, names.target, finite=True)
    with np.errstate(invalid="ignore"):
        outcomes = np.where(np.abs(outcomes) < LIMIT, outcomes, np.inf)
    if names.status in present:
        unfinished = [str(word) in UNFINISHED for word in source.column(names.status)]
        outcomes = np.where(unfinished, np.inf, outcomes)
    table = RunTable(measure, batch_sizes, lrs, outcomes, seeds, targets, tuple(notes))
    return _once(table, source, names) if measure == "loss" and names.target in present else table


def _telling(source: _Source, name: str, notes: list[str]) -> _Source:
    """The table without cells of a sweep that say nothing; words of other programs are passed over."""
    words = [str(word) for word in source.column(name)]
    silent = [word for word in words if word in SILENT]
    if not silent:
        return source
    kinds = ", ".join(f"{silent.count(kind)} {kind}" for kind in SILENT if kind in silent)
    remedy = "run them again with lightning-surge sweep --retry-failed"
    if len(silent) == len(words):
        raise ValueError(f"Expected runs that finished, got {kinds} in {str(source.path)!r}: {remedy}.")
    notes.append(f"rows left out, since they say nothing about their learning rates: {kinds}; {remedy}")
    kept = [row for row, word in enumerate(words) if word not in SILENT]

    def column(name: str) -> Sequence[Any]:
        values = source.column(name)
        return values[kept] if isinstance(values, np.ndarray) else [values[row] for row in kept]

    return _Source(source.path, source.names, len(kept), column, lambda row: source.line(kept[row]))


def _once(table: RunTable, source: _Source, names: Columns) -> RunTable:
    """The table without repetitions of a run's loss, once for each further target."""
    targets = source.column(names.target)
    seeds = np.zeros(len(targets), dtype=np.int64) if table.seeds is None else table.seeds
    first: dict[tuple[float, ...], Any] = {}
    kept = np.ones(len(targets), dtype=bool)
    rows = zip(table.batch_sizes, table.lrs, table.outcomes, seeds, targets, strict=True)
    for row, (*run, target) in enumerate(rows):
        kept[row] = first.setdefault(tuple(run), target) == target
    return table._replace(
        batch_sizes=table.batch_sizes[kept],
        lrs=table.lrs[kept],
        outcomes=table.outcomes[kept],
        seeds=None if table.seeds is None else table.seeds[kept],
    )


def _missing(source: _Source, name: str, role: str, *others: str) -> str:
    wanted = " or ".join(repr(each) for each in (name, *others))
    roles = (role, "steps") if others else (role,)
    options = " or ".join(f"--{each.replace('_', '-')}-column" for each in roles)
    shown = ", ".join(repr(each) for each in source.names[:20]) + (", ..." if len(source.names) > 20 else "")
    return (
        f"Expected a column {wanted} in {str(source.path)!r}, got {shown or 'none'}: "
        f"rename a column or name it with {options}."
    )


def _numbers(
    source: _Source, name: str, *, positive: bool = False, failed: bool = False, finite: bool = False
) -> FloatArray:
    """A column as floats, NaN where blank.

    `positive` and `finite` refuse NaN and infinities too; `failed` lets them stand for a run that failed, and
    refuses what is not positive among the others.
    """
    column = source.column(name)
    if isinstance(column, np.ndarray):
        values = column.astype(np.float64)
    else:
        try:
            values = np.array([float(text or "nan") for text in column], dtype=np.float64)
        except ValueError:
            row = next(i for i, text in enumerate(column) if not _is_number(text))
            raise ValueError(
                f"Expected numbers in column {name!r}, got {column[row]!r} on {source.line(row)}: "
                "leave the field blank for a run that failed."
            ) from None
    wrong = np.zeros(values.shape, dtype=bool)
    rule = ""
    if positive:
        wrong, rule = ~((values > 1 / LIMIT) & (values < LIMIT)), f"0 < {name} < {LIMIT:g}"
    elif failed:
        wrong, rule = values <= 1 / LIMIT, f"{name} > 0, or blank for a run that failed"
    elif finite:
        wrong, rule = ~np.isfinite(values), f"finite {name}"
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"Expected {rule}, got {name}={values[row]:g} on {source.line(row)}: correct or remove the row."
        )
    return values


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _csv(path: Path) -> _Source:
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            start, above = file.tell(), 0
            while (first := file.readline()).startswith("#") or (first and not first.strip()):
                start, above = file.tell(), above + 1
            if not first:
                raise ValueError(
                    f"Expected a header and rows, got the empty file {str(path)!r}: write the table again."
                )
            file.seek(start)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            header = [name.strip() for name in next(reader)]
            for row in reader:
                if not "".join(row).strip():
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"Expected {len(header)} fields, as in the header, got {len(row)} on line "
                        f"{reader.line_num + above} of {str(path)!r}: correct or remove the line."
                    )
                rows.append(row)
                lines.append(reader.line_num + above)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected text in UTF-8, got other bytes in {str(path)!r}: save it as CSV, or name a Parquet "
            "file *.parquet."
        ) from error
    except csv.Error as error:
        raise ValueError(f"Expected CSV, got {str(path)!r}: {error}; write the table again.") from error
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected distinct columns, got {twice!r} twice in {str(path)!r}: rename one.")

    def column(name: str) -> list[str]:
        place = header.index(name)
        return [row[place].strip() for row in rows]

    return _Source(path, header, len(rows), column, lambda row: f"line {lines[row]}")


def _parquet(path: Path) -> _Source:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading a Parquet file needs pyarrow: pip install 'lightning-surge[parquet]'."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names, rows = list(file.schema_arrow.names), int(file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"Expected a Parquet file, got {str(path)!r}: {error}; write it again.") from error

    def column(name: str) -> Sequence[Any]:
        try:
            values = file.read(columns=[name]).column(name)
            if pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type):
                array: Sequence[Any] = values.cast(pyarrow.float64(), safe=False).to_numpy()
                return array
            return ["" if value is None else str(value).strip() for value in values.to_pylist()]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"Expected a Parquet file, got {str(path)!r}: {error}; write it again."
            ) from error

    return _Source(path, names, rows, column, lambda row: f"row {row + 1}")
