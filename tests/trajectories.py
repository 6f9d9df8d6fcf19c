"""Fingerprints of small trainings, to see that a change of the code changes no number.

python -m tests.trajectories --write before.json
python -m tests.trajectories --compare before.json    # exit 1 if something differs

They hold on one machine, with one version of torch and of Lightning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_surge
from lightning_surge import (
    BatchSizeScheduler,
    BatchSizeWarmup,
    ExactResume,
    FollowPeak,
    ScheduledBatchSampler,
    SurgeLRCallback,
    by_examples,
)
from lightning_surge.schedules import GeometricRamp

# Of wall time, or on its way out.
LEFT_OUT = ("surge/overhead_time", "surge/trace_cov_steps")
MINUTE = timedelta(seconds=60)

Fingerprint = dict[str, Any]
Pair = Sequence[Tensor]


class Memory(Logger):
    """Keeps what the callbacks log, with its step."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, list[tuple[int | None, str]]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are the same in every run."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep values to the last bit."""
        for key, value in metrics.items():
            if key.startswith("surge/") and not key.startswith(LEFT_OUT):
                self.series.setdefault(key, []).append((step, float(value).hex()))


class Module(pl.LightningModule):
    """Notes the learning rates of every step, and the weights at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lrs: list[tuple[int, list[str]]] = []
        self.weights: list[bytes] = []

    def watched(self, *optimizers: Optimizer) -> None:
        """Note what updates read: torch's optimizers ask for the state of each group right before."""
        for index, optimizer in enumerate(optimizers):
            optimizer._init_group = partial(self._note, index, optimizer._init_group)  # type: ignore[attr-defined]

    def _note(self, index: int, ask: Any, group: dict[str, Any], *args: Any) -> Any:
        self.lrs.append((index, float(group["lr"]).hex()))
        return ask(group, *args)

    def on_train_end(self) -> None:
        """Processes that hold pieces of the weights are still together here."""
        for parameter in self.parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            self.weights.append(whole.detach().numpy().tobytes())


class Regression(Module):
    """A small network with noise of its own, that drops out."""

    def __init__(
        self,
        optimizer: type[Optimizer] = AdamW,
        schedule: Callable[[Optimizer], Any] | None = None,
        shard: bool = False,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.kind, self.make_schedule, self.shard = optimizer, schedule, shard

    def configure_model(self) -> None:
        """Cut the weights into one piece for each process."""
        if self.shard:
            self.shard = False
            mesh: Any = self.device_mesh
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The squared error."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by steps."""
        optimizer = self.kind(self.parameters(), lr=0.01)  # type: ignore[call-arg]
        self.watched(optimizer)
        if self.make_schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_schedule(optimizer), "interval": "step"}]


class Gan(Module):
    """Two networks in turn, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))

    def critic_loss(self, batch: Pair) -> Tensor:
        """Real against fake."""
        fake = self.generator(torch.randn(len(batch[0]), 2)).detach()
        softplus = nn.functional.softplus
        return softplus(-self.critic(batch[0])).mean() + softplus(self.critic(fake)).mean()

    def generator_loss(self, batch: Pair) -> Tensor:
        """Fake for real."""
        fake = self.generator(torch.randn(len(batch[0]), 2))
        return nn.functional.softplus(-self.critic(fake)).mean()

    def training_step(self, batch: Pair, batch_idx: int) -> None:
        """A step of the critic, and in every second batch one of the generator."""
        optimizers: Any = self.optimizers()
        for index, loss in enumerate((self.critic_loss, self.generator_loss)[: 1 + batch_idx % 2]):
            optimizers[index].zero_grad()
            self.manual_backward(loss(batch))
            optimizers[index].step()

    def configure_optimizers(self) -> Any:
        """One for each network."""
        optimizers = [AdamW(self.critic.parameters(), lr=0.01), AdamW(self.generator.parameters(), lr=0.02)]
        self.watched(*optimizers)
        return optimizers


def loader(batch_size: int, *, sampled: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(1024, 6, generator=generator), torch.randn(1024, 1, generator=generator)
    data = TensorDataset(x, x[:, :1] - 0.5 * x[:, 1:2] + 0.5 * noise)
    if sampled:
        return DataLoader(data, batch_sampler=ScheduledBatchSampler(RandomSampler(data), batch_size))
    return DataLoader(data, batch_size)


def surge(law: Any = "measured", base: int = 8, **options: Any) -> SurgeLRCallback:
    return SurgeLRCallback(base, law, **({"max_overhead": 2.0} | options))


@dataclass(frozen=True)
class SetUp:
    """One training: what it is made of is made anew for every run."""

    callbacks: Callable[[], list[pl.Callback]]
    module: Callable[[], Module] = Regression
    batch_size: int = 16
    sampled: bool = False
    options: Callable[[], dict[str, Any]] = dict
    processes: int = 1
    resumed_from: int = 0  # the step of a checkpoint, with which the rest is run once more
    epochs: int = 1


def ramped() -> list[pl.Callback]:
    return [BatchSizeScheduler(GeometricRamp(8, 64, 40)), surge()]


def counting(optimizer: Optimizer) -> Any:
    return by_examples(CosineAnnealingLR(optimizer, 256), examples_per_step=8)


def half_precision() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=20)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


def data_parallel() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=MINUTE), "limit_train_batches": 24}


def sharded() -> dict[str, Any]:
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=MINUTE)
    return {"strategy": strategy, "limit_train_batches": 24}


def adversaries() -> list[pl.Callback]:
    return [surge(optimizer=0, loss_fn=Gan.critic_loss), surge(optimizer=1, loss_fn=Gan.generator_loss)]


on_examples = partial(Regression, schedule=counting)

SET_UPS: dict[str, SetUp] = {
    # First, since a process is best forked before it has trained.
    "ddp": SetUp(lambda: [surge()], batch_size=8, options=data_parallel, processes=2),
    "fsdp2": SetUp(lambda: [surge()], partial(Regression, shard=True), 8, options=sharded, processes=2),
    "default": SetUp(lambda: [surge()]),
    "pooled": SetUp(lambda: [surge(probe_every=4, probe_examples=40, split_batch=False)]),
    "accumulated": SetUp(lambda: [surge()], batch_size=4, options=lambda: {"accumulate_grad_batches": 8}),
    "ramp": SetUp(ramped, on_examples, batch_size=4, epochs=2),
    "ramp by sampler": SetUp(ramped, on_examples, batch_size=12, sampled=True, epochs=2),
    "follow peak": SetUp(
        lambda: [BatchSizeScheduler(FollowPeak(8, 64, growth_only=False)), surge()], batch_size=8
    ),
    "clipped": SetUp(lambda: [surge()], options=lambda: {"gradient_clip_val": 0.5}),
    "16-mixed": SetUp(lambda: [surge()], options=half_precision),
    "sgd": SetUp(lambda: [surge()], partial(Regression, SGD)),
    "theorem2": SetUp(lambda: [surge("theorem2", probe_examples=32)]),
    "theorem3": SetUp(lambda: [surge("theorem3", probe_examples=32)]),
    "step": SetUp(lambda: [surge(objective="step", scale_weight_decay=False)]),
    "edge": SetUp(lambda: [surge(objective="edge")]),
    "sqrt": SetUp(lambda: [surge("sqrt")], partial(Regression, schedule=partial(ExponentialLR, gamma=0.98))),
    "gan": SetUp(adversaries, Gan),
    "resumed": SetUp(
        lambda: [BatchSizeWarmup(8, 32, 40), ExactResume(), surge()], sampled=True, resumed_from=30
    ),
}


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]


def fit(set_up: SetUp, logger: Memory, extra: list[pl.Callback], start: Path | None = None) -> Module:
    """Train once."""
    pl.seed_everything(0, verbose=False)
    module = set_up.module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=set_up.processes,
        max_epochs=set_up.epochs,
        logger=logger,
        log_every_n_steps=1,
        callbacks=set_up.callbacks() + extra,
        enable_checkpointing=bool(extra),
        enable_progress_bar=False,
        enable_model_summary=False,
        **set_up.options(),
    )
    batches = loader(set_up.batch_size, sampled=set_up.sampled)
    trainer.fit(module, batches, ckpt_path=start, weights_only=None if start is None else True)
    return module


def fingerprint(name: str) -> Fingerprint:
    """Train in this process, or with it as one of several."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name_of_logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    set_up, logger = SET_UPS[name], Memory()
    if step := set_up.resumed_from:
        with tempfile.TemporaryDirectory() as folder:
            kept = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
            modules = [fit(set_up, logger, [kept])]
            modules.append(fit(set_up, logger, [], Path(folder) / f"step={step}.ckpt"))
    else:
        modules = [fit(set_up, logger, [])]
    return {
        "weights": digest(weights for module in modules for weights in module.weights),
        "lrs": digest(json.dumps(module.lrs).encode() for module in modules),
        "logs": {key: digest([json.dumps(kept).encode()]) for key, kept in sorted(logger.series.items())},
    }


def work(rank: int, name: str, port: int, path: str) -> None:
    """One of several processes, as a launcher would start it."""
    count = SET_UPS[name].processes
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = fingerprint(name)
    if rank == 0:
        Path(path).write_text(json.dumps(found))


def trained(name: str) -> Fingerprint:
    """The fingerprint of a set-up, or its error."""
    try:
        if (count := SET_UPS[name].processes) == 1:
            return fingerprint(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/found.json"
            start_processes(work, (name, port, path), count, start_method="fork")  # type: ignore[no-untyped-call]
            return dict(json.loads(Path(path).read_text()))
    except Exception as error:
        last = str(error).strip().rpartition("\n")[2]
        return {"error": f"{type(error).__name__}: {last}"}


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Which parts are not the same, and which logged values."""
    if "error" in before or "error" in after:
        return [f"before: {before.get('error', 'ran')}, now: {after.get('error', 'ran')}"]
    found = [part for part in ("weights", "lrs") if before[part] != after[part]]
    for key in sorted({*before["logs"], *after["logs"]}):
        old, new = before["logs"].get(key), after["logs"].get(key)
        if old != new:
            found.append(key + (" (new)" if old is None else " (missing)" if new is None else ""))
    return found


def main() -> int:
    """Write fingerprints, or compare with those that were written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="FILE", help="write the fingerprints")
    task.add_argument("--compare", type=Path, metavar="FILE", help="exit 1 unless they are those of the file")
    parser.add_argument("--only", nargs="+", choices=list(SET_UPS), default=list(SET_UPS), metavar="NAME")
    options = parser.parse_args()
    before = json.loads(options.compare.read_text()) if options.compare else {}
    after, status = {}, 0
    print(f"of {Path(lightning_surge.__file__).parent}")
    for name in sorted(options.only, key=list(SET_UPS).index):
        begin = time.perf_counter()
        found = after[name] = trained(name)
        said = found.get("error") or f"weights {found['weights']}, {len(found['logs'])} logged values"
        if options.compare:
            differing = differences(before[name], found) if name in before else ["not in the file"]
            said = f"differs: {', '.join(differing)}" if differing else "equal"
            status |= bool(differing)
        print(f"{name}: {said} ({time.perf_counter() - begin:.1f} s)", flush=True)
    for name in sorted({*before} - {*SET_UPS}):
        print(f"{name}: only in the file")
        status = 1
    if options.write:
        options.write.write_text(json.dumps(after, indent=1) + "\n")
        status = int(any("error" in found for found in after.values()))
    return status


if __name__ == "__main__":
    sys.exit(main())
