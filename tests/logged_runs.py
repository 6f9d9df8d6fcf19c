"""Logs as a training writes them, made without one."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.runs.run_log import RunLog, Series

# r = 4: the peak is at 100 examples, half of the gain at 60.
LAW = MeasuredLaw(alignment_limit=2.0, alignment_scale=300.0, noise_curvature=1.0, signal_curvature=1.0)


def values(**changes: float | None) -> dict[str, float]:
    """What is logged at one step, at `LAW`'s critical batch size; `changes` by name, None to leave out."""
    known: dict[str, float | None] = {
        "lr_scheduled": 1e-3,
        "lr_predicted": 1e-3,
        "lr_used": 1e-3,
        "lr_scale": 1.0,
        "lr_scale_predicted": 1.0,
        "lr_scale_standard_error": 0.0,
        "lr_scale_doubled": LAW.lr(120.0) / LAW.lr(60.0),
        "lr_scale_doubled_standard_error": 0.1 * LAW.lr(120.0) / LAW.lr(60.0),
        "batch_size": 60.0,
        "base_batch_size": 60.0,
        "examples": 6000.0,
        "objective": float(list(OBJECTIVES).index("step")),
        "held_because": 0.0,
        "noise_scale": 300.0,
        "overhead": 0.01,
        "overhead_time": 0.02,
        "num_measurements": 20.0,
        "peak_batch_size": LAW.peak.batch_size,
        "peak_batch_size_standard_error": 20.0,
        "critical_batch_size": LAW.critical_batch_size,
        "critical_batch_size_standard_error": 10.0,
        "law/alignment_limit": 2.0,
        "law/alignment_scale": 300.0,
        "law/noise_curvature": 1.0,
        "law/signal_curvature": 1.0,
        "law/smallest_measured": 30.0,
        "law/largest_measured": 120.0,
    }
    return {f"surge/{name}": value for name, value in (known | changes).items() if value is not None}


def rows(steps: Sequence[int] = (10, 20, 30, 40, 50), **changes: float | None) -> dict[int, dict[str, float]]:
    """The same at several steps, with examples and measurements counted."""
    return {
        step: values(**{"examples": 60.0 * step, "num_measurements": 15.0 + step / 10, **changes})
        for step in steps
    }


def lawless(**changes: float | None) -> dict[int, dict[str, float]]:
    """A run whose measurements do not determine a law."""
    table = rows(**changes)
    return {
        step: {key: value for key, value in row.items() if "/law/" not in key} for step, row in table.items()
    }


def as_log(table: Mapping[int, Mapping[str, float]]) -> RunLog:
    keys = {key for row in table.values() for key in row}
    series = {}
    for key in keys:
        steps = [step for step, row in table.items() if key in row]
        series[key] = Series(
            np.array(steps), np.array([table[step][key] for step in steps], dtype=np.float64)
        )
    return RunLog("memory", series)


def write_csv(directory: Path, table: Mapping[int, Mapping[str, float]]) -> Path:
    """A `metrics.csv` as CSVLogger writes it, with a row of another callback between."""
    directory.mkdir(parents=True, exist_ok=True)
    keys = sorted({key for row in table.values() for key in row})
    path = directory / "metrics.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *keys, "val_loss"], restval="")
        writer.writeheader()
        for step, row in table.items():
            writer.writerow({"epoch": 0, "step": step, **row})
            writer.writerow({"epoch": 0, "step": step, "val_loss": 2.5})
    return path


def write_events(directory: Path, table: Mapping[int, Mapping[str, float]], suffix: str = "") -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory), filename_suffix=suffix) as writer:
        for step, row in table.items():
            for key, value in row.items():
                writer.add_scalar(key, value, global_step=step)
    (path,) = directory.glob(f"*tfevents*{suffix}")
    return path


def two_groups() -> dict[int, dict[str, float]]:
    """A run with the parameter groups `body` and `head`, whose learning rate is twice as large."""
    table = rows()
    for row in table.values():
        for name in ("lr_scheduled", "lr_used", "lr_predicted"):
            value = row.pop(f"surge/{name}")
            row |= {f"surge/{name}/body": value, f"surge/{name}/head": 2 * value}
    return table


def several_optimizers(groups: Mapping[str, Sequence[str]] | None = None) -> dict[int, dict[str, float]]:
    """Two callbacks of one module: `opt1` trains at twice the batch size and learning rate, by a later law.

    Args:
        groups: parameter groups of each optimizer; one each if left out.
    """
    table: dict[int, dict[str, float]] = {}
    for index, step in enumerate((10, 20, 30, 40, 50)):
        own = {
            "opt0": values(examples=60.0 * step),
            "opt1": values(
                examples=60.0 * step,
                batch_size=120.0,
                **{f"lr_{name}": 2e-3 for name in ("scheduled", "predicted", "used")},
                **{"law/noise_curvature": 1.0 + index, "law/signal_curvature": 1.0 + index},
            ),
        }
        row: dict[str, float] = {"loss": 1.0}
        for name, logged in own.items():
            for key, value in logged.items():
                rate = key.removeprefix("surge/") in ("lr_scheduled", "lr_predicted", "lr_used")
                parts = (groups or {}).get(name, ()) if rate else ()
                row |= {f"{key}/{name}/{part}": value for part in parts} or {f"{key}/{name}": value}
        table[step] = row
    return table
