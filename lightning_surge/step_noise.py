"""A noise estimate from every optimizer step, with no extra pass.

Between probes, the gradient of a step and the optimizer's own moving average of the steps before it
tell the noise apart from the signal: they share no example, so `g . m` estimates `|G|^2` while
`|g|^2` estimates `|G|^2 + tr Sigma / B`. The cross term is biased while the learning rate is high, because
the steps just taken bend the gradient; it is small beside the noise, so only their difference is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.gradients import dense

__all__ = ["StepNoise"]


class StepNoise:
    """Running `tr Sigma` from consecutive steps, kept on the device so that no step waits for it.

    Args:
        half_life: in optimizer steps.
    """

    def __init__(self, half_life: float = 50.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life)
        self._sum: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def update(self, optimizer: Optimizer, batch_size: float, loss_scale: float = 1.0) -> None:
        """Fold in the gradients of the step about to be taken.

        Args:
            optimizer: whose parameters have gradients and whose state holds `exp_avg`, as the Adam family's
                does; parameters that lack either are left out.
            batch_size: examples behind the gradients.
            loss_scale: factor that the gradients carry and the averages do not.
        """
        square: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        found = False
        for group in optimizer.param_groups:
            squares, products, steps = [], [], 0.0
            for parameter in group["params"]:
                gradient, state = parameter.grad, optimizer.state.get(parameter)
                if gradient is None or not state or "exp_avg" not in state or "step" not in state:
                    continue
                steps = steps or float(state["step"])
                flat = dense(gradient).reshape(-1)
                # 16 bits would overflow, or lose the difference.
                flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
                squares.append(torch.dot(flat, flat))
                products.append(torch.dot(flat, state["exp_avg"].reshape(-1).to(flat.dtype)))
            if steps < 1.0 or "betas" not in group:
                continue
            found = True
            # Adam's average starts at zero; this is its own correction for that.
            correction = 1.0 / (1.0 - group["betas"][0] ** steps)
            square = square + torch.stack(squares).double().sum() / loss_scale**2
            cross = cross + torch.stack(products).double().sum() * (correction / loss_scale)
        if not found:
            return
        noise = torch.as_tensor(batch_size * (square - cross))
        # A step whose gradient is not finite is left out of both sums.
        finite = torch.isfinite(noise)
        counted = finite.double()
        decay = self._decay * counted + (1.0 - counted)
        self._sum = self._sum * decay + torch.where(finite, noise, torch.zeros_like(noise))
        self._weight = self._weight * decay + counted

    @property
    def trace_cov(self) -> float:
        """`tr Sigma` per example; NaN before the second step. Reading it waits for the device."""
        weight = float(self._weight)
        return float(self._sum) / weight if weight > 0.0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"sum": float(self._sum), "weight": float(self._weight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that sums can have; nothing is taken over then.
            KeyError: if one is missing.
        """
        total, weight = state["sum"], state["weight"]
        numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in (total, weight))
        if not numbers or weight < 0.0:
            raise ValueError(
                f"Expected a finite sum and 0 <= weight < inf, got sum={total!r}, weight={weight!r}: load "
                "what state_dict returned."
            )
        self._sum, self._weight = float(total), float(weight)
