"""Dry runs of random trainings, each against the same training without the callback: equal bit for bit.

    python -m benchmarks.soak.dry_runs --count 150      # some minutes; exit 1 if one differs
    python -m benchmarks.soak.dry_runs --only 17        # one set-up again

A seed decides everything: module, optimizer, schedule, precision, clipping, accumulation, loader, callbacks
beside, and what is measured how. Compared are weights, buffers, gradients, states of optimizer, scheduler and
random streams, and what the module logged.
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
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trainer import quiet_trainer
from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.schedules.sizes import ConstantSize

SETUPS = 150
FEATURES = 5
SCHEDULES: list[Any] = [partial(ExponentialLR, gamma=0.9), partial(CosineAnnealingLR, T_max=9)]


class Net(pl.LightningModule):
    """A small network with whatever the draw gives it."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        norm = draw.choice([nn.Identity, nn.Identity, lambda: nn.BatchNorm1d(8), lambda: nn.LayerNorm(8)])
        middle = [norm(), draw.choice([nn.Tanh, nn.ReLU, nn.GELU])(), nn.Dropout(draw.choice([0.0, 0.3]))]
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Linear(8, 1))
        self.kind = draw.choice(["AdamW", "AdamW", "Adam", "SGD", "NAdam", "RMSprop", "Adagrad"])
        self.schedule = draw.choice([None, *SCHEDULES])
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
        """Draws from every stream, and leaves traces of every kind."""
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
        optimizer.step()
        return None

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
    """One training of a set-up; what it left, and how often it was measured."""
    draw = random.Random(seed)
    pl.seed_everything(seed, verbose=False)
    module = Net(draw)
    automatic = module.automatic_optimization
    size, batches, epochs = draw.choice([2, 4, 8, 16]), draw.randint(9, 30), draw.randint(1, 3)
    x = torch.randn(size * batches - draw.randint(0, 1), FEATURES)
    data = TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(len(x), 1))
    loader = DataLoader(data, size, shuffle=draw.random() < 0.5)
    options: dict[str, Any] = {"accumulate_grad_batches": draw.choice([1, 1, 2, 4, 8])} if automatic else {}
    options |= {"gradient_clip_val": draw.choice([None, None, 0.1])} if automatic else {}
    precision = draw.choice(["32-true", "32-true", "bf16-mixed", "16-mixed"])
    if precision == "16-mixed":
        options["plugins"] = MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    else:
        options["precision"] = precision
    laws: list[Any] = [("measured", objective) for objective in (None, "alignment", "step")]
    if module.kind != "SGD":
        laws += [("theorem2", None), ("theorem3", None)]
    if "Adam" in module.kind and precision == "32-true" and not options.get("gradient_clip_val"):
        laws.append(("measured", "edge"))
    law, objective = draw.choice(laws)
    callbacks: list[pl.Callback] = []
    if automatic and draw.random() < 0.3:
        callbacks.append(BatchSizeScheduler(ConstantSize(size * options.pop("accumulate_grad_batches"))))
    surge = SurgeLRCallback(
        draw.choice([1, size, None]),
        law,
        objective,
        dry_run=True,
        probe_every=draw.choice([1, 2, 3]),
        probe_examples=draw.choice([None, 8, 32]),
        split_batch=draw.choice([None, None, False]),
        loss_fn=(lambda module, batch: module.loss(batch)) if not automatic or draw.random() < 0.2 else None,
    )
    options |= {"limit_val_batches": draw.choice([0, 2]), "max_epochs": epochs, "log_every_n_steps": 1}
    trainer = quiet_trainer([*callbacks, *([surge] if watched else [])], **options)
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


def plain(value: Any) -> Any:
    """Tensors as lists, of which `repr` shows every bit."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, Tensor) else value


def compare(seed: int) -> tuple[list[str], int]:
    """What a dry run of a set-up changes, and how often it measured."""
    (alone, _), (watched, measured) = train(seed, watched=False), train(seed, watched=True)
    return [part for part in alone if repr(plain(alone[part])) != repr(plain(watched[part]))], measured


def main(argv: list[str] | None = None) -> int:
    """Compare set-ups and say which differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=SETUPS, help="set-ups, seeds 0, 1, 2, ...")
    parser.add_argument("--only", type=int, help="the seed of one set-up")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.count) if arguments.only is None else [arguments.only]
    torch.set_num_threads(1)
    found, measurements = 0, 0
    for seed in seeds:
        changed, measured = compare(seed)
        measurements += measured
        if changed:
            found += 1
            print(f"set-up {seed} differs: {', '.join(changed[:8])}", flush=True)
    print(
        f"{len(seeds) - found} of {len(seeds)} set-ups equal, bit for bit, with {measurements} measurements"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
