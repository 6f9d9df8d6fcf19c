"""The measured law beside the learning rate at which Adam's steps become unstable."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_surge.laws.base import MeasuredLaw, checked, store_numbers

__all__ = ["EdgeLaw"]


@dataclass(frozen=True, kw_only=True)
class EdgeLaw(MeasuredLaw):
    """A `MeasuredLaw` that knows Adam's edge of stability.

    With a preconditioner held still, steps of Adam diverge above

        edge_lr(B) = C / lambda_max(P^-1/2 H P^-1/2)        P ~ sqrt(v), v = mu^2 + sigma^2 / B

    If one group of coordinates with about the same `mu / sigma` holds the sharpest direction, `lambda^2` goes
    with `1 / v`, so that `edge_lr(B) = edge_limit sqrt(1 + edge_scale / B)`. It falls like `1 / sqrt(B)`
    while noise makes up `v`, and tends to a limit above 0 beyond.

    Args:
        edge_limit: the edge as B -> inf, at least 0; learning rate.
        edge_sq_slope: `edge_limit^2 edge_scale`, at least 0; learning rate squared times examples. Of pure
            noise, which has no limit, it is a number too.

    Raises:
        ValueError: if a value is out of range, or both are 0.

    Example:
        >>> law = EdgeLaw(
        ...     alignment_limit=2.0, alignment_scale=300.0, noise_curvature=1.0, signal_curvature=1.0,
        ...     edge_limit=0.0, edge_sq_slope=0.16,
        ... )
        >>> law.edge_lr(16), law.edge_lr(64)
        (0.1, 0.05)

    References:
        Cohen et al. 2022, arXiv:2207.14484, for the edge at one batch size; its shape follows from what
        `v` averages, see docs/learning-rate.md.
    """

    edge_limit: float
    edge_sq_slope: float

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "a sharpness that is not positive has no edge; hold the learning rate"
        store_numbers(self, {"edge_limit": remedy, "edge_sq_slope": remedy}, least=0)
        if self.edge_limit == 0 and self.edge_sq_slope == 0:
            raise ValueError(
                "Expected edge_limit > 0 or edge_sq_slope > 0, got edge_limit=0 and edge_sq_slope=0: "
                f"{remedy}."
            )

    def edge_lr(self, batch_size: float) -> float:
        """The edge of stability, a learning rate; ``batch_size`` in examples."""
        return math.sqrt(self.edge_limit**2 + self.edge_sq_slope / checked(batch_size))
