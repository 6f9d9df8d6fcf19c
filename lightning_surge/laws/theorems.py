"""The paper's theorems as laws: exact consequences of assumptions that real networks break.

Theorems 2 and 3 assume Gaussian gradients and noise that is independent across coordinates. They are
kept beside `MeasuredLaw`, which assumes neither, as selectable laws and as limits it must reproduce.

References:
    Li et al. 2024, arXiv:2405.14578, Theorems 2 and 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erf, logsumexp

from lightning_surge.checking.arguments import choice, number, store
from lightning_surge.laws.base import Law, Peak, checked, store_numbers

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Theorem3Law(Law):
    """The surge in closed form, for batches far below where any coordinate's sign settles.

        lr(B) = peak_lr / ((sqrt(noise_scale / B) + sqrt(B / noise_scale)) / 2)

    It holds for B << pi sigma_i^2 / (2 mu_i^2) in every coordinate i with gradient mean mu_i and
    standard deviation sigma_i per example. Beyond, it falls to 0 where the true law tends to a constant.
    ``gain`` is 1 / (1 + noise_scale / B), normalised to 1 as B -> inf.

    Without a falling side the noise scale is infinite, and the learning rate ``sqrt_coefficient * sqrt(B)``
    at every B. Peak and critical batch size are then infinite, and ``gain`` is B. A finite peak carries that
    slope already, as 2 peak_lr / sqrt(noise_scale).

    Args:
        noise_scale: examples at the peak, positive or infinite.
        peak_lr: learning rate at the peak, positive; infinite if and only if ``noise_scale`` is.
        sqrt_coefficient: learning rate per sqrt(example); only for an infinite ``noise_scale``.

    Example:
        >>> law = Theorem3Law(noise_scale=100.0, peak_lr=0.5)
        >>> law.lr(100), law.lr(25), law.lr(400)
        (0.5, 0.4, 0.4)

    References:
        arXiv:2405.14578, Theorem 3, Eq. 2 and 13-16.
    """

    noise_scale: float
    peak_lr: float
    sqrt_coefficient: float | None = None

    def __post_init__(self) -> None:
        remedies = dict.fromkeys(
            ("noise_scale", "peak_lr"), "use inf for both, and sqrt_coefficient, if there is no peak"
        )
        store_numbers(self, remedies, most=math.inf)
        if self.noise_scale == self.peak_lr == math.inf:
            remedy = "with noise_scale=inf pass the learning rate per sqrt(example)"
            store_numbers(self, {"sqrt_coefficient": remedy})
            return
        store_numbers(self, remedies)
        if self.sqrt_coefficient is not None:
            raise ValueError(
                f"Expected sqrt_coefficient=None with a finite noise_scale, got sqrt_coefficient="
                f"{self.sqrt_coefficient}, noise_scale={self.noise_scale}: peak_lr already fixes it."
            )

    @classmethod
    def from_moments(
        cls, *, mean: npt.ArrayLike, standard_deviation: npt.ArrayLike, hessian: npt.ArrayLike
    ) -> Self:
        """Law of a gradient with known statistics per example.

            noise_scale = pi sum_i H_ii / (2 sum_{i != j} (mu_i mu_j / sigma_i sigma_j) H_ij)
            peak_lr     = sqrt(noise_scale / (2 pi)) sum_i (mu_i^2 / sigma_i) / sum_i H_ii

        Where the double sum is not positive, coherent steps cost no more than noise: the noise scale is
        infinite, and only the slope sqrt(2 / pi) sum_i (mu_i^2 / sigma_i) / sum_i H_ii remains.

        Args:
            mean: mu, shape (n,), one example's expected gradient.
            standard_deviation: sigma, shape (n,), positive wherever ``mean`` is not 0.
            hessian: H, shape (n, n), with a positive trace; only its symmetric part counts.

        Example:
            Five parameters that only move together, mu / sigma = sqrt(pi / 8) / 10, so that the noise
            scale is pi * 5 / (2 * 20 * pi / 800) = 100.

            >>> law = Theorem3Law.from_moments(
            ...     mean=np.ones(5), standard_deviation=np.full(5, 10 * math.sqrt(8 / math.pi)),
            ...     hessian=np.ones((5, 5)),
            ... )
            >>> round(law.noise_scale, 9), round(law.peak_lr, 9)
            (100.0, 0.25)
        """
        mu, sigma, h = _statistics(mean, standard_deviation, hessian)
        if (mu[sigma == 0] != 0).any():
            raise ValueError(
                "Expected standard_deviation > 0 wherever mean is not 0, got standard_deviation=0: "
                "Theorem 3 is the limit of large noise; use Theorem2Law."
            )
        moving = sigma > 0
        mu, sigma, h = mu[moving], sigma[moving], h[np.ix_(moving, moving)]
        trace = number("trace of hessian", float(np.trace(h)), "damp the Hessian or use its positive part")
        ratio = mu / sigma
        coherent = float(ratio @ (h - np.diag(np.diag(h))) @ ratio)
        slope = math.sqrt(2 / math.pi) * float(mu @ ratio) / trace
        if coherent <= 0:
            return cls(noise_scale=math.inf, peak_lr=math.inf, sqrt_coefficient=slope)
        noise_scale = math.pi * trace / (2 * coherent)
        return cls(noise_scale=noise_scale, peak_lr=slope * math.sqrt(noise_scale) / 2)

    @property
    def peak(self) -> Peak:
        """The noise scale and the learning rate there."""
        return Peak(self.noise_scale, self.peak_lr)

    @property
    def critical_batch_size(self) -> float:
        """The noise scale, in examples."""
        return self.noise_scale

    def _lr(self, batch_size: float) -> float:
        if self.sqrt_coefficient is not None:
            return self.sqrt_coefficient * math.sqrt(batch_size)
        root = math.sqrt(batch_size / self.noise_scale)
        return 2 * self.peak_lr / (1 / root + root)

    def _gain(self, batch_size: float) -> float:
        if self.sqrt_coefficient is not None:
            return batch_size
        return 1 / (1 + self.noise_scale / batch_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Theorem2Law(Law):
    """Sign updates under Gaussian gradients whose noise is independent across coordinates.

    With E_i = erf(sqrt(B / 2) mu_i / sigma_i), the mean of the sign of coordinate i of the batch gradient:

        N(B) = sum_i E_i mu_i
        D(B) = sum_i (1 - E_i^2) H_ii + sum_ij E_i E_j H_ij

    That is exact under the two assumptions. ``form="sigmoid"`` replaces erf by the paper's algebraic
    approximation E_i = (mu_i / sigma_i) / sqrt(pi / (2 B) + (mu_i / sigma_i)^2), which has the same slope
    at B = 0, the same limit, and lies up to 0.108 below erf in between. Real networks break independence,
    because one example moves many signs together: at small B this law can be far too high.

    A coordinate with sigma_i = 0 has E_i = sign(mu_i) at every B; one with mu_i = 0 too never moves and
    costs nothing. Peak and critical batch size are found by a scan over log B, then a bounded search or a
    root; ``peak`` is infinite if no finite B beats the limit. The cost is O(n^2) per batch size.

    Args:
        mean: mu, shape (n,), one example's expected gradient, not all 0.
        standard_deviation: sigma, shape (n,), of one example's gradient, at least 0.
        hessian: H, shape (n, n), with D(B) > 0 at every B (checked on the scan); only its symmetric
            part counts.
        form: ``"erf"`` or ``"sigmoid"``.

    Raises:
        ValueError: if a statistic is out of range or D(B) <= 0 somewhere.

    Example:
        Five parameters that only move together, E = 1 / sqrt(192 / B + 1) for each of them: at B = 64,
        E = 1/2, N = 5/2, D = 5 * 3/4 + 25/4 = 10.

        >>> law = Theorem2Law(
        ...     mean=np.ones(5), standard_deviation=np.full(5, 8 * math.sqrt(6 / math.pi)),
        ...     hessian=np.ones((5, 5)), form="sigmoid",
        ... )
        >>> round(law.alignment(64), 9), round(law.curvature(64), 9), round(law.lr(64), 9)
        (2.5, 10.0, 0.25)
        >>> round(law.peak.batch_size, 3), round(law.peak.lr, 9), round(law.critical_batch_size, 6)
        (64.0, 0.25, 38.4)

    References:
        arXiv:2405.14578, Theorem 2, Eq. 9 and 10.
    """

    mean: FloatArray
    standard_deviation: FloatArray
    hessian: FloatArray
    form: Literal["erf", "sigmoid"] = "erf"

    def __post_init__(self) -> None:
        choice("form", self.form, ("erf", "sigmoid"), "use erf for exactness")
        arrays = _statistics(self.mean, self.standard_deviation, self.hessian)
        for array in arrays:
            array.setflags(write=False)
        store(self, **dict(zip(("mean", "standard_deviation", "hessian"), arrays, strict=True)))
        batch_sizes, _, curvatures = self._scan
        if (worst := curvatures.min()) <= 0:
            raise ValueError(
                f"Expected a hessian with D(B) > 0 at every batch size, got D={worst} at "
                f"B={batch_sizes[curvatures.argmin()]}: damp the Hessian or use its positive part."
            )

    def alignment(self, batch_size: float) -> float:
        """N(B) = E[V . G]; ``batch_size`` in examples."""
        return float(self._alignment_and_curvature(np.array([checked(batch_size)]))[0][0])

    def curvature(self, batch_size: float) -> float:
        """D(B) = E[V' H V]; ``batch_size`` in examples."""
        return float(self._alignment_and_curvature(np.array([checked(batch_size)]))[1][0])

    @cached_property
    def peak(self) -> Peak:
        """Largest learning rate over all batch sizes, the limits 0 and infinity included."""
        return self._largest(lambda alignment, curvature: alignment / curvature)

    @cached_property
    def critical_batch_size(self) -> float:
        """Smallest batch size, in examples, that gains half of the largest gain."""
        batch_sizes, alignments, curvatures = self._scan
        gains = _gain_of(alignments, curvatures)
        half = 0.5 * self._largest(_gain_of).lr
        first = int(np.argmax(gains >= half))
        if first == 0 or math.isinf(batch_sizes[first]):
            return float(batch_sizes[first])
        low = math.log(max(batch_sizes[first - 1], np.finfo(np.float64).tiny))
        high = math.log(batch_sizes[first])
        return math.exp(brentq(lambda log_b: self._gain(math.exp(log_b)) - half, low, high, xtol=1e-12))

    @cached_property
    def _ratio(self) -> FloatArray:
        """Mean over standard deviation, and 0 where there is no noise."""
        zeros = np.zeros_like(self.mean)
        return np.divide(self.mean, self.standard_deviation, out=zeros, where=self._noisy)

    @cached_property
    def _noisy(self) -> npt.NDArray[np.bool_]:
        # A ratio that would overflow is noiseless at every batch size a float can hold.
        return self.standard_deviation > np.finfo(np.float64).tiny * np.abs(self.mean)

    def _mean_signs(self, batch_sizes: FloatArray) -> FloatArray:
        """E, of shape (batch sizes, n); batch sizes may be 0 or infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            x = np.sqrt(batch_sizes / 2)[:, None] * self._ratio
        # inf * 0 is a coordinate without mean or without noise; 1e8 is far inside both plateaus.
        x = np.clip(np.nan_to_num(x, nan=0.0), -1e8, 1e8)
        signs = erf(x) if self.form == "erf" else x / np.hypot(math.sqrt(math.pi) / 2, x)
        return np.where(self._noisy, signs, np.sign(self.mean))

    def _alignment_and_curvature(self, batch_sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
        signs = self._mean_signs(batch_sizes)
        moves = (self.mean != 0) | self._noisy
        noise = (moves - signs * signs) @ np.diag(self.hessian)
        return signs @ self.mean, noise + ((signs @ self.hessian) * signs).sum(axis=1)

    @cached_property
    def _scan(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Batch sizes 0, a grid, inf; with N and D there."""
        log_squares = 2 * np.log(np.abs(self._ratio[self._ratio != 0]))
        if log_squares.size == 0:
            grid = np.zeros(1)
        else:
            # E_i rises like sqrt(B) ratio_i, so below 1 / sum ratio^2 all are small and above 1 / min ratio^2
            # all have settled. How small matters for D depends on the size of H beside D at the ends.
            ends = self._alignment_and_curvature(np.array([0.0, math.inf]))[1].min()
            coupling = np.abs(self.hessian).sum() / ends if ends > 0 else 1.0
            margin = math.log(1e4) + 2 * math.log(max(coupling, 1.0))
            low, high = -logsumexp(log_squares) - margin, -log_squares.min() + margin
            # Four points per factor e: E is smooth on that scale of log B.
            grid = np.clip(np.linspace(low, high, math.ceil(4 * (high - low)) + 1), -690.0, 690.0)
        batch_sizes = np.concatenate([[0.0], np.exp(grid), [math.inf]])
        return batch_sizes, *self._alignment_and_curvature(batch_sizes)

    def _largest(self, quantity: Callable[[FloatArray, FloatArray], FloatArray]) -> Peak:
        """Supremum over B of a function of N and D, refined between the neighbours on the grid."""
        batch_sizes, alignments, curvatures = self._scan
        values = quantity(alignments, curvatures)
        grid = np.log(batch_sizes[1:-1])
        best = int(np.argmax(values[1:-1]))
        found = minimize_scalar(
            lambda log_b: -quantity(*self._alignment_and_curvature(np.exp([log_b])))[0],
            bounds=(grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]),
            method="bounded",
            options={"xatol": 1e-9},
        )
        # A maximum that tops the limits by rounding only is none.
        if (1 + 1e-9) * max(values[0], values[-1]) >= -found.fun:
            return (
                Peak(math.inf, float(values[-1])) if values[-1] >= values[0] else Peak(0.0, float(values[0]))
            )
        return Peak(math.exp(found.x), float(-found.fun))

    def _lr(self, batch_size: float) -> float:
        alignment, curvature = self._alignment_and_curvature(np.array([batch_size]))
        return float(alignment[0] / curvature[0])

    def _gain(self, batch_size: float) -> float:
        return float(_gain_of(*self._alignment_and_curvature(np.array([batch_size])))[0])


def _gain_of(alignment: FloatArray, curvature: FloatArray) -> FloatArray:
    return alignment * alignment / (2 * curvature)


def _statistics(
    mean: npt.ArrayLike, standard_deviation: npt.ArrayLike, hessian: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Checked copies of mu, sigma and H."""
    size = np.size(mean)
    named = {"mean": mean, "standard_deviation": standard_deviation, "hessian": hessian}
    arrays = [np.array(value, dtype=np.float64) for value in named.values()]
    for name, array, shape in zip(named, arrays, ((size,), (size,), (size, size)), strict=True):
        if array.shape != shape:
            raise ValueError(
                f"Expected {name} of shape {shape}, got {name} of shape {array.shape}: "
                "pass vectors with one entry per parameter and a square matrix."
            )
        if not np.isfinite(array).all():
            raise ValueError(
                f"Expected {name} to be finite, got {name} with {array[~np.isfinite(array)][0]}: "
                "drop the measurement."
            )
    mu, sigma, h = arrays
    if not mu.any():
        raise ValueError("Expected mean to have an entry other than 0, got mean=0: no direction is downhill.")
    if (sigma < 0).any():
        raise ValueError(
            f"Expected standard_deviation >= 0, got standard_deviation={sigma.min()}: "
            "pass the root of the variance per example."
        )
    return mu, sigma, h
