"""Measure an existing project and change nothing: what would another batch size allow?

    python -m examples.dry_run            # a minute
    python -m examples.dry_run --fast     # a few seconds, to see that everything works

`SurgeLRCallback(dry_run=True)` measures and logs, and never touches the learning rate. To prove it, the
project is trained twice, without the callback and with it: the weights are equal, bit for bit. Then the
callback is asked what it would have done at other batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.digits_model import MICRO_BATCH_SIZE, ConvolutionalClassifier, Digits
from examples.epoch_table import quiet_trainer
from examples.report import fast_and_seed, prepare
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.estimates import EstimatedLaw


def train(callbacks: list[SurgeLRCallback], epochs: int, seed: int) -> ConvolutionalClassifier:
    """The existing project, with a list of callbacks."""
    prepare(seed)
    steps = epochs * Digits.TRAINING_EXAMPLES // MICRO_BATCH_SIZE
    model = ConvolutionalClassifier(schedule_steps=steps, warmup_steps=steps // 16)
    quiet_trainer(*callbacks, max_epochs=epochs).fit(model, Digits())
    return model


def main(arguments: Sequence[str] | None = None) -> SurgeLRCallback:
    """Train twice, compare the weights, print the law; returns the callback."""
    options = fast_and_seed(__doc__, arguments)
    epochs = 1 if options.fast else 8

    plain = train([], epochs, options.seed)
    # The size that is trained with is the one that the learning rate was tuned at.
    surge = SurgeLRCallback(
        base_batch_size=MICRO_BATCH_SIZE, dry_run=True, max_overhead=0.3 if options.fast else 0.1
    )
    watched = train([surge], epochs, options.seed)

    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    equal = all(torch.equal(one, other) for one, other in pairs)
    print(f"weights with and without the callback: {'equal, bit for bit' if equal else 'NOT equal'}")
    law = surge.law
    if not isinstance(law, EstimatedLaw):
        print("too few measurements for a law: train longer, or raise max_overhead")
        return surge
    stats = surge.history.stats()
    print(f"{surge.history.num_measurements} measurements, {surge.overhead:.1%} of the examples trained")
    print(f"noise scale {stats.noise_scale:.0f}, critical batch size {law.critical_batch_size:.0f} examples")

    print(f"\nwhat it would do at a scheduled learning rate of {plain.lr:g}:\n")
    print("batch size  factor  learning rate")
    for batch_size in (8, 16, 32, 64, 128, 256):
        factor = surge.lr_scale(batch_size)
        print(f"{batch_size:10d}  {factor:6.2f}  {factor * plain.lr:13.2e}")
    return surge


if __name__ == "__main__":
    main()
