"""What a measurement tells, in floats."""

from __future__ import annotations

from typing import NamedTuple

from lightning_surge.measure.direction import SIGN, Direction


class SizedValue(NamedTuple):
    """A quantity measured for directions made of `batch_size` examples."""

    batch_size: float
    value: float


class ChunkStatistics(NamedTuple):
    """What one set of chunk gradients says about the gradient distribution.

    Attributes:
        batch_size: examples in all chunks together.
        grad_sq: `|G|^2`, debiased; it can be negative in a single measurement.
        trace_cov: `tr Sigma`, the trace of the covariance of one example's gradient.
        alignments: `N(b) = E[V_b . G]` for directions `V_b` of several sizes `b`.
    """

    batch_size: float
    grad_sq: float
    trace_cov: float
    alignments: tuple[SizedValue, ...]


class CoordinateSums(NamedTuple):
    """Sums over coordinates that the theorems are made of, `u_i = mu_i / sigma_i`, debiased.

    Attributes:
        trace_hessian: `sum_i H_ii`.
        coherent_curvature: `sum_{i != j} u_i u_j H_ij`.
        alignment_slope: `sum_i mu_i^2 / sigma_i`.
    """

    trace_hessian: float
    coherent_curvature: float
    alignment_slope: float


class Measurement(NamedTuple):
    """What one set of chunks says about the law.

    Attributes:
        statistics: debiased norms and alignments.
        curvatures: `D(b) = V_b' H V_b` for two sizes of direction; none from norms alone.
        passes: examples passed forward and backward beyond training's own.
        num_chunks: chunks behind it.
        coordinate_sums: what the theorems need, if it was asked for.
        pairs: pairs of examples in different chunks, `n^2 - sum_k n_k^2`: the variance of `|G|^2` is
            `2 tr(Sigma^2) / pairs` where noise dominates. 0 where they were not counted.
    """

    statistics: ChunkStatistics
    curvatures: tuple[SizedValue, ...]
    passes: float
    num_chunks: int = 0
    coordinate_sums: CoordinateSums | None = None
    pairs: float = 0.0

    def unscaled(self, scale: float, *, direction: Direction = SIGN) -> Measurement:
        """What would have been measured, had the loss not been multiplied by `scale`."""
        norms, sums = self.statistics, self.coordinate_sums
        power = direction.loss_power
        of_alignment, of_curvature = scale ** (1 + power), scale ** (1 + 2 * power)
        return self._replace(
            statistics=ChunkStatistics(
                batch_size=norms.batch_size,
                grad_sq=norms.grad_sq / scale**2,
                trace_cov=norms.trace_cov / scale**2,
                alignments=tuple(SizedValue(b, value / of_alignment) for b, value in norms.alignments),
            ),
            curvatures=tuple(SizedValue(b, value / of_curvature) for b, value in self.curvatures),
            # u = mu / sigma has no unit, the Hessian and mu have the loss's.
            coordinate_sums=sums and CoordinateSums(*(value / scale for value in sums)),
        )
