"""Per-coordinate mean and deviation, and the sums over coordinates that the theorems need.

Theorems 2 and 3 treat coordinates as independent: they need `E_i = erf(sqrt(B / 2) u_i)` with
`u_i = mu_i / sigma_i` for every coordinate, and sums of the Hessian weighted by them. `E` and `u`
enter quadratically, where noise in `mu` would add up instead of averaging out, so every product is
one of two independent halves of the data. The Hessian's diagonal comes from random signs `z`:
`E[(z o a)' H (z o b)] = sum_i a_i b_i H_ii` (Hutchinson).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_surge.measure.curvature import Displacement, secant_curvature
from lightning_surge.measure.distributed import ALONE, Ranks
from lightning_surge.measure.gradients import blocks, dense, zeros
from lightning_surge.measure.measurement import Passes, Replay
from lightning_surge.measure.records import ChunkStatistics, CoordinateSums, Measurement, SizedValue
from lightning_surge.measure.replay import Chunk

# Secants that each law takes, two passes of the first half each.
SECANTS = {"theorem2": 4, "theorem3": 3}


class CoordinateMeasurement(Passes):
    """Measures what Theorems 2 and 3 are made of, in four gradient-sized buffers.

    Two halves' means and the per-coordinate second moment are summed in one pass; then the means
    become `u` in place, the second moment is dropped, and each secant differences two gradients in
    one buffer by giving the losses opposite signs.

    References:
        Li et al. 2024, arXiv:2405.14578, Theorem 2 (Eq. 9, 10), Theorem 3 (Eq. 13-16).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        replay: Replay,
        delta: float,
        scales: Sequence[float],
        sizes: Sequence[float],
        law: str,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(parameters, replay, ranks, delta)
        self._scales = scales
        self._sizes = tuple(sizes)
        self._law = law
        self._seed = seed
        self._halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._evaluation: list[Chunk] = []

    # The reciprocal of a deviation has no variance with fewer.
    FEWEST_CHUNKS = 8

    @staticmethod
    def sizes_for(chunks: Sequence[Chunk], base_batch_size: float) -> tuple[float, float]:
        """Two batch sizes that can be measured from these chunks, the base among them if possible."""
        half = len(chunks) // 2
        largest = min(sum(chunk.size for chunk in part) for part in (chunks[:half], chunks[half:])) / 2.0
        return min(base_batch_size, largest / 2.0), largest

    @staticmethod
    def cost(examples: float, law: str = "theorem2") -> float:
        """Examples passed by a measurement from so many examples."""
        return examples * (1.0 + SECANTS[law])

    def run(self, chunks: Sequence[Chunk]) -> Measurement:
        """Measure from chunks whose gradients have yet to be computed."""
        if len(chunks) < self.FEWEST_CHUNKS:
            raise ValueError(
                f"Expected at least {self.FEWEST_CHUNKS} chunks, got {len(chunks)}: a deviation per "
                "coordinate needs more data. Use larger batches, or probe_examples=."
            )
        half = len(chunks) // 2
        first, second = chunks[:half], chunks[half:]
        self._half_sizes = (sum(chunk.size for chunk in first), sum(chunk.size for chunk in second))
        if self._sizes and max(self._sizes) >= min(self._half_sizes):
            raise ValueError(
                f"Expected sizes below {min(self._half_sizes):g}, half of the examples, got "
                f"sizes={self._sizes}: a half's own noise is that of a batch of its size, and only smaller "
                "batches can be imitated."
            )
        norms, alignment_slope, alignments = self._moments(first, second)
        curvatures: tuple[SizedValue, ...] = ()
        trace_hessian = coherent = math.nan
        if self._law == "theorem2":
            curvatures = tuple(SizedValue(b, self._theorem2_curvature(b)) for b in self._sizes)
            trace_hessian = coherent = 0.0  # not measured, not used
        else:
            trace_hessian = self._secant(lambda: self._signs(lambda u, _: torch.ones_like(u)))
            total = self._secant(lambda: self._walk(0, _same), lambda: self._walk(1, _same))
            diagonal = self._secant(
                lambda: self._signs(lambda u, _: u), lambda: self._signs(lambda _, other: other)
            )
            coherent = total - diagonal
        return Measurement(
            ChunkStatistics(float(sum(self._half_sizes)), norms[0], norms[1], alignments),
            curvatures,
            self._passes,
            len(chunks),
            CoordinateSums(trace_hessian, coherent, alignment_slope),
            pairs=sum(self._half_sizes) ** 2 - sum(chunk.size**2 for chunk in chunks),
        )

    def _moments(
        self, first: Sequence[Chunk], second: Sequence[Chunk]
    ) -> tuple[tuple[float, float], float, tuple[SizedValue, ...]]:
        """One pass over both halves; leaves `u` of each half in `self._halves`."""
        sums = tuple([zeros(p) for p in self._parameters] for _ in range(2))
        squares = [zeros(p) for p in self._parameters]
        self._evaluation = []
        for index, chunks in enumerate((first, second)):
            for chunk, gradients in self._each(chunks):
                if index == 0:
                    self._evaluation.append(chunk)
                _fold(gradients, sums[index], squares, chunk.size)
                del gradients  # the next pass makes others
        size_a, size_b = self._half_sizes
        size = size_a + size_b
        # Scatter within the halves, so that a difference between them does not shrink their common u.
        freedom = len(first) + len(second) - 2
        grad_sq = trace = slope = 0.0
        products = dict.fromkeys(self._sizes, 0.0)
        inverse = _inverse_bias(freedom)
        for left, right, square, scale in zip(*sums, squares, self._scales, strict=True):
            for a, b, s in blocks(left, right, square):
                mean, mu_a, mu_b = (a + b) / size, a / size_a, b / size_b
                variance = ((s - a * mu_a - b * mu_b) / freedom).clamp_(min=0.0)
                # The traces have no halves, so they take all degrees of freedom.
                total = (s - size * mean * mean) / (freedom + 1)
                mean_sq, spread = float(torch.dot(mean, mean)), float(total.sum())
                grad_sq += mean_sq - spread / size
                trace += spread
                deviation = variance.sqrt_()
                noisy = deviation > 0
                a.copy_(torch.where(noisy, mu_a / (deviation * inverse), 0.0))
                b.copy_(torch.where(noisy, mu_b / (deviation * inverse), 0.0))
                slope += scale * float(torch.dot(a, mu_b))
                for batch_size in products:
                    both = torch.dot(self._mean_sign(a, 0, batch_size), mu_b)
                    both += torch.dot(self._mean_sign(b, 1, batch_size), mu_a)
                    products[batch_size] += 0.5 * scale * float(both)
        self._halves = (sums[0], sums[1])
        alignments = tuple(SizedValue(float(b), value) for b, value in products.items())
        return (grad_sq, trace), slope, alignments

    def _mean_sign(self, u: Tensor, half: int, batch_size: float) -> Tensor:
        """Estimate of `erf(sqrt(B / 2) u)` from one half's noisy `u`.

        That `u` has a variance of one over the half's size, and `E erf(sqrt(B' / 2) (u + noise))` is the erf
        of a batch with `1 / B = 1 / B' + 1 / size`. So the smoothing that is there already is left out of B'.
        """
        wanted = 1.0 / (1.0 / batch_size - 1.0 / self._half_sizes[half])
        return torch.erf(u * math.sqrt(wanted / 2.0))

    def _theorem2_curvature(self, batch_size: float) -> float:
        """`sum_i (1 - E_i^2) H_ii + sum_ij E_i E_j H_ij`, each product of two halves."""

        def noise(u: Tensor, other: Tensor) -> Tensor:
            signs = self._mean_sign(u, 0, batch_size), self._mean_sign(other, 1, batch_size)
            return (1.0 - signs[0] * signs[1]).sqrt_()

        diagonal = self._secant(lambda: self._signs(noise))
        coherent = self._secant(
            lambda: self._walk(0, lambda u: self._mean_sign(u, 0, batch_size)),
            lambda: self._walk(1, lambda u: self._mean_sign(u, 1, batch_size)),
        )
        return diagonal + coherent

    def _walk(self, half: int, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        for tensor, scale in zip(self._halves[half], self._scales, strict=True):
            for (block,) in blocks(tensor):
                yield function(block) * scale

    def _signs(self, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        """A function of both halves' `u`, times random signs that are the same on every walk."""
        generator = torch.Generator(device=self._parameters[0].device).manual_seed(self._seed)
        for left, right, scale in zip(*self._halves, self._scales, strict=True):
            for u, other in blocks(left, right):
                draws = torch.randint(0, 2, u.shape, generator=generator, device=u.device, dtype=u.dtype)
                yield draws.mul_(2.0).sub_(1.0).mul_(function(u, other)).mul_(scale)

    def _secant(self, direction: Displacement, against: Displacement | None = None) -> float:
        self._drop_gradients()
        self._pass_all(self._evaluation, -1.0)

        def difference() -> list[Tensor | None]:
            self._pass_all(self._evaluation)
            return self._gradients()

        curvature = secant_curvature(
            self._parameters,
            direction=direction,
            slope=0.0,
            gradient_at_displaced=difference,
            delta=self._delta,
            against=against,
        )
        self._drop_gradients()
        return curvature


def _fold(
    gradients: Sequence[Tensor | None], sums: Sequence[Tensor], squares: Sequence[Tensor], size: float
) -> None:
    for gradient, total, square in zip(gradients, sums, squares, strict=True):
        if gradient is not None:
            own = dense(gradient).to(total.dtype)
            total.add_(own, alpha=size)
            square.addcmul_(own, own, value=size)


def _same(u: Tensor) -> Tensor:
    return u


def _inverse_bias(freedom: int) -> float:
    """`deviation * E[1 / sample deviation]` for Gaussian samples with two or more degrees of freedom."""
    log_ratio = math.lgamma((freedom - 1) / 2) - math.lgamma(freedom / 2)
    return math.sqrt(freedom / 2.0) * math.exp(log_ratio)
