"""Fit laws to a table of runs: no training, no torch, no GPU.

    python -m examples.offline_fit            # ten seconds
    python -m examples.offline_fit --fast     # a few seconds, to see that everything works

The table has one run per row: a batch size, a learning rate, a seed, and the steps to a target loss. For
every target this prints the best learning rate of each batch size, the law that best predicts a batch size
that it was not fitted to, and where it has its peak; then it draws them. `lightning-surge fit` does the same
on the command line and says more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_surge.tables.bootstrap import Estimate
from lightning_surge.tables.figure import draw_fits
from lightning_surge.tables.fit import GridFit, fit_grid, remedy, split_targets
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.read import read_table

# A perceptron whose step is the sign of the gradient: five batch sizes, eight learning rates, three seeds.
TABLE = Path(__file__).parent / "tables" / "perceptron_sign.csv"


def number(estimate: Estimate) -> str:
    """A value and its interval."""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.3g}, {estimate.high:.3g}]"
    return f"{estimate.value:.3g}{ends}"


def print_optima(fit: GridFit) -> None:
    """The best learning rate of each batch size, or what its grid lacks."""
    print(f"batch size  {fit.measure}  best learning rate")
    for valley, lr in zip(fit.valleys, fit.lrs, strict=True):
        # Only optima inside their grid take part in the fits.
        found = valley.optimum.found
        outcome = f"{valley.optimum.outcome:.4g}" if found else "-"
        print(f"{valley.batch_size:10g}  {outcome:>5}  {number(lr) if found else remedy(valley)}")


def print_laws(fit: GridFit) -> None:
    """The law with the smallest held-out error, those that are as good, and its peak."""
    if fit.best is None:
        print("too few batch sizes to hold one out")
        return
    # They are in order of that error: each batch size left out in turn, and predicted from the others.
    best, factors = fit.laws[0], {law.name: 2**law.held_out.error for law in fit.laws if law.held_out}
    print(f"best law: {LAWS[best.name].label}, wrong by a factor of {factors[best.name]:.2f} on average")
    for name in fit.ties:
        print(f"  not told from it: {LAWS[name].label}, {factors[name]:.2f}")
    if math.isfinite(best.peak_batch_size.value):
        print(f"peak: {number(best.peak_lr)} at B = {number(best.peak_batch_size)}")
    else:
        print(f"no peak: the learning rate rises to {number(best.peak_lr)} as the batch grows")
    print(f"critical batch size: {number(best.critical_batch_size)} examples")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Read, fit, print, draw; returns the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few repetitions: rough intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the repetitions behind the intervals")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV, as in docs/fitting.md")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/offline_fit"), help="directory for the picture"
    )
    options = parser.parse_args(arguments)

    table = read_table(options.table)
    print(f"{options.table.name}: {table.lrs.size} runs")
    fits = []
    for target, part in split_targets(table):
        print("" if target is None else f"\nto the loss {target:.4g}\n")
        try:
            # An interval takes 20 repetitions: means of the grid, drawn from the scatter of its seeds.
            fit = fit_grid(part, bootstrap=20 if options.fast else 200, seed=options.seed)
        except ValueError as error:
            # A law takes three batch sizes with an optimum inside their grid; the message says what to add.
            print(f"no fit: {error}")
            continue
        print_optima(fit)
        print()
        print_laws(fit)
        fits.append(fit)

    options.output.mkdir(parents=True, exist_ok=True)
    picture: Path = options.output / f"{options.table.stem}.png"
    draw_fits(fits).savefig(picture)
    print(f"\npicture  {picture}")
    return picture


if __name__ == "__main__":
    main()
