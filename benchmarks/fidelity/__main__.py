"""Fidelity of the predicted learning rate: run what is not finished yet, then write tables and figures.

python -m benchmarks.fidelity --budget 60        # minutes; goes on where the last run stopped
python -m benchmarks.fidelity --quick            # under two minutes, nothing is written
python -m benchmarks.fidelity --report           # tables and figures from what is there
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cell, Store, chosen, run_cells
from benchmarks.fidelity import longer, procedure, report, secants
from benchmarks.fidelity.approach import approach
from benchmarks.fidelity.best_base import live_at_best_base
from benchmarks.fidelity.coupled import COUPLED, coupled
from benchmarks.fidelity.decay import decay
from benchmarks.fidelity.fine import FINE_WORKLOADS, fine
from benchmarks.fidelity.live import live
from benchmarks.fidelity.one_step import laws, truths
from benchmarks.fidelity.ramp import FIXED_RULES, RULES, ramp
from benchmarks.fidelity.regrets import DEFAULT
from benchmarks.fidelity.switch import BATCH_SIZES, SEEDS, sweep
from benchmarks.fidelity.tuning import tune
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

RESULTS = Path(__file__).parent / "results"
BETAS = (0.95, 0.999)
OVERHEADS = (0.05, 0.01, 0.25)
OBJECTIVES = ("step", "alignment", "progress", "edge")


def product(**axes: Any) -> list[dict[str, Any]]:
    """All combinations, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def grid() -> list[Cell]:
    """Every cell of the study, the most telling first."""
    cells = []
    names = list(WORKLOADS)
    for key in product(seed=SEEDS, phase=("late", "early", "start", "cooled"), beta_2=BETAS, workload=names):
        later = key["seed"] + (key["beta_2"] != BETAS[0])
        cells.append(Cell("truths", key, truths, priority=1 + later))
        cells.append(Cell("laws", key, laws, priority=1 + later))
        if key["workload"] in FINE_WORKLOADS:
            cells.append(Cell("fine", key, fine, priority=1 + later))
    for key in product(
        phase=("late", "early", "cooled"), beta_2=BETAS, batch_size=BATCH_SIZES, workload=names
    ):
        later = (key["phase"] == "cooled") + (key["beta_2"] != BETAS[0])
        cells.append(Cell("sweep", key, sweep, priority=2 * later))
    for key in product(
        max_overhead=OVERHEADS,
        phase=("late", "early", "cooled"),
        beta_2=BETAS,
        seed=SEEDS,
        objective=OBJECTIVES,
        workload=names,
    ):
        unusual = [key["phase"] == "cooled", key["beta_2"] != BETAS[0], key["max_overhead"] != OVERHEADS[0]]
        later = sum(unusual) + (key["seed"] == SEEDS[-1])
        cells.append(Cell("live", key, live, priority=1 + later + later // 2))
        if key.items() >= DEFAULT.items():
            at_best_base = partial(live_at_best_base, Store(RESULTS))
            cells.append(Cell("best_base", key, at_best_base, priority=2 + later))
    for key in product(seed=SEEDS, workload=names, beta_2=BETAS[:1]):
        cells.append(Cell("decay", key, decay, priority=2 + key["seed"]))
    for key in product(seed=SEEDS, budget=("short", "long"), rule=RULES, workload=names, beta_2=BETAS[:1]):
        overhead = 0.0 if key["rule"] in ("fixed batch", *FIXED_RULES) else OVERHEADS[0]
        cells.append(Cell("ramp", key | {"max_overhead": overhead}, ramp, priority=3))
    for key in product(phase=("late", "early", "cooled"), beta_2=BETAS, seed=SEEDS, workload=COUPLED):
        cells.append(Cell("coupled", key, coupled, priority=3))
    cells += longer.cells(Store(RESULTS), names, BETAS[0])
    for key in product(
        phase=("late", "early", "cooled"), beta_2=BETAS, batch_size=BATCH_SIZES[2:], workload=names
    ):
        later = (key["phase"] == "cooled") + (key["beta_2"] != BETAS[0])
        cells.append(Cell("approach", key, partial(approach, Store(RESULTS)), priority=3 + later))
    cells += [Cell("tuning", key, tune, priority=2) for key in product(workload=names, beta_2=BETAS)]
    for key in product(workload=names, beta_2=BETAS, batch_size=(BATCH_SIZES[0], BATCH_SIZES[-1])):
        correction = key | {"phase": "late", "correct_lag": True}
        cells.append(Cell("lag", correction, sweep, priority=3))
    return [*cells, *procedure.cells(), *secants.cells()]


def quick() -> list[Cell]:
    """One cell of each kind, on the smallest workload."""
    point: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "start"}
    return [
        Cell("truths", point | {"seed": 0}, truths),
        Cell("laws", point | {"seed": 0}, laws),
        Cell("sweep", point | {"batch_size": 16 * BASE_BATCH_SIZE}, sweep),
        Cell("live", point | {"seed": 0, "max_overhead": 0.05, "objective": "step"}, live),
    ]


def main() -> None:
    """Run, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=60.0, help="minutes after which no cell is started")
    parser.add_argument("--quick", action="store_true", help="one cell of each kind, nothing is written")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="*", help="kinds of cells to run")
    parser.add_argument("--workload", nargs="*", help="workloads to run")
    parser.add_argument("--run-only", action="store_true", help="leave tables and figures as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        run_cells(quick(), None, options.budget * 60, strict=True)
        return
    store = Store(RESULTS)
    if not options.report:
        cells = chosen(grid(), options.only, workload=options.workload)
        left = run_cells(cells, store, options.budget * 60)
        print(f"{left} cells are left" if left else "every cell is finished", flush=True)
        if options.run_only:
            return
    report.write_report(store, RESULTS, Counter(cell.kind for cell in grid()))


if __name__ == "__main__":
    main()
