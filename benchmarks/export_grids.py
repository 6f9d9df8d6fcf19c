"""Write committed grids of runs as tables for `lightning-surge fit`.

python -m benchmarks.export_grids            # rewrite examples/tables

The grids are those of a finished study, whose code still runs at commit c7eda09 (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import Store

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "fidelity" / "results"
TABLES = ROOT / "examples" / "tables"
OPTIMIZERS = {(0.0, 0.0): "sign", (0.9, 0.999): "adam"}
"""By Adam's betas: with both at 0 its step is the sign of the gradient."""


def log_steps(record: Mapping[str, Any], target: int) -> np.ndarray:
    """Log of the steps to a target by seed and learning rate, from the lowest loss so far; else infinite."""
    level, marks = record["targets"][target], np.log(record["steps"])
    losses = np.array(record["losses"], dtype=np.float64)
    lowest = np.minimum.accumulate(np.where(np.isnan(losses), np.inf, losses), axis=2)
    result = np.full(lowest.shape[:2], np.inf)
    for place in np.ndindex(*result.shape):
        course = lowest[place]
        if course[-1] <= level:
            after = int(np.argmax(course <= level))
            result[place] = marks[after]
            if after > 0 and np.isfinite(course[after - 1]):
                part = (course[after - 1] - level) / (course[after - 1] - course[after])
                result[place] = marks[after - 1] + part * (marks[after] - marks[after - 1])
    return result


def tables() -> Iterator[tuple[str, str]]:
    """Name and text of every table."""
    records = Store(RESULTS).records("procedure_grid")
    keys = sorted({(record["workload"], record["beta_1"], record["beta_2"]) for record in records})
    for name, *betas in keys:
        optimizer = OPTIMIZERS[betas[0], betas[1]]
        mine = [r for r in records if [r["workload"], r["beta_1"], r["beta_2"]] == [name, *betas]]
        lines = [
            f"# Steps to a loss at constant learning rates: {name}, {optimizer}, "
            f"betas {betas[0]:g} and {betas[1]:g}.",
            "# Steps are empty where a run did not get there.",
            "# From benchmarks/fidelity/results/procedure_grid.jsonl by: python -m benchmarks.export_grids",
            "batch_size,lr,seed,target,steps",
        ]
        for record in sorted(mine, key=lambda record: record["batch_size"]):
            for index, target in enumerate(record["targets"]):
                logs = log_steps(record, index)
                for seed, row in zip(record["seeds"], logs.tolist(), strict=True):
                    lines += [
                        f"{record['batch_size']},{lr:g},{seed},{target:.6g},"
                        + (f"{math.exp(log):.1f}" if math.isfinite(log) else "")
                        for lr, log in zip(record["lrs"], row, strict=True)
                    ]
        yield f"{name}_{optimizer}.csv", "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite them all."""
    TABLES.mkdir(exist_ok=True)
    for name, text in tables():
        (TABLES / name).write_text(text)
        print(TABLES.relative_to(ROOT) / name)


if __name__ == "__main__":
    main()
