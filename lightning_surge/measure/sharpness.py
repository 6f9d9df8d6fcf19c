"""Sharpness of the loss as Adam sees it, by a power iteration kept warm between measurements.

Adam steps with `g / P`, `P = sqrt(v) + eps`, and becomes unstable where its learning rate times the
largest eigenvalue of `A = P^-1/2 H P^-1/2` exceeds a constant. One step of the iteration costs one
gradient: `A w` is a secant along `d = P^-1/2 w`. The vector `w` is kept from measurement to measurement. Each
turns it by one step on one half of its examples, because the sharpest direction moves while a model
trains, and takes `w' A w` on the other half, which had no part in `w`: a sample's own largest eigenvalue
would follow its noise upward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_surge.measure.curvature import Displacement, Sample, displaced
from lightning_surge.measure.distributed import local
from lightning_surge.measure.gradients import blocks, dense, zeros
from lightning_surge.measure.records import SizedValue

__all__ = ["Sharpness", "SharpnessError"]

# Secants of a measurement that finds a vector: a turn, and the value. Of one that has to start from the
# gradient: turns, none of which counts.
SECANTS = 2
FIRST_SECANTS = 4


class SharpnessError(ValueError):
    """The examples have no curvature to speak of: nothing failed, but there is no sharpness to tell."""


class Sharpness:
    """Follows `lambda_max(P^-1/2 H P^-1/2)` for the preconditioners of several batch sizes.

    One vector of the size of the parameters, kept between measurements, is the only memory. The first
    measurement starts it from the gradient, which lies mostly along large curvature, and tells nothing. A
    Rayleigh quotient never exceeds the largest eigenvalue on average, so what a vector lacks makes an
    underestimate, which dies out at the rate of the iteration.

    The sharpest direction `d` in the parameters hardly depends on the batch size, since `P` changes in much
    the same proportion everywhere. So it is searched with the first preconditioner, and the same secant
    tells `d' H d / d' P d` for each.

    Example:
        `H = diag(2, 6)` and `P = diag(1, 4)`: the eigenvalues are 2 and 6 / 4. With half of that `P`, 4.

        >>> theta, hessian = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 6.0])
        >>> sample = Sample([hessian * theta], lambda: [hessian * theta])
        >>> sharpness = Sharpness()
        >>> for _ in range(30):
        ...     values = sharpness.measure(
        ...         [theta],
        ...         sizes=[8.0, 32.0],
        ...         inverse_root=lambda size: iter([torch.tensor([1.0, 0.5]) * (size / 8.0) ** 0.25]),
        ...         search=sample,
        ...         judge=sample,
        ...         delta=0.5,
        ...     )
        >>> [(size, round(value, 4)) for size, value in values]
        [(8.0, 2.0), (32.0, 4.0)]

    References:
        Cohen et al. 2022, arXiv:2207.14484, section 3, for the preconditioned Hessian; Gur-Ari et al. 2018,
        arXiv:1812.04754, for the gradient along large curvature.
    """

    def __init__(self) -> None:
        self._vector: list[Tensor] = []

    @property
    def secants(self) -> int:
        """Gradients of half of the examples that the next measurement will take."""
        return SECANTS if self._vector else FIRST_SECANTS

    def measure(
        self,
        parameters: Sequence[Tensor],
        *,
        sizes: Sequence[float],
        inverse_root: Callable[[float], Iterator[Tensor]],
        search: Sample,
        judge: Sample,
        delta: float,
    ) -> tuple[SizedValue, ...]:
        """Turn the vector towards the sharpest direction, then take the sharpness along it."""
        root = partial(inverse_root, sizes[0])
        cold = [w.shape for w in self._vector] != [local(parameter).shape for parameter in parameters]
        if cold:
            self._vector = [zeros(g).copy_(g) for g in search.gradient]
            for w, r in zip(_flat(self._vector), root(), strict=True):
                w.mul_(r)
        # Where a checkpoint was loaded.
        self._vector = [
            w.to(p.device, torch.promote_types(p.dtype, torch.float32))
            for w, p in zip(self._vector, parameters, strict=True)
        ]
        try:
            for _ in range(FIRST_SECANTS if cold else SECANTS - 1):
                _iterate(parameters, self._vector, root, search, delta)
            if cold:
                return ()
            lengths = [float(self._length_sq(root, partial(inverse_root, size)).item()) for size in sizes]
            if 0.0 in lengths:
                raise SharpnessError(f"Expected a direction of some length, got squared lengths {lengths}.")
            curvature = _iterate(parameters, self._vector, root, judge, delta)
        except BaseException:
            self._vector = []
            raise
        return tuple(
            SizedValue(float(size), curvature / length) for size, length in zip(sizes, lengths, strict=True)
        )

    def _length_sq(self, root: Displacement, other: Displacement) -> Tensor:
        """`d' P d` of `d = r w` with the preconditioner whose inverse root is `other`."""
        total = torch.zeros((), dtype=torch.float64, device=self._vector[0].device)
        for w, r, r_other in zip(_flat(self._vector), root(), other(), strict=True):
            scaled = torch.where(r_other > 0.0, w * (r / r_other), 0.0)
            total += torch.dot(scaled, scaled)
        return total

    def state_dict(self) -> dict[str, Any]:
        """The vector itself, as tensors."""
        return {"vector": self._vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a copy of the vector of `state_dict`; one of other shapes is started afresh when used."""
        vector = list(state["vector"])
        for w in vector:
            if not (isinstance(w, Tensor) and w.is_floating_point() and bool(w.isfinite().all())):
                found = f"{w.dtype} of shape {tuple(w.shape)}" if isinstance(w, Tensor) else repr(w)
                raise ValueError(f"Expected finite floating-point tensors in the vector, got {found}.")
        self._vector = [w.clone() for w in vector]


def _flat(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        for (block,) in blocks(tensor):
            yield block


def _iterate(
    parameters: Sequence[Tensor], vector: Sequence[Tensor], root: Displacement, sample: Sample, delta: float
) -> float:
    """Replace `w` by `A w / |A w|` in place, and return `w' A w` of the old one."""

    def direction() -> Iterator[Tensor]:
        for w, r in zip(_flat(vector), root(), strict=True):
            yield w * r

    device = parameters[0].device
    length_sq, change, realised, norm_sq = torch.zeros(4, dtype=torch.float64, device=device)
    for d in direction():
        length_sq += torch.dot(d, d)
    if length_sq.item() == 0.0:
        raise SharpnessError("Expected a direction of some length, got zeros: its examples have no gradient.")
    step = delta * math.sqrt(sum(parameter.numel() for parameter in parameters) / length_sq.item())
    with displaced(parameters, direction, step) as originals:
        moved = sample.gradient_now()
        roots = root()
        for parameter, original, before, after, w in zip(
            parameters, originals, sample.gradient, moved, vector, strict=True
        ):
            after = torch.zeros_like(parameter) if after is None else dense(after)
            for theta, theta_0, g, g_delta, w_block in blocks(parameter, original, before, after, w):
                r = next(roots)
                d = w_block * r
                difference = (g - g_delta.to(g.dtype)).to(d.dtype)
                change += torch.dot(d, difference)
                realised += torch.dot(d, (theta_0 - theta).to(d.dtype))
                torch.mul(difference, r, out=w_block)
                norm_sq += torch.dot(w_block, w_block)
    curvature = float((change * length_sq / realised).item())
    norm = math.sqrt(norm_sq.item())
    if not (math.isfinite(curvature) and 0.0 < norm < math.inf):
        raise SharpnessError(
            f"Expected a finite curvature along Adam's sharpest direction, got {curvature} with |A w| = "
            f"{norm}: the next measurement starts its search afresh."
        )
    for block in _flat(vector):
        block.div_(norm)
    return curvature
