"""A batch size that follows the measured noise, instead of a plan made beforehand.

    python -m examples.follow_peak            # a minute
    python -m examples.follow_peak --fast     # a few seconds, to see that everything works

Training starts at 8 examples per step. After every measurement `FollowPeak` compares the size in force with
the critical batch size, at which a step gains half of the most it can, and doubles where the measurement
allows it. How many steps there will be is not known, so the learning rate's schedule counts examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from examples.digits_model import MICRO_BATCH_SIZE, Digits
from examples.epoch_table import EpochTable, quiet_trainer
from examples.ramp import CountingClassifier
from examples.report import fast_and_seed, prepare
from lightning_surge import BatchSizeScheduler, FollowPeak, SurgeLRCallback


def main(arguments: Sequence[str] | None = None) -> pl.Trainer:
    """Train with a line per epoch; returns the Trainer."""
    options = fast_and_seed(__doc__, arguments)
    prepare(options.seed)
    epochs = 2 if options.fast else 16
    constant = epochs * Digits.TRAINING_EXAMPLES // MICRO_BATCH_SIZE

    sizes = BatchSizeScheduler(FollowPeak(start=MICRO_BATCH_SIZE, maximum=256))
    surge = SurgeLRCallback(base_batch_size=MICRO_BATCH_SIZE, max_overhead=0.5 if options.fast else 0.1)
    trainer = quiet_trainer(sizes, surge, EpochTable(), max_epochs=epochs)
    trainer.fit(CountingClassifier(constant, constant // 16), Digits())

    print(f"\n{trainer.global_step} steps, where batches of {MICRO_BATCH_SIZE} would have taken {constant}")
    return trainer


if __name__ == "__main__":
    main()
