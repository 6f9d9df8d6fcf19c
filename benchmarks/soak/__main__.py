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
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity.markdown import targets_table
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
    """A time in which something is wrong with the training, as shares of the run's steps."""

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


def examples(size: int) -> TensorDataset:
    """Noisy examples of a random function."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(size, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, 1, generator=generator) / math.sqrt(FEATURES)
    noise = torch.randn(size, 1, generator=generator)
    return TensorDataset(inputs, torch.tanh(inputs @ teacher) + noise)


class Regression(pl.LightningModule):
    """A perceptron that suffers the phases, and looks after itself as a careful user's module does."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, 1))
        self.steps = steps

    @property
    def phase(self) -> Phase | None:
        return phase_at(self.trainer.global_step / self.steps)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
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
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            for parameter in self.parameters():
                parameter.grad = None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)


class Watch(pl.Callback):
    """Looks at every step, and takes a record at the end of every window of steps."""

    def __init__(self, surge: SurgeLRCallback, sizes: BatchSizeScheduler, steps: int) -> None:
        self.surge, self.sizes, self.steps = surge, sizes, steps
        self.records: list[dict[str, Any]] = []
        self.bad_factors = self.bad_weights = self.examples = 0
        self.reasons: dict[str, dict[str, int]] = {}
        self.began = time.perf_counter()
        self.looking = 0.0  # seconds that this benchmark spends on looking
        self._step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.examples += self.sizes.scheduled_batch_size
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
            gc.collect()
            seconds = begin - self.began - self.looking
            self.records.append(
                {
                    "step": self._step,
                    "resident": resident_mib(),
                    "objects": len(gc.get_objects()),
                    "examples": self.examples,
                    "passes": self.surge.overhead * self.examples,
                    "seconds": seconds,
                    "measuring": self.surge.overhead_time * seconds,
                    "measurements": self.surge.history.num_measurements,
                    "factor": None if decision is None else decision.used,
                    "reason": "" if decision is None else decision.reason,
                }
            )
        self.looking += time.perf_counter() - begin


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
    loader = DataLoader(examples(8192), batch_size=MICRO, shuffle=True)
    trainer.fit(module, loader)
    return module, watch


def slope(steps: ArrayLike, values: ArrayLike) -> tuple[float, float]:
    """Least-squares growth per 10,000 steps, and its standard error.

    The windows are not independent, so the error is that of ten medians of neighbouring windows.
    """
    x = [np.mean(group) / 10_000 for group in np.array_split(np.asarray(steps), 10)]
    y = [np.median(group) for group in np.array_split(np.asarray(values), 10)]
    (growth, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(growth), float(math.sqrt(covariance[0, 0]))


def costs(records: list[dict[str, Any]], begin: float, end: float) -> tuple[float, float]:
    """Between two shares of the run: passes of measuring per example, and its share of the time."""
    first, last = (records[max(round(share * len(records)) - 1, 0)] for share in (begin, end))
    change = {name: last[name] - first[name] for name in ("passes", "examples", "measuring", "seconds")}
    return change["passes"] / change["examples"], change["measuring"] / change["seconds"]


def recovery(records: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """For every phase, the share of the run after its end until a measurement was good again."""
    found = {}
    for phase in PHASES:
        after = [record for record in records if record["step"] >= phase.end * steps]
        good = (one["step"] for one in after if one["measurements"] > after[0]["measurements"])
        found[phase.name] = next(good, math.inf) / steps - phase.end
    return found


def summarised(watch: Watch, steps: int) -> list[dict[str, Any]]:
    """One row per target."""
    late = [record for record in watch.records if record["step"] >= SETTLED * steps]
    # Where every tenth should cost the same.
    seventh, tenth = costs(watch.records, 0.6, 0.7), costs(watch.records, 0.9, 1.0)
    last = watch.records[-1]
    of_late = {name: [record[name] for record in late] for name in ("step", "resident", "objects")}
    growth = {name: slope(of_late["step"], of_late[name]) for name in ("resident", "objects")}
    errors = {name: {"standard_error": round(error, 4)} for name, (_, error) in growth.items()}
    title, per = "in the last 40 %", "per 10,000 steps"
    longest = max(recovery(watch.records, steps).values())
    found: list[tuple[str, float, float, dict[str, float]]] = [
        (f"growth of memory {title}, MiB {per}", growth["resident"][0], 4.0, errors["resident"]),
        (f"growth of collectable objects {title}, {per}", growth["objects"][0], 200.0, errors["objects"]),
        ("passes of all measuring, per example", last["passes"] / last["examples"], OVERHEAD, {}),
        ("passes in the last tenth, over those in the seventh", tenth[0] / seventh[0], 1.2, {}),
        ("share of time in the last tenth, over that in the seventh", tenth[1] / seventh[1], 1.2, {}),
        ("steps with a factor outside its bounds, or none", watch.bad_factors, 0.0, {}),
        ("windows at whose end a weight was not finite", watch.bad_weights, 0.0, {}),
        ("longest time without a good measurement after a phase, share of the run", longest, 0.05, {}),
    ]
    return [target(name, float(value), bound, COMMAND, **more) for name, value, bound, more in found]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="600 steps, nothing written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps = 600 if options.quick else STEPS
    _, watch = run(steps)
    summary = summarised(watch, steps)
    text = targets_table(summary)
    print(text)
    if not options.quick:
        raw = {"steps": steps, "seed": SEED, "reasons": watch.reasons, "records": watch.records}
        write(RESULTS, summary, **raw)
        (RESULTS / "summary.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
