"""Steps against examples: what a batch size costs on the way to a given loss.

If a step gains ``gain_max / (1 + B_crit / B)`` of what a noiseless step would, a run at batch size B
needs more steps than the fewest possible and, as B grows, more examples than the fewest possible:

    S(B) = S_min (1 + B_crit / B)        E(B) = B S(B) = E_min (1 + B / B_crit)
    (S / S_min - 1) (E / E_min - 1) = 1  B_crit = E_min / S_min

``B_crit`` is a law's ``critical_batch_size``: at that batch size a run takes twice the fewest steps
and twice the fewest examples. The forms assume one ``B_crit`` for the whole run, while the measured
one moves; over a run they hold for some average of it.

References:
    Li et al., arXiv:2405.14578, Theorem 5, Eq. 18-22; McCandlish et al., arXiv:1812.06162, section 2.3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import linregress

from lightning_surge.checking.arguments import number
from lightning_surge.laws.base import checked

Counts = Sequence[float] | npt.NDArray[np.float64]

_CRITICAL = "pass a law's critical_batch_size if it is finite and positive"
_SCALE = "pass what fit_tradeoff returned, or a count from a run"


class TradeoffFit(NamedTuple):
    """Trade-off curve through runs that reached the same loss.

    Attributes:
        critical_batch_size: examples, E_min / S_min.
        min_steps: S_min, the steps an unlimited batch would take.
        min_examples: E_min, the examples that ever smaller batches would take.
    """

    critical_batch_size: float
    min_steps: float
    min_examples: float


def steps_needed(batch_size: float, *, critical_batch_size: float, min_steps: float) -> float:
    """Steps to the loss at a constant batch size, S_min (1 + B_crit / B).

    Args:
        batch_size: examples, positive.
        critical_batch_size: examples, positive.
        min_steps: S_min, positive.

    Example:
        >>> steps_needed(100, critical_batch_size=300, min_steps=1000)
        4000.0
    """
    batch_size = checked(batch_size)
    critical_batch_size = number("critical_batch_size", critical_batch_size, _CRITICAL)
    return number("min_steps", min_steps, _SCALE) * (1 + critical_batch_size / batch_size)


def examples_needed(batch_size: float, *, critical_batch_size: float, min_examples: float) -> float:
    """Examples to the loss at a constant batch size, E_min (1 + B / B_crit).

    Args:
        batch_size: examples, positive.
        critical_batch_size: examples, positive.
        min_examples: E_min, positive.

    Example:
        >>> examples_needed(600, critical_batch_size=300, min_examples=300_000)
        900000.0
    """
    batch_size = checked(batch_size)
    critical_batch_size = number("critical_batch_size", critical_batch_size, _CRITICAL)
    return number("min_examples", min_examples, _SCALE) * (1 + batch_size / critical_batch_size)


def fit_tradeoff(steps: Counts, examples: Counts) -> TradeoffFit:
    """Fit of 1 / S = -B_crit (1 / E) + 1 / S_min by least squares in 1 / S.

    One pair per run, all runs to the same loss. With two runs the line passes through both. Noise in S
    is noise in E = B S as well, which least squares in one variable does not know: with runs to a noisy
    loss, or batch sizes within a factor of a few, treat the result as rough.

    Args:
        steps: S, optimizer steps of each run, positive.
        examples: E, examples of each run, positive.

    Returns:
        The critical batch size in examples, the fewest steps and the fewest examples.

    Raises:
        ValueError: for lengths that differ, values that are not positive and finite, fewer than two
            distinct runs, or runs in which more examples do not save steps.

    Example:
        Runs with S_min = 1000 and B_crit = 300: B = 100 takes 4000 steps, B = 600 takes 1500.

        >>> fit = fit_tradeoff([4000, 1500], [400_000, 900_000])
        >>> [round(value, 6) for value in fit]
        [300.0, 1000.0, 300000.0]

    References:
        arXiv:2405.14578, Eq. 22.
    """
    inverse_steps, inverse_examples = _inverses("steps", steps), _inverses("examples", examples)
    if inverse_steps.size != inverse_examples.size:
        raise ValueError(
            f"Expected as many steps as examples, got {inverse_steps.size} steps and "
            f"{inverse_examples.size} examples: pass one pair per run."
        )
    if (distinct := np.unique(inverse_examples).size) < 2:
        raise ValueError(
            f"Expected at least 2 runs with different examples, got {distinct}: add other batch sizes."
        )
    line = linregress(inverse_examples, inverse_steps)
    slope, intercept = float(line.slope), float(line.intercept)
    if slope >= 0 or intercept <= 0:
        raise ValueError(
            "Expected steps to fall towards a positive limit as examples grow, got 1/S against 1/E with "
            f"slope={slope:.3g}, intercept={intercept:.3g}: check that all runs reached the same loss, and "
            "add batch sizes further apart."
        )
    return TradeoffFit(-slope, 1 / intercept, -slope / intercept)


def _inverses(name: str, values: Counts) -> npt.NDArray[np.float64]:
    remedy = "pass one count per run and leave out runs that never reached the loss"
    return np.array([1 / number(f"{name}[{i}]", value, remedy) for i, value in enumerate(values)])
