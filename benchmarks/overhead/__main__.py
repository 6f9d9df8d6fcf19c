"""Measure what the callback costs, in time and in memory.

    python -m benchmarks.overhead                   # about ten minutes on one core
    python -m benchmarks.overhead --quick           # under a minute, to see that it works

Time: processor seconds of the same steps with and without the callback, in turns in one process; the ratio is
taken pair by pair. Beside it what passes inside the callback's hooks, which does not see what it costs
elsewhere, as in caches. Memory: peak bytes of live tensors, from the allocator's own record, in units of the
model's parameters.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity.markdown import targets_table
from benchmarks.results import commit, measured_at, target, write
from benchmarks.trainer import quiet_trainer
from lightning_surge import SurgeLRCallback

RESULTS = Path(__file__).parent / "results"
COMMAND = "make bench"
PAIRS = 9
WARM_UP = 2
BATCH = 8


class Size(NamedTuple):
    """A perceptron of square layers, and what its ordinary steps may cost."""

    tensors: int
    width: int
    steps: int
    bookkeeping: float


# Of 0.1, 3 and 25 million parameters.
SIZES = (Size(20, 71, 120, 0.10), Size(200, 122, 6, 0.03), Size(2000, 112, 3, 0.02))
# Options of the callback, and the share of passes that they spend on measuring.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "no measurement": ({"probe_every": 10**9}, 0.0),
    "default": ({}, 0.01),
    "5 %": ({"max_overhead": 0.05}, 0.05),
    "dry run": ({"dry_run": True}, 0.01),
}
PHASES = {"between probes": (10**6, 1.0), "during a probe": (1, 4.0)}
# 4 and 25 million parameters.
MEMORY = (Size(4, 1024, 4, 0.0), Size(6, 2048, 4, 0.0))


class Perceptron(pl.LightningModule):
    """Of square layers, whose inputs are passed on beside what they add."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(size.width, size.width, bias=False) for _ in range(size.tensors)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        x = batch[0]
        for layer in self.layers:
            x = x + F.relu(layer(x)) / len(self.layers)
        return F.mse_loss(x, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Processor seconds of the steps after the first ones, and of those the ones inside the hooks."""

    def __init__(self, surge: SurgeLRCallback | None) -> None:
        self.surge = surge
        self.begin = self.inside = 0.0
        if surge is not None:
            surge._stopwatch.clock = time.process_time

    def _read(self) -> tuple[float, float]:
        return time.process_time(), 0.0 if self.surge is None else self.surge._stopwatch.seconds

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start when everything has run a few times."""
        if batch_idx == WARM_UP:
            self.begin, self.inside = self._read()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        end, inside = self._read()
        self.begin, self.inside = end - self.begin, inside - self.inside


def train(size: Size, callback: SurgeLRCallback | None, *, accumulation: int = 1) -> Clock:
    """Steps of a new model, always the same."""
    pl.seed_everything(0, verbose=False)
    inputs = torch.randn(BATCH * accumulation * (WARM_UP + size.steps), size.width)
    loader = DataLoader(TensorDataset(inputs, inputs.flip(1)), batch_size=BATCH)
    clock = Clock(callback)
    callbacks = [clock] if callback is None else [callback, clock]
    trainer = quiet_trainer(callbacks, max_epochs=1, accumulate_grad_batches=accumulation)
    trainer.fit(Perceptron(size), loader)
    return clock


def measure_time(size: Size, pairs: int) -> list[dict[str, Any]]:
    """Of each pair: time with over without the callback, and the share inside the hooks."""
    train(size._replace(steps=5), None)
    records = []
    for pair in range(pairs):
        made = {name: SurgeLRCallback(BATCH, **options) for name, (options, _) in CASES.items()}
        # In turns, so that none profits from a machine that slows down.
        order = [None, *made] if pair % 2 else [*made, None]
        clocks = {name: train(size, made[name] if name else None) for name in order}
        plain = clocks[None].begin
        for name, callback in made.items():
            surge = clocks[name]
            records.append(
                {
                    "tensors": size.tensors,
                    "case": name,
                    "seconds_without": plain,
                    "difference": surge.begin / plain - 1.0,
                    "in_hooks": surge.inside / (surge.begin - surge.inside),
                    "charged": callback.overhead,
                    "measurements": callback.history.num_measurements,
                }
            )
            print(records[-1], flush=True)
    return records


def peak_bytes(size: Size, callback: SurgeLRCallback | None, accumulation: int) -> int:
    """Most bytes alive at once while training, above what was alive before."""
    # What the run before left in reference cycles must not be freed, and so subtracted, during this record.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(size, callback, accumulation=accumulation)
    # The allocator's own record; the public tables add it up per operator, which hides the peak.
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def measure_memory() -> list[dict[str, Any]]:
    """Parameter-sized buffers above training without the callback, between probes and during one."""
    records = []
    for size in MEMORY:
        parameters = size.tensors * size.width**2
        for accumulation in (1, 4):
            plain = peak_bytes(size, None, accumulation)
            for phase, (every, _) in PHASES.items():
                callback = SurgeLRCallback(base_batch_size=2, probe_every=every, probe_examples=BATCH)
                buffers = (peak_bytes(size, callback, accumulation) - plain) / (4 * parameters)
                found = {"phase": phase, "accumulation": accumulation, "parameters": parameters}
                measured = callback.history.num_measurements
                records.append(found | {"buffers": buffers, "measurements": measured})
                print(records[-1], flush=True)
    return records


def summarised(memory: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per target."""
    summary = []
    for record in memory:
        what = f"{record['parameters'] / 1e6:.0f} million parameters"
        name = f"buffers of {what}, {record['phase']}, accumulation {record['accumulation']}"
        summary.append(target(name, record["buffers"], PHASES[record["phase"]][1], COMMAND, form=".2f"))
    for size in SIZES:
        for case, (_, budget) in CASES.items():
            chosen = [one for one in times if (one["tensors"], one["case"]) == (size.tensors, case)]
            # "Near": half as much again as the budget, beside the bookkeeping of every step.
            bound = size.bookkeeping + 1.5 * budget
            for key, words in (("in_hooks", "in the hooks"), ("difference", "paired difference")):
                values = [one[key] for one in chosen]
                if values:
                    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                    spread = {"quartiles": [round(low, 4), round(high, 4)], "form": ".1%"}
                    name = f"{size.tensors} tensors, {case}, {words}"
                    summary.append(target(name, statistics.median(values), bound, COMMAND, **spread))
    return summary


def main() -> None:
    """Run both, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, nothing written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pairs = 1 if options.quick else PAIRS
    sizes = [size._replace(steps=10) if options.quick else size for size in SIZES]
    memory = measure_memory()
    times = [record for size in sizes for record in measure_time(size, pairs)]
    now = {"commit": commit()}
    memory, times = ([record | now for record in records] for records in (memory, times))
    summary = summarised(memory, times)
    if not options.quick:
        write(RESULTS, summary, time=times, memory=memory)
        page = f"{targets_table(summary)}\n\n{measured_at(memory + times)}\n"
        (RESULTS / "table.md").write_text(page)


if __name__ == "__main__":
    main()
