"""A gradual ramp of the batch size with every rule, over a short budget and a long one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from benchmarks.fidelity.analysis import Record, Row, deviation, groups, mean, paired, pick
from benchmarks.fidelity.live import loss_of
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import loss_of_run
from benchmarks.fidelity.switch import SEEDS
from benchmarks.fidelity.training import Batches, Study, fit
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS
from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.schedules.sizes import GeometricRamp
from lightning_surge.schedules.windows import AccumulatedSchedule, total_steps

__all__ = ["BUDGETS", "FIXED_RULES", "RULES", "ramp", "ramp_rows", "ramp_table"]

BUDGETS = {"short": 16_384, "long": 65_536}
LARGEST = 16 * BASE_BATCH_SIZE
RULES = ("fixed batch", "constant", "sqrt", "linear", "step", "alignment", "progress", "edge")
FIXED_RULES = ("constant", "sqrt", "linear")
# Optimizer steps of the ramp, which leaves a sixtieth of them for the largest size.
RAMP_STEPS = {"short": 256, "long": 1024}


def ramp(
    workload: str, beta_2: float, budget: str, rule: str, seed: int, max_overhead: float
) -> dict[str, Any]:
    """Train over equal examples, from the base batch size to 16 times it, with a decay to zero.

    The rule is a fixed one or an objective; `"fixed batch"` stays at the base batch size.
    """
    what, examples = WORKLOADS[workload], BUDGETS[budget]
    schedule = GeometricRamp(start=BASE_BATCH_SIZE, end=LARGEST, duration=RAMP_STEPS[budget])
    sizes = AccumulatedSchedule(schedule, BASE_BATCH_SIZE, examples_per_epoch=examples)
    fixed = rule == "fixed batch"
    steps = examples // BASE_BATCH_SIZE if fixed else total_steps(sizes, examples)
    pl.seed_everything(seed, verbose=False)
    study = Study(what, (0.9, beta_2), lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))
    callbacks: list[pl.Callback] = []
    if not fixed:
        measured = {"objective": rule, "max_overhead": max_overhead}
        settings: dict[str, Any] = {"law": rule} if rule in FIXED_RULES else measured
        surge = SurgeLRCallback(BASE_BATCH_SIZE, **settings)
        warmup = BatchSizeWarmup(
            BASE_BATCH_SIZE, LARGEST, RAMP_STEPS[budget], micro_batch_size=BASE_BATCH_SIZE
        )
        callbacks = [warmup, surge]
    batches = Batches(what.data(), BASE_BATCH_SIZE, examples // BASE_BATCH_SIZE, seed)
    trainer = fit(study, batches, callbacks, steps=-1)
    return {"loss": loss_of(study), "steps": trainer.global_step}


def ramp_rows(records: Iterable[Record]) -> list[Row]:
    """By workload, beta_2, budget and rule: loss over seeds, and the difference to sqrt scaling.

    `difference` is paired over the seeds that both have.
    """
    rows = []
    runs_of_all = [record | {"loss": loss_of_run(record["loss"])} for record in records]
    for key, found in groups(runs_of_all, "workload", "beta_2", "budget").items():
        reference = pick(found, rule="sqrt")
        for (rule,), runs in groups(found, "rule").items():
            row = dict(zip(("workload", "beta_2", "budget"), key, strict=True)) | {"rule": rule}
            row |= {name: mean(run[name] for run in runs).value for name in ("loss", "steps")}
            row |= {"count": len(runs), "spread": deviation([run["loss"] for run in runs])}
            rows.append(row | {"difference": paired(runs, reference, "loss", ("seed",))})
    return rows


def ramp_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Final losses of ramps, by budget."""
    parts = [
        "Final loss of a gradual ramp from 16 to 256 examples over equal examples, with a decay to zero: "
        "mean over seeds ± their standard deviation, in nats, for the autoencoder squared error per image; "
        "and minus that of sqrt scaling, paired over seeds, ± 95 % half-width. `fixed batch` stays at 16.",
    ]
    for (beta_2, budget), found in groups(ramp_rows(records["ramp"]), "beta_2", "budget").items():
        names = [name for name in WORKLOADS if pick(found, workload=name)]
        steps = {round(row["steps"]) for row in found if row["rule"] != "fixed batch"}
        lines = []
        for rule in RULES:
            rows = {row["workload"]: row for row in pick(found, rule=rule)}
            lines.append([rule, *(_final_loss(rows.get(name)) for name in names)])
        parts += [
            f"**{budget}**: {BUDGETS[budget]:,} examples, {' or '.join(map(str, sorted(steps)))} steps on "
            f"the ramp and {BUDGETS[budget] // BASE_BATCH_SIZE} at a fixed batch; beta_2 = {beta_2:g}.",
            table(["rule", *names], lines),
        ]
    return "\n\n".join(parts)


def _final_loss(row: Row | None) -> str:
    if row is None:
        return "-"
    loss = f"{number(row['loss'], 4)} ± {number(row['spread'], 4)}"
    missing = "" if row["count"] == len(SEEDS) else f" (n {row['count']})"
    gap = "" if row["rule"] in ("sqrt", "fixed batch") else f"; {average(row['difference'], 4)}"
    return loss + missing + gap
