"""Fit one law to optimal learning rates, and predict those that took no part.

Residuals are differences of logs, since a learning rate is wrong by a factor. A soft-l1 loss lets one bad
optimum bend the curve less. Parameters are logs too, which keeps them positive.

References:
    Li et al., arXiv:2405.14578, Eq. 22 (critical batch size from steps and examples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from lightning_surge.laws.base import ConstantLaw, Law, LinearLaw, MeasuredLaw, SGDLaw, SqrtLaw
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.laws.tradeoff import TradeoffFit, fit_tradeoff

FloatArray = npt.NDArray[np.float64]

RESIDUAL_SCALE = 0.2
"""Log of the learning rate beyond which a residual counts linearly: a fifth, the error of a good optimum."""
BEYOND = 1e3
"""Factor beyond the batch sizes tried up to which a scale is looked for; there its effect is out of sight."""
SHARES = (1e-3, 1e7)  # range of the measured law's ratio of coherent to noisy curvature
STARTS_PER_DECADE = 2
REFINED = 3  # starts from which a precise fit goes on; a repetition of it goes on from the best one only
TOLERANCE, ROUGH_TOLERANCE = 1e-12, 1e-5
EVALUATIONS, ROUGH_EVALUATIONS = 100, 30
"""Most of a fit: where a parameter hardly matters, or goes to its end, the rest of the way is in vain."""
AT_LIMIT = 1e-3  # distance of a log from the end of its range at which it counts as stopped there


class HeldOut(NamedTuple):
    """Errors of predictions at batch sizes that took no part in the fit."""

    error: float  # mean of the absolute log2 of predicted over found; 1 is a factor of two
    by_batch_size: tuple[tuple[float, float], ...]  # batch size, and log2 of predicted over found there


@dataclass(frozen=True)
class Optima:
    """Batch sizes, the logs of their best learning rates, and the steps to the target there if counted."""

    sizes: FloatArray
    logs: FloatArray
    steps: FloatArray | None = None

    @cached_property
    def line(self) -> TradeoffFit | None:
        """Eq. 22; None without steps, or where they do not fall towards a limit as examples grow."""
        try:
            return None if self.steps is None else fit_tradeoff(self.steps, self.sizes * self.steps)
        except ValueError:
            return None

    def without(self, index: int) -> Optima:
        """The same but for one batch size."""
        steps = None if self.steps is None else np.delete(self.steps, index)
        return Optima(np.delete(self.sizes, index), np.delete(self.logs, index), steps)


class LawFit(NamedTuple):
    """A law, the logs of fitted over found, and whether a parameter stopped at the end of its range."""

    law: Law
    residuals: FloatArray
    limited: bool


def fit_law(name: str, optima: Optima, *, precise: bool = True) -> LawFit | None:
    """Fit the law `LAWS[name]` to at least as many optima as it has parameters.

    None where it needs a scale from Eq. 22 and there is none. A repetition of which only quantiles are wanted
    need not be `precise`.
    """
    family, sizes, logs = LAWS[name], optima.sizes, optima.logs
    base = float(sizes[0])
    given: tuple[float, ...] = ()
    if family.given_scale:
        if optima.line is None:
            return None
        given = (optima.line.critical_batch_size,)

    def curve(shape: npt.ArrayLike) -> FloatArray:
        law = family.build(1.0, given or tuple(np.exp(shape).tolist()), base)
        return np.log([law.lr(size) for size in sizes.tolist()])

    # The amplitude is that of the mean over the batch sizes, so that it does not depend on the shape.
    def residuals(parameters: FloatArray) -> FloatArray:
        shape = curve(parameters[1:])
        differences: FloatArray = parameters[0] + shape - shape.mean() - logs
        return differences

    starts, low, high = [()], np.array([]), np.array([])
    if not given and family.size > 1:
        shapes, curves, low, high = _starts(name, tuple(sizes.tolist()))
        misfit = curves - (logs - logs.mean())
        misfit -= np.median(misfit, axis=1, keepdims=True)
        order = np.argsort(np.sqrt(1 + (misfit / RESIDUAL_SCALE) ** 2).sum(axis=1), kind="stable")
        starts = shapes[order[: REFINED if precise else 1]].tolist()
    options: dict[str, Any] = {"jac": "3-point" if precise else "2-point", "loss": "soft_l1"}
    options |= {"f_scale": RESIDUAL_SCALE, "bounds": ([-np.inf, *low], [np.inf, *high])}
    options |= dict.fromkeys(("xtol", "ftol", "gtol"), TOLERANCE if precise else ROUGH_TOLERANCE)
    options["max_nfev"] = EVALUATIONS if precise else ROUGH_EVALUATIONS
    results = [least_squares(residuals, np.array([logs.mean(), *start]), **options) for start in starts]
    found = min(results, key=lambda result: float(result.cost)).x
    amplitude = math.exp(found[0] - curve(found[1:]).mean())
    law = family.build(amplitude, given or tuple(np.exp(found[1:]).tolist()), base)
    limited = bool((np.minimum(found[1:] - low, high - found[1:]) < AT_LIMIT).any())
    return LawFit(law, residuals(found), limited)


@lru_cache(maxsize=64)
def _starts(name: str, sizes: tuple[float, ...]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Shapes to start from, their curves without amplitude, and the range of the shapes."""
    family: Family = LAWS[name]
    scale = (math.log(min(sizes) / BEYOND), math.log(max(sizes) * BEYOND))
    share = (math.log(SHARES[0]), math.log(SHARES[1]))
    ranges = [scale] * family.scales + [share] * family.shares
    axes = [np.linspace(a, b, 2 + round(STARTS_PER_DECADE * (b - a) / math.log(10)))[1:-1] for a, b in ranges]
    shapes = np.array(list(product(*axes)))
    laws = [family.build(1.0, shape, sizes[0]) for shape in np.exp(shapes).tolist()]
    curves = np.log([[law.lr(size) for size in sizes] for law in laws])
    low, high = np.array(ranges).T
    return shapes, curves - curves.mean(axis=1, keepdims=True), low, high


def hold_out(name: str, optima: Optima) -> HeldOut | None:
    """Predict each best learning rate from the others; None if too few, or without a scale of Eq. 22."""
    if optima.sizes.size <= LAWS[name].size:
        return None
    errors = []
    for index, size in enumerate(optima.sizes.tolist()):
        if (fit := fit_law(name, optima.without(index))) is None:
            return None
        errors.append((size, (math.log(fit.law.lr(size)) - float(optima.logs[index])) / math.log(2)))
    return HeldOut(float(np.mean([abs(error) for _, error in errors])), tuple(errors))


class Family(NamedTuple):
    """A law with its shape left open."""

    label: str  # for tables and figures
    scales: int  # batch sizes among the shape's parameters, each looked for around those tried
    shares: int  # ratios among them
    build: Callable[[float, Sequence[float], float], Law]  # from an amplitude, the shape and a batch size
    describe: Callable[[Law], dict[str, float]]  # the law's parameters, by name
    given_scale: bool = False  # whether the batch size in the shape is that of Eq. 22 instead of a fitted one

    @property
    def size(self) -> int:
        """Parameters to fit, the amplitude among them."""
        return 1 + self.shares + (0 if self.given_scale else self.scales)


def _theorem3(amplitude: float, shape: Sequence[float], _: float) -> Law:
    return Theorem3Law(peak_lr=amplitude, noise_scale=shape[0])


def _sgd(exponent: float) -> Callable[[float, Sequence[float], float], Law]:
    return lambda amplitude, shape, _: SGDLaw(max_lr=amplitude, noise_scale=shape[0], exponent=exponent)


def _measured(amplitude: float, shape: Sequence[float], _: float) -> Law:
    # The learning rate does not tell the unit of the loss: alignment is counted in its limit.
    noise, signal = 1 / amplitude, shape[1] / amplitude
    return MeasuredLaw(
        alignment_limit=1.0, alignment_scale=shape[0], noise_curvature=noise, signal_curvature=signal
    )


def _power(kind: type[SqrtLaw | LinearLaw | ConstantLaw]) -> Callable[[float, Sequence[float], float], Law]:
    return lambda amplitude, _, base: kind(base_lr=amplitude, base_batch_size=base)


def _parts(law: Law) -> dict[str, float]:
    assert isinstance(law, MeasuredLaw)
    limit, share = law.noise_curvature + law.signal_curvature, law.signal_curvature / law.noise_curvature
    return {"lr_limit": 1 / limit, "alignment_scale": law.alignment_scale, "signal_share": share}


def _fields(*names: str) -> Callable[[Law], dict[str, float]]:
    return lambda law: {name: float(getattr(law, name)) for name in names}


_ADAM, _SGD, _BASE = _fields("peak_lr", "noise_scale"), _fields("max_lr", "noise_scale"), _fields("base_lr")
LAWS: dict[str, Family] = {
    "measured": Family("measured-law form", 1, 1, _measured, _parts),
    "adam": Family("Adam, Eq. 23", 1, 0, _theorem3, _ADAM),
    "sgd": Family("SGD, exponent 1", 1, 0, _sgd(1.0), _SGD),
    "sgd_sqrt": Family("SGD, exponent 1/2", 1, 0, _sgd(0.5), _SGD),
    "adam_eq22": Family("Adam, B of Eq. 22", 1, 0, _theorem3, _ADAM, True),
    "sgd_eq22": Family("SGD 1, B of Eq. 22", 1, 0, _sgd(1.0), _SGD, True),
    "sgd_sqrt_eq22": Family("SGD 1/2, B of Eq. 22", 1, 0, _sgd(0.5), _SGD, True),
    "sqrt": Family("sqrt scaling", 0, 0, _power(SqrtLaw), _BASE),
    "linear": Family("linear scaling", 0, 0, _power(LinearLaw), _BASE),
    "constant": Family("constant", 0, 0, _power(ConstantLaw), _BASE),
}
"""What can be fitted. Names that end in `_eq22` are the paper's own procedure: the scale comes from steps and
examples, and only the amplitude from learning rates."""
