"""The ratio through a decay of the learning rate: how fast it moves, and which averaging window follows it.

The law belongs to a state of training, and cooling changes that state. A run is measured all the way through
a decay at a generous cost; at marks on the way the model is held and measured until the ratio is known well.
Windows are then compared offline, on the same measurements.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from benchmarks.fidelity.one_step import measure
from benchmarks.fidelity.training import HOT_STEPS, Batches, Study, fit
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.estimates import estimate, fit_sign_law
from lightning_surge.policy.history import NoiseHistory

__all__ = ["HALF_LIVES", "MARKS", "RATIO_SIZES", "decay"]

DECAY_STEPS = 512
MARKS = (0.0, 0.25, 0.5, 0.75, 0.9)
HALF_LIVES = (2.0, 4.0, 8.0, 16.0, 32.0)
RATIO_SIZES = (64, 256)
PROBE_EVERY = 16
REFERENCE_MEASUREMENTS = 60


class Recorder(pl.Callback):
    """Keeps every measurement with the step it was taken at."""

    def __init__(self, surge: SurgeLRCallback) -> None:
        self._surge = surge
        self.records: list[tuple[int, dict[str, Any]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """One step."""
        state = self._surge.history.state_dict()
        if state["num_measurements"] > len(self.records):
            self.records.append((trainer.global_step, state["records"][-1]))


def decay(workload: str, beta_2: float, seed: int) -> dict[str, Any]:
    """Ratios through a linear decay to zero, by averaging window, and what they should be.

    Args:
        workload: its name.
        beta_2: Adam's.
        seed: of the training.

    Returns:
        At each mark of the decay: log2 of the ratios of a long measurement with the model held, and of the
        callback's with every half-life.
    """
    what = WORKLOADS[workload]
    points = {}
    records: list[tuple[int, dict[str, Any]]] = []
    for mark in MARKS:
        # Training is deterministic: each mark's run repeats the one before and goes on.
        pl.seed_everything(seed, verbose=False)
        stop = HOT_STEPS + round(mark * DECAY_STEPS)
        study = Study(what, (0.9, beta_2), _factor)
        surge = SurgeLRCallback(
            BASE_BATCH_SIZE,
            objective="alignment",
            dry_run=True,
            probe_every=PROBE_EVERY,
            probe_examples=16 * BASE_BATCH_SIZE,
        )
        recorder = Recorder(surge)
        batches = Batches(what.data(), BASE_BATCH_SIZE, stop, seed)
        fit(study, batches, [surge, recorder], steps=stop)
        records = recorder.records
        reference = measure(study, law="measured", count=REFERENCE_MEASUREMENTS, seed=seed).law
        points[mark] = {
            "lr_factor": _factor(stop),
            "reference": _log_ratios(reference),
            **{f"{half_life:g}": _log_ratios(_refit(records, half_life)) for half_life in HALF_LIVES},
        }
    return {"points": points, "measurements": len(records)}


def _factor(step: int) -> float:
    return max(1.0 - max(step - HOT_STEPS, 0) / DECAY_STEPS, 0.0)


def _refit(records: list[tuple[int, dict[str, Any]]], half_life: float) -> Any:
    history = NoiseHistory(half_life)
    history.load_state_dict({"num_measurements": len(records), "records": [record for _, record in records]})
    return estimate(history, fit_sign_law)


def _log_ratios(law: Any) -> list[float] | None:
    if law is None:
        return None
    return [math.log2(law.lr(size) / law.lr(BASE_BATCH_SIZE)) for size in RATIO_SIZES]
