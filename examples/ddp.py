"""Two processes on the CPU: the batch size is that of both, and the ranks measure each other's noise.

    python -m examples.ddp            # half a minute
    python -m examples.ddp --fast     # some seconds, to see that everything works

Each of the two ranks has micro-batches of 8 examples, so a step has 16 and more. The learning rate
was tuned at 8. Lightning starts the second process itself, with the command line of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl

from examples.digits_model import MICRO_BATCH_SIZE, ConvolutionalClassifier, Digits
from examples.epoch_table import EpochTable, quiet_trainer
from examples.report import fast_and_seed, prepare
from lightning_surge import BatchSizeWarmup, SurgeLRCallback

RANKS = 2


def main(arguments: Sequence[str] | None = None) -> pl.Trainer:
    """Train with a line per epoch, printed by rank zero; returns the Trainer."""
    options = fast_and_seed(__doc__, arguments)
    prepare(options.seed)
    epochs = 2 if options.fast else 8
    steps = epochs * Digits.TRAINING_EXAMPLES // (RANKS * MICRO_BATCH_SIZE)

    trainer = quiet_trainer(
        # Sizes are global: 16 is one micro-batch on each rank, 64 is four.
        BatchSizeWarmup(start=RANKS * MICRO_BATCH_SIZE, end=64, num_steps=steps // 4),
        SurgeLRCallback(base_batch_size=MICRO_BATCH_SIZE, max_overhead=0.5 if options.fast else 0.1),
        EpochTable(),
        strategy="ddp",
        devices=RANKS,
        max_epochs=epochs,
    )
    trainer.fit(ConvolutionalClassifier(schedule_steps=steps, warmup_steps=steps // 16), Digits())
    if trainer.is_global_zero:
        print(f"\n{trainer.world_size} ranks, {trainer.global_step} optimizer steps")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
