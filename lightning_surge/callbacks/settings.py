"""The callback's plain settings, checked before any training time is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from lightning_surge.laws.base import ConstantLaw, LinearLaw, SqrtLaw
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.measure.direction import SIGN

__all__ = [
    "LAWS",
    "REFERENCE_RULES",
    "SurgeSettings",
    "check_functions",
    "default_objective",
    "refuse_retired",
]

REFERENCE_RULES: dict[str, type[ConstantLaw] | type[SqrtLaw] | type[LinearLaw]] = {
    "sqrt": SqrtLaw,
    "linear": LinearLaw,
    "constant": ConstantLaw,
}
LAWS = ("measured", "theorem2", "theorem3", *REFERENCE_RULES)


def default_objective(law: str) -> str:
    """What a law is followed for unless the user says otherwise.

    Args:
        law: key of `LAWS`.

    Returns:
        Adam's for the measured law, replaced in training by that of the optimizer's direction; `"step"` for
        the paper's closed forms and for fixed rules, which are followed to the letter.
    """
    return SIGN.objective if law == "measured" else "step"


@dataclass(frozen=True, kw_only=True)
class SurgeSettings:
    """Checked settings of `SurgeLRCallback`, which documents them.

    Raises:
        ValueError: if one of them is out of range; the message names it, its value and the remedy.
    """

    base_batch_size: float | None
    law: str
    objective: str
    dry_run: bool
    max_overhead: float
    probe_every: int | None
    probe_examples: int | None
    lr_scale_bounds: tuple[float, float] | None
    max_drift_per_step: float | None
    half_life: float
    scale_weight_decay: bool
    custom_scalars: bool
    prog_bar: bool
    optimizer: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("law", LAWS), ("objective", tuple(OBJECTIVES))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"Expected {name} to be one of {', '.join(choices)}, got {name}={value!r}.")
        if not self.measures and self.objective != "step":
            raise ValueError(
                f"Expected objective='step' with a rule that measures nothing, got law={self.law!r}, "
                f"objective={self.objective!r}: use law='measured'."
            )
        if self.follows_edge and self.law != "measured":
            raise ValueError(
                f"Expected law='measured' with objective='edge', got law={self.law!r}: only its measurements "
                "look for the edge of stability."
            )
        _positive(
            "base_batch_size", self.base_batch_size, "count examples per optimizer step, or leave it out"
        )
        _positive("max_overhead", self.max_overhead, "0.01 spends one percent of the passes on measuring")
        _positive("max_drift_per_step", self.max_drift_per_step, "0.05 lets the factor rise 5 % per step")
        _positive("half_life", self.half_life, "8 measurements is a good start")
        _whole("probe_every", self.probe_every, 1, "count optimizer steps, or leave it to max_overhead")
        _whole("optimizer", self.optimizer, 0, "count the optimizers of configure_optimizers from 0")
        _whole("probe_examples", self.probe_examples, 4, "4 examples make the smallest measurement")
        if not isinstance(self.scale_weight_decay, bool):
            raise ValueError(
                f"Expected scale_weight_decay=True or False, got {self.scale_weight_decay!r}: True lets the "
                "decay per step scale with the learning rate, as torch does."
            )
        if self.lr_scale_bounds is not None:
            self._check_bounds(self.lr_scale_bounds)

    @property
    def measures(self) -> bool:
        """Whether the law takes measurements, as rules do not."""
        return self.law not in REFERENCE_RULES

    @property
    def follows_edge(self) -> bool:
        """Whether measurements must find Adam's edge of stability too."""
        return self.objective == "edge"

    @staticmethod
    def _check_bounds(bounds: tuple[float, float]) -> None:
        pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
        if not pair or not all(_is_number(bound) for bound in bounds):
            raise ValueError(f"Expected lr_scale_bounds=(low, high), two finite numbers, got {bounds}.")
        low, high = bounds
        if not 0.0 < low <= 1.0 <= high:
            raise ValueError(
                f"Expected 0 < low <= 1 <= high, got lr_scale_bounds=({low}, {high}): the factor is 1 at "
                "base_batch_size, so the bounds must hold 1 between them, the smaller one first."
            )


def refuse_retired(arguments: Mapping[str, object]) -> None:
    """Refuse arguments that there are not, and say what to use for one that there was.

    Args:
        arguments: of `SurgeLRCallback`, beyond those that it has.

    Raises:
        ValueError: if one is retired.
        TypeError: if one is not known.
    """
    if "anchor" in arguments:
        raise ValueError(
            f"Expected no anchor, got anchor={arguments['anchor']!r}, which is retired: leave it out. The "
            "level is the schedule's, and the factor on it is 1 at base_batch_size."
        )
    for name in arguments:
        raise TypeError(f"SurgeLRCallback got an unexpected keyword argument {name!r}.")


def check_functions(loss_fn: Any, split_batch: Any) -> None:
    """Refuse what cannot be called for a loss, or to cut a batch.

    Args:
        loss_fn: of `SurgeLRCallback`.
        split_batch: of `SurgeLRCallback`.

    Raises:
        ValueError: with the rule, and what was found.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"Expected loss_fn to be a function or None, got loss_fn={loss_fn!r}.")
    if not (split_batch is None or split_batch is False or callable(split_batch)):
        raise ValueError(
            f"Expected split_batch to be a function of (batch, num_slices), None or False, got "
            f"split_batch={split_batch!r}."
        )


def _positive(name: str, value: float | None, remedy: str) -> None:
    if value is not None and not (_is_number(value) and value > 0 and math.isfinite(value)):
        raise ValueError(f"Expected 0 < {name} < inf, got {name}={value!r}: {remedy}.")


def _whole(name: str, value: int | None, smallest: int, remedy: str) -> None:
    if value is not None and not (_is_number(value) and int(value) == value and value >= smallest):
        raise ValueError(f"Expected a whole number {name} >= {smallest}, got {name}={value!r}: {remedy}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
