"""What a learning rate may be held to as the batch size changes: ratios of a law.

Each is a function of a law, a batch size and the base batch size. They answer for the policy while a model
trains, and for whoever reads the logs of a run afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_surge.laws.base import Law

Objective = Callable[[Law, float, float], float]
"""Maps a law, a batch size and the base batch size to the wanted ratio."""


def step_ratio(law: Law, batch_size: float, base_batch_size: float) -> float:
    """Ratio that keeps every step as good as it can be, `lr(B) / lr(base)`; it falls beyond the law's peak.

    Args:
        law: any law.
        batch_size: examples per optimizer step.
        base_batch_size: examples at which the scheduled learning rate was tuned.

    References:
        Li et al. 2024, arXiv:2405.14578, Lemma 1 (Eq. 6).
    """
    return law.lr(batch_size) / law.lr(base_batch_size)


def progress_ratio(law: Law, batch_size: float, base_batch_size: float) -> float:
    """Ratio that keeps the expected progress per example: `(B / base) N(base) / N(B)`.

    Square-root scaling while noise dominates the alignment N, linear scaling beyond. It has no falling
    side, and counts on the schedule to cool what it heats. The arguments are those of `step_ratio`.

    Example:
        With `N ~ sqrt(B)`, as for Theorem 3, it is square-root scaling.

        >>> from lightning_surge.laws.theorems import Theorem3Law
        >>> round(progress_ratio(Theorem3Law(noise_scale=100.0, peak_lr=0.1), 64.0, 16.0), 6)
        2.0
    """
    progress = law.alignment(base_batch_size) / law.alignment(batch_size)
    return batch_size / base_batch_size * progress


def alignment_ratio(law: Law, batch_size: float, base_batch_size: float) -> float:
    """Ratio of what a step gains: `N(B) / N(base)`, as if its cost were the same at every batch size.

    Square-root scaling while noise dominates the alignment N, constant beyond. For plain gradients, whose
    length changes with the batch size, it is the ratio of their law. Where `step_ratio` takes the curvature
    as it is found, this one counts on training to adapt it to the learning rate that comes. The arguments are
    those of `step_ratio`.

    Example:
        >>> from lightning_surge.laws.base import MeasuredLaw
        >>> law = MeasuredLaw(
        ...     alignment_limit=2.0, alignment_scale=48.0, noise_curvature=1.0, signal_curvature=1.0
        ... )
        >>> round(alignment_ratio(law, 144.0, 16.0), 6)  # sqrt((1 + 48 / 16) / (1 + 48 / 144))
        1.732051

    References:
        McCandlish et al. 2018, arXiv:1812.06162, section 2.2, for `alpha = 1/2` with a measured noise scale.
    """
    return law.isotropic_lr(batch_size) / law.isotropic_lr(base_batch_size)


# In the order of the codes under `surge/objective`, of which new ones may not take those in `RETIRED`.
OBJECTIVES: dict[str, Objective] = {
    "step": step_ratio,
    "alignment": alignment_ratio,
    "progress": progress_ratio,
}
# By the codes of old logs.
RETIRED = {3: "edge"}
