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
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_surge import BatchSizeScheduler, ExactResume, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize
from tests.trainings import at_update

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Expected a learning-rate schedule that reaches its end"),
]

EXAMPLES, EPOCHS, EVERY = 96, 2, 3
# What happens in a step, in the order in which it does.
TRAINING, REPLAY, STEP = "training", "replay", "step"


class Net(pl.LightningModule):
    """Says what it is asked for: passes of training, passes of measuring, and optimizer steps."""

    def __init__(self, dropout: float, kill_at: int | None = None) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        layers = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)]
        self.net = nn.Sequential(*layers)
        self.kill_at = kill_at
        self.lrs: list[float] = []
        self.outside = Outside()

    def happens(self, what: str) -> None:
        self.outside.events.append(what)
        if len(self.outside.events) - 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.outside.training = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.happens(TRAINING if self.outside.training else REPLAY)
        self.outside.training = False
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.9, 0.95))
        at_update(optimizer, lambda o: self.lrs.append(float(o.param_groups[0]["lr"])))
        optimizer.register_step_post_hook(lambda *_: self.happens(STEP))
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, T_max=40), "interval": "step"}]

    @property
    def weights(self) -> list[list[float]]:
        return [parameter.flatten().tolist() for parameter in self.parameters()]


class Outside:
    """Keeps what a measurement must not put back, where it does not look."""

    __slots__ = ("events", "training")

    def __init__(self) -> None:
        self.training = False
        self.events: list[str] = []


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 4, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) + torch.randn(EXAMPLES, 1, generator=generator))


def stateful(micro: int) -> Any:
    return StatefulDataLoader(dataset(), batch_size=micro, shuffle=True)


def plain(micro: int) -> Any:
    return DataLoader(dataset(), batch_size=micro)


# Where probes measure, and where the micro-batches of a window do; alone, or with a fixed size beside.
RUNS: dict[str, dict[str, Any]] = {
    "probes": {"micro": 8},
    "micro-batches": {"micro": 2, "accumulation": 4},
    "probes, all kept": {"micro": 8, "scheduled": True, "dropout": 0.3},
    "micro-batches, all kept": {"micro": 2, "scheduled": True, "dropout": 0.3},
}


def train(
    path: Path,
    *,
    micro: int,
    accumulation: int = 1,
    scheduled: bool = False,
    dropout: float = 0.0,
    loader: Callable[[int], Any] = stateful,
    every: int = EVERY,
    kill_at: int | None = None,
    resume: Path | None = None,
) -> tuple[Net, SurgeLRCallback]:
    torch.set_num_threads(1)
    net = Net(dropout, kill_at)
    surge = SurgeLRCallback(base_batch_size=4, objective="edge", probe_every=2, probe_examples=16)
    callbacks = [surge, ModelCheckpoint(path, "{step}", every_n_train_steps=every, save_top_k=-1)]
    if scheduled:
        callbacks += [BatchSizeScheduler(ConstantSize(8)), ExactResume()]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulation,
        callbacks=callbacks,
    )
    # A resumed process has other random streams than the one that was killed.
    pl.seed_everything(1 if resume is None else 77, verbose=False)
    trainer.fit(net, loader(micro), ckpt_path=None if resume is None else str(resume), weights_only=True)
    return net, surge


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
    saved = sorted(path.glob("*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
    return saved[-1]


def assert_same(one: Any, other: Any) -> None:
    """Equal numbers, lists, dicts and tensors; NaN is NaN."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other or (one != one and other != other)


def kill_points(events: list[str], chooser: random.Random) -> list[int]:
    """Two passes within measurements, one of training, and an optimizer step, at random."""
    chosen = []
    for what, count in ((REPLAY, 2), (TRAINING, 1), (STEP, 1)):
        # A checkpoint has been written before.
        places = [
            place
            for place, event in enumerate(events)
            if event == what and events[:place].count(STEP) > EVERY
        ]
        chosen += chooser.sample(places, count)
    return chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's threads do not survive a fork")
@pytest.mark.parametrize("name", RUNS)
def test_killed_anywhere(tmp_path: Path, name: str) -> None:
    options = RUNS[name]
    whole, surge = train(tmp_path / "whole", **options)
    steps = len(whole.lrs)
    assert steps == EPOCHS * EXAMPLES // 8
    assert len(set(whole.lrs)) == steps
    assert surge.history.num_measurements >= 6
    for place in kill_points(whole.outside.events, random.Random(name)):
        last = killed(tmp_path / f"killed at {place}", place, **options)
        taken = whole.outside.events[:place].count(STEP)
        done = int(last.stem.removeprefix("step="))
        assert taken - EVERY <= done <= taken
        again, resumed = train(tmp_path / f"resumed {place}", resume=last, **options)
        assert again.lrs == whole.lrs[done:]
        assert again.weights == whole.weights
        assert_same(resumed.state_dict(), surge.state_dict())


class TestAlone:
    """What `SurgeLRCallback` does not promise by itself, and why."""

    def test_random_numbers_of_training_are_not_kept(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"micro": 8, "dropout": 0.3, "every": 5}
        whole, _ = train(tmp_path / "whole", **options)
        again, _ = train(tmp_path / "again", resume=tmp_path / "whole" / "step=5.ckpt", **options)
        # The learning rate that follows from the checkpoint, but another dropout.
        assert again.lrs[0] == whole.lrs[5]
        assert again.weights != whole.weights

    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("epoch_end", [True, False])
    def test_a_plain_loader_begins_its_epoch_anew(self, tmp_path: Path, epoch_end: bool) -> None:
        steps = EXAMPLES // 8
        every = steps if epoch_end else 5
        options: dict[str, Any] = {"micro": 8, "loader": plain, "every": every}
        whole, _ = train(tmp_path / "whole", **options)
        last = tmp_path / "whole" / f"step={every}.ckpt"
        again, _ = train(tmp_path / "again", resume=last, **options)
        assert again.lrs[0] == whole.lrs[every]
        assert (again.weights == whole.weights) is epoch_end
