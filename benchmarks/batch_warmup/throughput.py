"""Examples per second of training with a scheduled batch sampler, against a plain DataLoader.

Both train at the same constant batch size, in turns in one process, so that they do the same work except for
the sampler and the callback. The ratio is taken pair by pair, in processor time: everything runs in one
thread of one process, and another process on the same machine does not count. Beside the trainings, the
loader alone is read, which tells what the sampler takes of the difference.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from benchmarks.batch_warmup.rules import BASE_BATCH_SIZE, LARGE_BATCH_SIZE
from benchmarks.batch_warmup.training import quiet_trainer
from benchmarks.batch_warmup.workloads import CONTEXT, WORKLOADS
from examples.stdlib_transformer import ByteTransformer
from lightning_surge.callbacks import BatchSizeScheduler
from lightning_surge.schedules.batch_sampler import Itinerary, ScheduledBatchSampler, follow, unfollow
from lightning_surge.schedules.sizes import ConstantSize

__all__ = ["BATCH_SIZES", "EXAMPLES", "LOADER", "MODELS", "throughput"]

BATCH_SIZES = (BASE_BATCH_SIZE, LARGE_BATCH_SIZE)
LOADER = "loader alone"
MODELS = ("tiny", "text", LOADER)
EXAMPLES = {
    "tiny": {8: 16_384, 128: 131_072},
    "text": {8: 2_048, 128: 8_192},
    LOADER: {8: 131_072, 128: 262_144},
}
"""Of one run, by model and batch size: a few seconds of work."""
PAIRS = 8
WIDTH = 4


class Tiny(pl.LightningModule):
    """Next to no work, so that the data path is most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def made(model: str, batch_size: int, examples: int) -> tuple[pl.LightningModule, Dataset[Any]]:
    """A fresh model and its data."""
    if model == "text":
        return ByteTransformer(examples // batch_size, 1, context=CONTEXT), WORKLOADS[model].data()[0]
    inputs = torch.randn(examples, WIDTH)
    return Tiny(), TensorDataset(inputs, inputs[:, :1])


def seconds(model: str, batch_size: int, examples: int, seed: int, *, scheduled: bool) -> float:
    """Processor time of one run."""
    pl.seed_everything(seed, verbose=False)
    module, data = made(model, batch_size, examples)
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data, num_samples=examples, generator=generator)  # type: ignore[arg-type]
    schedule = ConstantSize(batch_size)
    if scheduled:
        loader = DataLoader(data, batch_sampler=ScheduledBatchSampler(sampler, batch_size, drop_last=False))
    else:
        loader = DataLoader(data, batch_size=batch_size, sampler=sampler)
    if model == LOADER:
        return _reading(loader, Itinerary(schedule) if scheduled else None)
    trainer = quiet_trainer([BatchSizeScheduler(schedule)] if scheduled else [], epochs=1)
    begin = time.process_time()
    trainer.fit(module, loader)
    spent = time.process_time() - begin
    if trainer.global_step * batch_size != examples:
        raise RuntimeError(f"Expected {examples} examples, got {trainer.global_step} steps of {batch_size}.")
    return spent


def _reading(loader: DataLoader[Any], itinerary: Itinerary | None) -> float:
    begin = time.process_time()
    if itinerary is not None:
        follow(itinerary)
    for _ in loader:
        pass
    if itinerary is not None:
        unfollow(itinerary)
    return time.process_time() - begin


def throughput(model: str, batch_size: int, examples: int = 0, pairs: int = PAIRS) -> dict[str, Any]:
    """Ratios of examples per second, scheduled over plain.

    Args:
        model: of `MODELS`.
        batch_size: of every step, and of every micro-batch.
        examples: of one run; 0 for `EXAMPLES`.
        pairs: of runs.

    Returns:
        The ratio of every pair, and examples per second without the package.
    """
    examples = examples or EXAMPLES[model][batch_size]
    ratios, plain_speeds = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scheduled in (False, True):  # what is done once, in imports and caches
            seconds(model, batch_size, examples // 8, 0, scheduled=scheduled)
        for pair in range(pairs):
            # The second of a pair may find warmer caches, or a hotter processor.
            order = (False, True) if pair % 2 else (True, False)
            spent = {way: seconds(model, batch_size, examples, pair, scheduled=way) for way in order}
            ratios.append(spent[False] / spent[True])
            plain_speeds.append(examples / spent[False])
    return {"examples": examples, "ratios": ratios, "plain_examples_per_second": plain_speeds}
