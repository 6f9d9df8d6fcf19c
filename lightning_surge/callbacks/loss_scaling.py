"""What a gradient scaler does to the coming step: whether it skips it, how much gradients are scaled."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
from torch.optim import Optimizer

__all__ = ["StepScaling", "step_scaling"]


class StepScaling(NamedTuple):
    """The coming step, as the scaler of `precision="16-mixed"` sees it.

    Attributes:
        skipped: whether gradients are not finite, so that the optimizer will leave the parameters alone.
        loss_scale: factor that the gradients in `.grad` still carry.
    """

    skipped: bool
    loss_scale: float


def step_scaling(trainer: pl.Trainer, optimizer: Optimizer, *, has_loss: bool) -> StepScaling:
    """Ask the scaler in `on_before_optimizer_step`.

    Lightning has unscaled the gradients by then and looked for infinities, except those of a fused optimizer
    (`_step_supports_amp_scaling`), which does both within its step. For that one the scaler is made to look
    now: one more pass over the gradients, which waits for the device.

    Args:
        trainer: at `on_before_optimizer_step`.
        optimizer: the raw torch optimizer, whose gradients are complete.
        has_loss: whether the last `training_step` returned one; Lightning leaves out the scaler's step where
            it returned None.

    Returns:
        Not skipped, and a scale of 1, where there is no scaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return StepScaling(False, 1.0)
    if not has_loss:
        return StepScaling(True, 1.0)
    found = scaler._found_inf_per_device(optimizer)
    loss_scale = 1.0
    if not found:
        loss_scale = float(scaler.get_scale())
        found = scaler._check_inf_per_device(optimizer)
    return StepScaling(any(bool(value) for value in found.values()), loss_scale)
