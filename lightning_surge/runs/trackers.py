"""What loggers keep on a disk: Lightning's CSVLogger, TensorBoard, W&B and MLflow.

Records are decoded by the loggers' own libraries, which the package does not depend on.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sqlite3
import struct
import sys
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightning_surge.checking.libraries import needed
from lightning_surge.runs.run_log import PREFIX, RunLogError, Series

# An error gives so many names of what it found instead.
MOST_NAMED = 8
SECONDS_UNTIL_PROGRESS = 2.0
WANDB_SUFFIX = ".wandb"
MLFLOW_SUFFIXES = (".db", ".sqlite", ".sqlite3")
# What does without the library of a tracker.
INSTEAD = (
    ", or train with CSVLogger beside it, as in Trainer(logger=[..., CSVLogger('logs')]), and pass the "
    "directory of that"
)
# A record of an event file stands between its length (8 bytes) with a checksum (4), and its own checksum (4).
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
RECORD_HEAD, RECORD_FOOT = struct.Struct("<QI"), 4

# The column of steps in a metrics.csv, and in a table of W&B's history.
STEP_COLUMNS = ("step", "trainer/global_step")
# What WandbLogger logs beside W&B's own count of rows, and that count.
STEP_KEYS = ("trainer/global_step", "_step")

# W&B's file is LevelDB's log: a header, then blocks of fragments, each behind a checksum (4 bytes), a length
# (2) and a kind (1). https://github.com/google/leveldb/blob/main/doc/log_format.md
WANDB_HEADER, BLOCK_BYTES, FRAGMENT = 7, 1 << 15, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


class Points:
    """The points of one file, of keys under `surge/` and those in `also`, in the order of the file.

    `others` are some of the keys that were passed over.
    """

    def __init__(self, also: Collection[str] = ()) -> None:
        self._also = frozenset(also)
        self.found: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
        self.others: set[str] = set()

    def wants(self, key: str) -> bool:
        """Whether points of a key are kept; if not, its name is noted."""
        wanted = key.startswith(PREFIX) or key in self._also
        if not wanted and len(self.others) < MOST_NAMED:
            self.others.add(key)
        return wanted

    def add(self, key: str, step: int, value: float) -> None:
        """Append a point of one key."""
        steps, values = self.found[key]
        steps.append(step)
        values.append(value)

    def series(self) -> dict[str, Series]:
        """All points of every key, in the memory that they were gathered in."""
        return {
            key: Series(np.frombuffer(x, np.int64), np.frombuffer(y)) for key, (x, y) in self.found.items()
        }


def progress(path: Path, size: int) -> Any:
    """A bar on a terminal for files that take seconds to read; `update` it by the bytes that were read."""
    from tqdm import tqdm  # a dependency of Lightning

    return tqdm(
        desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, leave=False,
        delay=SECONDS_UNTIL_PROGRESS, disable=None,
    )  # fmt: skip


def reader_of(path: Path) -> Callable[[Path, Points], str | None]:
    """What reads a file, by its name; it returns a note on what it has left out or chosen."""
    known = {".csv": _read_table, WANDB_SUFFIX: read_wandb}
    return known.get(path.suffix, read_events if "tfevents" in path.name else read_mlflow)


def _read_table(path: Path, points: Points) -> str | None:
    """Columns of a `metrics.csv`, whose cells are empty where a key was not logged."""
    left_out = 0
    with path.open(newline="", encoding="utf-8-sig") as file, progress(path, path.stat().st_size) as bar:

        def lines() -> Iterator[str]:
            nonlocal left_out
            for line in file:
                bar.update(len(line))
                # The last line of a run that was killed: a number may be cut short, and be a number still.
                if line.endswith(("\n", "\r")):
                    yield line
                else:
                    left_out += 1

        rows = csv.reader(lines())
        try:
            header = next(rows, [])
            step_at = next((header.index(name) for name in STEP_COLUMNS if name in header), None)
            if step_at is None:
                raise ValueError(f"no column {STEP_COLUMNS[0]!r} among {header[:MOST_NAMED]}")
            kept = [at for at, key in enumerate(header) if at != step_at and points.wants(key)]
            for row in filter(any, rows):
                if len(row) != len(header) or not row[step_at]:
                    left_out += 1
                    continue
                # Other programs than CSVLogger write steps as `9.0`.
                if not (step := float(row[step_at])).is_integer():
                    raise ValueError(f"a step of {row[step_at]!r}")
                for at in kept:
                    if cell := row[at]:
                        points.add(header[at], int(step), float(cell))
        except (ValueError, OverflowError, csv.Error) as error:
            raise RunLogError(
                f"Expected a table of Lightning's CSVLogger, got {str(path)!r}, with {error} in line "
                f"{max(rows.line_num, 1):,}: mend that line, or pass what CSVLogger wrote."
            ) from error
    damaged = f"{path} is damaged, or still being written: {left_out:,} incomplete lines were left out"
    return damaged if left_out else None


def read_events(path: Path, points: Points) -> str | None:
    """Read the scalars of an event file up to the first damaged record; a note says if there was one.

    TensorBoard's own reader takes five times as long, most of it for checksums in Python. They are not
    looked at here: a file that was cut ends in the middle of a record, and damage seldom leaves a record.
    """
    with needed("Reading event files needs tensorboard", "'lightning-surge[tensorboard]'"):
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.util.tensor_util import make_ndarray

    read, size = 0, path.stat().st_size
    damage = DecodeError, TypeError, ValueError  # the latter two of tensors without a known type or a value
    with path.open("rb") as file, progress(path, size) as bar, suppress(*damage):
        while size - read >= RECORD_HEAD.size + RECORD_FOOT:
            length, _ = RECORD_HEAD.unpack(file.read(RECORD_HEAD.size))
            taken = RECORD_HEAD.size + length + RECORD_FOOT
            if not length or read + taken > size:
                break
            event = Event.FromString(file.read(length + RECORD_FOOT)[:length])
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                scalar = kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars"
                if (scalar or kind == "simple_value") and points.wants(value.tag):
                    number = float(make_ndarray(value.tensor)) if scalar else value.simple_value
                    points.add(value.tag, event.step, number)
            bar.update(taken)
            read += taken
    if read == size:
        return None
    return f"{path} is damaged, or still being written: read {read:,} of its {size:,} bytes"


def read_wandb(path: Path, points: Points) -> str | None:
    """Read the history in a `.wandb` file, offline or synchronized; a note if it is damaged."""
    with needed("Reading a file of W&B needs wandb", f"wandb{INSTEAD}"):
        from wandb.proto.wandb_internal_pb2 import Record

    size = path.stat().st_size
    with path.open("rb") as file, progress(path, size) as bar:
        for record in _wandb_records(file):
            bar.update(len(record))
            history = Record.FromString(record).history
            row = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
            step = next((float(row[key]) for key in STEP_KEYS if key in row), float(history.step.num))
            for key in filter(points.wants, row):
                # Infinity and NaN are words of Python's JSON, or strings.
                points.add(key, int(step), float(json.loads(row[key])))
        read = file.tell()
    return None if read == size else f"{path} is damaged: read {read:,} of its {size:,} bytes"


def _wandb_records(file: BinaryIO) -> Iterator[bytes]:
    """The records of a file, up to the first damaged one; the file is then where reading ended."""
    begin, record = file.seek(WANDB_HEADER), b""
    while block := file.read(BLOCK_BYTES - begin % BLOCK_BYTES):
        at = 0
        while at + FRAGMENT.size <= len(block):
            checksum, length, kind = FRAGMENT.unpack_from(block, at)
            end = at + FRAGMENT.size + length
            fragment = block[at + FRAGMENT.size - 1 : end]  # with its kind, which the checksum is of, too
            if zlib.crc32(fragment) != checksum:
                file.seek(begin + at)
                return
            record += fragment[1:]
            if kind in (WHOLE, LAST):
                yield record
                record = b""
            at = end
        begin += len(block)


def read_mlflow(path: Path, points: Points) -> str | None:
    """Read a run of MLflow: `mlruns/<experiment>/<run>`, `mlflow.db/<run>`, or `mlflow.db` for the newest."""
    with needed("Reading a store of MLflow needs mlflow", f"mlflow{INSTEAD}"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

    # Newer releases read a store of files only if they are told to.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    database = next((one for one in (path, path.parent) if one.is_file()), None)
    if database and not _has_metrics(database):
        raise RunLogError(
            f"Expected a database of MLflow, got {str(database)!r}, which is none: pass another."
        )
    try:
        client = MlflowClient(tracking_uri=f"sqlite:///{database}" if database else str(path.parents[1]))
        run, note = _newest(client, path) if path == database else (client.get_run(path.name), None)
        for key in filter(points.wants, run.data.metrics):
            for one in client.get_metric_history(run.info.run_id, key):
                # Databases keep infinity as the largest float.
                largest = abs(one.value) == sys.float_info.max
                points.add(key, one.step, math.copysign(math.inf, one.value) if largest else one.value)
    except MlflowException as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise RunLogError(
            f"Expected a store that MLflow can read, got {str(path)!r}: {why}. Pass another run."
        ) from error
    return note


def _has_metrics(database: Path) -> bool:
    """Whether it is a database of MLflow, which would make its tables in any other."""
    address = f"{database.absolute().as_uri()}?mode=ro"
    with suppress(sqlite3.Error), closing(sqlite3.connect(address, uri=True)) as found:
        return bool(found.execute("SELECT run_uuid, key FROM metrics LIMIT 1"))
    return False


def _newest(client: Any, path: Path) -> tuple[Any, str]:
    """The newest run with keys of ours, or else the newest run."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = list(client.search_runs(experiments, order_by=["attributes.start_time DESC"]))
    if not runs:
        raise RunLogError(f"Expected a store with a run, got {str(path)!r} without any: pass another.")
    ours = [run for run in runs if any(key.startswith(PREFIX) for key in run.data.metrics)] or runs
    newest, *others = (f"{path}/{run.info.run_id}" for run in ours)
    more = f", the newest of {len(ours):,} runs; the one before is {others[0]}" if others else ""
    return ours[0], f"reading {newest}{more}"
