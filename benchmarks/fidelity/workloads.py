"""Small trainings on data that every machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from examples.stdlib_transformer import ByteTransformer, Plan, StandardLibraryText

__all__ = ["BASE_BATCH_SIZE", "WORKLOADS", "Batch", "Workload", "draw"]

Batch = tuple[Tensor, ...]

BASE_BATCH_SIZE = 16
CONTEXT = 32


@dataclass(frozen=True)
class Workload:
    """A network, its loss and its data."""

    name: str
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]  # mean over a batch
    data: Callable[[], Batch]  # training tensors with the examples along their first dimension
    lr: float  # near the best constant-then-linear one at the base batch size, see docs/results.md
    sample: int  # examples of the fixed sample on which losses are compared
    cross_entropy: bool = True  # in nats; regrets of other losses are shares of them


def draw(data: Batch, size: int, generator: torch.Generator) -> Batch:
    """Examples at random, with replacement."""
    index = torch.randint(len(data[0]), (size,), generator=generator)
    return tuple(tensor[index] for tensor in data)


@cache
def shifted_digits() -> Batch:
    """scikit-learn's digits as 8 x 8 images, each moved by up to two pixels both ways: 44,925 examples."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    padded = F.pad(pixels, (2, 2, 2, 2))
    moves = [(down, right) for down in range(5) for right in range(5)]
    shifted = torch.cat([padded[:, down : down + 8, right : right + 8] for down, right in moves])
    return shifted.unsqueeze(1), torch.as_tensor(labels).repeat(len(moves))


@cache
def text_windows() -> Batch:
    """60,000 windows of 33 bytes of the standard library."""
    data = StandardLibraryText(Plan(60_000, 1, 1, 1, 1, 1), context=CONTEXT)
    data.setup("fit")
    return (torch.stack([data.train[index] for index in range(len(data.train))]).to(torch.uint8),)


def classification(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the digit, nats."""
    return F.cross_entropy(network(batch[0]), batch[1])


def reconstruction(network: nn.Module, batch: Batch) -> Tensor:
    """Squared error, summed over the 64 pixels of an image and averaged over images."""
    return F.mse_loss(network(batch[0]), batch[0].flatten(1), reduction="sum") / len(batch[0])


def next_byte(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next byte, nats."""
    text = batch[0].long()
    return F.cross_entropy(network(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def perceptron() -> nn.Module:
    """Two hidden layers of 128: 26,122 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def autoencoder() -> nn.Module:
    """64 - 128 - 12 - 128 - 64: 19,788 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.GELU(),
        nn.Linear(128, 12),
        nn.Linear(12, 128),
        nn.GELU(),
        nn.Linear(128, 64),
    )


def convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    """Convolution, BatchNorm, ReLU."""
    kernel = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return kernel, nn.BatchNorm2d(outputs), nn.ReLU()


def convnet() -> nn.Module:
    """Three convolutions with BatchNorm, 8 to 32 channels: 6,274 parameters."""
    return nn.Sequential(
        *convolution(1, 8, 1),
        *convolution(8, 16, 2),
        *convolution(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def transformer(width: int, heads: int) -> nn.Module:
    """Two blocks on windows of 32 bytes: 42,624 parameters at width 32, 106,848 at width 56."""
    return ByteTransformer(1, 1, context=CONTEXT, width=width, heads=heads, depth=2)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("perceptron", perceptron, classification, shifted_digits, 5.6e-3, 4096),
        Workload("convnet", convnet, classification, shifted_digits, 1.6e-2, 4096),
        Workload("autoencoder", autoencoder, reconstruction, shifted_digits, 6.8e-3, 4096, False),
        Workload("transformer", partial(transformer, 32, 2), next_byte, text_windows, 4.8e-3, 512),
        Workload("transformer-100k", partial(transformer, 56, 4), next_byte, text_windows, 3.4e-3, 512),
    )
}
