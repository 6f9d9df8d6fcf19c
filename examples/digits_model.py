"""What the examples on images share: scikit-learn's digits, and a small convolutional network for them."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

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

    def __init__(self, batch_size: int = MICRO_BATCH_SIZE) -> None:
        super().__init__()
        self.batch_size = batch_size

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
        """Micro-batches, if a `BatchSizeScheduler` decides how many of them make one optimizer step."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

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
        accuracy = (scores.argmax(1) == labels).float().mean()
        # The mean over ranks, where there are several.
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True, sync_dist=True)
        self.log("val_accuracy", accuracy, prog_bar=True, sync_dist=True)

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
