"""Batch-size warm-up against constant batch sizes: run what is not finished, then write tables and a figure.

python -m benchmarks.batch_warmup --budget 60                  # minutes; goes on where the last run stopped
python -m benchmarks.batch_warmup --workload text --run-only   # beside another process for digits
python -m benchmarks.batch_warmup --length long --run-only     # or one for the long runs, one for the short
python -m benchmarks.batch_warmup --quick                      # under a minute, nothing is written
python -m benchmarks.batch_warmup --report                     # tables and a figure from what is there
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.batch_warmup import grid
from benchmarks.batch_warmup.report import write_report
from benchmarks.batch_warmup.rules import BASE_BATCH_SIZE, BUDGETS, LARGE_BATCH_SIZE
from benchmarks.batch_warmup.workloads import WORKLOADS
from benchmarks.cells import Cell, Store, chosen, command_line, run_cells

RESULTS = Path(__file__).parent / "results"


def run(store: Store, options: argparse.Namespace) -> str:
    """Two phases: tuning at the small batch size, and what needs its outcome."""

    def wanted(cells: Iterable[Cell]) -> list[Cell]:
        return chosen(cells, options.only, workload=options.workload, budget=options.length)

    end = time.monotonic() + 60 * options.budget
    left = run_cells(wanted(grid.constants(BASE_BATCH_SIZE)), store, 60 * options.budget)
    growing, untuned = grid.ramps(store.records("constant"))
    cells = wanted([*growing, *grid.constants(LARGE_BATCH_SIZE)])
    left += run_cells(cells, store, end - time.monotonic())
    winners = wanted(grid.confirmations(store.records("constant"), store.records("ramp")))
    left += run_cells(winners, store, end - time.monotonic())
    said = f"{left} cells are left" if left else "every cell that could be run is finished"
    # Their cells cannot be counted: the learning rate that is part of their key is not known.
    return said + (f"; ramps wait for the tuning of {', '.join(untuned)}" if untuned else "")


def main() -> None:
    """Run, then report."""
    parser = command_line(__doc__ or "", list(grid.sizes()), list(WORKLOADS))
    parser.add_argument("--length", nargs="*", choices=BUDGETS, help="short or long runs only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        run_cells(grid.quick(), None, options.budget * 60, strict=True)
        return
    store = Store(RESULTS)
    if not options.report:
        print(run(store, options), flush=True)
        if options.run_only:
            return
    write_report(store, RESULTS, grid.sizes())


if __name__ == "__main__":
    main()
