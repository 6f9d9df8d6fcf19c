"""Train a small byte-level transformer on the source of Python's standard library, with a batch-size ramp.

    python -m examples.stdlib_transformer            # about three minutes on two cores
    python -m examples.stdlib_transformer --fast     # a few seconds, to see that everything works

The text is on every machine that has Python, so nothing is downloaded. The batch size grows from 8 to 128
while the schedule's learning rate was tuned at 8; `SurgeLRCallback` measures what the larger batches allow.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from examples.report import parse_arguments, prepare, print_report, progress_bar, run_loggers
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps

MICRO_BATCH_SIZE = 8

# The best learning rate at B = 8: this model trained at B = 8 throughout, on the same 81,920 examples with
# the same warm-up and cosine, on one thread. Last validation loss, in nats per byte:
#
#     lr       1e-3     2e-3     2.8e-3   4e-3     8e-3
#     seed 0   1.497    1.466    1.461    1.467    1.496
#     seed 1   1.498    1.466    1.460    1.456      -
#
# 2.8e-3 has the lowest mean; between 2e-3 and 4e-3 the curve is flat to within the difference of two seeds.
BASE_LR = 2.8e-3


@dataclass(frozen=True)
class Plan:
    """How much of everything: examples in windows of text, lengths in optimizer steps.

    Each doubling of the batch size takes a quarter of `ramp_steps`. The batch sizes are logged every
    `log_every` steps, which divides that quarter, so that the last step of every stage is in the logs.
    """

    examples: int
    ramp_steps: int
    warmup_steps: int
    validation_examples: int
    micro_batches_between_validations: int
    log_every: int


FULL = Plan(
    examples=81_920,
    ramp_steps=1024,
    warmup_steps=100,
    validation_examples=1024,
    micro_batches_between_validations=256,
    log_every=16,
)
FAST = Plan(
    examples=2_688,
    ramp_steps=64,
    warmup_steps=8,
    validation_examples=64,
    micro_batches_between_validations=16,
    log_every=2,
)


class TextWindows(Dataset[Tensor]):
    """Windows of bytes that start at evenly spaced places of a text, so that any number covers all of it."""

    def __init__(self, text: bytes, examples: int, length: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.starts = torch.linspace(0, len(text) - length, examples, dtype=torch.float64).long().tolist()
        self.length = length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.text[start : start + self.length].long()


class StandardLibraryText(pl.LightningDataModule):
    """The .py files of the running Python's standard library, split by file into training and validation."""

    # Tests and third-party packages vary between installations; the codec and help tables are not code.
    SKIPPED_DIRECTORIES = frozenset(
        {
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idle_test",
            "encodings",
            "pydoc_data",
            "__pycache__",
        }
    )

    def __init__(self, plan: Plan, context: int) -> None:
        super().__init__()
        self.plan = plan
        self.length = context + 1  # one byte more than the context: the last target

    def setup(self, stage: str) -> None:
        """Read files, in an order that depends on their names alone, until there is enough text."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file.relative_to(root) for file in root.rglob("*.py")]
        files = sorted(file for file in files if not self.SKIPPED_DIRECTORIES.intersection(file.parts))
        random.Random(0).shuffle(files)
        enough = self.plan.examples * self.length
        texts = {"train": bytearray(), "validation": bytearray()}
        for index, file in enumerate(files):
            if len(texts["train"]) >= enough:
                break
            texts["validation" if index % 10 == 0 else "train"] += (root / file).read_bytes()
        if min(map(len, texts.values())) < self.length:
            raise RuntimeError(
                f"Expected Python source files below {root}, found {len(files)}: too little text."
            )
        self.train = TextWindows(texts["train"], self.plan.examples, self.length)
        self.validation = TextWindows(texts["validation"], self.plan.validation_examples, self.length)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Micro-batches; `BatchSizeWarmup` decides how many of them make one optimizer step."""
        return DataLoader(self.train, batch_size=MICRO_BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same windows every time."""
        return DataLoader(self.validation, batch_size=128)


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Activations in and out, shape `(examples, bytes, width)`."""
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class ByteTransformer(pl.LightningModule):
    """Predicts the next byte. 136,448 parameters at the default size."""

    def __init__(
        self,
        schedule_steps: int,
        warmup_steps: int,
        lr: float = BASE_LR,
        context: int = 64,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.schedule_steps = schedule_steps
        self.warmup_steps = warmup_steps
        self.lr = lr
        self.byte_embedding = nn.Embedding(256, width)
        self.position_embedding = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256, bias=False))
        for embedding in (self.byte_embedding.weight, self.position_embedding):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of the next byte, shape `(examples, bytes, 256)`."""
        return self.out(self.blocks(self.byte_embedding(text) + self.position_embedding[: text.shape[1]]))

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of every byte given those before it in its window, in nats."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the mean loss of the validation windows."""
        self.log("val_loss", self.loss(batch), prog_bar=True)

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
    options = parse_arguments(__doc__, arguments, output="runs/demo")
    plan = FAST if options.fast else FULL
    prepare(options.seed)

    ramp = GeometricRamp(start=8, end=128, duration=plan.ramp_steps)
    # Large batches mean fewer steps: the cosine is as long as the ramp makes the run.
    sizes = AccumulatedSchedule(ramp, MICRO_BATCH_SIZE, examples_per_epoch=plan.examples)
    model = ByteTransformer(total_steps(sizes, plan.examples), plan.warmup_steps)
    data = StandardLibraryText(plan, context=64)

    surge = SurgeLRCallback(
        base_batch_size=8,
        law=options.law,
        objective=options.objective,
        max_overhead=options.max_overhead,
        log_peak=True,
    )
    loggers = run_loggers(options.output)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[BatchSizeWarmup(start=8, end=128, num_steps=plan.ramp_steps), surge, progress_bar()],
        logger=loggers,
        log_every_n_steps=plan.log_every,
        val_check_interval=plan.micro_batches_between_validations,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    return print_report(loggers, title="Byte-level transformer on the standard library")


if __name__ == "__main__":
    main()
