"""Killed anywhere, and resumed from the last checkpoint: the training that was not killed, bit for bit.

`SurgeLRCallback` alone keeps all of its own state. Random streams and the places of loaders are Lightning's,
which does not keep them all; `ExactResume` does.
"""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_surge import BatchSizeScheduler, ExactResume, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize
from tests.trainings import (
    MakeOptimizer,
    Outside,
    Regression,
    assert_same,
    every_step,
    probing,
    regression_data,
    saved_steps,
    trained,
    with_lr,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Expected a learning-rate schedule that reaches its end"),
]

EXAMPLES, EPOCHS, EVERY = 96, 2, 3
adamw = with_lr(AdamW, 0.01, betas=(0.9, 0.95))
# What happens in a step, in the order in which it does.
TRAINING, REPLAY, STEP = "training", "replay", "step"


class Net(Regression):
    """Says what it is asked for: passes of training, passes of measuring, and optimizer steps."""

    def __init__(self, make_optimizer: MakeOptimizer, dropout: float, kill_at: int | None = None) -> None:
        super().__init__(make_optimizer, lambda optimizer: CosineAnnealingLR(optimizer, T_max=40))
        self.net.insert(2, nn.Dropout(dropout))
        self.kill_at = kill_at
        self.outside = Outside()

    def happens(self, what: str) -> None:
        self.outside.notes.append(what)
        if len(self.outside.notes) - 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.outside.training = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.happens(TRAINING if self.outside.training else REPLAY)
        self.outside.training = False
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        configured["optimizer"].register_step_post_hook(lambda *_: self.happens(STEP))
        return configured


def stateful(micro: int) -> Any:
    return StatefulDataLoader(plain(micro).dataset, batch_size=micro, shuffle=True)


def plain(micro: int) -> Any:
    return regression_data(EXAMPLES, micro)


norms = {"objective": None, "probe_every": 1}
# Where probes measure, and where the micro-batches of a window do; alone, or with a fixed size beside.
RUNS: dict[str, dict[str, Any]] = {
    "probes": {"micro": 8},
    "micro-batches": {"micro": 2, "accumulation": 4},
    "probes, all kept": {"micro": 8, "scheduled": True, "dropout": 0.3},
    "micro-batches, all kept": {"micro": 2, "scheduled": True, "dropout": 0.3},
}
OTHER_STATES: dict[str, dict[str, Any]] = {
    # Of four batches, so that one pool is always under way where a checkpoint is written.
    "pooled": {"micro": 4, "every": 7, "options": norms | {"base_batch_size": 2}},
    "norms": {"micro": 2, "accumulation": 4, "options": norms | {"probe_examples": None}},
    "base from the first step": {"micro": 8, "options": norms | {"base_batch_size": None}},
    "budget": {"micro": 8, "options": {"objective": None, "probe_every": None, "max_overhead": 4.0}},
    "theorem2": {"micro": 8, "options": {"law": "theorem2"}},
    "theorem3": {"micro": 8, "options": {"law": "theorem3"}},
    "sgd": {"micro": 8, "options": norms, "make_optimizer": with_lr(SGD, 0.02, momentum=0.9)},
}


def train(
    path: Path,
    *,
    micro: int,
    accumulation: int = 1,
    scheduled: bool = False,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
    make_optimizer: MakeOptimizer = adamw,
    loader: Callable[[int], Any] = stateful,
    every: int = EVERY,
    kill_at: int | None = None,
    resume: Path | None = None,
) -> tuple[Net, SurgeLRCallback]:
    net = Net(make_optimizer, dropout, kill_at)
    surge = probing(**({"objective": "step", "probe_every": 2} | (options or {})))
    callbacks = [surge, every_step(path, every)]
    if scheduled:
        callbacks += [BatchSizeScheduler(ConstantSize(8)), ExactResume()]
    # A resumed process has other random streams than the one that was killed.
    pl.seed_everything(1 if resume is None else 77, verbose=False)
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulation}
    return trained(net, loader(micro), *callbacks, resume=resume, **options), surge


def killed(path: Path, kill_at: int, **options: Any) -> Path:
    """The last checkpoint of a process that got a SIGKILL at an event."""
    child = os.fork()
    if child == 0:
        try:
            train(path, kill_at=kill_at, **options)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return saved_steps(path)[-1]


def kill_points(
    events: list[str], chooser: random.Random, *, every: int, epoch: int, all_kept: bool
) -> list[int]:
    """Two passes within measurements, one of training, and an optimizer step, at random.

    A stateful loader that was saved after the last batch of an epoch has nothing left when it is resumed, and
    Lightning ends the training there, whatever callbacks there are; `ExactResume` mends that.
    """

    def may_be_killed(place: int) -> bool:
        taken = events[:place].count(STEP)
        saved = taken // every * every  # a checkpoint has been written before
        return taken > every and (all_kept or saved % epoch != 0)

    chosen = []
    for what, count in ((REPLAY, 2), (TRAINING, 1), (STEP, 1)):
        places = [place for place, event in enumerate(events) if event == what and may_be_killed(place)]
        chosen += chooser.sample(places, min(count, len(places)))
    return chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's threads do not survive a fork")
@pytest.mark.parametrize("name", [*RUNS, *OTHER_STATES])
def test_killed_anywhere(tmp_path: Path, name: str) -> None:
    options = {"every": EVERY} | (RUNS | OTHER_STATES)[name]
    every = options["every"]
    whole, surge = train(tmp_path / "whole", **options)
    steps = len(whole.lrs)
    if name in RUNS:
        assert steps == EPOCHS * EXAMPLES // 8
        assert len(set(whole.lrs)) == steps
        assert surge.history.num_measurements >= 6
    assert len(set(whole.lrs)) > steps // 2
    assert surge.history.num_measurements >= 4
    chooser, epoch, all_kept = random.Random(name), steps // EPOCHS, "scheduled" in options
    points = kill_points(whole.outside.notes, chooser, every=every, epoch=epoch, all_kept=all_kept)
    for place in points[: None if name in RUNS else 1]:
        last = killed(tmp_path / f"killed at {place}", place, **options)
        taken = whole.outside.notes[:place].count(STEP)
        done = int(last.stem.removeprefix("step="))
        assert taken - every <= done <= taken
        again, resumed = train(tmp_path / f"resumed {place}", resume=last, **options)
        assert again.lrs == whole.lrs[done:]
        assert torch.equal(again.weights, whole.weights)
        assert_same(resumed.state_dict(), surge.state_dict())
        assert resumed.lr_scale(300) == surge.lr_scale(300)


def test_a_pool_under_way_is_dropped_with_every_checkpoint(tmp_path: Path, unraised: list[str]) -> None:
    """Killing it means something only if checkpoints fall into pools."""
    pooled, measured = OTHER_STATES["pooled"], []
    for every in (3, 7, 1000):
        _, surge = train(tmp_path / str(every), **(pooled | {"every": every}))
        measured.append(surge.history.num_measurements)
    assert 0 == measured[0] < measured[1] < measured[2]
    assert "The last 3 checkpoints each came while batches were being pooled" in unraised.pop()


class TestAlone:
    """What `SurgeLRCallback` does not promise by itself, and why."""

    def test_random_numbers_of_training_are_not_kept(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"micro": 8, "dropout": 0.3, "every": 5}
        whole, _ = train(tmp_path / "whole", **options)
        again, _ = train(tmp_path / "again", resume=tmp_path / "whole" / "step=5.ckpt", **options)
        # The learning rate that follows from the checkpoint, but another dropout.
        assert again.lrs[0] == whole.lrs[5]
        assert not torch.equal(again.weights, whole.weights)

    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("epoch_end", [True, False])
    def test_a_plain_loader_begins_its_epoch_anew(self, tmp_path: Path, epoch_end: bool) -> None:
        every = EXAMPLES // 8 if epoch_end else 5
        options: dict[str, Any] = {"micro": 8, "loader": plain, "every": every}
        whole, _ = train(tmp_path / "whole", **options)
        again, _ = train(tmp_path / "again", resume=tmp_path / f"whole/step={every}.ckpt", **options)
        assert again.lrs[0] == whole.lrs[every]
        assert torch.equal(again.weights, whole.weights) is epoch_end
