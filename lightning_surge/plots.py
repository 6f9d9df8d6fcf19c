"""Read what a run has logged and draw it: this room sees logs and tables, never a model.

Three panels tell the story of one run. The first shows the learning rate from the schedule, the one the law
asks for and the one written to the optimizer. The second shows the batch size in force beside the batch
size at which the law's learning rate peaks. The third shows the law itself, `lr(B)` relative to `lr(base)`,
at several moments of training, with the points it was fitted to.

matplotlib and tensorboard are imported when a function needs them, so that importing the package does not
require the extras. Figures are built without pyplot: no window, no global state, any backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = NDArray[np.float64]

# Okabe and Ito's palette, which stays apart under the common forms of colour blindness.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
LAW_COLOURS = (SKY, VERMILION, GREEN, PURPLE, ORANGE, BLUE)

# The strip at the top of the batch-size panel, as fractions of the panel's height.
STRIP_BOTTOM, STRIP_HEIGHT = 0.92, 0.08
LEGEND: dict[str, Any] = {"fontsize": 8.5, "framealpha": 0.9, "edgecolor": "none"}


class Series(NamedTuple):
    """One logged quantity: what was written, and at which optimizer step.

    Attributes:
        steps: Optimizer steps, shape `(n,)`, increasing.
        values: Values, shape `(n,)`. TensorBoard keeps them in single precision.
    """

    steps: NDArray[np.int64]
    values: FloatArray


class LawSnapshot(NamedTuple):
    """The law as it was estimated at one moment of training.

    Attributes:
        step: Optimizer step of the estimate.
        batch_sizes: Batch sizes at which the fitted law was evaluated, in examples, increasing.
        lrs: The fitted `lr(B)` there, same length, positive.
        measured_batch_sizes: Batch sizes at which alignment and curvature were measured, in examples.
        measured_lrs: The measured ratio `N(B)/D(B)` there, in the unit of `lrs`. May be negative or NaN.
        measured_standard_errors: Its standard error, in the same unit.
    """

    step: int
    batch_sizes: Sequence[float]
    lrs: Sequence[float]
    measured_batch_sizes: Sequence[float]
    measured_lrs: Sequence[float]
    measured_standard_errors: Sequence[float]


def read_run(path: str | Path) -> dict[str, Series]:
    """Read every scalar of one run's TensorBoard event files.

    Args:
        path: The run's directory: `TensorBoardLogger.log_dir`, or any directory that holds event files.

    Returns:
        One `Series` per tag. Steps that a resumed run repeated appear once, as TensorBoard shows them.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.
        FileNotFoundError: If the directory does not exist or holds no event file.
        ValueError: If the event files hold no scalar.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with SummaryWriter(directory) as writer:
        ...         writer.add_scalar("surge/batch_size", 8, global_step=1)
        ...         writer.add_scalar("surge/batch_size", 16, global_step=2)
        ...     run = read_run(directory)
        >>> run["surge/batch_size"].values.tolist()
        [8.0, 16.0]
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading a run needs tensorboard: pip install 'lightning-surge[tensorboard]'."
        ) from error

    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"Expected path to be the directory of a run, got path={str(path)!r}, which does not exist: "
            "pass TensorBoardLogger.log_dir."
        )
    if not any(directory.glob("*tfevents*")):
        raise FileNotFoundError(
            f"Expected path to hold TensorBoard event files (*tfevents*), got path={str(path)!r} without "
            "one: pass TensorBoardLogger.log_dir, the directory of one version and not the one above it."
        )
    # 0 means no limit; the default would sample long runs down to 10,000 points.
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    tags = accumulator.Tags()["scalars"]
    if not tags:
        raise ValueError(
            f"Expected path to be a run that has logged, got path={str(path)!r} with no scalar in it: train "
            "for at least log_every_n_steps steps first."
        )
    run = {}
    for tag in tags:
        events = accumulator.Scalars(tag)
        steps = np.array([event.step for event in events], dtype=np.int64)
        run[tag] = Series(steps, np.array([event.value for event in events], dtype=np.float64))
    return run


def plot_run(
    run: Mapping[str, Series],
    snapshots: Sequence[LawSnapshot] = (),
    *,
    base_batch_size: float,
    group: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one run: its learning rates, its batch size against the peak, and the law.

    * *Learning rate*: scheduled, predicted and used, against optimizer steps, on a linear axis because
      schedules end at zero. The axis is scaled to the scheduled and the used one; a prediction that was
      out of bounds may leave the panel.
    * *Batch size*: the one in force, the peak with a band of one standard error, and the critical batch
      size. Where the peak is infinite (the learning rate never falls), a hatched strip at the top says so.
      Where its standard error was not logged, which means that it was not finite, the band fills the panel.
    * *Law*: each snapshot's curve `R(B) = lr(B)/lr(base)` and the measured points, divided by the *fitted*
      `lr(base)`. Error bars are one standard error of the measured ratio and do not include that of the
      divisor. A measured ratio that is not positive has no place on a log axis and is drawn as a triangle
      at the bottom.

    Args:
        run: What `read_run` returned.
        snapshots: The law at some moments, oldest first; two or three keep the panel readable.
        base_batch_size: The batch size at which the scheduled learning rate was tuned, in examples.
        group: The suffix of the learning rates' tags, where there are several parameter groups or
            optimizers, as `"1"`, `"opt0"` or `"opt0/1"`.
        title: A line above the figure.

    Returns:
        A figure for `figure.savefig`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If a tag is missing, or if a snapshot's arrays disagree in length or do not reach
            `base_batch_size`.

    Example:
        >>> import numpy as np
        >>> steps = np.array([1, 2])
        >>> names = ("lr_scheduled", "lr_predicted", "lr_used", "batch_size", "peak_batch_size")
        >>> names += ("critical_batch_size",)
        >>> run = {f"surge/{name}": Series(steps, np.array([8.0, 16.0])) for name in names}
        >>> [axes.get_xlabel() for axes in plot_run(run, base_batch_size=8).axes]
        ['', 'batch size B (examples)', 'optimizer step']
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Drawing a run needs matplotlib: pip install 'lightning-surge[plot]'."
        ) from error

    if not (np.isfinite(base_batch_size) and base_batch_size > 0):
        raise ValueError(
            f"Expected a positive, finite base_batch_size, got base_batch_size={base_batch_size}: pass the "
            "batch size at which the learning rate was tuned."
        )
    if group is not None and f"surge/batch_size/{group.partition('/')[0]}" in run:
        run = _of_optimizer(run, group.partition("/")[0])
    figure = Figure(figsize=(11.0, 6.4), dpi=150, layout="constrained")
    panels = figure.subplot_mosaic([["lr", "law"], ["batch", "law"]], width_ratios=[1.25, 1.0])
    panels["lr"].sharex(panels["batch"])
    panels["lr"].tick_params(labelbottom=False)
    _draw_learning_rates(panels["lr"], run, group)
    _draw_batch_sizes(panels["batch"], run)
    _draw_law(panels["law"], snapshots, float(base_batch_size))
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _of_optimizer(run: Mapping[str, Series], name: str) -> dict[str, Series]:
    """A run with one optimizer's series under the tags of an only optimizer too."""
    ending = f"/{name}"
    return {**run, **{tag.removesuffix(ending): run[tag] for tag in run if tag.endswith(ending)}}


def _logged(run: Mapping[str, Series], name: str, group: str | None = None) -> Series:
    """The series of a log key, or an error that says which are there."""
    tag = f"surge/{name}" if group is None else f"surge/{name}/{group}"
    if tag not in run:
        surge_tags = sorted(key for key in run if key.startswith("surge/")) or "none"
        raise ValueError(
            f"Expected run to hold the tag {tag!r}, got these surge tags: {surge_tags}. Read a run that was "
            "trained with SurgeLRCallback, and pass group= if it has several parameter groups or optimizers."
        )
    return run[tag]


def _draw_learning_rates(axes: Axes, run: Mapping[str, Series], group: str | None) -> None:
    """Scheduled, predicted and used learning rate against optimizer steps."""
    names = ("lr_scheduled", "lr_predicted", "lr_used")
    scheduled, predicted, used = (_logged(run, name, group) for name in names)
    _mark_changes(axes, _logged(run, "batch_size"), labelled=True)
    axes.plot(*predicted, color=ORANGE, linewidth=1.0, label="predicted by the law")
    axes.plot(*used, color=BLUE, linewidth=1.8, label="used")
    axes.plot(*scheduled, color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)), label="scheduled")
    kept = _positive(np.concatenate([scheduled.values, used.values]))
    top = kept.max() if kept.size else 1.0
    asked = _positive(predicted.values)
    # Room for ordinary excursions of the prediction; one wild value must not flatten everything else.
    top = max(top, min(asked.max() if asked.size else top, 1.5 * top))
    axes.set_ylim(0.0, 1.12 * top)
    axes.set_ylabel("learning rate (per step)")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_title("Learning rate", loc="left", fontsize=11, fontweight="bold", pad=16)
    axes.legend(loc="best", **LEGEND)


def _draw_batch_sizes(axes: Axes, run: Mapping[str, Series]) -> None:
    """Batch size in force, peak with its band, critical batch size; infinite peaks as a strip."""
    batch = _logged(run, "batch_size")
    # A run too short for a law, or with a rule that measures nothing, has no peak; standard errors are logged
    # only while they are finite.
    nothing = Series(np.array([], dtype=np.int64), np.array([]))
    peak, critical = (
        run.get(f"surge/{name}", nothing) for name in ("peak_batch_size", "critical_batch_size")
    )
    error = _aligned(run.get("surge/peak_batch_size_standard_error", nothing), peak.steps)
    in_reach = np.where(np.isfinite(peak.values) & (peak.values > 0), peak.values, np.nan)
    # An unknown error next to a known peak is drawn as the widest band there is, not as certainty.
    error = np.where(np.isnan(error), np.inf, error)

    shown = _positive(np.concatenate([batch.values, critical.values, peak.values]))
    low, high = (shown.min(), shown.max()) if shown.size else (1.0, 2.0)
    # Decades above the largest batch size say nothing a reader can use: the curve may leave the panel.
    high = min(high, 100.0 * np.nanmax(batch.values, initial=1.0))
    decades = np.log10(high / low) + 0.3
    axes.set_yscale("log")
    axes.set_ylim(low / 10**0.15, low / 10**0.15 * 10 ** (decades / (STRIP_BOTTOM - 0.03)))
    bottom, top = axes.get_ylim()

    _mark_changes(axes, batch, labelled=False)
    lower = np.clip(in_reach - error, bottom, top)
    upper = np.clip(in_reach + error, bottom, top)
    if peak.steps.size:
        axes.fill_between(
            peak.steps,
            lower,
            upper,
            color=VERMILION,
            alpha=0.14,
            linewidth=0,
            label="peak ± 1 standard error",
        )
        axes.plot(peak.steps, in_reach, color=VERMILION, linewidth=1.5, label="peak batch size")
        axes.plot(*critical, color=GREEN, linewidth=1.3, linestyle=(0, (5, 1.5)), label="critical batch size")
    axes.plot(*batch, color=BLACK, linewidth=1.8, drawstyle="steps-post", label="batch size in force")
    spans = _spans(peak.steps, np.isposinf(peak.values))
    if spans:
        axes.broken_barh(
            spans, (STRIP_BOTTOM, STRIP_HEIGHT), transform=axes.get_xaxis_transform(), facecolor="#fbe3d3",
            edgecolor=VERMILION, hatch="////", linewidth=0, label="no peak in reach (infinite)",
        )  # fmt: skip
        axes.set_ylim(bottom, top)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("batch size (examples)")
    axes.set_title("Batch size against the peak", loc="left", fontsize=11, fontweight="bold")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, **LEGEND)


def _draw_law(axes: Axes, snapshots: Sequence[LawSnapshot], base: float) -> None:
    """Each snapshot's `lr(B)/lr(base)` with its measured points, beside sqrt scaling."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    drawn: list[FloatArray] = [np.array([1.0])]
    sizes: list[FloatArray] = [np.array([base])]
    outside = False
    for index, snapshot in enumerate(snapshots):
        colour = LAW_COLOURS[index % len(LAW_COLOURS)]
        curve_sizes, lrs = _pair(snapshot, "batch_sizes", "lrs")
        points, ratios = _pair(snapshot, "measured_batch_sizes", "measured_lrs")
        _, errors = _pair(snapshot, "measured_batch_sizes", "measured_standard_errors")
        divisor = _lr_at(base, snapshot.step, curve_sizes, lrs)
        summit = int(np.argmax(lrs))
        inside = 0 < summit < len(lrs) - 1
        peak = f"peak at B = {curve_sizes[summit]:,.0f}" if inside else "no peak in this range"
        axes.plot(
            curve_sizes, lrs / divisor, color=colour, linewidth=2.0, label=f"step {snapshot.step:,}: {peak}"
        )
        if inside:
            axes.plot(
                curve_sizes[summit], lrs[summit] / divisor, "*", color=colour, markersize=14,
                markeredgecolor="white", markeredgewidth=0.8,
            )  # fmt: skip
        shown = ratios > 0
        # Snapshots share batch sizes: the older ones are drawn larger, so that they show behind the newer.
        older = len(snapshots) - 1 - index
        # An unknown error is drawn as the widest bar there is, not as certainty.
        bars = np.clip(np.nan_to_num(errors[shown], nan=np.inf) / divisor, 0.0, 1e6)
        axes.errorbar(
            points[shown], ratios[shown] / divisor, yerr=bars, color=colour, fmt="o",
            markersize=5.5 + 2 * older, elinewidth=1.2 + 1.6 * older, capsize=2.5 + 1.5 * older,
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
        axes.plot(
            points[~shown], np.full((~shown).sum(), 0.025), "v", color=colour, markersize=7,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        outside |= not shown.all()
        drawn += [lrs / divisor, ratios[shown] / divisor]
        sizes += [curve_sizes, points]
    reach = _positive(np.concatenate(sizes))
    ends = np.array([reach.min() / 1.15, reach.max() * 1.15])
    axes.plot(
        ends, np.sqrt(ends / base), color=GREY, linewidth=1.1, linestyle=(0, (1, 1.5)), label="sqrt scaling"
    )
    axes.plot([base], [1.0], "D", color=BLACK, markersize=5, label=f"base batch size, B = {base:g}")
    # Entries for what every snapshot shares, in a colour of none of them.
    axes.errorbar([], [], yerr=[], color=GREY, fmt="o", capsize=2.5, label="measured ± 1 standard error")
    if outside:
        axes.plot([], [], "v", color=GREY, label="measured, not positive")
    heights = _positive(np.concatenate(drawn))
    axes.set_xlim(*ends)
    axes.set_ylim(heights.min() / 1.5, heights.max() * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.set_xlabel("batch size B (examples)")
    axes.set_ylabel(f"optimal learning rate over the one at B = {base:g} (ratio R)")
    axes.set_title("The law, measured", loc="left", fontsize=11, fontweight="bold", pad=16)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.085), ncols=2, **LEGEND)


def _mark_changes(axes: Axes, batch: Series, *, labelled: bool) -> None:
    """A thin line wherever the batch size in force changed."""
    changed = np.flatnonzero(np.diff(batch.values)) + 1
    for step, size in zip(batch.steps[changed], batch.values[changed], strict=True):
        axes.axvline(float(step), color="#c8c8c8", linewidth=0.7, zorder=0.5)
        if labelled:
            axes.text(
                float(step), 1.015, f"{size:g}", transform=axes.get_xaxis_transform(), fontsize=7.5,
                color="#606060", horizontalalignment="center", verticalalignment="bottom",
            )  # fmt: skip


def _spans(steps: NDArray[np.int64], flags: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """`(start, width)` of each run of set flags; a sample reaches half way to its neighbours."""
    if not flags.any():
        return []
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
    padded = np.concatenate([[False], flags, [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
    return [(float(edges[a]), float(edges[b] - edges[a])) for a, b in zip(starts, ends, strict=True)]


def _aligned(series: Series, steps: NDArray[np.int64]) -> FloatArray:
    """The series' values at the given steps, NaN where it has none."""
    known = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    return np.array([known.get(step, np.nan) for step in steps.tolist()], dtype=np.float64)


def _positive(values: FloatArray) -> FloatArray:
    """The values that a log axis can show."""
    return values[np.isfinite(values) & (values > 0)]


def _pair(snapshot: LawSnapshot, x_name: str, y_name: str) -> tuple[FloatArray, FloatArray]:
    """Two fields of a snapshot as arrays of one length."""
    x: ArrayLike = getattr(snapshot, x_name)
    y: ArrayLike = getattr(snapshot, y_name)
    x_array, y_array = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_array.shape != y_array.shape or x_array.ndim != 1:
        raise ValueError(
            f"Expected snapshots with {x_name} and {y_name} of one length, got {x_array.shape} and "
            f"{y_array.shape} at step {snapshot.step}: give one value per batch size."
        )
    return x_array, y_array


def _lr_at(base: float, step: int, sizes: FloatArray, lrs: FloatArray) -> float:
    """The curve's learning rate at the base batch size; a power law joins neighbouring points."""
    if sizes.size == 0 or not sizes[0] <= base <= sizes[-1]:
        reach = "no batch size" if sizes.size == 0 else f"batch_sizes from {sizes[0]:g} to {sizes[-1]:g}"
        raise ValueError(
            f"Expected snapshots whose batch_sizes reach base_batch_size={base:g}, got {reach} at step "
            f"{step}: evaluate the law on a range that holds the base."
        )
    return float(np.exp(np.interp(np.log(base), np.log(sizes), np.log(lrs))))
