"""A dry run equals no callback: what a repeated training step touches is put back, or noticed in time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, StepLR
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from tests.trainings import heard, make_trainer


class Net(pl.LightningModule):
    """A small network whose training step also does what it is told."""

    def __init__(self, touch: Callable[[Any], object], **attributes: Any) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.net = nn.Linear(4, 2)
        self.teacher = nn.Linear(4, 2).requires_grad_(False)
        self.touch = touch
        for name, value in attributes.items():
            setattr(self, name, copy.deepcopy(value) if not isinstance(value, Iterator) else value)
        self.told: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        extra = self.touch(self)
        loss = (self.net(batch) - self.teacher(batch)).square().mean()
        return loss * (1.0 + 0.01 * extra) if isinstance(extra, (int, float)) else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        self.own: LRScheduler = StepLR(optimizer, 2, 0.7)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.99), "interval": "step"}]


@dataclass
class Counter:
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(seen=0))
    rows: list[int] = field(default_factory=list)


def average(module: Any) -> None:
    for slow, fast in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


def normalise(module: Any) -> None:
    with torch.no_grad():
        module.net.weight.div_(module.net.weight.norm(dim=1, keepdim=True))


def disturb(module: Any) -> None:
    with torch.no_grad():
        module.net.weight.add_(torch.randn_like(module.net.weight), alpha=1e-3)


def write(key: str, factor: float) -> Callable[[Any], None]:
    def write_entry(module: Any) -> None:
        for group in module.trainer.optimizers[0].param_groups:
            group[key] *= factor

    return write_entry


def count(module: Any) -> int:
    module.counter.inner.seen += 1
    module.counter.rows.append(module.counter.inner.seen)
    return len(module.counter.rows)


# Whatever else a module may hold: tests of measure/replay.py.
UNDONE: dict[str, tuple[Callable[[Any], object], Callable[[], dict[str, Any]]]] = {
    "weight decay": (write("weight_decay", 1.01), dict),
    "learning rate": (write("lr", 0.99), dict),
    "own scheduler": (lambda module: module.own.step(), dict),
    "counter": (count, lambda: {"counter": Counter()}),
    "iterator of a list": (lambda module: next(module.ticks), lambda: {"ticks": iter(list(range(500)))}),
    "iterator in a list": (lambda module: next(module.ticks[0]), lambda: {"ticks": [itertools.count()]}),
}
NOTICED: dict[str, tuple[Callable[[Any], object], Callable[[], dict[str, Any]], str]] = {
    "teacher": (average, dict, "changes teacher.weight, teacher.bias"),
    "prototypes": (normalise, dict, "changes net.weight"),
    "noise on weights": (disturb, dict, "changes net.weight"),
    "generator": (
        lambda module: next(module.ticks),
        lambda: {"ticks": (tick for tick in range(500))},
        "uses Net.ticks, which cannot be put back",
    ),
}


def data() -> DataLoader[Any]:
    return DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), 8)  # type: ignore[arg-type]


def outcome(module: Net, *callbacks: pl.Callback, **options: Any) -> list[Any]:
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, data())
    group = trainer.optimizers[0].param_groups[0]
    own = {name: value for name, value in vars(module.own).items() if isinstance(value, (int, float))}
    return [
        *(p.tolist() for p in module.parameters()),
        group["lr"],
        group["weight_decay"],
        own,
        vars(module).get("counter"),
    ]


def dry_run(touch: Any, attributes: Any, accumulation: int) -> SurgeLRCallback:
    """The callback after a run whose outcome was that without it."""
    callback = SurgeLRCallback(2, objective="step", dry_run=True, probe_every=1)
    options = {"accumulate_grad_batches": accumulation}
    plain = outcome(Net(touch, **attributes()), **options)
    assert outcome(Net(touch, **attributes()), callback, **options) == plain
    return callback


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("accumulation", [1, 4])
class TestDryRuns:
    @pytest.mark.parametrize("kind", UNDONE)
    def test_put_back_what_a_step_touches(self, kind: str, accumulation: int) -> None:
        assert dry_run(*UNDONE[kind], accumulation).history.num_measurements > 1

    @pytest.mark.parametrize("kind", NOTICED)
    def test_stop_measuring_where_that_cannot_be(self, kind: str, accumulation: int) -> None:
        touch, attributes, trace = NOTICED[kind]
        with heard() as told:
            callback = dry_run(touch, attributes, accumulation)
        said = [text for text in told if "Measuring is off from now on" in text]
        # Normalised once per micro-batch, prototypes are as they will be: to repeat it changes nothing.
        idle = kind == "prototypes" and accumulation > 1
        assert len(said) == 1 - idle
        assert callback.state_dict()["measurer"]["off"] is not idle
        # Norms of windows repeat no step, and go on.
        assert (callback.history.num_measurements > 1) == (accumulation > 1)
        assert all(trace in message and "pass loss_fn=" in message for message in said)
