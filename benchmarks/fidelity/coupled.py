"""A loss that couples the examples of a batch, as BatchNorm's does, is another loss at another batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.fidelity.analysis import POINT, Record, Row, groups, mean, pick
from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.regrets import DEFAULT, ELSEWHERE, FIXED, shared
from benchmarks.fidelity.run_tables import RULE_HEADERS, all_rows, at_default, rule_columns
from benchmarks.fidelity.switch import BATCH_SIZES, fixed_sample
from benchmarks.fidelity.training import train_to
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

__all__ = ["COUPLED", "coupled", "coupled_table"]

COUPLED = ("convnet",)
RULES = (*FIXED, "McCandlish", ELSEWHERE, *(f"{DEFAULT['objective']}, {how}" for how in ("used", "live")))


def coupled(workload: str, beta_2: float, phase: str, seed: int) -> dict[str, Any]:
    """The training loss at one point of training by batch size, and the loss with running statistics.

    Args:
        workload: its name.
        beta_2: Adam's.
        phase: where to stop.
        seed: of the training.
    """
    study, _ = train_to(WORKLOADS[workload], beta_2=beta_2, phase=phase, seed=seed)
    running = loss_of(study)
    sample = fixed_sample(study.workload)
    study.network.train()
    by_size = {}
    for size in BATCH_SIZES:
        with torch.no_grad():
            batches = zip(*(tensor.split(size) for tensor in sample), strict=True)
            losses = [float(study.workload.loss(study.network, batch)) for batch in batches]
        by_size[size] = sum(losses) / len(losses)
    return {"running": running, "training": by_size}


def coupled_table(records: Mapping[str, Sequence[Record]]) -> str:
    """The losses, and the rules where such a network goes below the base batch size, and elsewhere."""
    losses = [
        [
            *key,
            *(
                number(mean(record["training"][str(size)] for record in found).value, 3)
                for size in BATCH_SIZES
            ),
            number(mean(record["running"] for record in found).value, 3),
        ]
        for key, found in groups(records["coupled"], *POINT).items()
    ]
    rows = shared(at_default(all_rows(records)), RULES, "tuned")
    parts = {
        "all": rows,
        f"{', '.join(COUPLED)} below B = {BASE_BATCH_SIZE}": [row for row in rows if _below(row)],
        "all but these": [row for row in rows if not _below(row)],
    }
    lines = [
        [name, rule, len(found), *rule_columns(found)]
        for name, part in parts.items()
        for rule in RULES
        if (found := pick(part, rule=rule))
    ]
    return "\n\n".join(
        [
            "Mean loss of a batch as it is trained on, by its size, with the statistics of that batch; and "
            "with running statistics, as after training. Means over seeds, nats.",
            table([*POINT, *(f"B = {size}" for size in BATCH_SIZES), "running"], losses),
            "Rules where BatchNorm goes below the base batch size, and elsewhere, in the columns of "
            "`rules.md`.",
            table(["changes", "rule", "n", *RULE_HEADERS], lines),
        ]
    )


def _below(row: Row) -> bool:
    return row["workload"] in COUPLED and row["batch_size"] < BASE_BATCH_SIZE
