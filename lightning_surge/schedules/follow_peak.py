"""A batch size that follows the measured law instead of a plan made beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_surge.checking.arguments import choice, number, optional, store, switch, whole
from lightning_surge.laws.base import Law
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.schedules.sizes import BatchSizeRule

Target = Literal["critical", "peak"]


@dataclass(frozen=True)
class FollowPeak(BatchSizeRule):
    r"""Grows the batch size as the measured noise allows it: `B = factor * B_target`, within bounds.

    The paper observes that the peak of the learning rate moves to larger batches as the loss falls, and
    leaves a batch size that follows it to future work. After every measurement the rule asks whether the
    batch size in force is still the right one. It compares reciprocals, `x = 1 / (factor B_target)`, since
    `1 / B_noise = |G|^2 / tr(Sigma)` has an error that is nearly normal, and is 0 where there is no peak:

        grow to  B' = max_change B   if   x + confidence se(x) <= 1 / B'
        shrink                       if   x - confidence se(x) >= hysteresis / B     (growth_only=False)

    so that a doubling waits until the larger size is itself at or below the target.

    Args:
        start: Examples per optimizer step at first.
        maximum: Largest size.
        target: `"critical"`, the batch size at which a step gains half of the most it can, which always
            exists; or `"peak"`, where the learning rate is largest, which may be infinite.
        factor: Share, or multiple, of the target to use.
        minimum: Smallest size; None for `start`.
        max_change: Largest factor between one size and the next.
        growth_only: Whether the size never falls.
        hysteresis: How far beyond the target the size in force must be, as a factor, before it shrinks.
        confidence: Standard errors by which the target must clear the threshold: 1 makes a change that
            nothing warrants a one-in-six chance per measurement, 2 one in forty.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        Measured with no doubt, a critical batch size of 100 examples takes 16 to 64 in two decisions.

        >>> from lightning_surge.laws.base import SGDLaw
        >>> def measured(scale):
        ...     law = SGDLaw(max_lr=1.0, noise_scale=scale)
        ...     return EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2)
        >>> rule, sizes = FollowPeak(start=16, maximum=256), [16]
        >>> for _ in range(3):
        ...     sizes.append(rule.next_size(sizes[-1], measured(100.0)))
        >>> sizes
        [16, 32, 64, 64]

    References:
        Li et al. 2024, arXiv:2405.14578, section 5 (the peak moves); McCandlish et al. 2018,
        arXiv:1812.06162, section 2.3 (what batches beyond the critical size cost).
    """

    start: int
    maximum: int
    target: Target = "critical"
    factor: float = 1.0
    minimum: int | None = None
    max_change: float = 2.0
    growth_only: bool = True
    hysteresis: float = 2.0
    confidence: float = 1.0

    def __post_init__(self) -> None:
        choice("target", self.target, get_args(Target))
        remedy = "count examples per optimizer step"
        store(self, start=whole("start", self.start, remedy), maximum=whole("maximum", self.maximum, remedy))
        store(self, minimum=optional(whole, "minimum", self.minimum, remedy) or self.start)
        if not self.smallest <= self.start <= self.maximum:
            raise ValueError(
                f"Expected minimum <= start <= maximum, got minimum={self.minimum}, start={self.start}, "
                f"maximum={self.maximum}: the first size lies within the bounds."
            )
        for name, low, usual in (("factor", 0.0, 1), ("max_change", 1.0, 2), ("hysteresis", 1.0, 2)):
            store(self, **{name: number(name, getattr(self, name), f"the default is {usual}", above=low)})
        store(self, confidence=number("confidence", self.confidence, "count standard errors", least=0))
        switch("growth_only", self.growth_only)
        if math.floor(self.smallest * self.max_change) == self.smallest < self.maximum:
            raise ValueError(
                f"Expected max_change to add an example to the smallest size, {self.smallest}, got"
                f" max_change={self.max_change}: it could never grow; the default is 2."
            )

    @property
    def smallest(self) -> int:
        """`minimum`, or `start` where it was left out."""
        return self.start if self.minimum is None else self.minimum

    @property
    def first_size(self) -> int:
        """`start`."""
        return self.start

    @property
    def named_sizes(self) -> dict[str, int]:
        """`start`, `minimum` and `maximum`."""
        return {"start": self.start, "minimum": self.smallest, "maximum": self.maximum}

    def reciprocal(self, law: Law) -> float:
        """`1 / (factor B_target)` in 1 / examples; 0 for an infinite peak, infinite for a target of 0."""
        target = law.critical_batch_size if self.target == "critical" else law.peak.batch_size
        size = self.factor * target
        return math.inf if size == 0.0 else 1.0 / size

    def next_size(self, batch_size: int, law: EstimatedLaw) -> int:
        """The size that should follow; the one in force where the standard error allows no decision."""
        wanted = self.reciprocal(law)
        doubt = self.confidence * law.standard_error(self.reciprocal) if self.confidence else 0.0
        if not math.isfinite(wanted) or not math.isfinite(doubt):
            return batch_size
        larger = min(math.floor(batch_size * self.max_change), self.maximum)
        if larger > batch_size and (wanted + doubt) * larger <= 1.0:
            return larger
        smaller = max(math.ceil(batch_size / self.max_change), self.smallest)
        too_large = (wanted - doubt) * batch_size >= self.hysteresis
        return smaller if too_large and not self.growth_only and smaller < batch_size else batch_size
