"""The callback's plain settings, checked before any training time is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lightning_surge.checking.arguments import choice, number, optional, shown, store, switch, whole
from lightning_surge.laws.base import ConstantLaw, LinearLaw, SqrtLaw
from lightning_surge.laws.objectives import OBJECTIVES, RETIRED

REFERENCE_RULES: dict[str, type[ConstantLaw] | type[SqrtLaw] | type[LinearLaw]] = {
    "sqrt": SqrtLaw,
    "linear": LinearLaw,
    "constant": ConstantLaw,
}
LAWS = ("measured", "theorem2", "theorem3", *REFERENCE_RULES)

# Nobody counts more examples or measurements; a number beyond is a mistake, and would overflow in training.
LARGEST_NUMBER = 1e12


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
    log_peak: bool
    lr_scale_bounds: tuple[float, float] | None
    max_drift_per_step: float | None
    half_life: float
    scale_weight_decay: bool | Literal["per_example"]
    custom_scalars: bool
    prog_bar: bool
    optimizer: int | None = None

    def __post_init__(self) -> None:
        choice("law", self.law, LAWS)
        if self.objective in RETIRED.values():
            raise ValueError(
                f"Expected objective to be one of {', '.join(OBJECTIVES)}, got objective={self.objective!r}, "
                "which is retired: use objective='progress'."
            )
        choice("objective", self.objective, OBJECTIVES)
        if not self.measures and self.objective != "step":
            raise ValueError(
                f"Expected objective='step' with a rule that measures nothing, got law={self.law!r}, "
                f"objective={self.objective!r}: use law='measured'."
            )
        decay = "True lets the decay per step scale with the learning rate, False keeps it, and 'per_example'"
        if not isinstance(self.scale_weight_decay, str) or self.scale_weight_decay != "per_example":
            switch("scale_weight_decay", self.scale_weight_decay, f"{decay} keeps the decay per example")
        for name in ("dry_run", "log_peak", "custom_scalars", "prog_bar"):
            switch(name, getattr(self, name))
        for name, remedy in (
            ("max_overhead", "0.01 spends one percent of the passes on measuring"),
            ("half_life", "8 measurements is a good start"),
        ):
            store(self, **{name: number(name, getattr(self, name), remedy, most=LARGEST_NUMBER)})
        for name, least, remedy in (
            ("probe_every", 1, "count optimizer steps, or leave it to max_overhead"),
            ("probe_examples", 4, "4 examples make the smallest measurement"),
            ("optimizer", 0, "count the optimizers of configure_optimizers from 0"),
        ):
            store(self, **{name: optional(whole, name, getattr(self, name), remedy, least=least)})
        drift, remedy = "max_drift_per_step", "0.05 lets the factor rise 5 % per step"
        store(
            self,
            max_drift_per_step=optional(number, drift, self.max_drift_per_step, remedy, most=LARGEST_NUMBER),
            base_batch_size=optional(check_base, "base_batch_size", self.base_batch_size),
            lr_scale_bounds=optional(_bounds, "lr_scale_bounds", self.lr_scale_bounds),
        )

    @cached_property
    def measures(self) -> bool:
        """Whether the law takes measurements, as rules do not."""
        return self.law not in REFERENCE_RULES

    @cached_property
    def needs_curvature(self) -> bool:
        """Whether norms of gradients are not enough."""
        needed = self.objective == "step" or self.law.startswith("theorem") or self.log_peak
        return self.measures and needed


def check_base(name: str, value: object) -> float:
    """A base batch size that somebody may count, in examples or tokens."""
    remedy = "count examples per optimizer step, or leave it out"
    return number(name, value, remedy, least=1e-6, most=LARGEST_NUMBER)


def _bounds(name: str, bounds: Any) -> tuple[float, float]:
    """Two numbers around 1, as a plain tuple."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"Expected {name}=(low, high), two numbers, got {shown(bounds)}: say both.")
    remedy = "the factor is 1 at base_batch_size, which lies between the two, the smaller one first"
    return number(f"{name}[0]", bounds[0], remedy, most=1), number(f"{name}[1]", bounds[1], remedy, least=1)


def refuse_retired(arguments: Mapping[str, object]) -> None:
    """Refuse arguments that `SurgeLRCallback` does not have, and say what to use for one that it had."""
    if "anchor" in arguments:
        raise ValueError(
            f"Expected no anchor, got anchor={arguments['anchor']!r}, which is retired: leave it out. The "
            "level is the schedule's, and the factor on it is 1 at base_batch_size."
        )
    for name in arguments:
        raise TypeError(f"SurgeLRCallback got an unexpected keyword argument {name!r}.")
