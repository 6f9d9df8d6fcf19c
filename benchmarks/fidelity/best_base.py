"""The callback through a change of the batch size, on the base learning rate that is best from there on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells import Store
from benchmarks.fidelity.analysis import POINT, pick
from benchmarks.fidelity.live import live
from benchmarks.fidelity.regrets import sweeps_of
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE

__all__ = ["best_multiplier", "live_at_best_base"]


def best_multiplier(store: Store, **point: Any) -> float:
    """Of the base learning rate, for the rest of a run that keeps its batch size.

    The point is a workload, beta_2, phase, and the examples after it.

    Raises:
        LookupError: If the sweep at the base batch size is not finished there.
    """
    sweeps = sweeps_of(pick(store.records("sweep"), batch_size=BASE_BATCH_SIZE, **point))
    if not sweeps:
        raise LookupError(f"A sweep at the base batch size has to come first, none is finished at {point}.")
    return float(2.0 ** next(iter(sweeps.values())).best)


def live_at_best_base(store: Store, settings: Mapping[str, Any] | None = None, **key: Any) -> dict[str, Any]:
    """`live`, whose base learning rate is the best one from the change on.

    A rule for ratios can only be as good as the learning rate that it carries over. This takes that one's
    error away, which for a ratio without a callback the sweep does too.
    `settings` are those of `live` that are not in the key.
    """
    multiplier = best_multiplier(store, **{name: key[name] for name in (*POINT, "examples")})
    return {"multiplier": multiplier} | live(**key, multiplier=multiplier, **(settings or {}))
