"""Sharpness of the loss as Adam sees it, by a power iteration kept warm between measurements.

Adam steps with `g / P`, `P = sqrt(v) + eps`, and becomes unstable where its learning rate times the
largest eigenvalue of `A = P^-1/2 H P^-1/2` exceeds a constant. One step of the iteration costs one
gradient: `A w` is a secant along `d = P^-1/2 w`. The vector `w` found on the examples of one measurement
starts the next one, and the value that counts is taken before it moves: `w' A w` on examples that had no
part in `w`, so that it does not follow their noise upward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_surge.curvature import Displacement, displaced
from lightning_surge.gradients import SizedValue, blocks, dense, zeros

__all__ = ["Sharpness"]

# Iterations on the first examples seen, none of which counts: they start from the gradient.
FIRST_ROUNDS = 4


class Sharpness:
    """Follows `lambda_max(P^-1/2 H P^-1/2)` for preconditioners of several batch sizes.

    One vector of the size of the parameters per batch size, kept between measurements, is the only memory.
    The first measurement starts from the gradient, which lies mostly along large curvature, runs a few
    iterations and tells nothing. From then on each measurement makes one. A Rayleigh quotient never exceeds
    the largest eigenvalue on average, so what is left of the cold start is an underestimate that dies out
    at the rate of the iteration, and with it leaves the decayed averages.

    Example:
        `H = diag(2, 6)` and `P = diag(1, 4)`: the eigenvalues are 2 and 6 / 4.

        >>> theta, hessian = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 6.0])
        >>> sharpness = Sharpness()
        >>> for _ in range(30):
        ...     values = sharpness.measure(
        ...         [theta],
        ...         sizes=[8.0],
        ...         inverse_root=lambda size: iter([torch.tensor([1.0, 0.5])]),
        ...         gradient=[hessian * theta],
        ...         gradient_at_displaced=lambda: [hessian * theta],
        ...         delta=0.5,
        ...     )
        >>> values[0].batch_size, round(values[0].value, 4)
        (8.0, 2.0)

    References:
        Cohen et al. 2022, arXiv:2207.14484, section 3, for the preconditioned Hessian; Gur-Ari et al. 2018,
        arXiv:1812.04754, for the gradient along large curvature.
    """

    def __init__(self) -> None:
        self._vectors: list[list[Tensor]] = []

    @property
    def rounds(self) -> int:
        """Iterations, one gradient each, that the next measurement makes for each batch size."""
        return 1 if self._vectors else FIRST_ROUNDS

    def measure(
        self,
        parameters: Sequence[Tensor],
        *,
        sizes: Sequence[float],
        inverse_root: Callable[[float], Iterator[Tensor]],
        gradient: Sequence[Tensor],
        gradient_at_displaced: Callable[[], Sequence[Tensor | None]],
        delta: float,
    ) -> tuple[SizedValue, ...]:
        """Iterate once for every batch size.

        Args:
            parameters: the point `theta`; bit-identical on return.
            sizes: batch sizes behind the preconditioners, as many on every call.
            inverse_root: walks `P^-1/2` of a batch size in the flat blocks of `gradients.blocks`, 0 for
                coordinates to leave alone.
            gradient: the gradient at `theta`.
            gradient_at_displaced: computes it again at the current parameters, on the same examples with the
                same random numbers; None counts as zero.
            delta: root mean square of the secants' displacement, in units of the parameters.

        Returns:
            `w' A w` of the vectors as they were before, one per batch size: loss per squared unit of
            learning rate times gradient. Nothing from vectors that have just been started.

        Raises:
            ValueError: if a product is zero or not finite; the next measurement starts afresh.
        """
        rounds = self.rounds
        if not self._fits(parameters, sizes):
            rounds, self._vectors = FIRST_ROUNDS, [_copies(gradient) for _ in sizes]
            for vector, size in zip(self._vectors, sizes, strict=True):
                _times(vector, inverse_root(size))
        values = []
        try:
            for vector, size in zip(self._vectors, sizes, strict=True):
                root = partial(inverse_root, size)
                for index in range(rounds):
                    value = _iterate(parameters, vector, root, gradient, gradient_at_displaced, delta)
                    if index == 0:
                        values.append(SizedValue(float(size), value))
        except BaseException:
            self._vectors = []
            raise
        return () if rounds > 1 else tuple(values)

    def _fits(self, parameters: Sequence[Tensor], sizes: Sequence[float]) -> bool:
        """Whether there are vectors for these parameters; fine-tuning callbacks unfreeze some."""
        shapes = [parameter.shape for parameter in parameters]
        if len(self._vectors) != len(sizes) or [w.shape for w in self._vectors[0]] != shapes:
            return False
        if self._vectors[0][0].device != parameters[0].device:  # loaded from a checkpoint
            self._vectors = [
                [w.to(parameter.device) for w, parameter in zip(vector, parameters, strict=True)]
                for vector in self._vectors
            ]
        return True

    def state_dict(self) -> dict[str, Any]:
        """The vectors themselves, as tensors."""
        return {"vectors": self._vectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over copies of the vectors of `state_dict`."""
        self._vectors = [_copies(vector) for vector in state["vectors"]]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [zeros(tensor).copy_(tensor) for tensor in tensors]


def _flat(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        for (block,) in blocks(tensor):
            yield block


def _times(vector: Sequence[Tensor], walk: Iterator[Tensor]) -> None:
    for block, factor in zip(_flat(vector), walk, strict=True):
        block.mul_(factor)


def _iterate(
    parameters: Sequence[Tensor],
    vector: Sequence[Tensor],
    root: Displacement,
    gradient: Sequence[Tensor],
    gradient_at_displaced: Callable[[], Sequence[Tensor | None]],
    delta: float,
) -> float:
    """Replace `w` by `A w / |A w|` in place, and return `w' A w / |w|^2` of the old one."""

    def direction() -> Iterator[Tensor]:
        for w, r in zip(_flat(vector), root(), strict=True):
            yield w * r

    device = parameters[0].device
    length_sq, norm_sq, change, realised, new_norm_sq = torch.zeros(5, dtype=torch.float64, device=device)
    for w, d in zip(_flat(vector), direction(), strict=True):
        norm_sq += torch.dot(w, w)
        length_sq += torch.dot(d, d)
    step = delta * math.sqrt(sum(parameter.numel() for parameter in parameters) / length_sq.item())
    with displaced(parameters, direction, step) as originals:
        moved = gradient_at_displaced()
        roots = root()
        for parameter, original, before, after, w in zip(
            parameters, originals, gradient, moved, vector, strict=True
        ):
            after = torch.zeros_like(parameter) if after is None else dense(after)
            for theta, theta_0, g, g_delta, w_block in blocks(parameter, original, before, after, w):
                r = next(roots)
                d = w_block * r
                difference = (g - g_delta.to(g.dtype)).to(d.dtype)
                change += torch.dot(d, difference)
                realised += torch.dot(d, (theta_0 - theta).to(d.dtype))
                torch.mul(difference, r, out=w_block)
                new_norm_sq += torch.dot(w_block, w_block)
    value = float((change * length_sq / (realised * norm_sq)).item())
    norm = math.sqrt(new_norm_sq.item())
    if not (math.isfinite(value) and 0.0 < norm < math.inf):
        raise ValueError(
            f"Expected a finite curvature along Adam's sharpest direction, got {value} with |A w| = {norm}: "
            "the next measurement starts its search afresh."
        )
    for block in _flat(vector):
        block.div_(norm)
    return value
