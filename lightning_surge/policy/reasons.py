"""Why the factor on the learning rate is what it is: names, and the numbers under which loggers keep them.

A room of its own, so that whoever reads a run's logs needs neither torch nor the policy.
"""

from __future__ import annotations

from enum import IntEnum

# Codes from here on mean that the last law was kept because a new one could not be had.
FIRST_HELD = 10


class Reason(IntEnum):
    """What decided the factor, as logged under `surge/held_because`.

    The numbers are part of the logs' format: they never change, and new reasons get new ones.

    Attributes:
        text: the reason in words; a held one may have been logged with more detail.

    Example:
        >>> Reason(4), Reason(4).text, Reason(4).held
        (<Reason.BOUNDED_ABOVE: 4>, 'bounded above by lr_scale_bounds', False)
        >>> Reason.NO_LAW.held
        True
    """

    text: str

    def __new__(cls, code: int, text: str = "") -> Reason:
        """A member from its code and its words."""
        member = int.__new__(cls, code)
        member._value_, member.text = code, text
        return member

    MEASURED = 0, "measured"
    RULE = 1, "the rule"
    NOTHING_MEASURED = 2, "sqrt: nothing measured yet"
    UNCERTAIN = 3, "between sqrt and measured: standard error is large"
    BOUNDED_ABOVE = 4, "bounded above by lr_scale_bounds"
    BOUNDED_BELOW = 5, "bounded below by lr_scale_bounds"
    RISING = 6, "rising: limited by max_drift_per_step"
    NO_LAW_HERE = 7, "sqrt: no law at this batch size"
    UNRESOLVED = 8, "unresolved: the law is at the edge of what can be fitted"
    NO_LAW = 10, "held: the measurements do not determine a law"
    # 11 and 14 are of objective="edge", and found in old logs alone.
    NO_EDGE = 11, "held: the measurements do not determine an edge of stability"
    MEASURING_FAILED = 12, "held: measuring failed"
    FITTING_FAILED = 13, "held: fitting failed"
    AVERAGES_UNREADABLE = 14, "held: Adam's averages do not tell the gradient from its noise now"
    GRADIENTS_ZERO = 15, "held: the gradients are zero"
    PARAMETERS_CHANGED = 16, "held: the trained parameters have changed"

    @property
    def label(self) -> str:
        """The name as a word or two, for an axis."""
        return self.name.lower().replace("_", " ")

    @property
    def held(self) -> bool:
        """Whether the last law was kept because a new one could not be had."""
        return self >= FIRST_HELD
