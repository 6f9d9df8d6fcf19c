"""What the examples share: their flags, their loggers, and the table and picture at the end of a run."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from examples.story import draw_story
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.runs.log_files import read_run
from lightning_surge.runs.run_log import RunLog, Series


def fast_and_seed(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags that every example has."""
    return _parser(description).parse_args(arguments)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a few seconds, to see that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    return parser


def parse_arguments(
    description: str | None, arguments: Sequence[str] | None, *, output: str
) -> argparse.Namespace:
    """The flags of an example with a report; `output` is the default of `--output`."""
    parser = _parser(description)
    parser.add_argument(
        "--output", type=Path, default=Path(output), help="directory for logs and the picture"
    )
    parser.add_argument("--max-overhead", type=float, help="share of the work spent on probes")
    parser.add_argument("--law", default="measured", help="or sqrt, linear, constant, to compare")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what the factor keeps")
    options = parser.parse_args(arguments)
    if options.max_overhead is None:
        # These runs are short. At the default of 1 % a probe would come too rarely to follow them; a run of
        # hours gets as many probes from 1 % as this one gets from 5 %, and as one of seconds from 50 %.
        options.max_overhead = 0.5 if options.fast else 0.05
    return options


def prepare(seed: int) -> None:
    """Seeds, and settings that suit models and data as small as these."""
    pl.seed_everything(seed, verbose=False)
    # Operations this small gain a quarter from a second thread on idle cores, and become twenty times
    # slower when the cores are busy with something else, since the threads wait for each other.
    torch.set_num_threads(1)
    # The data fit in memory: worker processes would cost more than they save.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 with a newer torch, in every fit.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


def run_loggers(output: Path) -> list[Logger]:
    """TensorBoard and CSV logs in `output`, in the same new version_<n>."""
    tensorboard = TensorBoardLogger(output, name="tensorboard")
    return [tensorboard, CSVLogger(output, name="csv", version=tensorboard.version)]


def progress_bar() -> TQDMProgressBar:
    """A bar that is redrawn every 20 micro-batches: drawing it takes as long as a small model's step."""
    return TQDMProgressBar(refresh_rate=20)


class Stage(NamedTuple):
    """The last logged values while one batch size was in force; NaN where nothing was logged."""

    batch_size: int
    last_step: int
    lr_scale: float
    overhead: float
    val_loss: float


def stages(run: RunLog) -> list[Stage]:
    """One row for each batch size of the ramp, in the order of training."""
    sizes = run.require("batch_size")
    ends = np.append(np.flatnonzero(np.diff(sizes.values)), len(sizes.values) - 1)
    rows, begin = [], -1.0
    for end in ends:
        last_step = int(sizes.steps[end])
        # The last validation may follow a step that was not logged.
        until = math.inf if end == ends[-1] else last_step
        logged = [run.at(name, last_step) for name in Stage._fields[2:-1]]
        validation = _last(run.series["val_loss"], begin, until) if "val_loss" in run.series else math.nan
        rows.append(Stage(round(sizes.values[end]), last_step, *logged, validation))
        begin = last_step
    return rows


def _last(series: Series, after: float, until: float) -> float:
    """The last value of a series at a step in `(after, until]`, NaN if there is none."""
    inside = series.values[(series.steps > after) & (series.steps <= until)]
    return float(inside[-1]) if inside.size else math.nan


def table(rows: Sequence[Stage]) -> str:
    """The stages as text, in columns."""
    header = ["batch size", "until step", "learning rate x", "sqrt scaling x", "validation loss"]
    base = rows[0].batch_size
    cells = [
        [
            f"{row.batch_size}",
            f"{row.last_step:,}",
            f"{row.lr_scale:.2f}",
            f"{math.sqrt(row.batch_size / base):.2f}",
            f"{row.val_loss:.4f}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *cells]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]).replace("nan", "  -")


def summary(run: RunLog, rows: Sequence[Stage]) -> str:
    """What a person would want to know in the end."""
    first, last = rows[0], rows[-1]
    steps = last.last_step + 1
    examples = run.get("examples").values
    lines = [
        f"The batch size grew from {first.batch_size} to {last.batch_size}, and the learning rate to "
        f"{last.lr_scale:.1f} times what the schedule says."
    ]
    if examples.size:
        whole = examples[-1] / first.batch_size
        lines.append(f"That took {steps:,} optimizer steps; batches of {first.batch_size} take {whole:,.0f}.")
    critical = run.get("critical_batch_size").values
    if critical.size:
        lines.append(
            f"Batches far above {critical[-1]:,.0f} examples (the critical batch size) would save few steps."
        )
    if not math.isnan(last.overhead):
        lines.append(f"Measuring this cost as much as {last.overhead:.1%} more passes, arithmetic included.")
    return "\n".join(lines)


def print_report(loggers: Sequence[Logger], *, title: str) -> Path:
    """Print the table of a finished run and write its picture; both come from the logs."""
    directory = Path(str(loggers[0].log_dir))
    run = read_run(directory, also=["val_loss"])
    rows = stages(run)
    print(f"\n{title}\n\n{table(rows)}\n\n{summary(run, rows)}")
    picture = directory / "surge.png"
    draw_story(run, title).savefig(picture)
    print(f"\npicture  {picture}\ncharts   tensorboard --logdir {directory.parent}")
    print(f"details  lightning-surge plot {directory}")
    return picture
