"""Runs that experiment trackers keep on a disk: TensorBoard's event files, W&B's files and MLflow's stores.

Records are decoded by the trackers' own libraries, which the package does not depend on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning_surge.checking.libraries import needed
from lightning_surge.runs.series import PREFIX, Points, RunLogError, progress

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

# What WandbLogger logs beside W&B's own count of rows, and that count.
STEP_KEYS = ("trainer/global_step", "_step")

# W&B's file is LevelDB's log: a header, then blocks of fragments, each behind a checksum (4 bytes), a length
# (2) and a kind (1). https://github.com/google/leveldb/blob/main/doc/log_format.md
WANDB_HEADER, BLOCK_BYTES, FRAGMENT = 7, 1 << 15, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


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
    with path.open("rb") as file, progress(path, size) as bar, contextlib.suppress(DecodeError):
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
    """Read a run of MLflow: `mlruns/<experiment>/<run>`, `mlflow.db/<run>`, or `mlflow.db` for the newest.

    Returns a note on which run of a database was chosen.
    """
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
    try:
        with contextlib.closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
        ) as found:
            found.execute("SELECT run_uuid, key FROM metrics LIMIT 1")
    except sqlite3.Error:
        return False
    return True


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
