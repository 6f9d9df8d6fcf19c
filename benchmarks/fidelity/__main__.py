"""One step, and rules after a change of the batch size: run what is not finished, then write tables.

python -m benchmarks.fidelity --budget 60        # minutes; goes on where the last run stopped
python -m benchmarks.fidelity --only free live --run-only    # no report; also --workload perceptron
python -m benchmarks.fidelity --quick            # under a minute, nothing is written
python -m benchmarks.fidelity --report           # tables and figures from what is there
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cell, Store, chosen, command_line, run_cells
from benchmarks.fidelity import report
from benchmarks.fidelity.betas import betas
from benchmarks.fidelity.free import AS_SHIPPED, DECAYS, LARGER, free
from benchmarks.fidelity.ladder import LONGEST, ladder
from benchmarks.fidelity.live import live
from benchmarks.fidelity.one_step import laws, truths
from benchmarks.fidelity.switch import SEEDS
from benchmarks.fidelity.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
BETAS = (0.95, 0.999)
PHASES = ("late", "cooled", "early")
HELD = ("perceptron", "convnet", "autoencoder", "transformer")
"""Workloads of one step; the larger transformer is for rules after a change of the batch size."""


def product(**axes: Any) -> list[dict[str, Any]]:
    """All combinations, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def grid() -> list[Cell]:
    """Every cell of the study, the most telling first."""
    cells = []
    for key in product(seed=SEEDS, phase=("start", *PHASES), beta_2=BETAS, workload=HELD):
        later = key["seed"] + (key["beta_2"] != BETAS[0])
        cells += [Cell("truths", key, truths, 3 + later), Cell("laws", key, laws, 3 + later)]
    for key in product(beta_2=BETAS, examples=DECAYS, phase=PHASES, workload=WORKLOADS):
        later = unusual(key) + (key["workload"] == "transformer")
        sizes = LARGER
        if key["workload"] not in HELD:  # a minute for a run of the longer decay
            sizes = LARGER[:2] if key["examples"] == DECAYS[0] else LARGER[1:2]
        shipped = partial(live, batch_sizes=sizes)
        cells.append(Cell("free", key, free, later + 4 * (key["examples"] != DECAYS[0])))
        cells.append(Cell("ladder", key, partial(ladder, sizes=sizes), later))
        cells += [Cell("live", key | AS_SHIPPED | {"seed": seed}, shipped, later) for seed in SEEDS]
        if key["workload"] != "transformer":
            cells.append(Cell("betas", key, betas, later))
    sizes = (*LARGER, 4 * LARGER[-1])
    for key in product(beta_2=BETAS[:1], examples=[LONGEST], phase=PHASES, workload=HELD[:3]):
        cells.append(Cell("ladder", key, partial(ladder, sizes=sizes), 2 + unusual(key)))
    return cells


def unusual(key: dict[str, Any]) -> int:
    """In how many ways a change of the batch size is another one than the first to be run."""
    return (key["phase"] == "early") + 2 * (key["beta_2"] != BETAS[0])


def quick() -> list[Cell]:
    """One cell of each kind, as short as they can be."""
    point: dict[str, Any] = {"workload": "autoencoder", "beta_2": 0.95, "phase": "start"}
    short = point | {"examples": LARGER[-1]}
    return [
        Cell("truths", point | {"seed": 0}, truths),
        Cell("laws", point | {"seed": 0}, laws),
        Cell("free", short, free),
        Cell("ladder", short, ladder),
        Cell("betas", short, betas),
        Cell("live", short | AS_SHIPPED | {"seed": 0}, partial(live, batch_sizes=LARGER)),
    ]


def main() -> None:
    """Run, then report."""
    options = command_line(__doc__ or "", list(report.KEYS), list(WORKLOADS)).parse_args()
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
