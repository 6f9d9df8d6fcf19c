"""What tests train: a Trainer that writes nothing, small modules with their data, looks at what they do."""

from __future__ import annotations

import csv
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_surge import BatchSizeScheduler, ScheduledBatchSampler, SurgeLRCallback
from lightning_surge.runs.log_files import read_run

MakeOptimizer = Callable[[Any], Any]
Module = TypeVar("Module", bound=pl.LightningModule)


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on one CPU thread that writes nothing unless asked to."""
    torch.set_num_threads(1)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def trained(
    module: Module, data: Any = None, *callbacks: pl.Callback, resume: Path | None = None, **options: Any
) -> Module:
    """The module, after `make_trainer(*callbacks, **options)` has trained it, from a checkpoint perhaps."""
    make_trainer(*callbacks, **options).fit(module, data, ckpt_path=resume, weights_only=bool(resume) or None)
    return module


def scaling(init_scale: float = 256.0, **options: Any) -> MixedPrecision:
    """`precision="16-mixed"` on the CPU, with a scaler that overflows only where a test makes it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **options)  # type: ignore[attr-defined]
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def probing(**options: Any) -> SurgeLRCallback:
    """Measures 16 examples in a probe at every step, for a base batch size of 4."""
    settings: dict[str, Any] = {"base_batch_size": 4, "probe_every": 1, "probe_examples": 16}
    return SurgeLRCallback(**(settings | options))


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is warned of meanwhile; warnings are errors elsewhere."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught]


def every_step(path: Path, every: int = 1) -> ModelCheckpoint:
    """Keeps a checkpoint of every so many optimizer steps."""
    return ModelCheckpoint(path, "{step}", every_n_train_steps=every, save_top_k=-1)


def saved_steps(path: Path) -> list[Path]:
    """What `every_step` has left, in order."""
    return sorted(path.glob("step=*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))


def entries(optimizer: Optimizer) -> list[tuple[float, float | None]]:
    """Learning rate and weight decay of each group, as they are now."""
    return [
        (float(group["lr"]), None if "weight_decay" not in group else float(group["weight_decay"]))
        for group in optimizer.param_groups
    ]


def scheduled_lr(trainer: pl.Trainer) -> float:
    """The learning rate that everybody sees but the update."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])


def at_update(optimizer: Optimizer, look: Callable[[Optimizer], object]) -> None:
    """Look at an optimizer of torch's in the middle of each step, where the update reads its groups.

    Hooks see the schedule's values before and after: the factor is there for the update alone.
    """
    ask: Any = getattr(optimizer, "_init_group", None)
    if ask is None:  # LBFGS, which has one group and keeps no state by parameter
        return

    def asked(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if group is optimizer.param_groups[0]:
            look(optimizer)
        return ask(group, *args, **kwargs)

    optimizer._init_group = asked  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- optimizers


def sgd(module: nn.Module) -> Optimizer:
    """SGD with momentum."""
    return SGD(module.parameters(), lr=0.05, momentum=0.9)


def adamw(module: nn.Module) -> Optimizer:
    """AdamW with one group."""
    return AdamW(module.parameters(), lr=0.01)


def two_groups(module: nn.Module) -> Optimizer:
    """AdamW with two groups, the first four times as fast."""
    first, *rest = module.parameters()
    return AdamW([{"params": [first], "lr": 0.04}, {"params": rest}], lr=0.01)


def with_lr(kind: Callable[..., Optimizer], lr: float, **options: Any) -> MakeOptimizer:
    """Makes an optimizer of all parameters."""
    return lambda module: kind(module.parameters(), lr=lr, **options)


# ---------------------------------------------------------------------- modules and their data


def flat(tensors: Any) -> Tensor:
    """Tensors as one vector; None counts as empty."""
    return torch.cat([torch.zeros(0) if one is None else one.detach().reshape(-1) for one in tensors])


class Regression(pl.LightningModule):
    """A small network that notes the learning rates and weight decays which each update reads."""

    def __init__(
        self,
        make_optimizer: MakeOptimizer = adamw,
        make_schedule: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
        width: int = 8,
        features: int = 4,
    ) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 1))
        self.make_optimizer, self.make_schedule, self.interval = make_optimizer, make_schedule, interval
        self.read: list[list[tuple[float, float | None]]] = []
        self.calls = 0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if isinstance(optimizer, Optimizer):
            at_update(optimizer, lambda o: self.read.append(entries(o)))
        if self.make_schedule is None:
            return optimizer
        schedule = {"scheduler": self.make_schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule | {"monitor": "metric"}}

    @property
    def group_lrs(self) -> list[list[float]]:
        return [[lr for lr, _ in groups] for groups in self.read]

    @property
    def lrs(self) -> list[float]:
        return [lrs[0] for lrs in self.group_lrs]

    @property
    def weights(self) -> Tensor:
        return flat(self.parameters())


def regression_data(
    count: int, batch_size: int, *, features: int = 4, kind: type[DataLoader[Any]] = DataLoader
) -> DataLoader[Any]:
    """Sums of normal numbers, with noise of the same size as each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, features, generator=generator)
    y = x.sum(dim=1, keepdim=True) + torch.randn(count, 1, generator=generator)
    return kind(TensorDataset(x, y), batch_size=batch_size)


class Slope(pl.LightningModule):
    """Its gradient is exactly 1 in a full window, so its weight falls by the learning rate that was used."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.lr = lr
        self.steps: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append(self.weight.item())
        return (batch * self.weight).mean()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=self.lr)


def ones(count: int, batch_size: int) -> DataLoader[Any]:
    """Examples for `Slope`."""
    return DataLoader(torch.ones(count, 1, dtype=torch.float64), batch_size=batch_size)  # type: ignore[arg-type]


class OneHot(pl.LightningModule):
    """Its gradient spells out which examples are behind a step: example i pulls on coordinate i only.

    The mean over the examples i in S has the gradient 1/|S| at the coordinates in S and zero elsewhere. It
    notes of every step, too, the epoch, the scheduled learning rate, and what a batch-size callback says.
    """

    def __init__(self, size: int, make_scheduler: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.lr = 0.5
        self.make_scheduler = make_scheduler
        self.gradients: list[Tensor] = []
        self.epochs: list[int] = []
        self.scheduled: list[float] = []
        self.requested: list[int] = []
        self.planned: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch @ self.weight).mean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.weight.grad is not None
        self.gradients.append(self.weight.grad.clone())
        self.epochs.append(self.trainer.current_epoch)
        self.scheduled.append(scheduled_lr(self.trainer))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeScheduler):
                self.requested.append(callback.requested_batch_size)
                self.planned.append(callback.scheduled_batch_size)

    def configure_optimizers(self) -> Any:
        optimizer = SGD([self.weight], lr=self.lr)
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    @property
    def examples(self) -> list[list[int]]:
        return [gradient.nonzero().flatten().tolist() for gradient in self.gradients]

    @property
    def sizes(self) -> list[int]:
        """Examples behind each step; it makes sure that the gradient is their mean."""
        for gradient, examples in zip(self.gradients, self.examples, strict=True):
            expected = torch.full((len(examples),), 1 / len(examples))
            torch.testing.assert_close(gradient[examples], expected, rtol=2e-6, atol=0)
        return [len(examples) for examples in self.examples]


def one_hot(size: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    """Examples for `OneHot`."""
    return DataLoader(torch.eye(size), batch_size=batch_size, **options)  # type: ignore[arg-type]


def sampled(
    data: Any,
    largest: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    kind: type[DataLoader[Any]] = DataLoader,
    **options: Any,
) -> DataLoader[Any]:
    """Batches that a schedule sizes, of at most so many examples."""
    sampler = RandomSampler(data) if shuffle else SequentialSampler(data)
    return kind(data, batch_sampler=ScheduledBatchSampler(sampler, largest, drop_last), **options)


class Noisy(Dataset[Any]):
    """Its examples differ whenever they are read, by numbers from every random stream."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        noise = torch.randn(3) + np.random.normal() + random.random()  # noqa: NPY002
        return index, index / self.size + 0.1 * noise


class Reading(Regression):
    """Draws random numbers at every step, and notes which examples it has read, in which epoch."""

    def __init__(self, loader: Callable[[], Any], *optimization: Any) -> None:
        super().__init__(*optimization, features=3)
        self.net.insert(2, nn.Dropout(0.3))
        self.loader = loader
        self.taken: list[Any] = []

    def train_dataloader(self) -> Any:
        return self.loader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        # Lightning counts epochs several times; samplers are told this one.
        epoch = self.trainer.fit_loop.epoch_progress.current.processed
        indices = [indices.tolist() for indices, _ in parts]
        self.taken.append((self.trainer.current_epoch, epoch, batch_idx, indices))
        inputs = torch.cat([inputs for _, inputs in parts])
        return (self.net(inputs) - inputs.sum(1, keepdim=True)).square().mean()


class ValidatedReading(Reading):
    """Its validation draws from the streams of training, too."""

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(8), batch_size=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[1] + torch.randn_like(batch[1]))


class Ragged(list[Any]):
    """A loader of batches of any size, which says that they have four examples."""

    batch_size = 4

    def __init__(self, sizes: Sequence[int], features: int) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__(torch.randn(sum(sizes), features, generator=generator).split(list(sizes)))


class Outside:
    """Keeps what a measurement must not put back, where it does not look: each is a class of its own."""

    def __new__(cls) -> Any:
        return type("Outside", (), {"training": False, "notes": []})


class Sizes(pl.Callback):
    """The batch size of every step of each optimizer, as a callback for each has counted it."""

    def __init__(self, callbacks: Sequence[SurgeLRCallback]) -> None:
        self.sizes: list[list[float]] = [[] for _ in callbacks]
        self.callbacks = callbacks

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        index = trainer.optimizers.index(optimizer)
        self.sizes[index].append(self.callbacks[index]._behind_step.examples)


# ---------------------------------------------------------------------- what was logged, and what is equal


class Memory(Logger):
    """Keeps what it is given."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics) | {"at": float(step or 0)})

    def of(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


def columns(logger: Any) -> dict[str, list[float]]:
    """What a CSVLogger wrote, by column and without gaps."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def layouts_in(logger: Any) -> list[dict[str, dict[str, set[str]]]]:
    """TensorBoard's layouts in a run's files, as written: the keys in the logs that each chart shows."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger.experiment.flush()
    keys = read_run(logger.log_dir).series
    layouts = [
        layout_pb2.Layout.FromString(value.tensor.string_val[0])
        for path in sorted(Path(logger.log_dir).glob("*tfevents*"))
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "custom_scalars__config__"
    ]
    return [
        {
            category.title: {
                chart.title: {key for key in keys for tag in chart.multiline.tag if re.search(tag, key)}
                for chart in category.chart
            }
            for category in layout.category
        }
        for layout in layouts
    ]


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Equal bit for bit: numbers, tensors, arrays, and what dicts and lists hold of them; NaN is NaN."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key, value in one.items():
            assert_same(value, other[key], f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{at}[{index}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), at
    else:
        assert one == other or (one != one and other != other), at
