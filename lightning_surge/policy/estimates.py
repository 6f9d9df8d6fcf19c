"""Averaged noise statistics in, a law with standard errors out.

The measured law has four numbers. With the saturation `h(B)^2 = 1 / (1 + B_phi / B)`:

* `B_phi`, the alignment scale, is the noise scale `tr Sigma / |G|^2` of the averaged norms;
* `N_inf` is the least-squares fit of the alignments to `N_inf h(b)`;
* `D_0` and `c N_inf^2` are the non-negative fit of the curvatures to `D_0 + (c N_inf^2) h(b)^2`, with
  the slope from sizes measured at the same point of training.

The ratio of two learning rates needs only `B_phi` and `r = c N_inf^2 / D_0`, so the noise of `N_inf`,
by far the largest, drops out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_surge.checking.state import REMEDY, AnyFloat, restore, save
from lightning_surge.laws.base import Law, MeasuredLaw, Peak, SGDLaw
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.measure.direction import GRADIENT, SIGN, Direction
from lightning_surge.policy.history import Bin, Contrast, NoiseHistory, NoiseStats, jackknife_error

Fit = Callable[[NoiseStats], Law | None]
"""Turns averaged statistics into a law, or None where they do not determine one."""

# A noise scale beyond this many times the largest direction measured cannot be told from an infinite
# one: the law is in its square-root regime at every batch size in reach.
LARGEST_SCALE = 1e4
# The shapes of N and D are assumptions outside the sizes measured. Standard deviation of the log of a
# predicted ratio, per factor of two beyond them: a choice, more cautious than line searches up to 16 times
# beyond have shown.
EXTRAPOLATION_ERROR = 0.1


@dataclass(frozen=True)
class EstimatedLaw(Law):
    """A law together with what it would have been without each group of measurements.

    It answers what a `Law` answers; `standard_error` says how sure each answer is.

    Attributes:
        law: the law fitted to all measurements.
        replicates: the laws fitted without one group each, None where that fit failed, with the share
            of the weight that the group has.
        num_measurements: measurements behind the law.
        reach: smallest and largest size of direction measured, examples.
        at_edge: whether a clamp and not the data made one of the law's answers: noise hides `|G|^2`, or the
            critical batch size or the peak's learning rate is 0 or infinite.

    Example:
        >>> laws = [SGDLaw(max_lr=lr, noise_scale=1.0) for lr in (2.0, 1.0, 3.0)]
        >>> law = EstimatedLaw(laws[0], ((laws[1], 0.5), (laws[2], 0.5)), num_measurements=2)
        >>> law.lr(1.0), round(law.standard_error(lambda law: law.lr(1.0)), 3)
        (1.0, 0.919)
    """

    law: Law
    replicates: tuple[tuple[Law | None, float], ...]
    num_measurements: int
    reach: tuple[AnyFloat, AnyFloat] = (0.0, math.inf)
    at_edge: bool = False

    @property
    def peak(self) -> Peak:
        """Of the law."""
        return self.law.peak

    @property
    def critical_batch_size(self) -> float:
        """The law's critical batch size, examples."""
        return self.law.critical_batch_size

    def isotropic_lr(self, batch_size: float) -> float:
        """The law's learning rate for constant curvature, up to a factor."""
        return self.law.isotropic_lr(batch_size)

    def _lr(self, batch_size: float) -> float:
        return self.law.lr(batch_size)

    def _gain(self, batch_size: float) -> float:
        return self.law.gain(batch_size)

    def standard_error(self, quantity: Callable[[Law], float]) -> float:
        """Standard error of anything a law can be asked, in its unit; see `history.jackknife_error`.

        It is infinite with fewer than two measurements, or if the quantity is infinite or undefined without
        some group.
        """
        # A replicate decides by its law alone; a failed fit is as unsure as can be.
        values = [math.nan if law is None else _evaluate(quantity, law) for law, _ in self.replicates]
        return jackknife_error(_evaluate(quantity, self.law), values, [share for _, share in self.replicates])

    def extrapolation_error(self, batch_size: float) -> float:
        """Standard deviation to add to the log of a ratio for asking outside the sizes measured."""
        low, high = self.reach
        beyond = max(low / batch_size, batch_size / high, 1.0)
        return EXTRAPOLATION_ERROR * math.log2(beyond)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, from which `from_state_dict` makes an equal law."""
        replicates = [[law and _law_state(law), share] for law, share in self.replicates]
        return {**save(self), "law": _law_state(self.law), "replicates": replicates}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EstimatedLaw:
        """The law that `state_dict` described; an error if a value is missing or out of range."""
        replicates = [(law and _law_from_state(law), share) for law, share in state["replicates"]]
        estimated = restore(cls, {**state, "law": _law_from_state(state["law"]), "replicates": replicates})
        (low, high), shares = estimated.reach, [share for _, share in estimated.replicates]
        if not (all(0.0 < share <= 1.0 for share in shares) and 0.0 <= low <= high and high > 0.0):
            raise ValueError(
                f"Expected shares between 0 and 1 and a reach from low to high, got {shares} and "
                f"{estimated.reach}: {REMEDY}."
            )
        return estimated


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (MeasuredLaw, SGDLaw, Theorem3Law)}


def _law_state(law: Law) -> dict[str, Any]:
    return {"kind": type(law).__name__, **asdict(law)}  # type: ignore[call-overload]


def _law_from_state(state: dict[str, Any]) -> Law:
    numbers = dict(state)
    kind = numbers.pop("kind")
    if kind == "EdgeLaw":
        raise ValueError("objective='edge' is retired: use objective='progress'")
    law: Law = _KINDS[kind](**numbers)
    return law


def _evaluate(quantity: Callable[[Law], float], law: Law) -> float:
    try:
        return quantity(law)
    except (ArithmeticError, ValueError):
        return math.nan


def estimate(history: NoiseHistory, fit: Fit) -> EstimatedLaw | None:
    """Fit a law to a history and to the history without each group; None if they do not determine one."""
    stats = history.stats()
    law = _attempt(fit, stats)
    if law is None:
        return None
    replicates = tuple((_attempt(fit, left_out), share) for left_out, share in history.replicates())
    sizes = [entry.batch_size for entry in (*stats.alignments, *stats.curvatures)] or stats.sizes
    reach = (min(sizes), max(sizes))
    # Noise and curvature give finite numbers above 0; others are what is left of a clamped estimate.
    answers = (law.critical_batch_size, law.peak.lr, stats.noise_scale)
    at_edge = not all(0.0 < answer < math.inf for answer in answers)
    return EstimatedLaw(law, replicates, history.num_measurements, reach, at_edge)


def _attempt(fit: Fit, stats: NoiseStats) -> Law | None:
    """A fit that meets numbers no law can have has not determined one."""
    try:
        return fit(stats)
    except (ArithmeticError, ValueError):
        return None


def law_of(direction: Direction, *, curvature: bool = True) -> Fit:
    """Fits the measured law of a direction; `curvature` if one without measured curvature is of no use."""
    measured: Fit = {SIGN: fit_sign_law, GRADIENT: fit_sgd_law}[direction]
    return measured if curvature else lambda stats: measured(stats) or fit_noise_law(stats, direction)


def fit_noise_law(stats: NoiseStats, direction: Direction) -> Law | None:
    """A law from the norms alone, with curvature taken to be the same for every direction of one length.

    Its ratios are those of `isotropic_lr`; its level has no meaning, and its peak is not measured. Along the
    gradient the noise scale then is `tr Sigma / |G|^2`.

    References:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2.
    """
    if not stats.num_measurements:
        return None
    largest = stats.sizes[1] if math.isfinite(stats.sizes[1]) else 1.0
    scale = max(min(stats.resolved_noise_scale, LARGEST_SCALE * largest), 0.0)
    if direction is GRADIENT:
        return SGDLaw(max_lr=1.0, noise_scale=scale)
    return MeasuredLaw(alignment_limit=1.0, alignment_scale=scale, noise_curvature=1.0, signal_curvature=0.0)


def fit_sign_law(stats: NoiseStats) -> MeasuredLaw | None:
    """Lemma 1 with measured terms, for updates along the sign of the gradient.

    None if the curvature is not positive at any size, or nothing was measured.

    References:
        Li et al. 2024, arXiv:2405.14578, Lemma 1 (Eq. 6, 7) and the form of Eq. 11.
    """
    if not stats.alignments or not stats.contrasts:
        return None
    largest = max(entry.batch_size for entry in stats.alignments)
    # A negative trace is noise around no noise at all.
    scale = max(min(stats.resolved_noise_scale, LARGEST_SCALE * largest), 0.0)
    basis = [1.0 / math.sqrt(1.0 + scale / entry.batch_size) for entry in stats.alignments]
    limit = _resolved_mean(stats.alignments, basis)
    if limit <= 0.0:
        return None
    noise, signal = _fit_curvature(stats.contrasts, lambda size: 1.0 / (1.0 + scale / size))
    if noise + signal <= 0.0:
        return None
    return MeasuredLaw(
        alignment_limit=limit,
        alignment_scale=scale,
        noise_curvature=noise,
        signal_curvature=signal / limit**2,
    )


def fit_sgd_law(stats: NoiseStats) -> SGDLaw | None:
    """The law of plain gradient steps, `lr = |G|^2 / (G'HG + tr(H Sigma) / B)`.

    Along `V = g_b` the alignment is `|G|^2` at every size and the curvature `G'HG + tr(H Sigma) / b`. None if
    `G'HG` is not positive, where no finite learning rate is best.

    References:
        McCandlish et al. 2018, arXiv:1812.06162, Eq. 2.6 to 2.8; Eq. 1 of Li et al. 2024.
    """
    if not stats.alignments or not stats.contrasts:
        return None
    signal, noise = _fit_curvature(stats.contrasts, lambda size: 1.0 / size)
    if signal <= 0.0:
        return None
    limit = _resolved_mean(stats.alignments, [1.0] * len(stats.alignments))
    if limit <= 0.0:
        return None
    return SGDLaw(max_lr=limit / signal, noise_scale=noise / signal)


def fit_theorem3_law(stats: NoiseStats) -> Theorem3Law | None:
    """Theorem 3 from averaged coordinate sums; None if the Hessian's trace or the alignment is not positive.

    References:
        Li et al. 2024, arXiv:2405.14578, Eq. 13-16.
    """
    sums = stats.coordinate_sums
    if sums is None or sums.trace_hessian <= 0.0 or sums.alignment_slope <= 0.0:
        return None
    slope = math.sqrt(2.0 / math.pi) * sums.alignment_slope / sums.trace_hessian
    if sums.coherent_curvature <= 0.0:
        return Theorem3Law(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=slope)
    noise_scale = math.pi * sums.trace_hessian / (2.0 * sums.coherent_curvature)
    return Theorem3Law(noise_scale=noise_scale, peak_lr=slope * math.sqrt(noise_scale) / 2.0)


def _resolved_mean(alignments: Sequence[Bin], basis: Sequence[float]) -> float:
    """Least-squares coefficient of `values ~ coefficient * basis`; 0 where nothing resolves it.

    All sizes share the examples they are dotted with, so their errors are alike and the fit is unweighted by
    size. A coefficient below its own scatter is reported as that scatter: the level of the law is then
    unknown, which its standard error says, but ratios do not depend on it.
    """
    x = np.array(basis)
    y = np.array([entry.value for entry in alignments])
    weights = np.array([entry.weight for entry in alignments])
    norm = float(np.sum(weights * x**2))
    coefficient = float(np.sum(weights * x * y)) / norm
    variances = np.array([entry.variance for entry in alignments])
    scatter = float(np.sqrt(np.sum((weights * x) ** 2 * variances))) / norm
    return max(coefficient, scatter, 0.0)


def _fit_curvature(contrasts: Sequence[Contrast], basis: Callable[[float], float]) -> tuple[float, float]:
    """Non-negative `(a, b)` of `D ~ a + b basis(size)`: the slope from within, the level from all.

    The level of the curvature drifts while a model trains, several-fold in a run. Sizes measured at different
    times, as in a ramp, must not be compared: the slope is the least-squares fit to the differences inside
    each measurement. The constant then makes the line pass through the weighted mean.
    """
    weights = np.array([entry.weight for entry in contrasts])
    values = np.array([entry.values for entry in contrasts])
    x = np.array([[basis(size) for size in entry.sizes] for entry in contrasts])
    spread = x[:, 1] - x[:, 0]
    norm = float(np.sum(weights * spread**2))
    slope = float(np.sum(weights * spread * (values[:, 1] - values[:, 0]))) / norm if norm > 0.0 else 0.0
    level = float(np.sum(weights * values.mean(axis=1)) / np.sum(weights))
    centre = float(np.sum(weights * x.mean(axis=1)) / np.sum(weights))
    if level <= 0.0:
        return 0.0, 0.0
    slope = min(max(slope, 0.0), level / centre)
    # Where the clamp acts the difference is zero up to rounding, which may be negative.
    return max(level - slope * centre, 0.0), slope
