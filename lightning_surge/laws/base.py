"""Laws of the optimal learning rate: batch size in, learning rate out.

A law answers four questions about an optimizer step taken with ``batch_size`` examples: which
learning rate lowers the loss most (``lr``), by how much (``gain``), where that learning rate is
largest (``peak``), and at which batch size a step gains half of the most it can
(``critical_batch_size``). For an update ``theta <- theta - lr * V`` all of them follow from two
numbers, with G the true gradient and H the true Hessian:

    N(B) = E[V . G]     alignment, what a step gains per unit of learning rate
    D(B) = E[V' H V]    curvature, what it costs per unit squared
    lr(B) = N / D       gain(B) = N^2 / (2 D)

Only floats appear here, so every law can be plotted and checked by hand.

References:
    Li et al. 2024, arXiv:2405.14578, Lemma 1 (Eq. 6 and 7); McCandlish et al. 2018, arXiv:1812.06162,
    section 2.2.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning_surge.checking.arguments import number, store


class Peak(NamedTuple):
    """Where a law's learning rate is largest.

    Attributes:
        batch_size: examples; ``inf`` if no finite batch size beats the limit ``B -> inf``, 0 if the
            learning rate only falls.
        lr: the learning rate there, or its limit where the batch size is infinite or 0.
    """

    batch_size: float
    lr: float


def checked(batch_size: float) -> float:
    """A batch size as a float; at once where it is one, since laws are asked at every step."""
    if type(batch_size) is float and 0.0 < batch_size < math.inf:
        return batch_size
    return float(number("batch_size", batch_size, "count the examples behind one optimizer step"))


def store_numbers(law: object, remedies: Mapping[str, str], **bounds: float) -> None:
    """Check fields of a law that is being made, and keep them as floats."""
    store(law, **{n: float(number(n, getattr(law, n), why, **bounds)) for n, why in remedies.items()})


class Law(ABC):
    """How the best learning rate depends on the batch size, in examples behind one optimizer step.

    A subclass supplies the formulas for a checked batch size, ``_lr`` and ``_gain``, and the two properties.
    Every method raises a ``ValueError`` unless ``0 < batch_size < inf``.
    """

    def lr(self, batch_size: float) -> float:
        """Learning rate that lowers the expected loss most, with ``batch_size`` examples behind the step."""
        return self._lr(checked(batch_size))

    def alignment(self, batch_size: float) -> float:
        """N(B) = 2 gain / lr, since gain = N^2 / (2 D) and lr = N / D; a ratio where ``gain`` is one."""
        return 2.0 * self.gain(batch_size) / self.lr(batch_size)

    def isotropic_lr(self, batch_size: float) -> float:
        """Optimal learning rate, up to a factor, if the curvature per squared length of a step were constant.

        Steps along a sign all have the same length, which leaves the alignment.
        """
        return self.alignment(batch_size)

    def gain(self, batch_size: float) -> float:
        """Expected decrease of the loss in one step at the best learning rate.

        In units of the loss for ``MeasuredLaw``, which knows N and D themselves. The other laws know ratios
        only; each says how its gain is normalised.
        """
        return self._gain(checked(batch_size))

    @property
    @abstractmethod
    def peak(self) -> Peak:
        """Batch size at which ``lr`` is largest, and that learning rate."""

    @property
    @abstractmethod
    def critical_batch_size(self) -> float:
        """Examples at which ``gain`` is half of its largest value; ``inf`` where that is infinite."""

    @abstractmethod
    def _lr(self, batch_size: float) -> float: ...

    @abstractmethod
    def _gain(self, batch_size: float) -> float: ...


@dataclass(frozen=True, kw_only=True)
class MeasuredLaw(Law):
    """Lemma 1 with the two shapes that measured N and D take.

    Alignment saturates and curvature has a part from noise and a part from signal:

        N(B) = alignment_limit / sqrt(1 + alignment_scale / B)
        D(B) = noise_curvature + signal_curvature * N(B)^2

    No assumption about noise across coordinates enters, since D is measured as a whole. With
    ``r = signal_curvature * alignment_limit^2 / noise_curvature``:

        peak_lr             = 1 / (2 sqrt(signal_curvature * noise_curvature))
        peak_batch_size     = alignment_scale / (r - 1),   no peak where r <= 1
        critical_batch_size = alignment_scale / (1 + r)
        gain(B)             = gain_max / (1 + critical_batch_size / B)

    For ``B << alignment_scale`` it is ``Theorem3Law`` with noise scale ``alignment_scale / r``, for
    ``signal_curvature = 0`` ``SGDLaw`` with exponent 1/2, and for ``B -> inf`` a constant above 0. It fails
    where a step is too long for a second-order model of the loss. With ``alignment_scale = 0`` (no noise) the
    learning rate is constant. With ``noise_curvature = 0`` and noise present it only falls, from
    ``Peak(0, inf)``: a measurement that says so has not resolved what noise costs.

    Args:
        alignment_limit: N as B -> inf, positive; unit loss per unit of learning rate.
        alignment_scale: examples at which N is 1/sqrt(2) of its limit, at least 0.
        noise_curvature: D as N -> 0, at least 0; unit loss per learning rate squared.
        signal_curvature: what N^2 adds to D, at least 0; unit 1 / loss.

    Raises:
        ValueError: if a value is out of range, or if both curvatures are 0.

    Example:
        r = 1 * 2^2 / 1 = 4, so the peak is at 300 / 3 examples and the half gain at 300 / 5.

        >>> law = MeasuredLaw(
        ...     alignment_limit=2.0, alignment_scale=300.0, noise_curvature=1.0, signal_curvature=1.0
        ... )
        >>> law.alignment(100), law.curvature(100), law.lr(100)
        (1.0, 2.0, 0.5)
        >>> law.peak
        Peak(batch_size=100.0, lr=0.5)
        >>> law.critical_batch_size
        60.0

    References:
        arXiv:2405.14578, Lemma 1 (Eq. 6 and 7), Eq. 11.
    """

    alignment_limit: float
    alignment_scale: float
    noise_curvature: float
    signal_curvature: float

    def __post_init__(self) -> None:
        store_numbers(self, {"alignment_limit": "a zero gradient has no best learning rate"})
        store_numbers(self, {"alignment_scale": "use 0 for noiseless gradients"}, least=0)
        remedy = "clamp a negative estimate to 0, and hold the learning rate if D itself is not positive"
        store_numbers(self, {"noise_curvature": remedy, "signal_curvature": remedy}, least=0)
        if self.noise_curvature == 0 and self.signal_curvature == 0:
            raise ValueError(
                "Expected noise_curvature > 0 or signal_curvature > 0, got noise_curvature=0 and "
                "signal_curvature=0: without curvature every step length gains more; hold the learning rate."
            )

    def alignment(self, batch_size: float) -> float:
        """N(B) = E[V . G]; ``batch_size`` in examples."""
        batch_size = checked(batch_size)
        return self.alignment_limit / math.sqrt(1 + self.alignment_scale / batch_size)

    def curvature(self, batch_size: float) -> float:
        """D(B) = E[V' H V]; ``batch_size`` in examples."""
        alignment = self.alignment(batch_size)
        return self.noise_curvature + self.signal_curvature * alignment * alignment

    @property
    def peak(self) -> Peak:
        """Peak of the learning rate; ``batch_size`` is infinite where r <= 1 or gradients carry no noise."""
        if self._signal_share <= 1 or self.alignment_scale == 0:
            return Peak(math.inf, self._lr_at(self.alignment_limit))
        if self.noise_curvature == 0:
            return Peak(0.0, math.inf)
        # Two roots: the product of two small curvatures could underflow.
        lr = 0.5 / (math.sqrt(self.signal_curvature) * math.sqrt(self.noise_curvature))
        return Peak(self.alignment_scale / (self._signal_share - 1), lr)

    @property
    def critical_batch_size(self) -> float:
        """Examples at which a step gains half of its limit; finite with or without a peak."""
        return self.alignment_scale / (1 + self._signal_share)

    @property
    def _signal_share(self) -> float:
        """r: curvature from signal over curvature from noise, at B -> inf."""
        if self.noise_curvature == 0:
            return math.inf
        return self.signal_curvature * self.alignment_limit * self.alignment_limit / self.noise_curvature

    def _lr_at(self, alignment: float) -> float:
        # N / (D_0 + c N^2), divided through by N so that N^2 cannot underflow.
        return 1 / (self.noise_curvature / alignment + self.signal_curvature * alignment)

    def _lr(self, batch_size: float) -> float:
        return self._lr_at(self.alignment(batch_size))

    def _gain(self, batch_size: float) -> float:
        return 0.5 * self.alignment(batch_size) * self._lr(batch_size)


@dataclass(frozen=True, kw_only=True)
class SGDLaw(Law):
    """Rise to a plateau: the law of plain SGD, and the guess for Adam made beside it.

        lr(B) = max_lr / (1 + noise_scale / B)^exponent

    Exponent 1 is Lemma 1 with V the batch gradient itself. Exponent 1/2 is the guess for Adam, and the limit
    of ``MeasuredLaw`` without coherent curvature: it has no falling side, so it misses a surge. ``gain`` is
    1 / (1 + noise_scale / B), which follows from Lemma 1 for exponents 1 and 1/2 only.

    Args:
        max_lr: learning rate as B -> inf, positive.
        noise_scale: examples at which exponent 1 halves the learning rate, at least 0.
        exponent: from above 0 to 1.

    Example:
        >>> SGDLaw(max_lr=0.1, noise_scale=300.0).lr(100)
        0.025
        >>> SGDLaw(max_lr=0.1, noise_scale=300.0, exponent=0.5).lr(100)
        0.05

    References:
        arXiv:1812.06162, section 2.2; arXiv:2405.14578, Eq. 1 (exponent 1) and Eq. 24 (both exponents).
    """

    max_lr: float
    noise_scale: float
    exponent: float = 1.0

    def __post_init__(self) -> None:
        store_numbers(self, {"max_lr": "pass the learning rate of a very large batch"})
        store_numbers(self, {"noise_scale": "use 0 for noiseless gradients"}, least=0)
        remedy = "use 1 for SGD, 0.5 for the guess for Adam, ConstantLaw for 0"
        store_numbers(self, {"exponent": remedy}, most=1)

    @property
    def peak(self) -> Peak:
        """No peak at a finite batch size: the learning rate tends to ``max_lr`` from below."""
        return Peak(math.inf, self.max_lr)

    @property
    def critical_batch_size(self) -> float:
        """The noise scale, in examples."""
        return self.noise_scale

    def isotropic_lr(self, batch_size: float) -> float:
        """The same law: its curvature is that of gradients whose length shrinks as their noise does."""
        return self.lr(batch_size)

    def _lr(self, batch_size: float) -> float:
        return float(self.max_lr / (1 + self.noise_scale / batch_size) ** self.exponent)

    def _gain(self, batch_size: float) -> float:
        return 1 / (1 + self.noise_scale / batch_size)


@dataclass(frozen=True, kw_only=True)
class _PowerLaw(Law):
    """``lr`` and ``gain`` as powers of ``batch_size / base_batch_size``."""

    base_lr: float
    base_batch_size: float
    _lr_exponent: ClassVar[float]
    _gain_exponent: ClassVar[float]

    def __post_init__(self) -> None:
        store_numbers(self, {"base_lr": "pass the learning rate tuned at base_batch_size"})
        store_numbers(self, {"base_batch_size": "pass the batch size base_lr was tuned at"})

    @property
    def peak(self) -> Peak:
        """No peak at a finite batch size."""
        return Peak(math.inf, math.inf if self._lr_exponent else self.base_lr)

    @property
    def critical_batch_size(self) -> float:
        """0 where the gain is constant, infinite where it grows in proportion to the batch size."""
        return math.inf if self._gain_exponent else 0.0

    def _lr(self, batch_size: float) -> float:
        return float(self.base_lr * (batch_size / self.base_batch_size) ** self._lr_exponent)

    def _gain(self, batch_size: float) -> float:
        return float((batch_size / self.base_batch_size) ** self._gain_exponent)


class ConstantLaw(_PowerLaw):
    """Keep the learning rate: lr(B) = base_lr.

    The limit B >> noise scale of the laws above. A larger batch then buys nothing, so ``gain`` is the
    constant 1 and the critical batch size 0.

    Args:
        base_lr: learning rate at every batch size, positive.
        base_batch_size: examples, positive; kept for the common interface.

    Example:
        >>> ConstantLaw(base_lr=0.001, base_batch_size=16).lr(64)
        0.001
    """

    _lr_exponent = 0.0
    _gain_exponent = 0.0


class SqrtLaw(_PowerLaw):
    """Square-root scaling: lr(B) = base_lr sqrt(B / base_batch_size).

    The limit B << noise scale for sign-like updates (Adam). Each example then gains the same: ``gain`` is
    B / base_batch_size, and the critical batch size infinite. The arguments are those of `ConstantLaw`.

    Example:
        >>> SqrtLaw(base_lr=0.001, base_batch_size=16).lr(64)
        0.002
    """

    _lr_exponent = 0.5
    _gain_exponent = 1.0


class LinearLaw(_PowerLaw):
    """Linear scaling: lr(B) = base_lr B / base_batch_size.

    The limit B << noise scale for SGD, with the gain and the arguments of `SqrtLaw`.

    Example:
        >>> LinearLaw(base_lr=0.001, base_batch_size=16).lr(64)
        0.004
    """

    _lr_exponent = 1.0
    _gain_exponent = 1.0
