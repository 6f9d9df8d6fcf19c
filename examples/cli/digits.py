"""The model and the data that `examples/cli/config.yaml` names: scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.digits_model import Batch, Digits
from lightning_surge import by_examples


class DigitsData(Digits):
    """Digits in micro-batches of a size that can be configured.

    Args:
        batch_size: examples per micro-batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled; what is left at the end of an epoch makes no smaller batch."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)


class DigitsClassifier(pl.LightningModule):
    """A network with one hidden layer: 5,386 parameters at the default width.

    Args:
        lr: the learning rate at its highest, tuned at `base_batch_size`.
        width: units of the hidden layer.
        base_batch_size: examples per step that the schedule is written for.
        total_examples: examples after which the learning rate is zero, whatever batches they came in.
        warmup_examples: examples until the learning rate is at its highest.
    """

    def __init__(
        self,
        lr: float = 4e-3,
        width: int = 72,
        base_batch_size: int = 8,
        total_examples: int = 61440,
        warmup_examples: int = 800,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.base_batch_size = base_batch_size
        self.warmup = warmup_examples / base_batch_size
        self.length = total_examples / base_batch_size
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes, shape `(examples, 10)`."""
        return self.layers(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, in nats."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and the share of images named rightly."""
        images, labels = batch
        scores = self(images)
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate rises, then falls to zero, both linear in examples, whatever the ramp."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95))

        def factor(step: int) -> float:
            rise = (step + 1) / max(1.0, self.warmup)
            fall = (self.length - step) / max(1.0, self.length - self.warmup)
            return max(0.0, min(rise, fall, 1.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scheduler = by_examples(schedule, examples_per_step=self.base_batch_size)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
