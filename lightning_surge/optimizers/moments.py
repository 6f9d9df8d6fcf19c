"""Per-coordinate mean and variance of the gradient, read from Adam's own moving averages.

Adam already keeps `m`, the average of the gradients, and `v`, the average of their squares. For gradients
of `B` examples with per-example mean `mu` and variance `sigma^2`, and bias-corrected averages,

    E[m^2] = mu^2 + b sigma^2       b: sum of squared weights of m, each over the batch size of its step
    E[v]   = mu^2 + a sigma^2       a: average of 1 / B with the weights of v

so two numbers that follow the batch size from step to step turn them into `mu^2` and `sigma^2`, with
no memory and no pass. At a constant batch size `b / a` is `(1 - beta_1) / (1 + beta_1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.checking.arguments import number
from lightning_surge.checking.state import REMEDY, restore
from lightning_surge.measure.distributed import local
from lightning_surge.optimizers.families import has_plain_averages

__all__ = ["AdamMoments"]

# `b` must be less than half of `a`, or their difference drowns in noise. In the long run that takes a beta_1
# above 1/3.
LARGEST_SHARE = 0.5
# Of the steps counted, a parameter must have taken part in this share.
LEAST_STEPS = 0.9


@dataclass(frozen=True)
class MomentsState:
    """What a checkpoint holds of `AdamMoments`: sums not yet corrected for their start."""

    steps: int
    seen_from_start: bool
    first: float
    second: float
    betas: tuple[float, float]

    def __post_init__(self) -> None:
        for name in ("steps", "first", "second"):
            number(name, getattr(self, name), REMEDY, least=0)
        for beta in self.betas:
            number("betas", beta, REMEDY, least=0, below=1)


class AdamMoments:
    """Follows the batch size behind Adam's averages, and reads mean and variance off them.

    It assumes that the gradient's moments hold still over the memory of `v`, `1 / (1 - beta_2)` steps. It
    declines where the averages are not those of the loss's gradient, as with coupled weight decay or variants
    of Adam, where it has not seen the state's first steps or enough since, where parameters joined later,
    and where `beta_1` is so small that `m` and `v` tell the same. Clipping also makes them averages of
    something else; the caller must know of it.

    Example:
        After one step at B = 4 with `beta_1 = 0.5`, `beta_2 = 0.75`, both averages have one entry, 1 / 4.

        >>> moments = AdamMoments()
        >>> moments.step(4.0, (0.5, 0.75))
        >>> moments.second, moments.first
        (0.25, 0.25)
    """

    def __init__(self) -> None:
        self._steps = 0
        self._seen_from_start = True
        self._first = 0.0
        self._second = 0.0
        self._betas = (0.0, 0.0)

    def begin(self, optimizer: Optimizer) -> None:
        """Start a run: afresh with an optimizer that has no history, else knowing what was known."""
        if not optimizer.state:
            vars(self).update(vars(AdamMoments()))
        elif self._steps == 0:
            self._seen_from_start = False

    def step(self, batch_size: float, betas: tuple[float, float]) -> None:
        """Count one optimizer step with `batch_size` examples behind it."""
        beta_1, beta_2 = self._betas = betas
        self._first = beta_1**2 * self._first + (1.0 - beta_1) ** 2 / batch_size
        self._second = beta_2 * self._second + (1.0 - beta_2) / batch_size
        self._steps += 1

    @property
    def first(self) -> float:
        """`b`: what `m^2` holds of `sigma^2`, bias-corrected."""
        return self._first / (1.0 - self._betas[0] ** self._steps) ** 2

    @property
    def second(self) -> float:
        """`a`: what `v` holds of `sigma^2`, bias-corrected."""
        return self._second / (1.0 - self._betas[1] ** self._steps)

    def readable(self, optimizer: Optimizer) -> bool:
        """Whether the averages tell mean and variance apart now; False where the class says it declines."""
        if not has_plain_averages(optimizer):
            return False
        if any(tuple(group.get("betas", ()))[:2] != self._betas for group in optimizer.param_groups):
            return False
        if self._steps < 2 or not any("exp_avg_sq" in state for state in optimizer.state.values()):
            return False
        memory = 1.0 / (1.0 - self._betas[1]) if self._betas[1] < 1.0 else math.inf
        if not (self._seen_from_start or self._steps > 3.0 * memory):
            return False
        # Parameters that joined later, or had no gradient at times, have averages of other steps than those
        # counted here, until they have forgotten where they began.
        known = LEAST_STEPS * min(float(self._steps), 3.0 * memory)
        return self._fewest_steps(optimizer) >= known and self.first < LARGEST_SHARE * self.second

    @staticmethod
    def _fewest_steps(optimizer: Optimizer) -> float:
        """Of the parameters that are trained and have averages."""
        rows = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        states = [optimizer.state[p] for p in rows if p in optimizer.state]
        return min((float(state["step"]) for state in states if "exp_avg_sq" in state), default=math.inf)

    def variance(self, optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
        """Per-coordinate variance of one example's gradient, debiased and not below zero.

        None if the parameter has no averages; `readable` must hold.
        """
        state = optimizer.state.get(parameter)
        if not state or "exp_avg_sq" not in state:
            return None
        steps = float(state["step"])
        mean_sq: Tensor = (local(state["exp_avg"]) / (1.0 - self._betas[0] ** steps)).square_()
        variance: Tensor = (local(state["exp_avg_sq"]) / (1.0 - self._betas[1] ** steps)).sub_(mean_sq)
        return variance.div_(self.second - self.first).clamp_(min=0.0)

    def deviation_l1(self, optimizer: Optimizer) -> float:
        """`sum_i sigma_i` over all coordinates that have averages; NaN where `readable` does not hold."""
        if not self.readable(optimizer):
            return math.nan
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for parameter in parameters:
            variance = self.variance(optimizer, parameter)
            if variance is not None:
                total += variance.sqrt_().sum(dtype=torch.float64)
        return float(total.item())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "_betas": list(self._betas)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`, or none of it if it is damaged."""
        saved = restore(MomentsState, state)
        vars(self).update({f"_{name}": value for name, value in vars(saved).items()})
