"""Write committed grids of runs as tables for `lightning-surge fit`.

python -m benchmarks.export_grids            # rewrite examples/tables
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cells import Store
from benchmarks.fidelity.procedure_optima import log_steps

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "fidelity" / "results"
TABLES = ROOT / "examples" / "tables"
OPTIMIZERS = {(0.0, 0.0): "sign", (0.9, 0.999): "adam"}
"""By Adam's betas: with both at 0 its step is the sign of the gradient."""


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
