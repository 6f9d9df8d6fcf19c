"""Laws, histories and checks that the tests of several packages draw or make."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from lightning_surge.laws.base import Law, MeasuredLaw
from lightning_surge.measure.records import ChunkStatistics, CoordinateSums, Measurement, SizedValue
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.policy.history import NoiseHistory

# No deadline: a shared machine stalls.
many = settings(max_examples=60, deadline=None)
BASE = 16.0
# A positive definite one, whose off-diagonal part costs where signs are +, -, +, +.
HESSIAN = np.array(
    [[2.0, -0.6, 0.8, 0.1], [-0.6, 1.0, -0.3, 0.2], [0.8, -0.3, 1.5, 0.4], [0.1, 0.2, 0.4, 0.9]]
)
sizes = st.floats(0, 14).map(lambda exponent: 2.0**exponent)


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def measured_law(limit: float, scale: float, noise: float, signal: float) -> MeasuredLaw:
    return MeasuredLaw(
        alignment_limit=limit, alignment_scale=scale, noise_curvature=noise, signal_curvature=signal
    )


measured_laws = st.builds(
    measured_law,
    decades(-4, 4),
    st.one_of(st.just(0.0), decades(-2, 8)),
    decades(-6, 6),
    st.one_of(st.just(0.0), decades(-6, 6)),
)


def halves(law: Law, *replicates: Law | None, at_edge: bool = False) -> EstimatedLaw:
    """A law with what it would have been without each of some equal groups; without any, a sure one."""
    groups = replicates or (law, law)
    shares = tuple((each, 1.0 / len(groups)) for each in groups)
    return EstimatedLaw(law, shares, len(groups), at_edge=at_edge)


def history_of(measurements: Sequence[Measurement], half_life: float = 1e6) -> NoiseHistory:
    history = NoiseHistory(half_life)
    for measurement in measurements:
        history.add(measurement)
    return history


def record(
    grad_sq: float = 1.0,
    trace_cov: float = 10.0,
    alignments: Sequence[tuple[float, float]] = (),
    curvatures: Sequence[tuple[float, float]] = (),
    sums: CoordinateSums | None = None,
) -> Measurement:
    """A measurement on 64 examples in four chunks; alignments and curvatures with their batch sizes."""
    pairs, curved = (tuple(SizedValue(*pair) for pair in each) for each in (alignments, curvatures))
    norms = ChunkStatistics(64.0, grad_sq, trace_cov, pairs)
    return Measurement(norms, curved, passes=64.0, num_chunks=4, coordinate_sums=sums)


def through_a_checkpoint(state: Any) -> Any:
    """As it comes out of a file that is read with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def numbers(measurement: Measurement) -> list[float]:
    """Norms, alignments and curvatures."""
    norms = measurement.statistics
    sized = (*norms.alignments, *measurement.curvatures)
    return [norms.grad_sq, norms.trace_cov, *[value for _, value in sized]]


def within(samples: Sequence[float], truth: float, allowance: float = 0.0) -> None:
    """The mean of samples lies within 4 standard errors of the truth, and an allowance for known bias."""
    error, mean = float(np.std(samples, ddof=1)) / math.sqrt(len(samples)), float(np.mean(samples))
    assert abs(mean - truth) < 4 * error + allowance, f"{mean} +- {error}, expected {truth}"
