"""What an optimizer steps along, and what follows from it for measuring, fitting and following a law.

No torch is imported here, so that `policy`, which works on floats, can ask too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Direction:
    """The direction `V` of an optimizer's step `lr * V`, as a function of the mean gradient of a batch.

    A new direction is one more instance here, a law for it in `policy.estimates.law_of`, and the optimizers
    that take it in `optimizers.families`.

    Attributes:
        name: one word, as docs/support.md writes it.
        of: elementwise map from a mean gradient to `V`. It sees flat blocks of a parameter
            (`gradients.blocks`), so a map of whole matrices needs a walk of its own.
        loss_power: exponent with which `V` grows when the loss is multiplied by a number.
        objective: key of `OBJECTIVES` that a measured law is followed for by default.

    Example:
        >>> SIGN.loss_power, GRADIENT.loss_power
        (0, 1)
    """

    name: str
    of: Callable[[Tensor], Tensor]
    loss_power: int
    objective: str


def _sign(gradient: Tensor) -> Tensor:
    return gradient.sign()


def _itself(gradient: Tensor) -> Tensor:
    return gradient


# Adam and its relatives: an update's length does not grow with the gradient, coordinate by coordinate.
SIGN = Direction("sign", _sign, loss_power=0, objective="progress")
# SGD. Equal progress per example is linear scaling here, whatever is measured; `alignment` is its own law.
GRADIENT = Direction("gradient", _itself, loss_power=1, objective="alignment")
