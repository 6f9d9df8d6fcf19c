"""Dry runs of random trainings, each against the same training without the callback: equal bit for bit.

    python -m benchmarks.soak.dry_runs --count 150      # some minutes; exit 1 if one differs
    python -m benchmarks.soak.dry_runs --only 17        # one set-up again

A seed decides everything: module, optimizer, schedule, precision, clipping, accumulation, loader, callbacks
beside, and what is measured how.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trainer import quiet_trainer
from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize

SETUPS = 150
FEATURES = 5
SCHEDULES: list[Any] = [partial(ExponentialLR, gamma=0.9), partial(CosineAnnealingLR, T_max=9)]
OPTIMIZERS = ["AdamW", "AdamW", "Adam", "SGD", "NAdam", "RMSprop", "Adagrad"]


class Net(pl.LightningModule):
    """A small network with whatever the draw gives it, which leaves traces of every kind."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        norm = draw.choice([nn.Identity, nn.Identity, lambda: nn.BatchNorm1d(8), lambda: nn.LayerNorm(8)])
        middle = [norm(), draw.choice([nn.Tanh, nn.ReLU, nn.GELU])(), nn.Dropout(draw.choice([0.0, 0.3]))]
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Linear(8, 1))
        self.kind, self.schedule = draw.choice(OPTIMIZERS), draw.choice([None, *SCHEDULES])
        self.noise, self.summed = draw.choice([0.0, 0.1]), draw.random() < 0.15
        self.automatic_optimization = draw.random() < 0.85
        self.register_buffer("average", torch.zeros(()))
        self.notes: list[float] = []
        self.counts = {"steps": [0]}

    def loss(self, batch: Any) -> Tensor:
        """Squared errors: their mean or, as some write it, their sum."""
        x, y = batch
        errors = (self.net(x + self.noise * torch.randn_like(x)) - y).square()
        return errors.sum() if self.summed else errors.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss, with draws from every stream."""
        self.counts["steps"].append(batch_idx)
        self.notes.append(random.random() + np.random.rand())  # noqa: NPY002
        loss = self.loss(batch)
        self.average.mul_(0.9).add_(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """In the midst of training."""
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        """What was drawn."""
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=0.01)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def train(seed: int, *, watched: bool) -> tuple[dict[str, Any], int]:
    """What one training of a set-up leaves, and how often it was measured."""
    draw = random.Random(seed)
    pl.seed_everything(seed, verbose=False)
    module = Net(draw)
    automatic = module.automatic_optimization
    size, batches = draw.choice([4, 8, 16]), draw.randint(9, 30)
    x = torch.randn(size * batches - draw.choice([0, size // 2]), FEATURES)
    data = TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(len(x), 1))
    loader = DataLoader(data, size, shuffle=draw.random() < 0.5)
    accumulation, clip = draw.choice([1, 1, 2, 4, 8]), draw.choice([None, None, 0.1])
    options: dict[str, Any] = {"max_epochs": draw.randint(1, 3), "limit_val_batches": draw.choice([0, 2])}
    precision = draw.choice(["32-true", "32-true", "bf16-mixed", "16-mixed"])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaled = precision == "16-mixed"
    options |= {"plugins": MixedPrecision(precision, "cpu", scaler)} if scaled else {"precision": precision}
    laws: list[Any] = [("measured", objective) for objective in (None, "alignment", "step")]
    if module.kind != "SGD":
        laws += [("theorem2", None), ("theorem3", None)]
    callbacks: list[pl.Callback] = []
    if automatic and draw.random() < 0.3:
        callbacks.append(BatchSizeScheduler(ConstantSize(size * accumulation)))
    elif automatic:
        options |= {"accumulate_grad_batches": accumulation}
    options |= {"gradient_clip_val": clip} if automatic else {}
    chosen: dict[str, Any] = {
        "probe_every": draw.choice([1, 2, 3]),
        "split_batch": draw.choice([None, False]),
    }
    chosen |= {"probe_examples": draw.choice([None, 8, 32])}
    if not automatic or draw.random() < 0.2:
        chosen["loss_fn"] = lambda module, batch: module.loss(batch)
    surge = SurgeLRCallback(draw.choice([1, size, None]), *draw.choice(laws), dry_run=True, **chosen)
    trainer = quiet_trainer([*callbacks, *([surge] if watched else [])], log_every_n_steps=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, DataLoader(data, 16))
    left = {
        "module": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "python": [module.notes, module.counts],
        "logged": {key: value for key, value in trainer.callback_metrics.items() if "surge/" not in key},
        "streams": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()],  # noqa: NPY002
    }
    return left, surge.history.num_measurements


def compare(seed: int) -> tuple[list[str], int]:
    """What a dry run of a set-up changes, and how often it measured."""
    (alone, _), (watched, measured) = train(seed, watched=False), train(seed, watched=True)
    # As lists, of which `repr` shows every bit.
    alone, watched = tree_map_only(Tensor, Tensor.tolist, (alone, watched))
    return [part for part in alone if repr(alone[part]) != repr(watched[part])], measured


def main(argv: list[str] | None = None) -> int:
    """Compare set-ups and say which differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=SETUPS, help="set-ups, seeds 0, 1, 2, ...")
    parser.add_argument("--only", type=int, help="the seed of one set-up")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.count) if arguments.only is None else [arguments.only]
    torch.set_num_threads(1)
    differing = measurements = 0
    for seed in seeds:
        changed, measured = compare(seed)
        measurements += measured
        if changed:
            differing += 1
            print(f"set-up {seed} differs: {', '.join(changed)}", flush=True)
    print(
        f"{len(seeds) - differing} of {len(seeds)} set-ups equal bit for bit, in {measurements} measurements"
    )
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
