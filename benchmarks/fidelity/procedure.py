"""The paper's own procedure: grids of batch size and learning rate, run to a target loss.

From runs with constant learning rates come the steps S and examples E to a loss, the best learning rate on
the way there for every batch size, and B_noise from the line of 1/S against 1/E (Li et al., arXiv:2405.14578,
Eq. 22, Figures 2 and 3). From a point of a training come the best learning rate over the steps that follow,
and what the callback says there. The paper claims that the optimum rises and falls with the batch size, and
that its peak moves to larger batch sizes as the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch

from benchmarks.cells import Cell
from benchmarks.fidelity.ensemble import Ensemble, Snapshot, shared_batch
from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import Batches, Study, fit
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, Workload
from lightning_surge import SurgeLRCallback, tradeoff
from lightning_surge.laws import Law

__all__ = ["cells", "claims", "figures", "fit_tradeoff", "following", "grid", "table"]

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""The records of each kind of cell."""

BATCH_SIZES = (4, 16, 64, 256, 1024)
BETAS = ((0.0, 0.0), (0.9, 0.999))
SIGN_FACTOR = 0.5
"""On a workload's learning rate if the step is the sign of the gradient, which no average makes calmer."""
REFERENCE_STEPS = {"transformer": 384}
DEFAULT_REFERENCE_STEPS = 512
TARGETS = (0.15, 0.4, 1.0)
"""Parts of the reference run after which its losses are the targets."""
GRID_FACTORS = tuple(2.0**exponent for exponent in range(-3, 5))
FOLLOWING_FACTORS = tuple(2.0**exponent for exponent in range(-4, 4))
FOLLOWING_STEPS = 16
MEASUREMENTS = 40
PROBE_EXAMPLES = 256
DOUBLED_AT = {"transformer": 256}
DEFAULT_DOUBLED_AT = 128
"""Batch size at which a grid goes on for twice the examples of a small batch."""
PATIENCE = 1.6
"""A grid goes on for so many times the steps in which its first learning rate has reached the last target."""
MOVED = 2.0
"""Factor by which a peak must differ to count as moved: half the distance of two batch sizes."""


def prepared(name: str, beta_1: float) -> Workload:
    """The workload with the learning rate of its reference run."""
    what = WORKLOADS[name]
    return what if beta_1 > 0 else replace(what, lr=what.lr * SIGN_FACTOR)


def seeds_of(name: str) -> range:
    """Two seeds where a step is expensive, else three."""
    return range(2 if name == "transformer" else 3)


def train(
    what: Workload,
    betas: tuple[float, float],
    starts: Sequence[Snapshot],
    lrs: Sequence[float],
    batch_size: int,
    marks: Sequence[int],
    seed: int = 0,
) -> Iterator[Ensemble]:
    """Every start with every constant learning rate; yields the copies, by start and rate, at the marks.

    Args:
        what: the workload.
        betas: Adam's.
        starts: each has batches of its own, the same for all its learning rates.
        lrs: learning rates.
        batch_size: examples.
        marks: increasing numbers of steps.
        seed: of the batches, plus the start's index.
    """
    ensemble = Ensemble(what, [start for start in starts for _ in lrs], betas)
    generators = [
        torch.Generator().manual_seed(20_000 + 100 * batch_size + seed + i) for i in range(len(starts))
    ]
    rates = torch.tensor(list(lrs) * len(starts))
    for step in range(1, marks[-1] + 1):
        ensemble.step(shared_batch(what.data(), batch_size, generators, len(lrs)), rates)
        if step in marks:
            yield ensemble


def fresh(what: Workload, seed: int) -> Snapshot:
    """Untrained."""
    torch.manual_seed(seed)
    return Snapshot.fresh(what.network())


@cache
def reference(name: str, betas: tuple[float, float]) -> tuple[tuple[float, ...], tuple[Snapshot, ...]]:
    """Target losses, averaged over seeds, and the first seed's snapshots at the same steps."""
    what = prepared(name, betas[0])
    steps = REFERENCE_STEPS.get(name, DEFAULT_REFERENCE_STEPS)
    marks = [round(part * steps) for part in TARGETS]
    starts = [fresh(what, seed) for seed in seeds_of(name)]
    losses, snapshots = [], []
    for ensemble in train(what, betas, starts, [what.lr], BASE_BATCH_SIZE, marks):
        losses.append(float(ensemble.losses(small_sample(what)).mean()))
        snapshots.append(ensemble.snapshot(0))
    return tuple(losses), tuple(snapshots)


def small_sample(what: Workload) -> tuple[torch.Tensor, ...]:
    """A quarter of the fixed sample."""
    return tuple(tensor[: what.sample // 4] for tensor in fixed_sample(what))


def grid(workload: str, beta_1: float, beta_2: float, batch_size: int) -> dict[str, Any]:
    """Losses on the way, from fresh networks at constant learning rates.

    Larger batches get more examples, and a grid ends early once the last target is well behind.

    Args:
        workload: its name.
        beta_1: Adam's.
        beta_2: Adam's.
        batch_size: examples.

    Returns:
        Targets, learning rates, seeds, steps, and losses by seed, learning rate and step.
    """
    what = prepared(workload, beta_1)
    targets = reference(workload, (beta_1, beta_2))[0]
    lrs = [what.lr * factor for factor in GRID_FACTORS]
    seeds = seeds_of(workload)
    length = REFERENCE_STEPS.get(workload, DEFAULT_REFERENCE_STEPS) * BASE_BATCH_SIZE
    growth = 1.0 + batch_size / DOUBLED_AT.get(workload, DEFAULT_DOUBLED_AT)
    last = round(2 * length * growth / batch_size)
    marks = sorted({round(step) for step in np.geomspace(max(1, last / 100), last, 28)})
    sample = small_sample(what)
    losses: list[list[list[float]]] = []
    done = math.inf
    starts = [fresh(what, seed) for seed in seeds]
    for mark, ensemble in zip(
        marks, train(what, (beta_1, beta_2), starts, lrs, batch_size, marks, seed=10), strict=False
    ):
        found = ensemble.losses(sample).view(len(seeds), len(lrs))
        losses.append([[round(loss, 5) for loss in row] for row in found.tolist()])
        if math.isinf(done) and bool((found.mean(0) <= targets[-1]).any()):
            done = mark
        if mark >= PATIENCE * done:
            break
    return {
        "targets": targets,
        "lrs": lrs,
        "seeds": list(seeds),
        "steps": marks[: len(losses)],
        "losses": np.transpose(losses, (1, 2, 0)).tolist(),
    }


def following(workload: str, beta_1: float, beta_2: float, target: int) -> dict[str, Any]:
    """The best learning rate over the steps that follow a point, and what the callback says there.

    Adam's averages start anew, so that their lag behind the batch size has no part in it.

    Args:
        workload: its name.
        beta_1: Adam's.
        beta_2: Adam's.
        target: which of the targets.

    Returns:
        The loss there, and for every batch size the losses by seed and learning rate; the callback's answers.
    """
    what = prepared(workload, beta_1)
    targets, snapshots = reference(workload, (beta_1, beta_2))
    snapshot = snapshots[target]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in snapshot.exp_avg.items()}
    start = snapshot._replace(exp_avg=zeros, exp_avg_sq=zeros, step=0)
    lrs = [what.lr * factor for factor in FOLLOWING_FACTORS]
    losses = {}
    for size in BATCH_SIZES:
        starts = [start] * (4 if size <= 64 else 2)
        (ensemble,) = train(what, (beta_1, beta_2), starts, lrs, size, [FOLLOWING_STEPS], seed=50)
        losses[str(size)] = ensemble.losses(fixed_sample(what)).view(len(starts), len(lrs)).tolist()
    return {
        "loss": targets[target],
        "steps": FOLLOWING_STEPS,
        "lrs": lrs,
        "losses": losses,
        "callback": predictions(what, (beta_1, beta_2), snapshot),
    }


def predictions(what: Workload, betas: tuple[float, float], snapshot: Snapshot) -> dict[str, Any]:
    """The callback's law at a point that is held, each value with its standard error."""
    pl.seed_everything(0, verbose=False)
    study = Study(what, betas)
    study.network.load_state_dict(snapshot.weights)
    study.optimizer.held = True
    callback = SurgeLRCallback(
        base_batch_size=BASE_BATCH_SIZE,
        objective="step",
        dry_run=True,
        probe_every=1,
        probe_examples=PROBE_EXAMPLES,
        half_life=MEASUREMENTS,
    )
    fit(study, Batches(what.data(), PROBE_EXAMPLES, MEASUREMENTS, 70), [callback], steps=MEASUREMENTS)
    if not callback.law_history:
        return {}
    law = callback.law_history[-1].law

    def lr_at(size: int) -> Any:
        return lambda law: law.lr(size)

    def peak(law: Law) -> float:
        return law.peak.batch_size

    def critical(law: Law) -> float:
        return law.critical_batch_size

    return {
        "lrs": {str(size): [law.lr(size), law.standard_error(lr_at(size))] for size in BATCH_SIZES},
        "peak_batch_size": [peak(law), law.standard_error(peak)],
        "critical_batch_size": [critical(law), law.standard_error(critical)],
        "measurements": law.num_measurements,
    }


def cells() -> list[Cell]:
    """The perceptron and the transformer first."""
    found = []
    for name in WORKLOADS:
        priority = 4 if name in ("perceptron", "transformer") else 8
        for beta_1, beta_2 in BETAS:
            key = {"workload": name, "beta_1": beta_1, "beta_2": beta_2}
            found += [Cell("procedure_grid", {**key, "batch_size": b}, grid, priority) for b in BATCH_SIZES]
            found += [
                Cell("procedure_following", {**key, "target": index}, following, priority)
                for index in range(len(TARGETS))
            ]
    return found


# ---------------------------------------------------------------------- what the records say


class Optimum(NamedTuple):
    """The best learning rate at a batch size.

    Attributes:
        batch_size: examples.
        lr: between the learning rates tried, by a parabola in their logarithms.
        error: standard error of the log of `lr`, from the seeds' scatter.
        edge: whether the best rate tried was the smallest or the largest.
        values: what was made smallest, by seed.
    """

    batch_size: int
    lr: float
    error: float
    edge: bool
    values: list[float]


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Bottom of the parabola through the smallest of evenly spaced points and its neighbours."""
    index = int(np.argmin(y))
    if not 0 < index < len(x) - 1 or not np.isfinite(y[index - 1 : index + 2]).all():
        return float(x[index]), float(y[index])
    left, middle, right = y[index - 1 : index + 2]
    bend = left - 2 * middle + right
    if bend <= 0:
        return float(x[index]), float(middle)
    shift = 0.5 * (left - right) / bend
    return float(x[index] + shift * (x[1] - x[0])), float(middle - bend * shift**2 / 2)


def optimum(batch_size: int, lrs: Sequence[float], rows: np.ndarray) -> Optimum:
    """Where rows of values by seed and learning rate are smallest."""
    x = np.log(lrs)
    mean = rows.mean(0)
    bottoms = np.array([vertex(x, row) for row in rows])
    error = float(bottoms[:, 0].std(ddof=1) / math.sqrt(len(rows)))
    edge = int(np.argmin(mean)) in (0, len(x) - 1)
    return Optimum(batch_size, math.exp(vertex(x, mean)[0]), error, edge, bottoms[:, 1].tolist())


def values(nested: Any) -> np.ndarray:
    """Numbers of a record, infinite where it has none."""
    array = np.array(nested, dtype=np.float64)
    return np.where(np.isnan(array), np.inf, array)


def log_steps(record: Mapping[str, Any], target: int) -> np.ndarray:
    """Log of the steps to a target by seed and learning rate, from the lowest loss so far; else infinite."""
    level, marks = record["targets"][target], np.log(record["steps"])
    lowest = np.minimum.accumulate(values(record["losses"]), axis=2)
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


def best_to_target(records: Sequence[Mapping[str, Any]], target: int) -> list[Optimum]:
    """The best learning rate of each batch size that reached a target; its values are logs of steps.

    A learning rate that has not reached it counts as if it had at the end.
    """
    found = []
    for record in sorted(records, key=lambda record: record["batch_size"]):
        rows = log_steps(record, target)
        if np.isfinite(rows).all(0).any():
            rows = np.minimum(rows, math.log(record["steps"][-1]))
            found.append(optimum(record["batch_size"], record["lrs"], rows))
    return found


def best_over_following(record: Mapping[str, Any]) -> list[Optimum]:
    """The best learning rate of each batch size over the steps after a point."""
    return [optimum(int(size), record["lrs"], values(rows)) for size, rows in record["losses"].items()]


class Shape(NamedTuple):
    """How the best learning rate depends on the batch size.

    Attributes:
        peak: batch size where it is largest; 0 or infinite if that is the smallest or the largest tried.
        rises: whether it does, up to the peak, by more than a standard error.
        falls: the same beyond the peak.
    """

    peak: float
    rises: bool
    falls: bool


def shape(optima: Sequence[Optimum]) -> Shape:
    """Peak, rise and fall; a batch size that missed the target has no part in it."""
    y = np.log([each.lr for each in optima])
    x = np.log([each.batch_size for each in optima])
    top = int(np.argmax(y))

    def above(end: int) -> bool:
        return bool(y[top] - y[end] > math.hypot(optima[top].error, optima[end].error))

    peak = 0.0 if top == 0 else math.inf if top == len(y) - 1 else math.exp(vertex(x, -y)[0])
    return Shape(peak, above(0), above(-1))


def fit_tradeoff(steps: Mapping[int, Sequence[float]], draws: int = 200) -> dict[str, list[float]]:
    """The line of 1/S against 1/E, Eq. 22.

    Args:
        steps: S by seed, for each batch size.
        draws: of the seeds, with replacement, for the standard errors.

    Returns:
        `min_steps`, `min_examples` and `noise_scale`, which is B_noise = E_min / S_min in examples, each with
        its standard error; nan where the line does not fall.
    """
    sizes = np.array(list(steps), dtype=np.float64)
    logs = [np.log(each) for each in steps.values()]

    def line(means: Sequence[float]) -> list[float]:
        counts = np.exp(means)
        try:
            found = tradeoff.fit_tradeoff(counts, sizes * counts)
        except ValueError:
            return [math.nan] * 3
        return [found.min_steps, found.min_examples, found.critical_batch_size]

    generator = np.random.default_rng(0)
    whole = line([float(each.mean()) for each in logs])
    drawn = np.array(
        [line([generator.choice(each, len(each)).mean() for each in logs]) for _ in range(draws)]
    )
    valid = drawn[~np.isnan(drawn[:, 0])]
    errors = valid.std(0, ddof=1).tolist() if len(valid) > draws / 2 else [math.nan] * 3
    names = ("min_steps", "min_examples", "noise_scale")
    return {name: [value, error] for name, value, error in zip(names, whole, errors, strict=True)}


def line_of(optima: Sequence[Optimum]) -> dict[str, list[float]]:
    """`fit_tradeoff` of the best learning rates."""
    return fit_tradeoff({each.batch_size: np.exp(each.values).tolist() for each in optima})


class Case(NamedTuple):
    """All there is about a workload, betas and a target."""

    workload: str
    betas: tuple[float, float]
    target: int
    loss: float
    grid: list[Mapping[str, Any]]
    optima: list[Optimum]
    following: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """For figures."""
        return f"{self.workload}, betas {self.betas[0]:g}, {self.betas[1]:g}, loss {self.loss:.2f}"


def cases(records: Records) -> list[Case]:
    """One for each workload, betas and target of which something was measured."""
    found = []
    for name in WORKLOADS:
        for betas in BETAS:

            def own(
                kind: str, name: str = name, betas: tuple[float, float] = betas
            ) -> list[Mapping[str, Any]]:
                mine = (name, *betas)
                return [r for r in records.get(kind, ()) if (r["workload"], r["beta_1"], r["beta_2"]) == mine]

            runs, after = own("procedure_grid"), {r["target"]: r for r in own("procedure_following")}
            for target in range(len(TARGETS)):
                if runs or target in after:
                    loss = runs[0]["targets"][target] if runs else after[target]["loss"]
                    best = best_to_target(runs, target)
                    found.append(Case(name, betas, target, loss, runs, best, after.get(target)))
    return found


def table(records: Records) -> str:
    """Markdown: three rows per target, for whole runs, for the steps that follow, and for the callback."""
    lines = [
        "| workload | betas | target loss | best lr by | "
        + " | ".join(f"B = {size}" for size in BATCH_SIZES)
        + " | peak at B | B_noise or B_crit (examples) |",
        "|" + "---|" * (len(BATCH_SIZES) + 6),
    ]

    def add(case: Case, source: str, lrs: Mapping[int, str], peak: str, scale: str) -> None:
        tried = {record["batch_size"] for record in case.grid} if source == "runs to the loss" else set()
        cut = [lrs.get(size, "not reached" if size in tried else "-") for size in BATCH_SIZES]
        start = [case.workload, f"{case.betas[0]:g}, {case.betas[1]:g}", f"{case.loss:.3f}", source]
        lines.append("| " + " | ".join([*start, *cut, peak, scale]) + " |")

    for case in cases(records):
        if len(case.optima) > 1:
            scale = plus_minus(line_of(case.optima)["noise_scale"])
            add(case, "runs to the loss", texts(case.optima), peak_text(case.optima), scale)
        if case.following is not None:
            optima, said = best_over_following(case.following), case.following["callback"]
            add(case, f"following {case.following['steps']} steps", texts(optima), peak_text(optima), "")
            if said:
                lrs = {int(size): f"{lr:.2g}" for size, (lr, _) in said["lrs"].items()}
                peak, scale = plus_minus(said["peak_batch_size"]), plus_minus(said["critical_batch_size"])
                add(case, "callback", lrs, peak, scale)
    note = (
        "`*`: the smallest or the largest learning rate tried. Errors are standard errors; `?`: not finite."
    )
    return "\n".join([*lines, "", note])


def texts(optima: Sequence[Optimum]) -> dict[int, str]:
    """Learning rates by batch size, with a mark where the range was too small."""
    return {each.batch_size: f"{each.lr:.2g}" + ("*" if each.edge else "") for each in optima}


def peak_text(optima: Sequence[Optimum]) -> str:
    """Where the peak is."""
    peak = shape(optima).peak
    if math.isinf(peak):
        return f"none up to {optima[-1].batch_size}"
    return f"{peak:.0f}" if peak > 0 else f"none from {optima[0].batch_size}"


def plus_minus(pair: Sequence[float | None]) -> str:
    """A value with its standard error, as it comes back from JSON."""
    value, error = (None if each is None or not math.isfinite(each) else f"{each:.3g}" for each in pair)
    return "none" if value is None else f"{value} ± {error or '?'}"


def claims(records: Records) -> dict[str, dict[str, int]]:
    """The two claims, counted.

    Returns:
        By source, "runs", "following" and "callback": `cases`, and how many of them have an optimum that
        `rises_and_falls` within the batch sizes tried; `pairs` of neighbouring targets, and in how many of
        them the peak `moves_up`, `moves_down` or `stays` as the loss falls, to within a factor of two. A
        peak below or above the range counts as one place each.
    """
    shapes: dict[str, dict[tuple[Any, ...], Shape]] = {"runs": {}, "following": {}, "callback": {}}
    for case in cases(records):
        key = (case.workload, case.betas, case.target)
        if len(case.optima) > 2:
            shapes["runs"][key] = shape(case.optima)
        if case.following is not None:
            shapes["following"][key] = shape(best_over_following(case.following))
            said = case.following["callback"].get("peak_batch_size", [None])[0]
            peak = (
                math.inf if said is None or said > BATCH_SIZES[-1] else 0.0 if said < BATCH_SIZES[0] else said
            )
            if case.following["callback"]:
                shapes["callback"][key] = Shape(peak, peak > 0, not math.isinf(peak))
    result = {}
    for source, found in shapes.items():
        both = sum(0 < s.peak < math.inf and s.rises and s.falls for s in found.values())
        counts = {"cases": len(found), "rises_and_falls": both, "pairs": 0, "moves_up": 0, "moves_down": 0}
        for (*rest, target), after in found.items():
            before = found.get((*rest, target - 1))
            if before is not None:
                counts["pairs"] += 1
                counts["moves_up"] += after.peak > MOVED * before.peak
                counts["moves_down"] += before.peak > MOVED * after.peak
        result[source] = {**counts, "stays": counts["pairs"] - counts["moves_up"] - counts["moves_down"]}
    return result


# ---------------------------------------------------------------------- figures

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#bbbbbb"
SIZE_COLORS = dict(zip(BATCH_SIZES, ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7"), strict=True))


def figures(records: Records, directory: Path) -> list[Path]:
    """Draw `procedure_{grid,tradeoff,following}.png`, by workload, betas and target."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    everything = cases(records)
    for name, painter in (("grid", draw_grid), ("tradeoff", draw_tradeoff), ("following", draw_following)):
        shown = [case for case in everything if (case.following if name == "following" else case.optima)]
        rows = list(dict.fromkeys((case.workload, case.betas) for case in shown))
        if not rows:
            continue
        figure = Figure(figsize=(11.0, 2.9 * len(rows) + 0.4), dpi=90, layout="constrained")
        panels = figure.subplots(len(rows), len(TARGETS), squeeze=False)
        for axes in panels.flat:
            axes.set_visible(False)
        for case in shown:
            axes = panels[rows.index((case.workload, case.betas)), case.target]
            axes.set_visible(True)
            axes.set_title(case.title, fontsize=10)
            painter(axes, case)
        drawn = [axes.get_legend_handles_labels() for axes in panels.flat]
        unique = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
        figure.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False)
        paths.append(directory / f"procedure_{name}.png")
        figure.savefig(paths[-1])
    return paths


def batch_size_axis(axes: Any) -> None:
    """Logarithmic, with the batch sizes tried."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set_xlabel("batch size B (examples)")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("learning rate (per step)")


def draw_grid(axes: Any, case: Case) -> None:
    """Steps to the target by batch size and learning rate, as a multiple of the fewest at that size."""
    lrs = np.array(case.grid[0]["lrs"])
    excess = np.full((len(lrs), len(BATCH_SIZES)), np.nan)
    for record in case.grid:
        steps = log_steps(record, case.target).mean(0)
        if np.isfinite(steps).any():
            steps = np.where(np.isfinite(steps), steps - steps.min(), np.nan)
            excess[:, BATCH_SIZES.index(record["batch_size"])] = np.exp(steps)
    edges = [
        np.exp(np.append(x - (d := (x[1] - x[0]) / 2), x[-1] + d)) for x in (np.log(BATCH_SIZES), np.log(lrs))
    ]
    axes.set_facecolor(GREY)  # not reached
    image = axes.pcolormesh(*edges, np.log2(excess), cmap="viridis_r", vmin=0, vmax=2, rasterized=True)
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0, 1, 2], extend="max")
    bar.ax.set_yticklabels(["1", "2", "4"])
    bar.set_label("steps / fewest at this B\n(grey: loss not reached)", fontsize=8)
    batch_size_axis(axes)
    draw_optima(axes, case.optima, "black")


def draw_optima(axes: Any, optima: Sequence[Optimum], color: str) -> None:
    """Best learning rates with standard errors, and their peak as a star if there is one."""
    sizes, lrs = [each.batch_size for each in optima], np.array([each.lr for each in optima])
    errors = np.array([each.error for each in optima])
    bars = [lrs * (1 - np.exp(-errors)), lrs * (np.exp(errors) - 1)]
    axes.errorbar(sizes, lrs, yerr=bars, color=color, marker="o", markersize=4, capsize=3, label="best lr")
    peak = shape(optima).peak if len(optima) > 2 else math.inf
    if 0 < peak < math.inf:
        axes.plot(peak, lrs.max(), "*", color=ORANGE, markersize=13, label="its peak")


def draw_tradeoff(axes: Any, case: Case) -> None:
    """1/S against 1/E with the line of Eq. 22."""
    steps = {each.batch_size: math.exp(np.mean(each.values)) for each in case.optima}
    x = np.array([1 / (size * count) for size, count in steps.items()])
    y = np.array([1 / count for count in steps.values()])
    for size, across, up in zip(steps, x, y, strict=True):
        axes.plot(1e3 * across, up, "o", color=SIZE_COLORS[size], markersize=7, label=f"B = {size}")
    found = line_of(case.optima)
    if math.isnan(found["noise_scale"][0]):
        axes.set_title(f"{case.title}\nno falling line", fontsize=9)
    else:
        axes.set_title(f"{case.title}\nB_noise = {plus_minus(found['noise_scale'])} examples", fontsize=9)
        ends = np.array([0.0, 1.05 / found["min_examples"][0]])
        line = 1 / found["min_steps"][0] - found["noise_scale"][0] * ends
        axes.plot(1e3 * ends, line, color=GREY, zorder=0, label="Eq. 22")
    axes.set_xlim(0, 1.1e3 * x.max())
    axes.set_ylim(0, 1.1 * y.max())
    axes.set_xlabel("1/E (per 1,000 examples)")
    axes.set_ylabel("1/S (per step)")


def draw_following(axes: Any, case: Case) -> None:
    """Best learning rate of the steps that follow, and the callback's curve."""
    assert case.following is not None
    optima, said = best_over_following(case.following), case.following["callback"]
    draw_optima(axes, optima, BLUE)
    if said:
        sizes = [int(size) for size in said["lrs"]]
        lrs = np.array([lr for lr, _ in said["lrs"].values()])
        base = sizes.index(BASE_BATCH_SIZE)
        axes.plot(sizes, lrs, ":", color=ORANGE, label="callback, one step")
        axes.plot(
            sizes,
            lrs / lrs[base] * optima[base].lr,
            color=ORANGE,
            label=f"the same, equal at B = {sizes[base]}",
        )
        peak = said["peak_batch_size"][0]
        if peak is not None and BATCH_SIZES[0] < peak < BATCH_SIZES[-1]:
            axes.axvline(peak, color=ORANGE, linewidth=0.8, linestyle="--", label="callback's peak")
    batch_size_axis(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9 * 10 ** math.floor(math.log10(high))), high)  # a power of ten in sight
