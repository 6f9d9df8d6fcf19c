"""Find the files of a run and read their numbers: event files of TensorBoard, or Lightning's `metrics.csv`.

The files of a run that was resumed are joined: what came after the step at which it went on again belongs to
a training that was given up, and is left out. A run that is still going, or was killed, ends in the middle
of a record: files are read up to the last complete one.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "PREFIX", "RunLogError", "Series", "read_files"]

FloatArray = NDArray[np.float64]
Columns = dict[str, tuple["array[int]", "array[float]"]]

PREFIX = "surge/"
# How far below a directory its runs are looked for, and how many names an error gives.
SEARCH_DEPTH = 3
MOST_NAMED = 8
# A record of an event file is framed by its length (8 bytes) and two checksums (4 each).
RECORD_FRAME = 16


class RunLogError(ValueError):
    """A run cannot be read: the rule, the value and the remedy."""


class Series(NamedTuple):
    """One logged quantity: what was written, and at which optimizer step.

    Attributes:
        steps: Optimizer steps, shape `(n,)`, increasing.
        values: Values, shape `(n,)`. TensorBoard keeps them in single precision.
    """

    steps: NDArray[np.int64]
    values: FloatArray


NOTHING = Series(np.array([], dtype=np.int64), np.array([], dtype=np.float64))


def read_files(path: Path) -> tuple[Path, dict[str, Series], list[str]]:
    """Find one run and read it.

    Args:
        path: an event file, a `metrics.csv`, the directory that holds them, or one above it.

    Returns:
        The directory or file that was read; one series per key; notes on what was chosen and left out.

    Raises:
        ModuleNotFoundError: if tensorboard is needed and not installed.
        RunLogError: if there is no run, more than one, or nothing that `SurgeLRCallback` has logged.
    """
    notes: list[str] = []
    series: dict[str, Series] = {}
    try:
        found = _find(path, notes)
        for files in _sources(found):
            series = _joined([_read_file(file, notes) for file in files])
            if any(key.startswith(PREFIX) for key in series):
                return found, series, notes
    except OSError as error:
        raise RunLogError(
            f"Expected files that can be read, got {error}: check their permissions."
        ) from error
    keys = ", ".join(sorted(series)[:MOST_NAMED]) or "nothing"
    what = "; ".join(["", *notes])
    raise RunLogError(
        f"Expected a run that was trained with SurgeLRCallback, got {str(found)!r}, in which {keys} was "
        f"logged and no key that begins with {PREFIX!r}{what}: train for at least log_every_n_steps steps "
        "with the callback and a logger, or pass another run."
    )


def _sources(found: Path) -> list[list[Path]]:
    """The files of a run: its event files together, or else its CSV file."""
    if found.is_file():
        return [[found]]
    events, table = sorted(found.glob("*tfevents*"), key=_began), found / "metrics.csv"
    return [files for files in (events, [table] if table.is_file() else []) if files]


def _began(path: Path) -> list[tuple[int, str]]:
    """Names have the second at which a file was begun, and end with a count of the process: numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _find(path: Path, notes: list[str]) -> Path:
    """The run at a path or below it."""
    if path.is_file():
        if "tfevents" in path.name or path.suffix == ".csv":
            return path
        raise RunLogError(
            f"Expected an event file (*tfevents*) or a metrics.csv, got {str(path)!r}: pass one of these, or "
            "the directory that holds them."
        )
    if not path.is_dir():
        raise RunLogError(
            f"Expected the directory or file of a run, got {str(path)!r}, which does not exist: pass what "
            "logger.log_dir says."
        )
    if _sources(path):
        return path
    below = (place for depth in range(1, SEARCH_DEPTH + 1) for place in path.glob("/".join("*" * depth)))
    runs = sorted(place for place in below if place.is_dir() and _sources(place))
    if not runs:
        raise RunLogError(
            f"Expected a directory with event files (*tfevents*) or a metrics.csv, got {str(path)!r} without "
            "any: pass what logger.log_dir says."
        )
    versions = {int(match[1]): run for run in runs if (match := re.fullmatch(r"version_(\d+)", run.name))}
    one_logger = len(versions) == len(runs) and len({run.parent for run in runs}) == 1
    if len(runs) > 1 and not one_logger:
        names = ", ".join(str(run.relative_to(path)) for run in runs[:MOST_NAMED])
        more = "" if len(runs) <= MOST_NAMED else f" and {len(runs) - MOST_NAMED} more"
        raise RunLogError(f"Expected one run, got {len(runs)} in {str(path)!r}: choose among {names}{more}.")
    chosen = versions[max(versions)] if one_logger else runs[0]
    notes.append(f"reading {chosen}" + (f", the newest of {len(runs)} runs" if len(runs) > 1 else ""))
    return chosen


def _read_file(path: Path, notes: list[str]) -> Columns:
    return _read_table(path, notes) if path.suffix == ".csv" else _read_events(path, notes)


def _read_events(path: Path, notes: list[str]) -> Columns:
    """Scalars of one event file, up to the first record that is damaged."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto import event_pb2
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading event files needs tensorboard: pip install 'lightning-surge[tensorboard]'."
        ) from error

    columns: Columns = {}
    read = 0
    # TensorBoard's loader that also migrates old formats takes three times as long.
    for record in RawEventFileLoader(str(path)).Load():
        try:
            event = event_pb2.Event.FromString(record)
        except DecodeError:
            break
        read += len(record) + RECORD_FRAME
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                _append(columns, value.tag, event.step, value.simple_value)
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
                _append(columns, value.tag, event.step, float(tensor_util.make_ndarray(value.tensor)))
    if read < (size := path.stat().st_size):
        notes.append(f"{path} is damaged, or still being written: read {read:,} of its {size:,} bytes")
    return columns


def _read_table(path: Path, notes: list[str]) -> Columns:
    """Columns of a `metrics.csv`, whose cells are empty where a key was not logged."""
    columns: Columns = {}
    left_out = 0
    with path.open("rb") as file:
        # The last line of a run that was killed: a number may be cut short, and be a number still.
        file.seek(0, 2)
        file.seek(max(file.tell() - 1, 0))
        unfinished = file.read() not in (b"\n", b"\r")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if "step" not in header:
                raise RunLogError(
                    "Expected a metrics.csv of Lightning's CSVLogger, with a column 'step', got "
                    f"{str(path)!r} with the columns {header[:MOST_NAMED]}: pass what CSVLogger wrote."
                )
            previous = next(rows, None)
            while previous is not None:
                row = next(rows, None)
                if len(previous) != len(header) or (row is None and unfinished):
                    left_out += 1
                else:
                    _append_row(columns, header, previous)
                previous = row
    except RunLogError:
        raise
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunLogError(
            f"Expected a text file with columns, got {str(path)!r}: {error}. Pass what CSVLogger wrote."
        ) from error
    except (ValueError, OverflowError) as error:
        raise RunLogError(
            f"Expected numbers in {str(path)!r}, got {error} before line {rows.line_num + 1}: take it out."
        ) from error
    if left_out:
        notes.append(f"{path} is damaged, or still being written: {left_out} incomplete lines were left out")
    return columns


def _append_row(columns: Columns, header: Sequence[str], row: Sequence[str]) -> None:
    cells = dict(zip(header, row, strict=True))
    cells.pop("epoch", None)
    step = int(cells.pop("step"))
    for key, cell in cells.items():
        if cell:
            _append(columns, key, step, float(cell))


def _append(columns: Columns, key: str, step: int, value: float) -> None:
    steps, values = columns.setdefault(key, (array("q"), array("d")))
    steps.append(step)
    values.append(value)


def _joined(parts: Sequence[Columns]) -> dict[str, Series]:
    """One run from the files of its parts, each in place of what earlier ones did after its beginning."""
    series: dict[str, Series] = {}
    for part in parts:
        own = [min(steps) for key, (steps, _) in part.items() if key.startswith(PREFIX)]
        begin = min(own, default=math.inf)
        for key, (steps, values) in series.items():
            if key.startswith(PREFIX):
                series[key] = Series(steps[steps < begin], values[steps < begin])
        for key, (new_steps, new_values) in part.items():
            steps, values = series.get(key, NOTHING)
            series[key] = Series(
                np.concatenate([steps, np.frombuffer(new_steps, dtype=np.int64)]),
                np.concatenate([values, np.frombuffer(new_values, dtype=np.float64)]),
            )
    return {key: _increasing(*one) for key, one in series.items() if one.steps.size}


def _increasing(steps: NDArray[np.int64], values: FloatArray) -> Series:
    """Without the points that a later one with the same or an earlier step takes back."""
    earliest_after = np.minimum.accumulate(steps[::-1])[::-1][1:]
    kept = np.append(steps[:-1] < earliest_after, True)
    return Series(steps[kept], values[kept])
