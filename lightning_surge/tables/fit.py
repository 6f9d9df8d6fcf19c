"""Fit laws of the optimal learning rate to grids of runs, and say how well each predicts.

A grid gives the best learning rate of each batch size (`optima`); laws are fitted to those (`law_fits`), with
intervals from repetitions (`bootstrap`); and they are compared by what each says of a batch size that took
no part in its fit.

References:
    Li et al., arXiv:2405.14578, Eq. 22-24 and Figures 2-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightning_surge.checking.arguments import function, number, optional, whole
from lightning_surge.laws.base import Law
from lightning_surge.tables.bootstrap import FEWEST_REPETITIONS, Estimate, Repetitions, estimate, repeat
from lightning_surge.tables.law_fits import LAWS, HeldOut, LawFit, Optima, fit_law, hold_out
from lightning_surge.tables.optima import Valley, valleys
from lightning_surge.tables.read import Measure, RunTable

FEWEST = 3  # batch sizes with an optimum inside their grid
NO_INTERVALS = "use 0 for no intervals"
MAX_SIZES = 200  # batch sizes up to which a table is a grid
CLOSE = 1e-3  # relative difference of a target from what is written for it


class FittedLaw(NamedTuple):
    """One law; batch sizes in examples."""

    name: str  # a key of `law_fits.LAWS`
    law: Law
    parameters: tuple[Estimate, ...]
    peak_batch_size: Estimate  # where its learning rate is largest; infinite if it never falls
    peak_lr: Estimate  # the learning rate there, or its limit; infinite if it grows without bound
    critical_batch_size: Estimate  # where a step gains half of the most it can
    at: tuple[Estimate, ...]  # its learning rates at the batch sizes asked for
    limited: bool  # whether the grid only bounds a parameter, which stopped at the end of the range searched
    residual: float  # root mean square of log2 of fitted over found
    held_out: HeldOut | None  # None with too few batch sizes


class GridFit(NamedTuple):
    """All that a grid says."""

    measure: Measure  # what was made smallest, or largest if the table was read so
    target: float | None  # the loss that was to be reached; None if the table does not say
    group: Mapping[str, str]  # values that its runs share, by column
    runs: int
    valleys: tuple[Valley, ...]  # the grid, by batch size
    lrs: tuple[Estimate, ...]  # each valley's best learning rate
    tradeoff: tuple[Estimate, ...]  # critical batch size, fewest steps and examples by Eq. 22; or empty
    laws: tuple[FittedLaw, ...]  # by held-out error, best first
    best: str | None  # name of the law with the smallest held-out error; None where nothing was held out
    ties: tuple[str, ...]  # names of laws that exceed that error by less than two standard errors
    from_seeds: bool  # whether intervals of laws come from the scatter of seeds, or of the optima around them
    repetitions: int  # behind the intervals
    notes: tuple[str, ...]

    @property
    def winner(self) -> FittedLaw:
        """The best law; the closest one where nothing was held out."""
        return next((law for law in self.laws if law.name == self.best), self.laws[0])

    def tried(self, batch_size: float) -> bool:
        """Whether a batch size lies within those of the grid."""
        return self.valleys[0].batch_size <= batch_size <= self.valleys[-1].batch_size


class Unfitted(NamedTuple):
    """A grid that says too little: its target and group as of a `GridFit`, and what is missing."""

    target: float | None
    group: Mapping[str, str]
    reason: str

    def __str__(self) -> str:
        group = [f"{name} {value}" for name, value in self.group.items()]
        label = ", ".join(group + ([] if self.target is None else [f"target {self.target:.5g}"]))
        return f"{label}: {self.reason}" if label else self.reason


def split_targets(
    table: RunTable, wanted: Sequence[float] | None = None
) -> list[tuple[float | None, RunTable]]:
    """One table for each target, or those `wanted`, in fewer digits perhaps, from the highest loss down."""
    if table.targets is None:
        if wanted is not None:
            raise ValueError(
                "Expected a table with a column of targets and --measure steps, got --target without them: "
                "leave --target out, or name the column with --target-column."
            )
        return [(None, table)]
    targets = sorted(np.unique(table.targets).tolist(), reverse=True)
    for value in wanted or ():
        if not any(math.isclose(target, value, rel_tol=CLOSE) for target in targets):
            there = ", ".join(f"{target:.5g}" for target in targets[:20])
            raise ValueError(f"Expected --target among {there}, got {value:g}: choose one of them.")
    if wanted is not None:
        targets = [t for t in targets if any(math.isclose(t, value, rel_tol=CLOSE) for value in wanted)]
    return [(target, table.at(table.targets == target)) for target in targets]


def fit_grid(
    table: RunTable,
    *,
    laws: Collection[str] = tuple(LAWS),
    tuned: bool = False,
    bootstrap: int = 200,
    seed: int = 0,
    at: Sequence[float] = (),
    progress: Callable[[], object] | None = None,
) -> GridFit:
    """Fit laws to one grid of runs.

    Args:
        table: runs to one target.
        laws: names from `law_fits.LAWS`.
        tuned: whether a learning rate that is the only one of its batch size is the best one, as in tables of
            runs that others have tuned.
        bootstrap: number of repetitions for the intervals, at least 20; 0 for none.
        seed: seed of the repetitions.
        at: batch sizes at which every law is asked for its learning rate, in examples.
        progress: called after each repetition.

    Raises:
        ValueError: for fewer than three batch sizes with an optimum inside their grid, saying which are
            missing and why; for a name that is no law, or a negative `bootstrap`.

    Example:
        Optimal learning rates 0.004, 0.005, 0.004 are those of Theorem 3 with its peak of 0.005 at 32.

        >>> import numpy as np
        >>> best = np.repeat([0.004, 0.005, 0.004], 3)
        >>> lrs = best * np.tile([0.5, 1.0, 2.0], 3)
        >>> table = RunTable("loss", np.repeat([8.0, 32.0, 128.0], 3), lrs, np.log(lrs / best) ** 2)
        >>> fit = fit_grid(table, laws=["adam"], bootstrap=0)
        >>> [(each.name, round(each.value, 6)) for each in fit.laws[0].parameters]
        [('peak_lr', 0.005), ('noise_scale', 32.0)]
    """
    if unknown := [name for name in laws if name not in LAWS]:
        raise ValueError(f"Expected laws among {', '.join(LAWS)}, got {unknown[0]!r}: choose one of them.")
    bootstrap = whole("bootstrap", bootstrap, NO_INTERVALS, least=0)
    bootstrap = bootstrap and whole("bootstrap", bootstrap, NO_INTERVALS, least=FEWEST_REPETITIONS)
    seed = whole("seed", seed, "any count from 0 on", least=0)
    optional(function, "progress", progress)
    at = [number("at", size, "count examples per optimizer step") for size in at]
    if table.targets is not None and (count := np.unique(table.targets).size) > 1:
        raise ValueError(f"Expected runs to one target, got {count} targets: pass them one by one.")
    if (count := np.unique(table.batch_sizes).size) > MAX_SIZES:
        raise ValueError(
            f"Expected at most {MAX_SIZES} batch sizes, got {count}: a grid repeats batch sizes with several "
            "learning rates each; round them."
        )
    grid = valleys(table, tuned=tuned)
    used = [valley for valley in grid if valley.optimum.found]
    if len(used) < FEWEST:
        raise ValueError(_too_little(grid, table.maximize))
    optima = Optima(
        sizes=np.array([valley.batch_size for valley in used]),
        logs=np.log([valley.optimum.lr for valley in used]),
        steps=np.array([valley.optimum.outcome for valley in used]) if table.measure == "steps" else None,
    )
    notes = list(table.notes)
    if optima.steps is not None and optima.line is None:
        notes.append("Eq. 22 gives no scale: steps do not fall towards a limit as examples grow")
    names = [name for name in LAWS if name in laws and LAWS[name].size <= len(used)]
    fits = {name: fit for name in names if (fit := fit_law(name, optima)) is not None}
    if not fits:
        raise ValueError(
            f"Expected a law that can be fitted to {len(used)} batch sizes, got laws={', '.join(laws)}: name "
            "others, or add batch sizes, and steps that fall as the batch grows for adam_eq22."
        )
    drawn = repeat(used, optima, fits, repetitions=bootstrap, seed=seed, progress=progress)
    fitted = [_fitted(name, fit, hold_out(name, optima), drawn, at) for name, fit in fits.items()]
    # What cannot be held out comes last.
    fitted.sort(key=lambda each: math.inf if each.held_out is None else each.held_out.error)
    best, ties = _ranking(fitted)
    columns = iter(np.exp(drawn.logs).T.tolist())
    lrs = (estimate("lr", each.optimum.lr, next(columns) if each.optimum.found else []) for each in grid)
    return GridFit(
        measure=table.measure,
        target=None if table.targets is None else float(table.targets[0]),
        group=table.group,
        runs=table.lrs.size,
        valleys=tuple(grid),
        lrs=tuple(lrs),
        tradeoff=_tradeoff(optima, drawn),
        laws=tuple(fitted),
        best=best,
        ties=ties,
        from_seeds=drawn.from_seeds,
        repetitions=bootstrap,
        notes=tuple(notes),
    )


def _fitted(
    name: str, fit: LawFit, held_out: HeldOut | None, drawn: Repetitions, at: Sequence[float]
) -> FittedLaw:
    def interval(what: str, quantity: Callable[[Law], float]) -> Estimate:
        return estimate(what, quantity(fit.law), [quantity(law) for law in drawn.laws[name]])

    describe = LAWS[name].describe
    return FittedLaw(
        name=name,
        law=fit.law,
        parameters=tuple(interval(key, lambda law, key=key: describe(law)[key]) for key in describe(fit.law)),  # type: ignore[misc]
        peak_batch_size=interval("peak_batch_size", lambda law: law.peak.batch_size),
        peak_lr=interval("peak_lr", lambda law: law.peak.lr),
        critical_batch_size=interval("critical_batch_size", lambda law: law.critical_batch_size),
        at=tuple(interval(f"{size:.15g}", lambda law, size=size: law.lr(size)) for size in at),  # type: ignore[misc]
        limited=fit.limited,
        residual=float(np.sqrt(np.mean(fit.residuals**2)) / math.log(2)),
        held_out=held_out,
    )


def _tradeoff(optima: Optima, drawn: Repetitions) -> tuple[Estimate, ...]:
    if (line := optima.line) is None:
        return ()
    columns = zip(*drawn.lines, strict=True) if drawn.lines else [()] * len(line)
    return tuple(map(estimate, line._fields, line, map(list, columns)))


def _ranking(fitted: Sequence[FittedLaw]) -> tuple[str | None, tuple[str, ...]]:
    """The law that predicts best, and those that the batch sizes do not tell from it."""
    ranked = [(each.name, each.held_out) for each in fitted if each.held_out is not None]
    if not ranked:
        return None, ()
    best, winner = ranked[0]
    errors = np.abs([error for _, error in winner.by_batch_size])
    ties = []
    for name, other in ranked[1:]:
        excess = np.abs([error for _, error in other.by_batch_size]) - errors
        if excess.mean() < 2 * excess.std(ddof=1) / math.sqrt(excess.size) + 1e-9:
            ties.append(name)
    return best, tuple(ties)


REMEDIES = {
    "edge_low": "the best learning rate is the smallest one tried, {lr:.3g}: add smaller ones",
    "edge_high": "the best learning rate is the largest one tried, {lr:.3g}: add larger ones",
    "flat": "no valley stands out of the noise: add seeds, or learning rates further apart",
    "few": "fewer than 3 learning rates: add some around {lr:.3g}, or pass --tuned if it is known to be best",
    "failed": "every learning rate has a run that failed: add smaller ones",
}
"""What to do where a batch size has no optimum inside its grid, by status."""


def remedy(valley: Valley) -> str:
    """Why a batch size has no optimum inside its grid, and what would give it one; empty if it has."""
    optimum = valley.optimum
    return REMEDIES.get(optimum.status, "").format(lr=optimum.lr)


def missing(grid: Sequence[Valley], most: int) -> str:
    """What would give batch sizes their optimum: of the first few, and of how many more; empty if of none."""
    said = [f"at B = {valley.batch_size:,g} {remedy(valley)}" for valley in grid if remedy(valley)]
    return "; ".join(said[:most] + ([f"and {len(said) - most} more"] if len(said) > most else []))


def _too_little(grid: Sequence[Valley], maximize: bool) -> str:
    found = sum(valley.optimum.found for valley in grid)
    edges = all(valley.optimum.status in ("edge_low", "edge_high") for valley in grid)
    hint = ". Every optimum is at an end: pass --maximize if larger values are better, as of an accuracy"
    if maximize:
        hint = ". Every optimum is at an end: leave out --maximize if smaller values are better"
    return (
        f"Expected {FEWEST} batch sizes with an optimum inside their grid, got {found} of "
        f"{len(grid)}: {missing(grid, 6) or 'add batch sizes, each with at least 3 learning rates'}"
        f"{hint if edges else ''}."
    )
