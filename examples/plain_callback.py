"""One callback added to a training whose batch size is not the one that its learning rate was tuned at.

    python -m examples.plain_callback            # half a minute
    python -m examples.plain_callback --fast     # a few seconds, to see that everything works

The learning rate was tuned at 8 examples per step; the loader now gives 64. The same network is trained twice
on the same batches: with the learning rate as it is, and with `SurgeLRCallback(base_batch_size=8)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from examples.digits_model import ConvolutionalClassifier, Digits
from examples.epoch_table import EpochTable, quiet_trainer
from examples.report import fast_and_seed, prepare
from lightning_surge import SurgeLRCallback

TUNED_AT, BATCH_SIZE = 8, 64


def train(callbacks: list[pl.Callback], epochs: int, seed: int) -> float:
    """Train with the callbacks; returns the last validation loss."""
    prepare(seed)
    steps = epochs * Digits.TRAINING_EXAMPLES // BATCH_SIZE
    model = ConvolutionalClassifier(schedule_steps=steps, warmup_steps=steps // 16)
    trainer = quiet_trainer(*callbacks, max_epochs=epochs)
    trainer.fit(model, Digits(BATCH_SIZE))
    return float(trainer.callback_metrics["val_loss"])


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train twice and compare; returns both losses, without the callback and with it."""
    options = fast_and_seed(__doc__, arguments)
    epochs = 3 if options.fast else 16

    before = train([], epochs, options.seed)
    # A run of hours gets as many measurements from the default of 1 % as this short one does from 10 %.
    surge = SurgeLRCallback(base_batch_size=TUNED_AT, max_overhead=0.5 if options.fast else 0.1)
    after = train([surge, EpochTable()], epochs, options.seed)

    print(
        f"\nvalidation loss with the learning rate tuned at {TUNED_AT}, batch size {BATCH_SIZE}: {before:.4f}"
    )
    print(f"with SurgeLRCallback: {after:.4f}")
    if surge.decision is not None:
        print(f"factor on the learning rate at the end: {surge.decision.used:.2f} ({surge.decision.reason})")
    return before, after


if __name__ == "__main__":
    main()
