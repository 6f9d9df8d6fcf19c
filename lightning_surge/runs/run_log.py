"""What a run has logged: its series, its parameter groups, and its law at any step.

docs/logged-values.md lists the keys, which are the same with every logger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_surge.laws.base import Law, MeasuredLaw, SGDLaw
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.laws.theorems import Theorem3Law

FloatArray = NDArray[np.float64]

PREFIX = "surge/"
LAW_PREFIX = f"{PREFIX}law/"


class RunLogError(ValueError):
    """A run cannot be read: the rule, the value and the remedy."""


class Series(NamedTuple):
    """One logged quantity: what was written, and at which optimizer step.

    Attributes:
        steps: Optimizer steps, shape `(n,)`, increasing.
        values: Values, shape `(n,)`. TensorBoard keeps them in single precision.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """The values at some steps, NaN where there is none."""
        if not self.steps.size:
            return np.full(steps.shape, np.nan)
        index = np.minimum(np.searchsorted(self.steps, steps), self.steps.size - 1)
        return np.where(self.steps[index] == steps, self.values[index], np.nan)

    @property
    def changes(self) -> NDArray[np.int64]:
        """The steps at which there is another value than before, shape `(n,)`."""
        differs: NDArray[np.bool_] = np.append(True, self.values[1:] != self.values[:-1])
        return self.steps[differs[: self.steps.size]]


NOTHING = Series(np.array([], dtype=np.int64), np.array([], dtype=np.float64))


@dataclass(frozen=True)
class RunLog:
    """What one run has logged.

    Attributes:
        source: the directory or file that was read.
        series: one `Series` per key.
        notes: what a reader should know of the files: which run was chosen, what was left out.

    Example:
        >>> steps = np.array([10, 20])
        >>> run = RunLog("here", {"surge/batch_size": Series(steps, np.array([8.0, 16.0]))})
        >>> run.at("batch_size", 20), run.at("batch_size", 15), run.last_step
        (16.0, nan, 20)
    """

    source: str
    series: Mapping[str, Series]
    notes: tuple[str, ...] = ()

    def of_group(self, group: str | None) -> RunLog:
        """The run as one of several optimizers saw it: without the keys of others, its own without its name.

        Args:
            group: name of an optimizer, as `"opt0"`, or of a parameter group of it, as `"opt0/1"`; anything
                else changes nothing.
        """
        chosen = (group or "").partition("/")[0]
        if chosen not in self.optimizers:
            return self
        ending, others = f"/{chosen}", set(self.optimizers) - {chosen}
        kept = {key: found for key, found in self.series.items() if others.isdisjoint(key.split("/"))}
        own = {key.removesuffix(ending): found for key, found in kept.items() if key.endswith(ending)}
        return replace(self, series=kept | own)

    def get(self, name: str, group: str | None = None) -> Series:
        """The series of `surge/<name>`, or of `surge/<name>/<group>`; empty if it was not logged."""
        return self.series.get(f"{PREFIX}{name}" if group is None else f"{PREFIX}{name}/{group}", NOTHING)

    def require(self, name: str, group: str | None = None) -> Series:
        """The same, or a `RunLogError` that says which keys there are."""
        found = self.get(name, group)
        if found.steps.size == 0:
            key = f"{PREFIX}{name}" if group is None else f"{PREFIX}{name}/{group}"
            known = sorted(key for key in self.series if key.startswith(PREFIX)) or "none"
            raise RunLogError(
                f"Expected a run that logged {key!r}, got these surge keys: {known}. Read a run that was "
                "trained with SurgeLRCallback, and name the group if it has several parameter groups."
            )
        return found

    def at(self, name: str, step: int, group: str | None = None) -> float:
        """The value logged at a step, NaN if there is none."""
        return float(self.get(name, group).at(np.array(step)))

    @property
    def last_step(self) -> int:
        """The last optimizer step at which the callback logged."""
        return int(self.require("batch_size").steps[-1])

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the parameter groups; empty if there is one, which has no name."""
        start = f"{PREFIX}lr_used/"
        return tuple(key.removeprefix(start) for key in self.series if key.startswith(start))

    @cached_property
    def optimizers(self) -> tuple[str, ...]:
        """Names of the optimizers that have a callback each, as `"opt0"`; empty if there is one optimizer."""
        start = f"{PREFIX}batch_size/"
        return tuple(key.removeprefix(start) for key in self.series if key.startswith(start))

    @cached_property
    def base_batch_size(self) -> float:
        """Examples at which the scheduled learning rate was tuned; NaN if it was not logged."""
        values = self.get("base_batch_size").values
        return float(values[-1]) if values.size else math.nan

    @cached_property
    def law_steps(self) -> NDArray[np.int64]:
        """Logged steps at which the law was a new one; shape `(n,)`, increasing."""
        changed = [one.changes for key, one in self.series.items() if key.startswith(LAW_PREFIX)]
        return np.unique(np.concatenate([NOTHING.steps, *changed]))

    def law_at(self, step: int) -> Law | None:
        """The law that was in force at a logged step, made again from its numbers; None if none was known."""
        names = [key.removeprefix(LAW_PREFIX) for key in self.series if key.startswith(LAW_PREFIX)]
        numbers = {name: self.at(f"law/{name}", step) for name in names}
        return law_from_numbers({name: value for name, value in numbers.items() if not math.isnan(value)})

    def objective_at(self, step: int) -> str | None:
        """The objective at a logged step; None if none was logged, or one that this release has not."""
        return dict(enumerate(OBJECTIVES)).get(self.at("objective", step))  # type: ignore[call-overload, no-any-return]

    def examples_at(self, steps: ArrayLike) -> FloatArray:
        """Examples trained by each step, in proportion between two that were logged."""
        examples = self.require("examples")
        return np.interp(np.asarray(steps, dtype=np.float64), examples.steps, examples.values)


def wanted_factor(objective: str, law: Law, batch_size: float, base_batch_size: float) -> float:
    """What an objective asks for; NaN if the law cannot tell."""
    try:
        return OBJECTIVES[objective](law, batch_size, base_batch_size)
    except (ArithmeticError, ValueError):
        return math.nan


def law_from_numbers(numbers: Mapping[str, float]) -> Law | None:
    """The law that has these parameters, by name; others are ignored. None if no law has them."""
    kinds: tuple[type[MeasuredLaw | SGDLaw | Theorem3Law], ...] = (MeasuredLaw, SGDLaw, Theorem3Law)
    for kind in kinds:
        names = [field.name for field in fields(kind) if field.name in numbers]
        # A number is missing, or single precision has rounded it to 0 or infinity.
        with suppress(TypeError, ValueError):
            return kind(**{name: numbers[name] for name in names})
    return None
