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
from benchmarks.fidelity import longer, report
from benchmarks.fidelity.approach import approach
from benchmarks.fidelity.best_base import live_at_best_base
from benchmarks.fidelity.live import live
from benchmarks.fidelity.one_step import laws, truths
from benchmarks.fidelity.ramp import FIXED_RULES, RULES, ramp
from benchmarks.fidelity.regrets import DEFAULT
from benchmarks.fidelity.switch import BATCH_SIZES, SEEDS, sweep
from benchmarks.fidelity.training import CONTINUED_EXAMPLES
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS

RESULTS = Path(__file__).parent / "results"
BETAS = (0.95, 0.999)
PHASES = ("late", "early", "cooled")
EXAMPLES = {"examples": CONTINUED_EXAMPLES}
OVERHEADS = (0.05, 0.01, 0.25)
OBJECTIVES = ("step", "alignment", "progress", "edge")


def product(**axes: Any) -> list[dict[str, Any]]:
    """All combinations, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def grid() -> list[Cell]:
    """Every cell of the study, the most telling first."""
    store, cells = Store(RESULTS), []
    names = list(WORKLOADS)
    for key in product(seed=SEEDS, phase=("late", "early", "start", "cooled"), beta_2=BETAS, workload=names):
        later = key["seed"] + (key["beta_2"] != BETAS[0])
        cells.append(Cell("truths", key, truths, priority=1 + later))
        cells.append(Cell("laws", key, laws, priority=1 + later))
    after = {"phase": PHASES, "beta_2": BETAS}
    for key in product(**after, batch_size=BATCH_SIZES, workload=names):
        cells.append(Cell("sweep", key | EXAMPLES, sweep, priority=2 * unusual(key)))
        if key["batch_size"] > BASE_BATCH_SIZE:
            cells.append(Cell("approach", key, partial(approach, store), priority=3 + unusual(key)))
    for key in product(max_overhead=OVERHEADS, **after, seed=SEEDS, objective=OBJECTIVES, workload=names):
        later = unusual(key) + (key["max_overhead"] != OVERHEADS[0]) + (key["seed"] == SEEDS[-1])
        cells.append(Cell("live", key | EXAMPLES, live, priority=1 + later + later // 2))
        if key.items() >= DEFAULT.items():
            at_best_base = partial(live_at_best_base, store)
            cells.append(Cell("best_base", key | EXAMPLES, at_best_base, priority=2 + later))
    for key in product(seed=SEEDS, budget=("short", "long"), rule=RULES, workload=names, beta_2=BETAS[:1]):
        overhead = 0.0 if key["rule"] in ("fixed batch", *FIXED_RULES) else OVERHEADS[0]
        cells.append(Cell("ramp", key | {"max_overhead": overhead}, ramp, priority=3))
    return cells + longer.cells(store, names, BETAS[0])


def unusual(key: dict[str, Any]) -> int:
    """In how many ways a change of the batch size is another one than the first to be run."""
    return (key["phase"] == "cooled") + (key["beta_2"] != BETAS[0])


def quick() -> list[Cell]:
    """One cell of each kind, on the smallest workload."""
    point: dict[str, Any] = {"workload": "perceptron", "beta_2": 0.95, "phase": "start"}
    return [
        Cell("truths", point | {"seed": 0}, truths),
        Cell("laws", point | {"seed": 0}, laws),
        Cell("sweep", point | {"batch_size": 16 * BASE_BATCH_SIZE}, sweep),
        Cell("live", point | {"seed": 0, "max_overhead": 0.05, "objective": DEFAULT["objective"]}, live),
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
