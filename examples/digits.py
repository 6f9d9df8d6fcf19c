"""Train a small convolutional network on scikit-learn's digits, with a batch-size ramp.

    python -m examples.digits            # less than a minute on two cores
    python -m examples.digits --fast     # a few seconds, to see that everything works

The images come with scikit-learn, so nothing is downloaded. The batch size grows from 8 to 128 while the
schedule's learning rate was tuned at 8; `SurgeLRCallback` measures what the larger batches allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from examples.digits_model import BASE_LR, MICRO_BATCH_SIZE, ConvolutionalClassifier, Digits
from examples.report import parse_arguments, prepare, print_report, progress_bar, run_loggers
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps

__all__ = ["BASE_LR", "ConvolutionalClassifier", "Digits", "main"]


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
        log_peak=True,
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
    return print_report(loggers, title="Convolutional network on scikit-learn's digits")


if __name__ == "__main__":
    main()
