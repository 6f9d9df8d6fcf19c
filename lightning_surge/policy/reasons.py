"""Why the factor on the learning rate is what it is: names, and the numbers under which loggers keep them.

A room of its own, so that whoever reads a run's logs needs neither torch nor the policy.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Reason"]

# Codes from here on mean that the last law was kept because a new one could not be had.
FIRST_HELD = 10


class Reason(IntEnum):
    """What decided the factor, as logged under `surge/held_because`.

    The numbers are part of the logs' format: they never change, and new reasons get new ones.

    Example:
        >>> Reason(4), Reason(4).text, Reason(4).held
        (<Reason.BOUNDED_ABOVE: 4>, 'bounded above by lr_scale_bounds', False)
        >>> Reason.NO_LAW.held
        True
    """

    MEASURED = 0
    RULE = 1
    NOTHING_MEASURED = 2
    UNCERTAIN = 3
    BOUNDED_ABOVE = 4
    BOUNDED_BELOW = 5
    RISING = 6
    NO_LAW_HERE = 7
    UNRESOLVED = 8
    NO_LAW = 10
    NO_EDGE = 11
    MEASURING_FAILED = 12
    FITTING_FAILED = 13
    AVERAGES_UNREADABLE = 14
    GRADIENTS_ZERO = 15
    PARAMETERS_CHANGED = 16

    @property
    def text(self) -> str:
        """The reason in words; a held one may have been logged with more detail."""
        return _TEXTS[self]

    @property
    def label(self) -> str:
        """The name as a word or two, for an axis."""
        return self.name.lower().replace("_", " ")

    @property
    def held(self) -> bool:
        """Whether the last law was kept because a new one could not be had."""
        return self >= FIRST_HELD


_TEXTS = {
    Reason.MEASURED: "measured",
    Reason.RULE: "the rule",
    Reason.NOTHING_MEASURED: "sqrt: nothing measured yet",
    Reason.UNCERTAIN: "between sqrt and measured: standard error is large",
    Reason.BOUNDED_ABOVE: "bounded above by lr_scale_bounds",
    Reason.BOUNDED_BELOW: "bounded below by lr_scale_bounds",
    Reason.RISING: "rising: limited by max_drift_per_step",
    Reason.NO_LAW_HERE: "sqrt: no law at this batch size",
    Reason.UNRESOLVED: "unresolved: the law is at the edge of what can be fitted",
    Reason.NO_LAW: "held: the measurements do not determine a law",
    Reason.NO_EDGE: "held: the measurements do not determine an edge of stability",
    Reason.MEASURING_FAILED: "held: measuring failed",
    Reason.FITTING_FAILED: "held: fitting failed",
    Reason.AVERAGES_UNREADABLE: "held: Adam's averages do not tell the gradient from its noise now",
    Reason.GRADIENTS_ZERO: "held: the gradients are zero",
    Reason.PARAMETERS_CHANGED: "held: the trained parameters have changed",
}
