"""Whether a gradient scaler skips the coming step."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.optim import Optimizer

__all__ = ["skips_step"]


def skips_step(trainer: pl.Trainer, optimizer: Optimizer, *, has_loss: bool) -> bool:
    """Ask the scaler of `precision="16-mixed"` in `on_before_optimizer_step`.

    Lightning has unscaled the gradients by then and looked for infinities, except those of a fused optimizer
    (`_step_supports_amp_scaling`), which does both within its step. For that one the scaler is made to look
    now: one more pass over the gradients, which waits for the device.

    Args:
        trainer: at `on_before_optimizer_step`.
        optimizer: the raw torch optimizer, whose gradients are complete.
        has_loss: whether the last `training_step` returned one; Lightning leaves out the scaler's step where
            it returned None.

    Returns:
        Whether gradients are not finite, so that the optimizer will leave the parameters alone; False where
        there is no scaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return False
    if not has_loss:
        return True
    found = scaler._found_inf_per_device(optimizer) or scaler._check_inf_per_device(optimizer)
    return any(bool(value) for value in found.values())
