"""Laws with their shape left open, by name: what can be fitted to optimal learning rates.

References:
    Li et al., arXiv:2405.14578, Eq. 23 (Adam) and Eq. 24 (SGD, exponents 1 and 1/2); section 3 of
    docs/theory.md for the measured form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_surge.laws import ConstantLaw, Law, LinearLaw, MeasuredLaw, SGDLaw, SqrtLaw
from lightning_surge.theorems import Theorem3Law

__all__ = ["LAWS", "Family"]


class Family(NamedTuple):
    """A law with its shape left open.

    Attributes:
        label: for tables and figures.
        scales: batch sizes among the shape's parameters, each looked for around those tried.
        shares: ratios among them.
        build: the law from an amplitude, the shape and a batch size to refer to.
        describe: the law's parameters, by name.
        given_scale: whether the batch size in the shape is that of Eq. 22 instead of a fitted one.
    """

    label: str
    scales: int
    shares: int
    build: Callable[[float, Sequence[float], float], Law]
    describe: Callable[[Law], dict[str, float]]
    given_scale: bool = False

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
    return MeasuredLaw(
        alignment_limit=1.0,
        alignment_scale=shape[0],
        noise_curvature=1 / amplitude,
        signal_curvature=shape[1] / amplitude,
    )


def _power(kind: type[SqrtLaw | LinearLaw | ConstantLaw]) -> Callable[[float, Sequence[float], float], Law]:
    return lambda amplitude, _, base: kind(base_lr=amplitude, base_batch_size=base)


def _parts(law: Law) -> dict[str, float]:
    assert isinstance(law, MeasuredLaw)
    return {
        "lr_limit": 1 / (law.noise_curvature + law.signal_curvature),
        "alignment_scale": law.alignment_scale,
        "signal_share": law.signal_curvature / law.noise_curvature,
    }


def _fields(*names: str) -> Callable[[Law], dict[str, float]]:
    return lambda law: {name: float(getattr(law, name)) for name in names}


LAWS: dict[str, Family] = {
    "measured": Family("measured-law form", 1, 1, _measured, _parts),
    "adam": Family("Adam, Eq. 23", 1, 0, _theorem3, _fields("peak_lr", "noise_scale")),
    "sgd": Family("SGD, exponent 1", 1, 0, _sgd(1.0), _fields("max_lr", "noise_scale")),
    "sgd_sqrt": Family("SGD, exponent 1/2", 1, 0, _sgd(0.5), _fields("max_lr", "noise_scale")),
    "adam_eq22": Family("Adam, B of Eq. 22", 1, 0, _theorem3, _fields("peak_lr", "noise_scale"), True),
    "sgd_eq22": Family("SGD 1, B of Eq. 22", 1, 0, _sgd(1.0), _fields("max_lr", "noise_scale"), True),
    "sgd_sqrt_eq22": Family("SGD 1/2, B of Eq. 22", 1, 0, _sgd(0.5), _fields("max_lr", "noise_scale"), True),
    "sqrt": Family("sqrt scaling", 0, 0, _power(SqrtLaw), _fields("base_lr")),
    "linear": Family("linear scaling", 0, 0, _power(LinearLaw), _fields("base_lr")),
    "constant": Family("constant", 0, 0, _power(ConstantLaw), _fields("base_lr")),
}
"""What can be fitted. Names that end in `_eq22` are the paper's own procedure: the scale comes from steps and
examples, and only the amplitude from learning rates."""
