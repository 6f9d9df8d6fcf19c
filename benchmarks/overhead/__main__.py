"""Measure what the callback costs, in time and in memory.

    python -m benchmarks.overhead            # about ten minutes on two cores
    python -m benchmarks.overhead --quick    # under a minute, to see that it works

Time: the demo's model and ramp, at a fifth of its length, with and without the callback in turns in one
process; the ratio of processor time is taken pair by pair. Memory: peak bytes of live tensors, from the
allocator's own record, in units of the model's parameters.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.fidelity.markdown import table
from benchmarks.results import target, write
from benchmarks.trainer import quiet_trainer
from examples.stdlib_transformer import FULL, MICRO_BATCH_SIZE, ByteTransformer, StandardLibraryText
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps

RESULTS = Path(__file__).parent / "results"
COMMAND = "make bench"
LEVELS = (0.01, 0.05, 0.25)
BOOKKEEPING = "statistics and bookkeeping of every step at B=8, no probe"
WIDTH = 2048
LAYERS = 5
FOLLOWING = "during a probe that follows the edge"
PHASES: list[tuple[str, int, Literal["step", "edge"]]] = [
    ("between probes", 10**6, "step"),
    ("during a probe", 1, "step"),
    (FOLLOWING, 1, "edge"),
]
BUFFERS = {"between probes": 1.0, "during a probe": 4.0, FOLLOWING: 5.0}


def run_ramp(
    data: StandardLibraryText, examples: int, seed: int, callback: SurgeLRCallback | None, end: int = 128
) -> float:
    """Processor seconds of a run on the demo's ramp, or at its smallest batch size."""
    pl.seed_everything(seed, verbose=False)
    ramp = GeometricRamp(start=8, end=end, duration=examples // 80)
    sizes = AccumulatedSchedule(ramp, MICRO_BATCH_SIZE, examples_per_epoch=examples)
    model = ByteTransformer(total_steps(sizes, examples), warmup_steps=20)
    callbacks: list[pl.Callback] = [BatchSizeWarmup(start=8, end=end, num_steps=examples // 80)]
    callbacks += [] if callback is None else [callback]
    trainer = quiet_trainer(callbacks, max_epochs=1, accelerator="auto")
    loader = DataLoader(Subset(data.train, range(examples)), batch_size=MICRO_BATCH_SIZE, shuffle=True)
    begin = time.process_time()
    trainer.fit(model, loader)
    return time.process_time() - begin


def measure_time(examples: int, pairs: int) -> list[dict[str, Any]]:
    """Ratios with over without the callback, for each budget on the ramp, and without any probe at B = 8."""
    data = StandardLibraryText(FULL, context=64)
    data.setup("fit")
    run_ramp(data, examples // 4, 0, None)  # warm-up, not counted
    cases: list[tuple[str, int, dict[str, Any]]] = [
        (f"max_overhead={level:g} on the demo's ramp", 128, {"max_overhead": level}) for level in LEVELS
    ]
    cases.append((BOOKKEEPING, 8, {"probe_every": 10**9}))
    records = []
    for seed in range(pairs):
        for name, end, options in cases:
            # The shorter one has nothing rare in it.
            length = examples if end > 8 else examples // 4
            without = run_ramp(data, length, seed, None, end)
            callback = SurgeLRCallback(base_batch_size=8, **options)
            ratio = run_ramp(data, length, seed, callback, end) / without
            record = {
                "case": name,
                "target": options.get("max_overhead", 0.0) * 1.5 + 0.02,
                "seed": seed,
                "examples": length,
                "seconds_without": without,
                "ratio": ratio,
                "charged": callback.overhead,
                "measurements": callback.history.num_measurements,
            }
            records.append(record)
            print(
                f"{name}, pair {seed + 1}/{pairs}: {ratio - 1:+7.2%} processor time, "
                f"{callback.overhead:6.2%} charged, {callback.history.num_measurements} measurements",
                flush=True,
            )
    return records


class Wide(pl.LightningModule):
    """A perceptron of about 20 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def peak_bytes(callback: SurgeLRCallback | None, accumulation: int, steps: int) -> int:
    """Most bytes alive at once while training, above what was alive before."""
    # What the run before left in reference cycles must not be freed, and so subtracted, during this record.
    gc.collect()
    pl.seed_everything(0, verbose=False)
    inputs = torch.randn(64, WIDTH)
    loader = DataLoader(TensorDataset(inputs, inputs.flip(1)), batch_size=8)
    model = Wide()
    callbacks: list[pl.Callback] = [] if callback is None else [callback]
    options = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": accumulation}
    trainer = quiet_trainer(callbacks, accelerator="auto", **options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.fit(model, loader)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.fit(model, loader)
    # The allocator's own record; the public tables add it up per operator, which hides the peak.
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def measure_memory() -> list[dict[str, Any]]:
    """Parameter-sized buffers above training without the callback, between probes and during one.

    With `objective="edge"` a vector is kept between probes, and counted during one.
    """
    size = sum(p.numel() * p.element_size() for p in Wide().parameters())
    records = []
    for accumulation in (1, 8):
        plain = peak_bytes(None, accumulation, steps=4)
        for phase, every, objective in PHASES:
            callback = SurgeLRCallback(
                base_batch_size=2, probe_every=every, probe_examples=8, objective=objective
            )
            # Adam's averages tell mean and variance apart after three steps; one more makes the vector.
            peak = peak_bytes(callback, accumulation, steps=6 if objective == "edge" else 4)
            records.append(
                {
                    "phase": phase,
                    "accumulation": accumulation,
                    "parameters": size // 4,
                    "peak_bytes_without": plain,
                    "peak_bytes": peak,
                    "buffers": (peak - plain) / size,
                    "measurements": callback.history.num_measurements,
                }
            )
            print(
                f"accumulation {accumulation}, {phase}: {(peak - plain) / size:+.2f} parameter-sized buffers"
            )
    return records


def summarised(memory: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per target."""
    summary = []
    for record in memory:
        phase, accumulation = record["phase"], record["accumulation"]
        name = f"memory {phase}, accumulation {accumulation}, in parameter-sized buffers"
        summary.append(target(name, record["buffers"], BUFFERS[phase], COMMAND))
    for case in dict.fromkeys(record["case"] for record in times):
        of_case = [record for record in times if record["case"] == case]
        # "Near": half as much again, and two percent for what every step costs.
        ratios = [record["ratio"] - 1.0 for record in of_case]
        span = [round(min(ratios), 4), round(max(ratios), 4)]
        median, bound = statistics.median(ratios), of_case[0]["target"]
        summary.append(target(f"processor time, {case}", median, bound, COMMAND, range=span))
    return summary


def page(summary: list[dict[str, Any]]) -> str:
    """Markdown: one row per target."""
    lines = []
    for entry in summary:
        form = "{:.1f}" if "buffers" in entry["name"] else "{:.1%}"
        value, bound = (form.format(entry[key]) for key in ("value", "bound"))
        value += " ({:+.1%} to {:+.1%})".format(*entry["range"]) if "range" in entry else ""
        lines.append([entry["name"], value, f"at most {bound}", "met" if entry["met"] else "missed"])
    return table(["what", "median (range of 3 pairs)", "target", ""], lines)


def main() -> None:
    """Run both, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, nothing written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    memory = measure_memory()
    times = measure_time(examples=1600 if options.quick else 16_000, pairs=1 if options.quick else 3)
    summary = summarised(memory, times)
    if not options.quick:
        write(RESULTS, summary, time=times, memory=memory)
        (RESULTS / "table.md").write_text(page(summary) + "\n")


if __name__ == "__main__":
    main()
