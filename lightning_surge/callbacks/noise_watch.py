"""Whether the noise has changed since the last measurement, from what every step tells of it."""

from __future__ import annotations

import math
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_surge.step_noise import StepNoise

__all__ = ["NoiseWatch"]

# How often the noise of the steps is read, which waits for the device, and how far it must have moved since
# the last measurement for the next one to hurry.
CHECK_STEPS = 16
CHANGE = 2.0


class NoiseWatch:
    """Follows the noise of the steps, and compares it with that at the last measurement.

    Attributes:
        changed: for any process, at the latest step: the next window knows.
    """

    def __init__(self) -> None:
        self.changed = False
        self._steps = StepNoise()
        self._works = True
        self._at_measurement = math.nan

    @property
    def trace_cov(self) -> float:
        """`tr Sigma` as the steps tell it; NaN where they do not. Reading it waits for the device."""
        return self._steps.trace_cov

    def step(self, optimizer: Optimizer, batch_size: float, loss_scale: float) -> None:
        """Take what a step about to be taken tells, from the optimizers that tell it; survives a failure.

        Args:
            optimizer: whose gradients are complete.
            batch_size: examples behind them.
            loss_scale: factor that they carry.
        """
        if not self._works:
            return
        try:
            self._steps.update(optimizer, batch_size, loss_scale)
        except Exception as error:
            self._works = False
            rank_zero_warn(
                f"The state of {type(optimizer).__name__} is not read for its noise: {type(error).__name__}: "
                f"{error}. Measurements do not need it."
            )

    def sees_change(self, step: int) -> bool:
        """Whether the steps since the last measurement show a noise that differs from what it saw.

        Args:
            step: optimizer steps taken before; the noise is looked at every few of them.
        """
        if step % CHECK_STEPS:
            return False
        before, now = self._at_measurement, self.trace_cov
        # Not a number before the second step, and zero where the gradients are: neither tells of a change.
        if not (0.0 < before < math.inf and 0.0 < now < math.inf):
            return False
        return not 1.0 / CHANGE < now / before < CHANGE

    def measured(self) -> None:
        """Compare from now on with the noise as it is."""
        self._at_measurement, self.changed = self.trace_cov, False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "step_noise": self._steps.state_dict(),
            "noise_at_measurement": self._at_measurement,
            "noise_changed": self.changed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that it can have; this object is of no use then.
            KeyError: if one is missing.
        """
        self._steps.load_state_dict(state["step_noise"])
        self._at_measurement = float(state["noise_at_measurement"])
        self.changed = bool(state.get("noise_changed", False))
