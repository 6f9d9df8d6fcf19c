"""Laws of the optimal learning rate, objectives and trade-offs between steps and examples: floats only."""

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, MeasuredLaw, Peak, SGDLaw, SqrtLaw
from lightning_surge.laws.objectives import OBJECTIVES, alignment_ratio, progress_ratio, step_ratio
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.laws.tradeoff import TradeoffFit, examples_needed, fit_tradeoff, steps_needed

__all__ = [
    "OBJECTIVES", "ConstantLaw", "Law", "LinearLaw", "MeasuredLaw", "Peak", "SGDLaw", "SqrtLaw",
    "Theorem3Law", "TradeoffFit", "alignment_ratio", "examples_needed", "fit_tradeoff",
    "progress_ratio", "step_ratio", "steps_needed",
]  # fmt: skip
