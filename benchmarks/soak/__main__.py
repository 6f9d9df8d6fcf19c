"""Train for long, through bad times, and see whether measuring leaks, slows down or loses its head.

    python -m benchmarks.soak            # 20,000 steps, about ten minutes on two cores
    python -m benchmarks.soak --quick    # 600 steps, seconds; nothing written

A small perceptron, a ramp of the batch size by accumulation (probes first, then measurements from the
micro-batches), and phases in which the training misbehaves; in between it is itself again. The overhead is
set to a quarter, so that there are hundreds of measurements.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import resource
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.fidelity.markdown import table, targets_table
from benchmarks.results import target, write
from benchmarks.trainer import quiet_trainer
from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp

RESULTS = Path(__file__).parent / "results"
COMMAND = "make soak"
STEPS = 20_000
SEED = 0
MICRO = 8
LARGEST = 4 * MICRO
FEATURES = 16
WIDTH = 64
LR = 1e-3
OVERHEAD = 0.25
# Of the run's steps: when memory is read, and what the rates of a tenth are taken between.
WINDOWS = 100
# By then the ramp and the phases are over, and the laws that are kept are all from after them.
SETTLED = 0.6


class Phase(NamedTuple):
    """A time in which something is wrong with the training.

    Attributes:
        name: what is wrong.
        begin: share of the run's steps before it.
        end: share of the run's steps before the end of it.
    """

    name: str
    begin: float
    end: float


PHASES = (
    Phase("the loss is NaN and the module drops its gradients", 0.25, 0.28),
    Phase("examples are NaN and training_step returns None", 0.31, 0.34),
    Phase("the loss is constant, without a gradient", 0.37, 0.40),
    Phase("the gradients are zero", 0.43, 0.46),
)
NAN_LOSS, NAN_EXAMPLES, CONSTANT, ZERO = PHASES


def phase_at(share: float) -> Phase | None:
    """The phase of a step, None in good times."""
    return next((phase for phase in PHASES if phase.begin <= share < phase.end), None)


class Examples(Dataset[Any]):
    """Noisy examples of a random function, a batch at a time."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.inputs = torch.randn(size, FEATURES, generator=generator)
        teacher = torch.randn(FEATURES, 1, generator=generator) / math.sqrt(FEATURES)
        self.targets = torch.tanh(self.inputs @ teacher) + torch.randn(size, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class Regression(pl.LightningModule):
    """A perceptron that suffers the phases, and looks after itself as a careful user's module does."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, 1))
        self.steps = steps

    @property
    def phase(self) -> Phase | None:
        """What is wrong now."""
        return phase_at(self.trainer.global_step / self.steps)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Mean squared error, or what the phase makes of it."""
        inputs, targets = batch
        phase = self.phase
        if phase is NAN_EXAMPLES:
            inputs = inputs * math.nan
        outputs = self.net(inputs)
        if not bool(outputs.isfinite().all()):
            return None
        loss = nn.functional.mse_loss(outputs, targets)
        if phase is NAN_LOSS:
            return loss * math.nan
        if phase is CONSTANT:
            return torch.ones((), requires_grad=True) * 1.0
        return loss * 0.0 if phase is ZERO else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """No step with gradients that are no numbers."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            for parameter in self.parameters():
                parameter.grad = None

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)


class Record(NamedTuple):
    """What was found at the end of a window of steps."""

    step: int  # optimizer steps taken
    resident: float  # memory of the process in MiB
    objects: int  # containers that the garbage collector knows
    examples: float  # trained on
    passes: float  # of measuring, with the safety factor
    seconds: float  # since the training began
    measuring: float  # of these, for measuring
    measurements: int  # so far
    scale: float  # the factor on the learning rate
    reason: str  # of the factor
    batch_size: int  # examples of the latest step


class Watch(pl.Callback):
    """Takes the records, and looks at every step."""

    def __init__(self, surge: SurgeLRCallback, sizes: BatchSizeScheduler, steps: int) -> None:
        self.surge, self.sizes, self.steps = surge, sizes, steps
        self.records: list[Record] = []
        self.bad_factors = self.bad_weights = 0
        self.reasons: dict[str, dict[str, int]] = {}
        self.began = time.perf_counter()
        # What this benchmark spends on looking.
        self.looking = 0.0
        self._step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """After every optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        begin = time.perf_counter()
        decision = self.surge.decision
        if decision is not None:
            bound = LARGEST / MICRO
            self.bad_factors += not 1.0 / bound <= decision.used <= bound
            phase = phase_at((self._step - 1) / self.steps)
            counts = self.reasons.setdefault("good times" if phase is None else phase.name, {})
            counts[decision.reason] = counts.get(decision.reason, 0) + 1
        if self._step % max(self.steps // WINDOWS, 1) == 0:
            weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
            self.bad_weights += not bool(weights.isfinite().all())
            self._record(begin)
        self.looking += time.perf_counter() - begin

    def _record(self, now: float) -> None:
        gc.collect()
        decision, examples = self.surge.decision, self.surge._measurer.budget.trained
        self.records.append(
            Record(
                step=self._step,
                resident=resident_mib(),
                objects=len(gc.get_objects()),
                examples=examples,
                passes=self.surge._measurer.budget.spent,
                seconds=now - self.began - self.looking,
                measuring=self.surge._stopwatch.seconds,
                measurements=self.surge.history.num_measurements,
                scale=math.nan if decision is None else decision.used,
                reason="" if decision is None else decision.reason,
                batch_size=self.sizes.scheduled_batch_size,
            )
        )


def resident_mib() -> float:
    """Memory of this process; its largest so far where the system does not tell the present one."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(steps: int, **options: Any) -> tuple[Regression, Watch]:
    """One long training, with options of the learning-rate callback: the module, and what was seen."""
    pl.seed_everything(SEED, verbose=False)
    sizes = BatchSizeScheduler(GeometricRamp(MICRO, LARGEST, duration=steps // 5))
    surge = SurgeLRCallback(base_batch_size=MICRO, **({"max_overhead": OVERHEAD} | options))
    watch = Watch(surge, sizes, steps)
    module = Regression(steps)
    trainer = quiet_trainer([sizes, surge, watch], max_steps=steps, max_epochs=-1)
    loader = DataLoader(Examples(8192), batch_size=MICRO, shuffle=True, collate_fn=lambda batch: batch)
    trainer.fit(module, loader)
    return module, watch


def slope(steps: list[int], values: list[float]) -> tuple[float, float]:
    """Least-squares growth per 10,000 steps, and its standard error.

    The windows are not independent, so the error is that of ten medians of neighbouring windows.
    """
    groups = np.array_split(np.arange(len(steps)), 10)
    x = np.array([np.mean(np.array(steps)[group]) for group in groups]) / 10_000
    y = np.array([np.median(np.array(values)[group]) for group in groups])
    (slope_, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope_), float(math.sqrt(covariance[0, 0]))


def tenths(records: list[Record], steps: int) -> list[dict[str, float]]:
    """Overhead in each tenth of the run, in passes and in time."""
    edges = [0, *(index * len(records) // 10 - 1 for index in range(1, 11))]
    rates = []
    for start, stop in pairwise(edges):
        first, last = records[start], records[stop]
        rates.append(
            {
                "until": last.step / steps,
                "passes": (last.passes - first.passes) / (last.examples - first.examples),
                "time": (last.measuring - first.measuring) / (last.seconds - first.seconds),
                "measurements": last.measurements - first.measurements,
                "milliseconds_per_step": 1e3 * (last.seconds - first.seconds) / (last.step - first.step),
            }
        )
    return rates


def recovery(records: list[Record], steps: int) -> dict[str, float]:
    """For every phase, the share of the run after its end until a measurement was good again.

    What it then says is another matter: near the end of training the edge of stability is often hidden by
    noise, in good times too, and the factor held for it.
    """
    found = {}
    for phase in PHASES:
        after = [record for record in records if record.step >= phase.end * steps]
        good = (record.step for record in after if record.measurements > after[0].measurements)
        found[phase.name] = next(good, math.inf) / steps - phase.end
    return found


def summarised(watch: Watch, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was found, and one row per target."""
    records = watch.records
    late = [record for record in records if record.step >= SETTLED * steps]
    memory = slope([r.step for r in late], [r.resident for r in late])
    objects = slope([r.step for r in late], [float(r.objects) for r in late])
    rates = tenths(records, steps)
    # Where every tenth should cost the same.
    first, *_, last = [rate for rate in rates if rate["until"] > SETTLED + 0.05]
    recovered = recovery(records, steps)
    raw = {
        "steps": steps,
        "seed": SEED,
        "memory_mib_per_10000_steps": memory,
        "objects_per_10000_steps": objects,
        "tenths": rates,
        "recovered_after_share_of_run": recovered,
        "reasons": watch.reasons,
        "records": [record._asdict() for record in records],
    }
    per_example = records[-1].passes / records[-1].examples
    passes, share = last["passes"] / first["passes"], last["time"] / first["time"]
    growth = "in the last 40 %"
    found: list[tuple[str, float, float, dict[str, float]]] = [
        (f"growth of memory {growth}, MiB per 10,000 steps", memory[0], 4.0, _error(memory)),
        (f"growth of collectable objects {growth}, per 10,000 steps", objects[0], 200.0, _error(objects)),
        ("passes of all measuring, per example", per_example, OVERHEAD, {}),
        ("passes in the last tenth, over those in the seventh", passes, 1.2, {}),
        ("share of time in the last tenth, over that in the seventh", share, 1.2, {}),
        ("steps with a factor outside its bounds, or none", watch.bad_factors, 0.0, {}),
        ("windows at whose end a weight was not finite", watch.bad_weights, 0.0, {}),
        (
            "longest time without a good measurement after a phase, share of the run",
            max(recovered.values()),
            0.05,
            {},
        ),
    ]
    return raw, [target(name, value, bound, COMMAND, **more) for name, value, bound, more in found]


def _error(growth: tuple[float, float]) -> dict[str, float]:
    return {"standard_error": round(growth[1], 4)}


def page(summary: list[dict[str, Any]], rates: list[dict[str, float]]) -> str:
    """Markdown: one row per target, then one per tenth."""
    lines = [
        [
            f"{rate['until']:.0%}",
            f"{rate['passes']:.3f}",
            f"{rate['time']:.3f}",
            f"{rate['measurements']:.0f}",
            f"{rate['milliseconds_per_step']:.2f}",
        ]
        for rate in rates
    ]
    tenths_table = table(["until", "passes", "time", "measurements", "ms per step"], lines)
    return f"{targets_table(summary)}\n\n{tenths_table}"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="600 steps, nothing written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps = 600 if options.quick else STEPS
    _, watch = run(steps)
    raw, summary = summarised(watch, steps)
    text = page(summary, raw["tenths"])
    print(text)
    if not options.quick:
        write(RESULTS, summary, **raw)
        (RESULTS / "summary.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
