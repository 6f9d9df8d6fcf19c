"""The factor as an optimizer alone sees it; trainings are in tests/callbacks/test_factor.py."""

from typing import Any

import torch
from torch.optim import SGD

from lightning_surge.optimizers.lr_writer import FactorInUpdate


class Early(SGD):
    """Reads its learning rate before it asks for gradients."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        (group,) = self.param_groups
        lr, loss = group["lr"], closure()
        for parameter in group["params"]:
            parameter.data -= lr * parameter.grad
        return loss


def test_of_an_early_reader_what_it_read_is_told() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Early([weight], lr=0.25)
    # Before the closure the examples of the step are only foreseen: what is known after it comes too late.
    factor = FactorInUpdate(optimizer, lambda early: 2.0 if early else 4.0)

    def closure() -> float:
        weight.grad = torch.ones(1)
        return float(optimizer.param_groups[0]["lr"])

    for left in (0.5, 0.0):
        assert optimizer.step(closure) == 0.25
        assert weight.item() == left
        assert (factor.scheduled, factor.used) == ([0.25], [0.5])
        assert optimizer.param_groups[0]["lr"] == 0.25
