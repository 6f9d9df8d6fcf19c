"""The trainings of the two examples, over a short budget and one four times as long.

Everything that a rule must not change is here: the data and their order, the network and its first weights,
and the learning-rate schedule, which is a function of the examples consumed and not of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.batch_warmup.rules import BASE_BATCH_SIZE
from examples import digits, stdlib_transformer
from examples.digits import ConvolutionalClassifier, Digits
from examples.stdlib_transformer import ByteTransformer, StandardLibraryText
from lightning_surge.schedules.by_examples import by_examples

__all__ = ["CONTEXT", "WORKLOADS", "Workload"]

# Of the examples of a run, for the linear rise of the learning rate before its cosine.
WARMUP_SHARE = 1 / 16
CONTEXT = 64


@dataclass(frozen=True)
class Workload:
    """A network and its data."""

    name: str
    title: str  # the name in words
    base_lr: float  # near the best one at `BASE_BATCH_SIZE`; multipliers are of it
    examples: Mapping[str, int]  # to train on by budget; "quick" is to see that everything works
    examples_per_epoch: int | None  # of several epochs; None for one pass
    module: Callable[[float, int], pl.LightningModule]  # from a learning rate and the examples of the run
    data: Callable[[], tuple[Dataset[Any], DataLoader[Any]]]  # what to train on, and to validate on

    def epochs(self, budget: str) -> int:
        """Passes over the data, or over a part of them, that make the budget."""
        return 1 if self.examples_per_epoch is None else self.examples[budget] // self.examples_per_epoch

    def sampler(self, budget: str, seed: int) -> RandomSampler:
        """An order of the examples that depends on the seed alone, whatever cuts it into batches."""
        return RandomSampler(
            self.data()[0],  # type: ignore[arg-type]
            num_samples=self.examples[budget] // self.epochs(budget),
            generator=torch.Generator().manual_seed(seed),
        )


def lr_factor(examples: int) -> Callable[[float], float]:
    """Warm-up and cosine to zero, by base batches consumed: steps, had the batch size been constant."""
    steps = examples / BASE_BATCH_SIZE
    warmup = WARMUP_SHARE * steps

    def factor(step: float) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / (steps - warmup), 1.0)))

    return factor


def adamw(module: pl.LightningModule, lr: float, examples: int) -> Any:
    """The optimizer of the examples, with a schedule that counts examples."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(examples))
    clock = by_examples(schedule, examples_per_step=BASE_BATCH_SIZE)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": clock, "interval": "step"}}


def on_schedule(network: Callable[[float], Any], lr: float, examples: int) -> pl.LightningModule:
    """An example's network on a schedule of examples."""
    module: pl.LightningModule = network(lr)
    module.configure_optimizers = partial(adamw, module, lr, examples)  # type: ignore[method-assign]
    return module


@cache
def text() -> tuple[Dataset[Any], DataLoader[Any]]:
    """The demo's windows, of which a run draws as many as its budget has; and all its validation windows."""
    data = StandardLibraryText(stdlib_transformer.FULL, context=CONTEXT)
    data.setup("fit")
    return data.train, data.val_dataloader()


@cache
def images() -> tuple[Dataset[Any], DataLoader[Any]]:
    """scikit-learn's digits, shifted and noisy to train on."""
    data = Digits()
    data.setup("fit")
    return data.train, data.val_dataloader()


EPOCH = Digits.TRAINING_EXAMPLES
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "text",
            "byte-level transformer on the standard library",
            stdlib_transformer.BASE_LR,
            {"short": 16_384, "long": 65_536, "quick": 1_024},
            None,
            partial(on_schedule, partial(ByteTransformer, 1, 1, context=CONTEXT)),
            text,
        ),
        Workload(
            "digits",
            "convolutional network on scikit-learn's digits",
            digits.BASE_LR,
            {"short": 8 * EPOCH, "long": 32 * EPOCH, "quick": EPOCH},
            EPOCH,
            partial(on_schedule, partial(ConvolutionalClassifier, 1, 1)),
            images,
        ),
    )
}
