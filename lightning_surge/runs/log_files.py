"""Find the files of a run and read their numbers, of TensorBoard, Lightning's CSVLogger, W&B or MLflow.

The files of a run that was resumed are joined: what came after the step at which it went on again belongs to
a training that was given up, and is left out. A run that is still going, or was killed, ends in the middle
of a record: files are read up to the last complete one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_surge.runs.run_log import NOTHING, PREFIX, RunLog, RunLogError, Series
from lightning_surge.runs.trackers import MLFLOW_SUFFIXES, MOST_NAMED, WANDB_SUFFIX, Points, reader_of

KINDS = "an event file (*tfevents*), a metrics.csv, a .wandb file or a store of MLflow"
# How far below a directory its runs are looked for.
SEARCH_DEPTH = 3


def read_run(path: str | Path, also: Collection[str] = ()) -> RunLog:
    r"""Read what the callback has logged of one run.

    Args:
        path: An event file of TensorBoard, a `metrics.csv`, a `.wandb` file or a store of MLflow; or a
            directory that holds one (`logger.log_dir`), or a single run below it. Of the `version_N` of one
            logger the newest is taken.
        also: Keys to read besides those under `surge/`.

    Returns:
        What was logged. Steps that a resumed run repeated appear once.

    Raises:
        ModuleNotFoundError: If the library is not installed that reads such files.
        RunLogError: If there is no run, more than one, or nothing that `SurgeLRCallback` has logged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     rows = "epoch,step,surge/batch_size,val_loss\n0,1,8,\n0,1,,2.5\n0,2,16,\n"
        ...     _ = Path(directory, "metrics.csv").write_text(rows)
        ...     run = read_run(directory, also=["val_loss"])
        >>> run.series["surge/batch_size"].values.tolist(), run.series["val_loss"].values.tolist()
        ([8.0, 16.0], [2.5])
    """
    notes: list[str] = []
    others: set[str] = set()
    try:
        found = _find(Path(path), notes)
        for files in _sources(found):
            parts = []
            for file in files:
                points = Points(also)
                notes += filter(None, [reader_of(file)(file, points)])
                parts.append(points.series())
                others |= points.others | parts[-1].keys()
            series = joined(parts)
            if any(key.startswith(PREFIX) for key in series):
                return RunLog(str(found), series, tuple(notes))
    except OSError as error:
        raise RunLogError(
            f"Expected files that can be read, got {error}: check their permissions."
        ) from error
    keys = ", ".join(sorted(others)[:MOST_NAMED]) or "nothing"
    what = "; ".join(["", *notes])
    raise RunLogError(
        f"Expected a run that was trained with SurgeLRCallback, got {str(found)!r}, in which {keys} was "
        f"logged and no key that begins with {PREFIX!r}{what}: train for at least log_every_n_steps steps "
        "with the callback and a logger, or pass another run."
    )


def joined(files: Sequence[dict[str, Series]]) -> dict[str, Series]:
    """One run from the series of its files, oldest first: each replaces what came after its beginning."""
    run: dict[str, Series] = {}
    for part in files:
        ours = [one.steps.min() for key, one in part.items() if key.startswith(PREFIX)]
        begin = min(ours, default=math.inf)
        for key, (steps, values) in run.items():
            if key.startswith(PREFIX):
                run[key] = Series(steps[steps < begin], values[steps < begin])
        for key, one in part.items():
            steps, values = run.get(key, NOTHING)
            run[key] = _increasing(np.append(steps, one.steps), np.append(values, one.values))
    return {key: one for key, one in run.items() if one.steps.size}


def _increasing(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Series:
    """Without the points that a later one with the same or an earlier step takes back."""
    earliest_after = np.minimum.accumulate(steps[::-1])[::-1][1:]
    kept = np.append(steps[:-1] < earliest_after, True)
    return Series(steps[kept], values[kept])


def _is_log(path: Path) -> bool:
    known = path.suffix in (".csv", WANDB_SUFFIX, *MLFLOW_SUFFIXES) or "tfevents" in path.name
    return known and path.is_file()


def _sources(found: Path) -> list[list[Path]]:
    """The files of a run: its event files together, or else the others one after the other."""
    if not found.is_dir():
        return [[found]]
    events = sorted(filter(_is_log, found.glob("*tfevents*")), key=_began)
    single = [found / "metrics.csv", *sorted(found.glob(f"*{WANDB_SUFFIX}")), found / "mlflow.db"]
    stores = [[found]] if (found / "meta.yaml").is_file() and (found / "metrics").is_dir() else []
    return [*([events] if events else []), *([one] for one in single if _is_log(one)), *stores]


def _began(path: Path) -> list[tuple[int, str]]:
    """Names have the second at which a file was begun, and end with a count of the process: numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _find(path: Path, notes: list[str]) -> Path:
    """The run at a path or below it."""
    if path.is_file():
        if _is_log(path):
            return path
        raise RunLogError(
            f"Expected {KINDS}, got {str(path)!r}: pass one of these, or the directory that holds them."
        )
    if path.parent.suffix in MLFLOW_SUFFIXES and path.parent.is_file():
        return path
    if not path.is_dir():
        raise RunLogError(
            f"Expected the directory or file of a run, got {str(path)!r}, which does not exist: pass what "
            "logger.log_dir says."
        )
    if _sources(path):
        return path
    below = (place for depth in range(1, SEARCH_DEPTH + 1) for place in path.glob("/".join("*" * depth)))
    # W&B's latest-run is a link to one of the others.
    runs = sorted(place for place in below if place.is_dir() and not place.is_symlink() and _sources(place))
    if not runs:
        raise RunLogError(
            f"Expected a directory with {KINDS}, got {str(path)!r} without any: pass what logger.log_dir "
            "says."
        )
    versions = {int(match[1]): run for run in runs if (match := re.fullmatch(r"version_(\d+)", run.name))}
    one_logger = len(versions) == len(runs) and len({run.parent for run in runs}) == 1
    if len(runs) > 1 and not one_logger:
        names = ", ".join(str(run.relative_to(path)) for run in runs[:MOST_NAMED])
        more = f" and {len(runs) - MOST_NAMED:,} more" if len(runs) > MOST_NAMED else ""
        raise RunLogError(
            f"Expected one run, got {len(runs):,} in {str(path)!r}: choose among {names}{more}."
        )
    chosen = versions[max(versions)] if one_logger else runs[0]
    notes.append(f"reading {chosen}" + (f", the newest of {len(runs):,} runs" if len(runs) > 1 else ""))
    return chosen
