"""The base learning rate of each workload: the best one for a whole run at the base batch size."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.switch import SEEDS, fixed_sample
from benchmarks.fidelity.training import CONTINUED_EXAMPLES, PHASES, schedule
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

__all__ = ["tune"]

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
