"""Two processes on the CPU: the batch size is that of both, and the ranks measure each other's noise.

    python -m examples.ddp            # half a minute
    python -m examples.ddp --fast     # some seconds, to see that everything works

Each of the two ranks has micro-batches of 8 examples, so a step has 16 and more. The learning rate
was tuned at 8. Lightning starts the second process itself, with the command line of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from examples.digits_model import MICRO_BATCH_SIZE, ConvolutionalClassifier, Digits
from examples.epoch_table import EpochTable, quiet_trainer
from examples.report import fast_and_seed, prepare
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.schedules import AccumulatedSchedule, GeometricRamp, total_steps

RANKS = 2
TUNED_AT = MICRO_BATCH_SIZE


class Result(pl.Callback):
    """Prints, at the end, whether all ranks took their steps with the same learning rates, and the law.

    It does so in the processes that train. What started them may be another one, which knows nothing of this.
    """

    def __init__(self, surge: SurgeLRCallback) -> None:
        self.surge = surge
        self.factors: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """The factor that the step was taken with."""
        if self.surge.decision is not None:
            self.factors.append(self.surge.decision.used)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank sends what it has, rank zero prints."""
        factors: list[list[float]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(factors, self.factors)
        if not trainer.is_global_zero:
            return
        equal = all(other == self.factors for other in factors)
        print(f"\n{trainer.world_size} ranks, {trainer.global_step} optimizer steps")
        print(f"factors {'equal on all ranks' if equal else 'NOT equal'}, at most {max(self.factors):.2f}")
        law = self.surge.law
        if not isinstance(law, EstimatedLaw):
            print("too few measurements for a law: train longer, or raise max_overhead")
            return
        noise_scale = self.surge.history.stats().noise_scale
        print(
            f"law from {self.surge.history.num_measurements} measurements: noise scale {noise_scale:.0f}, "
            f"critical batch size {law.critical_batch_size:.0f} examples"
        )
        scales = [f"{size}: {self.surge.lr_scale(size):.2f}" for size in (16, 32, 64, 128)]
        print(f"factor on the learning rate tuned at {TUNED_AT}, by batch size: {', '.join(scales)}")


def main(arguments: Sequence[str] | None = None, strategy: str = "ddp") -> None:
    """Train with a line per epoch; `strategy="ddp_fork"` starts processes where there is no command line."""
    options = fast_and_seed(__doc__, arguments)
    prepare(options.seed)
    epochs = 2 if options.fast else 8
    smallest = RANKS * MICRO_BATCH_SIZE
    ramp_steps = epochs * Digits.TRAINING_EXAMPLES // smallest // 4
    # A ramp takes fewer steps than its smallest batch size would: the learning-rate schedule must know.
    ramp = AccumulatedSchedule(
        GeometricRamp(smallest, 64, duration=ramp_steps),
        smallest,
        examples_per_epoch=Digits.TRAINING_EXAMPLES,
    )
    steps = total_steps(ramp, epochs * Digits.TRAINING_EXAMPLES)

    surge = SurgeLRCallback(base_batch_size=TUNED_AT, max_overhead=0.5 if options.fast else 0.1)
    trainer = quiet_trainer(
        # Sizes are global: 16 is one micro-batch on each rank, 64 is four.
        BatchSizeWarmup(start=smallest, end=64, num_steps=ramp_steps),
        surge,
        EpochTable(),
        Result(surge),
        strategy=strategy,
        devices=RANKS,
        max_epochs=epochs,
    )
    trainer.fit(ConvolutionalClassifier(schedule_steps=steps, warmup_steps=steps // 16), Digits())


if __name__ == "__main__":
    main()
