"""Measurements in, averaged noise statistics out.

One measurement is very noisy, so what is used is a decayed average of many. Sums are averaged; ratios,
roots and clamps come only afterwards (`estimates`), because the mean of a ratio is not the ratio of the
means. Alignments are averaged per bin of log2 of the batch size. Curvatures are kept measurement by
measurement: their level drifts with training, so only sizes seen at the same point can be compared. Records
stay apart until they are asked for: standard errors come from leaving out one group of them at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit

from lightning_surge.checking.arguments import number, whole
from lightning_surge.checking.state import REMEDY, restore, save
from lightning_surge.measure.records import CoordinateSums, Measurement, SizedValue

# A size that a ramp has left behind weighs less and less; below this share of the heaviest bin's weight it
# tells of another time, and is left out.
STALE = 0.25
# Beyond this nothing is known, and its square still is a number.
LARGEST_ERROR = 1e100
# No count of examples or tokens is smaller: in a checkpoint it is damage.
SMALLEST = 1e-12


class Bin(NamedTuple):
    """A weighted mean over measurements with directions of about the same size.

    `batch_size` is the geometric mean of theirs; `variance` is that of `value`, from the scatter.
    """

    batch_size: float
    value: float
    weight: float
    variance: float


class Contrast(NamedTuple):
    """Two curvatures of one measurement, along directions of two sizes, the smaller one first."""

    sizes: tuple[float, float]
    values: tuple[float, float]
    weight: float


class NoiseStats(NamedTuple):
    """Averaged statistics of the gradient.

    Attributes:
        num_measurements: measurements behind them.
        grad_sq: `|G|^2`, debiased; negative while noise hides the signal.
        trace_cov: `tr Sigma`.
        alignments: `N(b)` by size of direction.
        curvatures: `D(b)` by size of direction, to look at.
        contrasts: the curvatures measurement by measurement, to fit.
        grad_sq_error: standard error of `grad_sq`, from its scatter.
        coordinate_sums: what the theorems need, if measured.
        sizes: examples in the smallest chunk and in the largest batch whose norms were taken.
    """

    num_measurements: int
    grad_sq: float
    trace_cov: float
    alignments: tuple[Bin, ...]
    curvatures: tuple[Bin, ...]
    contrasts: tuple[Contrast, ...] = ()
    grad_sq_error: float = 0.0
    coordinate_sums: CoordinateSums | None = None
    sizes: tuple[float, float] = (0.0, math.inf)

    @property
    def knows_curvature(self) -> bool:
        """Whether more than norms was measured."""
        return bool(self.contrasts) or self.coordinate_sums is not None

    @property
    def noise_scale(self) -> float:
        """`B_simple = tr Sigma / |G|^2` in examples; infinite while noise hides `|G|^2` altogether.

        References:
            McCandlish et al. 2018, arXiv:1812.06162, Eq. 2.9.
        """
        return self.trace_cov / self.grad_sq if self.grad_sq > 0 else math.inf

    @property
    def resolved_noise_scale(self) -> float:
        """The noise scale, with `|G|^2` no smaller than its own standard error.

        A signal below that could have any size, so the smallest noise scale that agrees with the data is
        taken: the law then claims to know less about large batches, not more.
        """
        return self.trace_cov / max(self.grad_sq, self.grad_sq_error, 1e-300)


class NoiseHistory:
    """The latest measurements, with weights that halve every `half_life` measurements.

    Args:
        half_life: in measurements, positive.

    Example:
        Two measurements, the older one worth half with `half_life=1`: (1 * 6 + 0.5 * 3) / 1.5 = 5.

        >>> from lightning_surge.measure.records import ChunkStatistics
        >>> history = NoiseHistory(half_life=1)
        >>> for grad_sq in (3.0, 6.0):
        ...     history.add(Measurement(ChunkStatistics(8.0, grad_sq, 10.0, ()), (), passes=16.0))
        >>> history.stats().grad_sq
        5.0
    """

    def __init__(self, half_life: float = 8.0) -> None:
        self.half_life = number("half_life", half_life, "8 measurements is a good start")
        # Beyond six half-lives a record weighs less than 2 %.
        self._records: deque[Measurement] = deque(maxlen=max(2, math.ceil(6 * half_life)))
        self.num_measurements = 0
        # Of the records as they are, by the number of groups.
        self._replicates: dict[int, list[tuple[NoiseStats, float]]] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def latest(self) -> Measurement | None:
        """The newest measurement."""
        return self._records[-1] if self._records else None

    def add(self, measurement: Measurement) -> None:
        """Append a measurement, or refuse one with a number that is not finite."""
        statistics = measurement.statistics
        sized = (*statistics.alignments, *measurement.curvatures)
        values = [value for pair in sized for value in pair]
        finite = all(map(math.isfinite, (*statistics[:3], *values, *(measurement.coordinate_sums or ()))))
        sizes = [statistics.batch_size, *(size for size, _ in sized)]
        counted = min(sizes) >= SMALLEST and min(measurement.passes, measurement.pairs) >= 0.0
        if not (finite and counted):
            raise ValueError(
                "Expected finite gradient statistics and sizes above 0, got "
                f"batch_size={statistics.batch_size}, grad_sq={statistics.grad_sq}, trace_cov="
                f"{statistics.trace_cov}, passes={measurement.passes}: this measurement is left out. Look "
                "whether the loss is a number."
            )
        self._records.append(measurement)
        self.num_measurements += 1
        self._replicates.clear()

    def stats(self) -> NoiseStats:
        """Average all records."""
        return self._average(range(len(self._records)))

    def replicates(self, max_groups: int = 16) -> list[tuple[NoiseStats, float]]:
        """Averages without one group of consecutive records each, and the group's share of all weight."""
        count = len(self._records)
        groups = min(count, max_groups)
        if groups < 2:
            return []
        if groups not in self._replicates:
            weights = [_precision(r) * w for r, w in zip(self._records, self._weights(), strict=True)]
            edges = [round(index * count / groups) for index in range(groups + 1)]
            self._replicates[groups] = [
                (
                    self._average(index for index in range(count) if not start <= index < stop),
                    sum(weights[start:stop]) / sum(weights),
                )
                for start, stop in pairwise(edges)
            ]
        return self._replicates[groups]

    def standard_error(self, quantity: Callable[[NoiseStats], float]) -> float:
        """Standard error of anything the averages can be asked; infinite where it is not known."""
        replicates = self.replicates()
        shares = [share for _, share in replicates]
        return jackknife_error(quantity(self.stats()), [quantity(stats) for stats, _ in replicates], shares)

    def _weights(self) -> list[float]:
        count = len(self._records)
        return [2.0 ** (-(count - 1 - index) / self.half_life) for index in range(count)]

    def _average(self, indices: Iterable[int]) -> NoiseStats:
        all_weights = self._weights()
        records = [(self._records[index], all_weights[index]) for index in indices]
        if not records:
            return NoiseStats(0, math.nan, math.nan, (), ())
        # One "size" for all: the norms need no bins, but the same scatter.
        norms = [(_precision(record) * weight, record.statistics) for record, weight in records]
        norm = _bin([(weight, 0.0, statistics.grad_sq) for weight, statistics in norms])
        return NoiseStats(
            num_measurements=len(records),
            grad_sq=norm.value,
            grad_sq_error=math.sqrt(norm.variance),
            trace_cov=sum(weight * statistics.trace_cov for weight, statistics in norms) / norm.weight,
            sizes=(
                min(s.batch_size / max(r.num_chunks, 1) for r, _ in records for s in [r.statistics]),
                max(record.statistics.batch_size for record, _ in records),
            ),
            alignments=_bins((record.statistics.alignments, weight) for record, weight in records),
            curvatures=_bins((record.curvatures, weight) for record, weight in records),
            contrasts=tuple(
                Contrast((low.batch_size, high.batch_size), (low.value, high.value), weight)
                for record, weight in records
                if record.curvatures
                for low, high in [(min(record.curvatures), max(record.curvatures))]
            ),
            coordinate_sums=_mean_sums(records),
        )

    def state_dict(self) -> dict[str, Any]:
        """The records as plain numbers and lists."""
        records = []
        for record in self._records:
            entry = record._asdict()
            statistics = entry.pop("statistics")
            records.append({"norms": statistics[:3], "alignments": statistics.alignments, **entry})
        return {"num_measurements": self.num_measurements, "records": save(records)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the records of `state_dict`, or nothing if a value is missing or out of range."""
        loaded = NoiseHistory(self.half_life)
        for record in state["records"]:
            statistics, sums = [*record["norms"], record["alignments"]], record["coordinate_sums"]
            # Version 0.2.0 saved a fourth sum.
            record = {**record, "statistics": statistics, "coordinate_sums": sums and sums[:3]}
            loaded.add(restore(Measurement, record))
        count = whole("num_measurements", state["num_measurements"], REMEDY, least=len(loaded))
        self._records, self.num_measurements = loaded._records, count
        self._replicates.clear()


def jackknife_error(whole: float, without: Sequence[float], shares: Sequence[float]) -> float:
    r"""Standard error of an answer, by what it would be without each group of measurements.

    A group with a share `w_g` of the weight has the pseudo-value `q / w_g - (1 / w_g - 1) q_(g)`, with
    `q_(g)` the answer without the group. These scatter around their weighted mean, and the variance of that
    mean is `sum_g w_g^2 / (1 - w_g) (pseudo_g - mean)^2`: the usual formula where all shares are equal. Few
    groups know their own scatter badly, so the error is multiplied by Student's factor, after which one
    standard error holds for 68 % of the truths, as a Gaussian's does. Its degrees of freedom are
    `1 / sum_g w_g^2 - 1`.

    Returns:
        The standard error in the answer's unit; infinite with fewer than two groups, or if an answer is
        infinite or undefined.

    References:
        Busing, Meijer and van der Leeden 1999, *Statistics and Computing* 9, for pseudo-values of unequal
        groups. Their variance is for groups of unequal size; here it is the weights that differ.
    """
    if len(without) < 2 or not all(map(math.isfinite, (whole, *without))):
        return math.inf
    weights = np.array(shares)
    with np.errstate(all="ignore"):
        pseudo = whole / weights - (1.0 / weights - 1.0) * np.array(without)
        centre = np.sum(weights * pseudo)
        variance = np.sum(weights**2 / (1.0 - weights) * (pseudo - centre) ** 2)
        student = stdtrit(1.0 / np.sum(weights**2) - 1.0, ndtr(1.0))
        error = float(student * np.sqrt(variance))
    return error if error < LARGEST_ERROR else math.inf


def _precision(record: Measurement) -> float:
    """Weight of its norms, beside its age.

    Their variance falls with the pairs of examples where noise dominates, and with the examples where the
    signal does. The root is right for the latter, and leaves others a say in how sure the average is.
    """
    return math.sqrt(record.pairs) or 1.0


def _mean_sums(records: Sequence[tuple[Measurement, float]]) -> CoordinateSums | None:
    sums = [record.coordinate_sums for record, _ in records if record.coordinate_sums is not None]
    if len(sums) < len(records):
        return None
    return CoordinateSums(*np.average(sums, axis=0, weights=[weight for _, weight in records]).tolist())


def _bins(records: Iterable[tuple[Sequence[SizedValue], float]]) -> tuple[Bin, ...]:
    grouped: dict[int, list[tuple[float, float, float]]] = {}
    for sized_values, weight in records:
        for batch_size, value in sized_values:
            log_size = math.log2(batch_size)
            grouped.setdefault(round(log_size), []).append((weight, log_size, value))
    bins = [_bin(entries) for _, entries in sorted(grouped.items())]
    heaviest = max((entry.weight for entry in bins), default=0.0)
    return tuple(entry for entry in bins if entry.weight >= STALE * heaviest)


def _bin(entries: Sequence[tuple[float, float, float]]) -> Bin:
    total = sum(weight for weight, _, _ in entries)
    log_size = sum(weight * log_size for weight, log_size, _ in entries) / total
    mean = sum(weight * value for weight, _, value in entries) / total
    scatter = sum((weight * (value - mean)) ** 2 for weight, _, value in entries) / total**2
    count = len(entries)
    return Bin(2.0**log_size, mean, total, scatter * count / (count - 1) if count > 1 else 0.0)
