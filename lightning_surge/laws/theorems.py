"""The paper's closed form as a law: exact consequences of assumptions that real networks break.

Theorems 2 and 3 assume Gaussian gradients and noise that is independent across coordinates. What
`law="theorem2"` measures has the form of `MeasuredLaw`; Theorem 3, the limit for small batches, has a form of
its own, which `MeasuredLaw` must reproduce.

References:
    Li et al. 2024, arXiv:2405.14578, Theorems 2 and 3.
"""

import math
from dataclasses import dataclass

from lightning_surge.laws.base import Law, Peak, store_numbers


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
