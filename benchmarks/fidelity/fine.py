"""Finer line searches at the sizes whose ratios are judged to a tenth.

The signs of small batches scatter. On the autoencoder and the transformer the directions of `truths` tell
the best ratio of two sizes to some percent, on the other two to some ten percent, or they find no best step.
Some ten times as many directions tell whether a predicted ratio is within 10 percent of it there, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.fidelity.analysis import POINT, Record
from benchmarks.fidelity.one_step import fresh_directions, gradient_of, searched
from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import train_to
from benchmarks.fidelity.workloads import WORKLOADS

__all__ = ["FINE_WORKLOADS", "fine", "refined"]

FINE_WORKLOADS = ("perceptron", "convnet")
DIRECTIONS = {16: 240, 64: 120, 256: 80}


def fine(workload: str, beta_2: float, phase: str, seed: int) -> dict[str, Any]:
    """The best sign step at one point of training, of many directions.

    Args:
        workload: its name.
        beta_2: Adam's.
        phase: where to stop.
        seed: of the training and the directions.

    Returns:
        By batch size: what `searched` tells of them.
    """
    study, _ = train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)
    sample = fixed_sample(study.workload)
    study.network.train()
    full = gradient_of(study, sample)
    result = {}
    for size, count in DIRECTIONS.items():
        steps = fresh_directions(study, size, count, 66_000 + 1000 * seed + size)
        result[size] = searched(study, steps, sample, full)
    return {"sign": result}


def refined(truths: Iterable[Record], fines: Iterable[Record]) -> list[Record]:
    """Truths with the finer line searches in place of their own, where there are some."""
    keys = (*POINT, "seed")
    found = {tuple(record[key] for key in keys): record["sign"] for record in fines}
    return [_refined(record, found.get(tuple(record[key] for key in keys), {})) for record in truths]


def _refined(record: Record, finer: Record) -> Record:
    sign = {size: entry | finer.get(size, {}) for size, entry in record["sign"].items()}
    return record | {"sign": sign}
