"""What is compared: constant batch sizes, and ramps with a rule for the learning rate."""

from __future__ import annotations

from typing import NamedTuple

from lightning_surge import SurgeLRCallback
from lightning_surge.laws.objectives import OBJECTIVES

BASE_BATCH_SIZE = 8
LARGE_BATCH_SIZE = 128
BUDGETS = ("short", "long")
SEEDS = (0, 1, 2)
MORE_SEEDS = tuple(range(3, 23))
"""For the winner and what it is held against, which the others have chosen: until the interval is narrow."""
MULTIPLIERS = {
    ("short", BASE_BATCH_SIZE): (0.71, 1.0, 1.41, 2.0, 2.83, 4.0),
    ("short", LARGE_BATCH_SIZE): (1.41, 2.0, 2.83, 4.0, 5.66, 8.0),
    ("long", BASE_BATCH_SIZE): (0.71, 1.0, 1.41),
    ("long", LARGE_BATCH_SIZE): (1.41, 2.0, 2.83, 4.0, 5.66, 8.0),
}
"""Of the example's learning rate, to tune it at a constant batch size."""

RAMPS = {"slow": 1.0, "fast": 0.25}
"""Share of the examples of a run over which the batch size grows geometrically."""
SEESAW = "Seesaw"
APPROACHED = ", approached"
FIXED_RULES = ("constant", "sqrt", "linear", f"sqrt{APPROACHED}", f"linear{APPROACHED}")
"""They measure nothing; an approached one rises from 1 by at most `MAX_DRIFT` a step."""
DEFAULT = SurgeLRCallback().settings.objective
DEFAULT_OVERHEAD = SurgeLRCallback().settings.max_overhead
# These runs are short: at the default cost a probe comes too rarely to follow them.
LARGE_OVERHEAD = 0.05


class Rule(NamedTuple):
    """A growing batch size with a rule for the learning rate."""

    ramp: str  # key of `RAMPS`, or `SEESAW`, by the learning-rate schedule
    rule: str  # fixed rule, or objective of the callback
    max_overhead: float  # of the callback; 0 with a fixed rule

    @property
    def label(self) -> str:
        """The learning rate's rule, for tables."""
        if self.rule in FIXED_RULES:
            return "constant lr" if self.rule == "constant" else self.rule
        default = " (default)" if self.rule == DEFAULT else ""
        return f"SurgeLR {self.rule}{default}, overhead {100 * self.max_overhead:g} %"


def growth(ramp: str) -> str:
    """How the batch size grows, for tables."""
    return f"{ramp} ramp" if ramp in RAMPS else ramp


RULES = [
    *(
        rule
        for ramp in RAMPS
        for rule in (
            *(Rule(ramp, fixed, 0.0) for fixed in FIXED_RULES),
            *(Rule(ramp, objective, LARGE_OVERHEAD) for objective in OBJECTIVES),
            Rule(ramp, DEFAULT, DEFAULT_OVERHEAD),
        )
    ),
    Rule(SEESAW, "sqrt", 0.0),
    Rule(SEESAW, DEFAULT, DEFAULT_OVERHEAD),
]
CANDIDATES = [rule for rule in RULES if rule.rule == DEFAULT and rule.max_overhead == LARGE_OVERHEAD]
"""Of which the best one is held against the best constant batch size."""
