"""Train a small convolutional network on scikit-learn's digits, with a batch-size ramp.

    python -m examples.digits            # less than a minute on two cores
    python -m examples.digits --fast     # a few seconds, to see that everything works

The images come with scikit-learn, so nothing is downloaded. The batch size grows from 8 to 128 while the
schedule's learning rate was tuned at 8; `SurgeLRCallback` measures what the larger batches allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.report import parse_arguments, prepare, print_report, progress_bar, run_loggers
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules import GeometricRamp
from lightning_surge.windows import AccumulatedSchedule, total_steps

MICRO_BATCH_SIZE = 8

# The best learning rate at B = 8: this model trained at B = 8 throughout, for the same 40 epochs with the
# same warm-up and cosine, on one thread. Last validation loss:
#
#     lr       1e-3    2e-3    4e-3    8e-3
#     seed 0   0.095   0.039   0.036   0.047
#     seed 1   0.089   0.051   0.047   0.047
#     seed 2     -     0.049   0.048     -
BASE_LR = 4e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How much of everything: lengths in optimizer steps. Each doubling takes a quarter of `ramp_steps`.

    The batch sizes are logged every `log_every` steps, which divides that quarter, so that the last step of
    every stage is in the logs.
    """

    epochs: int
    ramp_steps: int
    warmup_steps: int
    micro_batches_between_validations: int
    log_every: int


FULL = Plan(epochs=40, ramp_steps=1024, warmup_steps=100, micro_batches_between_validations=192, log_every=16)
FAST = Plan(epochs=4, ramp_steps=192, warmup_steps=16, micro_batches_between_validations=48, log_every=2)


class ShiftedImages(Dataset[Batch]):
    """Images, each moved by at most one pixel in a random direction and blurred by noise whenever it is read.

    Without the noise the network soon names every training image rightly and there is no gradient left.
    """

    NOISE = 0.3  # standard deviation of a pixel, where white is 0 and black is 1

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.padded = F.pad(images, (1, 1, 1, 1))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        down, right = torch.randint(0, 3, (2,)).tolist()
        image = self.padded[index, :, down : down + 8, right : right + 8]
        return image + self.NOISE * torch.randn(image.shape), self.labels[index]


class Digits(pl.LightningDataModule):
    """1,797 images of 8 x 8 pixels in ten classes: 1,536 to train on, 261 to validate."""

    # 1,536 = 12 * 128: every epoch is a whole number of optimizer steps at every batch size of the ramp.
    TRAINING_EXAMPLES = 1536

    def setup(self, stage: str) -> None:
        """The split is by a fixed shuffle, since the file groups the images by writer."""
        images, labels = load_digits(return_X_y=True)
        shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[shuffle] / 16
        classes = torch.as_tensor(labels)[shuffle]
        training = self.TRAINING_EXAMPLES
        self.train = ShiftedImages(pixels[:training], classes[:training])
        self.validation = TensorDataset(pixels[training:], classes[training:])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches; `BatchSizeWarmup` decides how many of them make one optimizer step."""
        return DataLoader(self.train, batch_size=MICRO_BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same images every time, not shifted."""
        return DataLoader(self.validation, batch_size=len(self.validation))


class ConvolutionalClassifier(pl.LightningModule):
    """Two convolutions and two linear layers: 38,282 parameters."""

    def __init__(self, schedule_steps: int, warmup_steps: int, lr: float = BASE_LR) -> None:
        super().__init__()
        self.schedule_steps = schedule_steps
        self.warmup_steps = warmup_steps
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes, shape `(examples, 10)`."""
        return self.layers(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, in nats."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and the share of images named rightly."""
        images, labels = batch
        scores = self(images)
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        """AdamW; linear warm-up, then a cosine that reaches zero at the last optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95))

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = (step - self.warmup_steps) / (self.schedule_steps - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, then print the table and write the picture; returns where the picture is."""
    options = parse_arguments(__doc__, arguments, output="runs/digits")
    plan = FAST if options.fast else FULL
    prepare(options.seed)

    data = Digits()
    ramp = GeometricRamp(start=8, end=128, duration=plan.ramp_steps)
    # Large batches mean fewer steps: the cosine is as long as the ramp makes the run.
    sizes = AccumulatedSchedule(ramp, MICRO_BATCH_SIZE, examples_per_epoch=data.TRAINING_EXAMPLES)
    model = ConvolutionalClassifier(
        total_steps(sizes, plan.epochs * data.TRAINING_EXAMPLES), plan.warmup_steps
    )

    surge = SurgeLRCallback(
        base_batch_size=8,
        law=options.law,
        objective=options.objective,
        max_overhead=options.max_overhead,
    )
    loggers = run_loggers(options.output)
    trainer = pl.Trainer(
        max_epochs=plan.epochs,
        accelerator="cpu",
        callbacks=[BatchSizeWarmup(start=8, end=128, num_steps=plan.ramp_steps), surge, progress_bar()],
        logger=loggers,
        log_every_n_steps=plan.log_every,
        val_check_interval=plan.micro_batches_between_validations,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    return print_report(
        loggers, surge.law_history, base_batch_size=8, title="Convolutional network on scikit-learn's digits"
    )


if __name__ == "__main__":
    main()
