"""The training before a change of the batch size and after it, with the callback as users have it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.fidelity.ensemble import Snapshot
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, Batch, Workload, draw
from benchmarks.trainer import quiet_trainer
from lightning_surge import SurgeLRCallback

__all__ = ["CONTINUED_EXAMPLES", "PHASES", "Study", "continue_run", "schedule", "train_to"]

PHASES = {"start": 16, "early": 256, "late": 1024, "cooled": 1280}
"""Optimizer steps at the base batch size before each phase."""
HOT_STEPS = 1024
COOLED_TO = 1 / 3
CONTINUED_EXAMPLES = 8192
# Nobody reads the logged values here, and they cost a fifth of such short steps.
NEVER = 10**9

Factor = Callable[[int], float]


def before(step: int) -> float:
    """Factor on the learning rate before the change: constant, then down to a third within 256 steps."""
    if step < HOT_STEPS:
        return 1.0
    return 1.0 - (1.0 - COOLED_TO) * min((step - HOT_STEPS) / (PHASES["cooled"] - HOT_STEPS), 1.0)


def schedule(phase: str, steps_after: int) -> Factor:
    """The factor of a run that changes its batch size at a phase and decays to zero in the steps after it."""
    change = PHASES[phase]

    def factor(step: int) -> float:
        if step < change:
            return before(step)
        return before(change) * max(1.0 - (step - change) / steps_after, 0.0)

    return factor


class HeldAdam(torch.optim.Adam):
    """Adam that leaves the parameters alone while it is held."""

    held = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.held:
            return super().step(closure)
        with torch.enable_grad():
            return None if closure is None else closure()


class Study(pl.LightningModule):
    """Trains a workload's network, or holds it still."""

    def __init__(
        self, workload: Workload, betas: tuple[float, float], factor: Factor = lambda step: 1.0
    ) -> None:
        super().__init__()
        self.network = workload.network()
        self.workload = workload
        self.factor = factor
        self.optimizer = HeldAdam(self.network.parameters(), lr=workload.lr, betas=betas)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.workload.loss(self.network, batch)

    def configure_optimizers(self) -> Any:
        """The same optimizer, with its averages, in every fit."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def snapshot(self) -> Snapshot:
        """Weights and Adam's averages as they stand."""
        state = {name: self.optimizer.state[p] for name, p in self.network.named_parameters()}
        return Snapshot(
            {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()},
            {name: entry["exp_avg"].clone() for name, entry in state.items()},
            {name: entry["exp_avg_sq"].clone() for name, entry in state.items()},
            int(next(iter(state.values()))["step"]),
        )


class StopAt(pl.Callback):
    """Ends a run before its planned end."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self._step


class Batches:
    """So many fresh random batches. Its length counts those that an earlier part of the run has used."""

    def __init__(self, data: Batch, size: int, count: int, seed: int, used: int = 0) -> None:
        self._data, self._size, self._count, self._seed, self._used = data, size, count, seed, used

    def __len__(self) -> int:
        return self._used + self._count

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._count):
            yield draw(self._data, self._size, generator)


def fit(
    study: Study,
    batches: Batches,
    callbacks: Sequence[pl.Callback],
    *,
    steps: int,
    ckpt_path: Path | None = None,
) -> pl.Trainer:
    """Train to a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epochs = 1 if ckpt_path is None else 2
        trainer = quiet_trainer(callbacks, max_steps=steps, max_epochs=epochs, log_every_n_steps=NEVER)
        trainer.fit(study, batches, ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def train_to(
    workload: Workload,
    *,
    beta_2: float,
    phase: str,
    seed: int,
    callback: SurgeLRCallback | None = None,
    examples: int = CONTINUED_EXAMPLES,
) -> tuple[Study, pl.Trainer]:
    """Train at the base batch size to a phase, after which so many examples will be trained."""
    pl.seed_everything(seed, verbose=False)
    rest = examples // BASE_BATCH_SIZE
    study = Study(workload, (0.9, beta_2), schedule(phase, rest))
    # The callback plans its probes for the whole run, of which the rest comes after the change.
    steps = PHASES[phase] + rest
    batches = Batches(workload.data(), BASE_BATCH_SIZE, steps, seed)
    callbacks: list[pl.Callback] = [] if callback is None else [callback]
    return study, fit(study, batches, [*callbacks, StopAt(PHASES[phase])], steps=steps)


def continue_run(
    workload: Workload,
    trainer: pl.Trainer,
    *,
    beta_2: float,
    phase: str,
    seed: int,
    batch_size: int,
    callbacks: Sequence[pl.Callback],
    examples: int = CONTINUED_EXAMPLES,
) -> Study:
    """Go on from a phase at another batch size over equal examples, with a decay to zero."""
    steps = examples // batch_size
    change = PHASES[phase]
    study = Study(workload, (0.9, beta_2), schedule(phase, steps))
    batches = Batches(workload.data(), batch_size, steps, continuation_seed(seed, batch_size), used=change)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "change.ckpt"
        trainer.save_checkpoint(path)
        fit(study, batches, callbacks, steps=change + steps, ckpt_path=path)
    return study


def continuation_seed(seed: int, batch_size: int) -> int:
    """Every learning rate sees the same batches, every batch size others."""
    return 10_000 + 100 * seed + batch_size
