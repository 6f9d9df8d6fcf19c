"""The base learning rate of each workload: the best one for a whole run at the base batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.analysis import Record
from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.switch import SEEDS, fixed_sample
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, PHASES, schedule
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

__all__ = ["tune", "tuning_table"]

LRS = tuple(0.001 * 2.0 ** (index / 2) for index in range(-1, 10))


def tune(workload: str, beta_2: float) -> dict[str, Any]:
    """Final loss of runs that are constant up to the late phase and decay to zero afterwards."""
    what = WORKLOADS[workload]
    snapshots = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        snapshots += [Snapshot.fresh(what.network())] * len(LRS)
    ensemble = Ensemble(what, snapshots, (0.9, beta_2))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    steps_after = CONTINUED_EXAMPLES // BASE_BATCH_SIZE
    factor = schedule("late", steps_after)
    lr = torch.tensor(LRS * len(SEEDS))
    for step in range(PHASES["late"] + steps_after):
        batch = shared_batch(what.data(), BASE_BATCH_SIZE, generators, len(LRS))
        ensemble.step(batch, lr * factor(step))
    return {"lrs": LRS, "losses": ensemble.losses(fixed_sample(what)).view(len(SEEDS), -1).tolist()}


def tuning_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Final losses by base learning rate, the lowest in bold, beside the one that the study uses."""
    lines = []
    for record in records["tuning"]:
        # JSON has no number for a run that has diverged.
        means = np.array(record["losses"], dtype=float).mean(axis=0)
        best = int(np.nanargmin(means))
        losses = [f"**{number(mean, 4)}**" if i == best else number(mean, 4) for i, mean in enumerate(means)]
        used = WORKLOADS[record["workload"]].lr
        lines.append([record["workload"], record["beta_2"], f"{used:g}", *losses])
    return "\n\n".join(
        [
            f"Final loss at B = {BASE_BATCH_SIZE} by the base learning rate, constant up to the late phase "
            f"and decaying to zero afterwards, mean over {len(SEEDS)} seeds; `-` where a seed diverged.",
            table(["workload", "beta_2", "used", *(f"{lr:.2g}" for lr in LRS)], lines),
        ]
    )
