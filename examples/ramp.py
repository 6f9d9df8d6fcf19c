"""A batch-size ramp of exact sizes, and a learning-rate schedule that ends with the data.

    python -m examples.ramp            # half a minute
    python -m examples.ramp --fast     # a few seconds, to see that everything works

The batch size grows from 8 to 96 examples over the first half of the training. A batch sampler gives every
step exactly the size requested, in micro-batches of at most 32; the last step of an epoch gets what is left.
The schedule of the learning rate was written for steps of 8 examples; `by_examples` lets it count examples,
so that it ends with the data however many steps there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from torch.utils.data import DataLoader, RandomSampler

from examples.digits_model import Batch, ConvolutionalClassifier, Digits
from examples.epoch_table import EpochTable, quiet_trainer
from examples.report import fast_and_seed, prepare
from lightning_surge import BatchSizeScheduler, ScheduledBatchSampler, SurgeLRCallback, by_examples
from lightning_surge.schedules.sizes import LinearRamp

TUNED_AT, LARGEST = 8, 96


class SampledDigits(Digits):
    """The digits, with a loader whose batches follow the schedule of the `BatchSizeScheduler`."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """At most 32 examples at once: what "fits into memory"."""
        sampler = ScheduledBatchSampler(RandomSampler(self.train), batch_size=32)
        return DataLoader(self.train, batch_sampler=sampler)


class CountingClassifier(ConvolutionalClassifier):
    """The classifier, with a schedule that moves once for every 8 examples."""

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        """The schedule of the parent class, with another clock."""
        configured = super().configure_optimizers()
        config = configured["lr_scheduler"]
        config["scheduler"] = by_examples(config["scheduler"], examples_per_step=TUNED_AT)
        return configured


def main(arguments: Sequence[str] | None = None) -> pl.Trainer:
    """Train with a line per epoch; returns the Trainer."""
    options = fast_and_seed(__doc__, arguments)
    prepare(options.seed)
    epochs = 3 if options.fast else 16
    examples = epochs * Digits.TRAINING_EXAMPLES

    trainer = quiet_trainer(
        BatchSizeScheduler(LinearRamp(TUNED_AT, LARGEST, duration=examples // 2, unit="examples")),
        SurgeLRCallback(base_batch_size=TUNED_AT, max_overhead=0.5 if options.fast else 0.1),
        EpochTable(),
        max_epochs=epochs,
    )
    trainer.fit(CountingClassifier(examples // TUNED_AT, examples // TUNED_AT // 16), SampledDigits())

    constant = examples // TUNED_AT
    print(f"\n{trainer.global_step} steps, where batches of {TUNED_AT} would have taken {constant}")
    (rate,) = {group["lr"] for group in trainer.optimizers[0].param_groups}
    print(f"scheduled learning rate after the last step: {rate:.1e}")
    return trainer


if __name__ == "__main__":
    main()
