"""Whether Adam's averages should forget faster, counted in steps, when the batch size grows.

Momentum and the second moment remember steps, and a larger batch makes that memory longer in examples. At a
change of the batch size each beta is raised to a power of the ratio of sizes; the learning rate is that of
sqrt scaling approached from 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from benchmarks.fidelity.analysis import POINT, Record, chosen_elsewhere, loss_of_run, mean_over_seeds
from benchmarks.fidelity.free import approached
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.switch import SEEDS, final_losses
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge.policy.policy import MAX_DRIFT

__all__ = ["BETA_1", "EXPONENTS", "beta_gaps", "betas", "betas_table"]

BETA_1 = 0.9
GROWTH = 16
EXPONENTS = tuple(itertools.product((0.0, 0.25, 0.5), repeat=2))
"""Of the ratio of batch sizes, in the powers to which beta_1 and beta_2 are raised."""
KEPT = "0, 0"


def betas(workload: str, beta_2: float, phase: str, examples: int) -> dict[str, Any]:
    """Final losses after a change to 16 times the batch size at a phase: by exponents, one for each seed."""
    ratio = GROWTH**0.5
    used = [(BETA_1 ** (GROWTH**first), beta_2 ** (GROWTH**second)) for first, second in EXPONENTS]

    def multipliers_at(step: int) -> torch.Tensor:
        return torch.full((len(used),), approached(ratio, MAX_DRIFT, step))

    size = GROWTH * BASE_BATCH_SIZE
    found = final_losses(workload, beta_2, phase, size, multipliers_at, examples, used)
    names = [f"{first:g}, {second:g}" for first, second in EXPONENTS]
    return {
        "seeds": list(SEEDS),
        "losses": dict(zip(names, map(list, zip(*found, strict=True)), strict=True)),
    }


def beta_gaps(records: Sequence[Record]) -> pd.DataFrame:
    """Final losses minus those with betas kept, a row for each change, seed and exponents.

    `gap` is in nats, or in percent of the mean loss with betas kept where the loss is no cross-entropy.
    """
    rows = []
    for cell in records:
        kept = cell["losses"][KEPT]
        nats = WORKLOADS[cell["workload"]].cross_entropy
        unit = 1.0 if nats else 100.0 * len(kept) / sum(kept)
        rows += [
            {name: cell[name] for name in (*POINT, "examples")}
            | {"exponents": name, "seed": seed, "gap": unit * (loss_of_run(loss) - kept[seed])}
            for name, losses in cell["losses"].items()
            for seed, loss in enumerate(losses)
        ]
    return pd.DataFrame(rows)


def betas_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Gaps by exponents, for each beta_2, workload and decay; and what a workload's others would choose."""
    found = beta_gaps(records["betas"])
    note = (
        f"Final loss minus that with betas kept, after a change to {GROWTH} times the batch size with sqrt "
        "scaling approached: mean over phases and seeds (mean of the worst seed); nats, for the autoencoder "
        f"percent. At the change, betas of {BETA_1:g} and {{}} are raised to powers of {GROWTH}, of which "
        "these are the exponents."
    )
    parts = []
    for beta_2, part in found.groupby("beta_2"):
        columns = {}
        for (workload, examples), here in part.groupby(["workload", "examples"], sort=False):
            of_seed = here.groupby(["exponents", "seed"])["gap"].mean().groupby(level=0)
            phases = ", ".join(here["phase"].unique())
            columns[f"{workload}, {examples // CONTINUED_EXAMPLES} x decay ({phases})"] = {
                name: f"{number(of_seed.mean()[name], 4)} ({number(of_seed.max()[name], 4)})"
                for name in here["exponents"].unique()
            }
        rows = [[name, *(by[name] for by in columns.values())] for name in part["exponents"].unique()]
        parts += [note.format(f"{beta_2:g}"), table(["exponents of beta_1, beta_2", *columns], rows)]
    headers = ["left out", "by the", "the others choose", "which gains here", "best here", "which gains"]
    return "\n\n".join([*parts, table(headers, left_out(found))])


def left_out(found: pd.DataFrame) -> list[list[object]]:
    """For each workload the exponents that the others choose, and their gap here with its half-width."""
    scale = found.groupby("workload")["gap"].apply(lambda gap: gap.abs().mean())
    of_seed = found.groupby(["workload", "exponents", "seed"])["gap"].mean()

    def gap(workload: str, exponents: str) -> str:
        here = found[(found["workload"] == workload) & (found["exponents"] == exponents)]
        return average(mean_over_seeds(here.to_dict("records"), "gap"), 4)

    lines: list[list[object]] = []
    for how, over in {
        "mean": of_seed.groupby(level=[0, 1]).mean(),
        "worst seed": of_seed.groupby(level=[0, 1]).max(),
    }.items():
        costs = {name: (over[name] / scale[name]).to_dict() for name in scale.index}
        for workload, others, _, best, *_ in chosen_elsewhere(costs, KEPT):
            lines.append([workload, how, others, gap(workload, others), best, gap(workload, best)])
    return lines
