"""How long it takes to read a long log, and how much memory: `python -m benchmarks.long_logs`.

Writes a log of so many points under the keys of a real run, as TensorBoard's event file or as a
`metrics.csv`, and reads it in a process of its own, as the command line does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event

from tests.logged_runs import values

# Keys of the callback, and as many of others, logged every ten steps.
KEYS = [*values(), *(f"train/metric_{index}" for index in range(28))]
LOG_EVERY = 10
READER = """
import json, resource, sys, time
begin = time.perf_counter(), time.process_time()
from lightning_surge.runs.run_log import read_run
run = read_run(sys.argv[1])
points = sum(one.steps.size for one in run.series.values())
seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"kept {points:,} points in {seconds:.1f} s ({cpu:.1f} s of CPU), at most {mebibytes:.0f} MiB")
"""


def write_events(directory: Path, keys: list[str], steps: NDArray[np.int64]) -> None:
    """An event file whose records differ in step and value; all keys of a step make one row of bytes."""
    with (directory / "events.out.tfevents.1700000000.host.1.0").open("wb") as file:
        bits = np.frexp(steps)[1]
        for width in np.unique(-(-bits // 7)):
            for part in np.array_split(steps[-(-bits // 7) == width], 100):
                file.write(np.concatenate([_records(key, part) for key in keys], axis=1).tobytes())


def _records(key: str, steps: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The framed records of one key, of steps that take equally many bytes, one a row."""
    event = Event(wall_time=1.7e9, step=int(steps[0]) if steps.size else 1)
    event.summary.value.add(tag=key, simple_value=1.0)
    record = np.frombuffer(event.SerializeToString(), dtype=np.uint8)
    rows = np.tile(record, (steps.size, 1))
    places = np.arange(-(-int(steps[0]).bit_length() // 7) if steps.size else 0)
    digits = (steps[:, None] >> (7 * places)) & 0x7F
    rows[:, 10 + places] = digits | np.where(places < places.size - 1, 0x80, 0)
    rows[:, -4:] = np.ascontiguousarray(1e-3 * steps, dtype="<f4").view(np.uint8).reshape(-1, 4)
    lengths = np.tile(np.array([record.size], dtype="<u8").view(np.uint8), (steps.size, 1))
    sums = np.zeros((steps.size, 4), dtype=np.uint8)  # which the reader does not look at
    return np.concatenate([lengths, sums, rows, sums], axis=1)


def write_table(directory: Path, keys: list[str], steps: NDArray[np.int64]) -> None:
    """A `metrics.csv` in which the callback and the module have lines of their own."""
    ours = [key for key in keys if key.startswith("surge/")]
    others = len(keys) - len(ours)
    with (directory / "metrics.csv").open("w") as file:
        file.write(",".join(["epoch", "step", *ours, *keys[len(ours) :]]) + "\n")
        for step in steps:
            value = f",{1e-3 * step:.16g}"
            file.write(
                f"0,{step}{value * len(ours)}{',' * others}\n0,{step}{',' * len(ours)}{value * others}\n"
            )


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=6_000_000, help="points in the log")
    parser.add_argument("--only-surge", action="store_true", help="all of them under surge/")
    options = parser.parse_args()
    keys = [key for key in KEYS if key.startswith("surge/") or not options.only_surge]
    steps = LOG_EVERY * np.arange(1, options.points // len(keys) + 1)
    for write in (write_events, write_table):
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), keys, steps)
            (path,) = Path(directory).iterdir()
            print(f"{path.name}: {steps.size * len(keys):,} points, {path.stat().st_size / 2**20:.0f} MiB")
            subprocess.run([sys.executable, "-c", READER, directory], check=True)


if __name__ == "__main__":
    main()
