"""Curvature of the loss along a direction, from a difference of two gradients.

`D = V' H V` is what a step along `V` costs. A secant measures it with one extra gradient, at
`theta - delta V`, and no double backward, so fused attention kernels and anything else that
lacks a second derivative keep working.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_surge.measure.distributed import local
from lightning_surge.measure.gradients import blocks, dense

Displacement = Callable[[], Iterator[Tensor]]
"""Yields the direction `V` in the flat blocks of `gradients.blocks`, parameter by parameter, on each call.

Blocks, and a fresh walk per call, so that `V` is computed where it is used and never stored."""


# A step of this many representable steps of a typical parameter keeps rounding of theta below about
# 3 % of the displacement.
RESOLUTION_STEPS = 32.0


def probe_distance(parameters: Sequence[Tensor], lr: float) -> float:
    """How far to move for a secant: the learning rate in use, floored by the dtype's resolution."""
    squares, count, epsilon = 0.0, 0, 0.0
    for parameter in parameters:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        squares += torch.linalg.vector_norm(local(parameter.detach()), dtype=dtype).item() ** 2
        count += parameter.numel()
        epsilon = max(epsilon, torch.finfo(parameter.dtype).eps)
    floor = RESOLUTION_STEPS * epsilon * math.sqrt(squares / max(count, 1))
    return max(lr, floor, torch.finfo(torch.float32).tiny)


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Displacement, delta: float) -> Iterator[list[Tensor]]:
    """Move parameters to `theta - delta V` and put them back bit for bit, whatever happens inside."""
    # `.data`: the version counters must not move, or a graph that the user keeps would be refused.
    data = [local(parameter.data) for parameter in parameters]
    originals = [tensor.clone() for tensor in data]
    try:
        walk = direction()
        for tensor in data:
            if tensor.is_contiguous():
                for (theta,) in blocks(tensor):
                    theta.add_(next(walk).to(theta.dtype), alpha=-delta)
            else:
                # A flat view does not exist; such parameters (channels_last weights) are small.
                flat = torch.cat([next(walk) for _ in blocks(tensor)])
                tensor.add_(flat.view(tensor.shape).to(tensor.dtype), alpha=-delta)
        del walk  # it would keep hold of the last tensor behind the direction
        yield originals
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            local(parameter.data).copy_(original)


def realised_slope(
    parameters: Sequence[Tensor], direction: Displacement, delta: float, gradient: Sequence[Tensor | None]
) -> Tensor:
    """`d . g` with the displacement `d = theta - theta_delta` that `displaced` is going to make."""
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    walk = direction()
    for parameter, grad in zip(parameters, gradient, strict=True):
        for theta, g in blocks(parameter, parameter if grad is None else dense(grad)):
            moved = theta.add(next(walk).to(theta.dtype), alpha=-delta)
            if grad is not None:
                total += torch.dot(_difference(theta, moved), g.double())
    return total


def secant_curvature(
    parameters: Sequence[Tensor],
    *,
    direction: Displacement,
    slope: float,
    gradient_at_displaced: Callable[[], Sequence[Tensor | None]],
    delta: float,
    against: Displacement | None = None,
) -> float:
    r"""Curvature `W' H V` by a secant, `W = V` unless `against` is given.

    With the displacement that floating point really made, `d = theta - theta_delta`, which also stands in for
    `V` where that is `W`, so that nothing has to keep it,

        D = (W . g - W . g_delta) |V|^2 / (V . d)        V' H V = (d . g - d . g_delta) (|V|^2 / (V . d))^2

    which is `W . (g - g_delta) / delta` in exact arithmetic. Both slopes are along the same vector: their
    difference is far smaller than either, so what rounding makes of `V` must not enter only one of them.
    `D` is the curvature averaged over the segment, so `delta` should be the length of step whose cost is
    asked for. Unbiased for the Hessian of the examples behind `g`; independent of the noise in `V` only if
    `V` comes from other examples.

    Args:
        parameters: the point `theta`; bit-identical on return.
        direction: walks `V`; not needed any more once `gradient_at_displaced` is called.
        slope: at `theta`, the `realised_slope`, or `W . g` if `against` is given; 0 if
            `gradient_at_displaced` returns the difference `g_delta - g` itself.
        gradient_at_displaced: computes the gradient at the current parameters on the same examples
            with the same random numbers; None counts as zero.
        delta: distance of the displacement, positive.
        against: walks `W`.

    Returns:
        The curvature, in units of loss per squared unit of `V`; negative along a direction in which the
        loss curves down; NaN if the parameters could not be moved.

    References:
        Lemma 1 (Eq. 6, 7) of Li et al. 2024, arXiv:2405.14578, for the role of `V' H V`.
    """
    device = parameters[0].device
    change, length_sq, realised = torch.zeros(3, dtype=torch.float64, device=device)
    with displaced(parameters, direction, delta) as originals:
        walk = direction()
        for parameter, original in zip(parameters, originals, strict=True):
            for theta, theta_0 in blocks(parameter, original):
                v = next(walk)
                length_sq += torch.dot(v, v)
                realised += torch.dot(v.double(), _difference(theta_0, theta))
                del v  # likewise
        del walk
        if realised.item() == 0.0:
            # A direction of zeros, as from examples without a gradient, has no curvature; one that rounding
            # swallowed has an unknown one.
            return 0.0 if length_sq.item() == 0.0 else math.nan
        moved = gradient_at_displaced()
        other = None if against is None else against()
        for parameter, original, after in zip(parameters, originals, moved, strict=True):
            after = torch.zeros_like(parameter) if after is None else dense(after)
            for theta, theta_0, g_delta in blocks(parameter, original, after):
                w = _difference(theta_0, theta) if other is None else next(other)
                change += torch.dot(w.double(), g_delta.double())
    per_length = length_sq / realised
    return float(((slope - change) * (per_length.square() if against is None else per_length)).item())


def _difference(left: Tensor, right: Tensor) -> Tensor:
    """In float64: two slopes are subtracted that may agree to all digits of float32."""
    return left.double() - right.double()
