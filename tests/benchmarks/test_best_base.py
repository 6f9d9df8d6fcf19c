"""Live runs on the best base learning rate: which one that is, and that it holds from the change on."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from benchmarks.cells import Store
from benchmarks.fidelity import best_base
from benchmarks.fidelity.best_base import best_multiplier, live_at_best_base
from benchmarks.fidelity.training import PHASES, continue_run, train_to
from benchmarks.fidelity.workloads import WORKLOADS

POINT: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "start", "examples": 8192}


def store_with(directory: Path, *, best: float) -> Store:
    """Parabolas in the logarithm, around a multiplier at 16 and around others that must not count."""
    keys = [
        (POINT | {"batch_size": 16}, best),
        (POINT | {"batch_size": 64}, 0.25),
        (POINT | {"batch_size": 16, "phase": "late"}, 4.0),
        (POINT | {"batch_size": 16, "examples": 32_768}, 4.0),
    ]
    grid = [0.25, 0.5, 1.0, 2.0, 4.0]
    lines = [
        key | {"multipliers": grid, "seeds": [0], "losses": [[math.log2(m / middle) ** 2 for m in grid]]}
        for key, middle in keys
    ]
    (directory / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Store(directory)


class LearningRates(pl.Callback):
    """As they are when a batch starts."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def test_the_best_base_lr_is_that_of_the_sweep_at_the_same_point(tmp_path: Path) -> None:
    assert best_multiplier(store_with(tmp_path, best=1.7), **POINT) == pytest.approx(1.7)


def test_without_a_sweep_there_is_nothing_to_run(tmp_path: Path) -> None:
    key = POINT | {"seed": 0, "objective": "progress", "max_overhead": 0.05}
    with pytest.raises(LookupError, match=r"sweep at the base batch size.*perceptron"):
        live_at_best_base(Store(tmp_path), **key)


def test_the_multiplier_is_what_is_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(best_base, "live", lambda **key: asked.update(key) or {"by_batch_size": {}})
    key = POINT | {"seed": 0, "objective": "progress", "max_overhead": 0.05}
    record = live_at_best_base(store_with(tmp_path, best=0.5), **key)
    assert record["multiplier"] == pytest.approx(0.5)
    assert asked == key | {"multiplier": record["multiplier"]}


def test_the_multiplier_holds_from_the_first_step_after_the_change() -> None:
    what = WORKLOADS[POINT["workload"]]
    before, after = LearningRates(), LearningRates()
    point: dict[str, Any] = {"beta_2": POINT["beta_2"], "phase": POINT["phase"], "seed": 0, "multiplier": 0.5}
    _, trainer = train_to(what, **point, callback=before)  # type: ignore[arg-type]
    continue_run(what, trainer, **point, batch_size=1024, callbacks=[after])
    assert before.seen == [what.lr] * PHASES["start"]
    assert after.seen == pytest.approx([0.5 * what.lr * (1 - step / 8) for step in range(8)])
