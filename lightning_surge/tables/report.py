"""What a fit says, in words and as a document for programs: what `lightning-surge fit` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightning_surge.checking.answers import aligned, plain
from lightning_surge.tables.bootstrap import CONFIDENCE, Estimate
from lightning_surge.tables.fit import FittedLaw, GridFit, Unfitted, missing, remedy
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.read import MIXED

VERSION = 1  # of the keys: raised when one changes its meaning or goes
BEYOND = 4.0  # factor beyond the batch sizes tried up to which the next one is proposed

Found = Sequence[GridFit | Unfitted]


def describe(found: Found, title: str = "") -> str:
    """The answer of a fit in a few lines, then its tables; of several fits one table of answers."""
    lines = [title, ""] if title else []
    (first, *others) = found
    if others or isinstance(first, Unfitted):
        lines += _table_of_answers(found)
    else:
        lines += [*_answer(first), *_notes([first]), "", *_tables(first)]
    return "\n".join(lines)


def document(found: Found, **head: Any) -> dict[str, Any]:
    """The same for `json.dumps`, below what `head` adds; docs/fitting.md lists the keys."""
    fits, fitted = [], [each for each in found if isinstance(each, GridFit)]
    for each in found:
        part = {"target": each.target, "group": dict(each.group), "error": None}
        fits.append(part | ({"error": each.reason} if isinstance(each, Unfitted) else _fit_json(each)))
    said = {"measure": fitted[0].measure, "bootstrap": fitted[0].repetitions} if fitted else {}
    answer: dict[str, Any] = plain(
        {"version": VERSION, "confidence": CONFIDENCE, **head, **said, "fits": fits}
    )
    return answer


def _answer(fit: GridFit) -> list[str]:
    """The best law, its rivals, its peak, learning rates asked for, and what to do next: a line each."""
    best = fit.winner
    label = f"{best.name} ({LAWS[best.name].label})" + ", at the end of the range searched" * best.limited
    if best.held_out is None:
        lines = [f"Closest law: {label}; to compare laws takes one batch size more than their parameters."]
    else:
        factor = f"a factor of {2.0**best.held_out.error:.2f}"
        rivals = f"Rivals within error: {', '.join(fit.ties)}." if fit.ties else ""
        lines = [f"Best law: {label}, within {factor} on average at batch sizes left out."]
        lines.append(rivals or "No other law comes within its error.")
    size = best.peak_batch_size
    peak = "No peak: its learning rate never falls as the batch grows"
    if 0 < size.value < math.inf:
        outside = "" if fit.tried(size.value) else ", outside the batch sizes tried"
        peak = f"Peak: lr {_with_interval(best.peak_lr)} at B = {_with_interval(size)}{outside}"
    lines.append(f"{peak}; critical batch size {_with_interval(best.critical_batch_size)}.")
    if best.at:
        lines.append(f"Learning rate {'; '.join(_at(fit, index) for index in range(len(best.at)))}.")
    return [*lines, f"Next: {_next(fit)}."]


def _at(fit: GridFit, index: int) -> str:
    lr = fit.winner.at[index]
    size, ends = float(lr.name), [fit.valleys[end].batch_size for end in (0, -1)]
    text = f"at B = {size:,g}: {_with_interval(lr)}"
    rivals = [law.at[index].value for law in fit.laws if law.name in fit.ties]
    if rivals and max(*rivals, lr.value) > 1.01 * min(*rivals, lr.value):
        text += f", by rivals {_number(min(rivals))} to {_number(max(rivals))}"
    return text + ("" if fit.tried(size) else f", outside the {ends[0]:,g} to {ends[1]:,g} tried")


def _next(fit: GridFit) -> str:
    """The first of what would help most."""
    best = fit.winner
    if fit.notes and fit.notes[0].startswith(MIXED):
        return "tell apart the runs that the first note names"
    if said := missing(fit.valleys, 2):
        return said
    if best.held_out is None:
        return "add a batch size, with learning rates on both sides of the best one"
    if best.held_out.error > 0.5:
        return "keep to the best learning rates below, since no law predicts them within a factor of 1.4"
    if fit.ties:
        first, last = fit.valleys[0].batch_size, fit.valleys[-1].batch_size
        laws = [law.law for law in fit.laws if law.name in (best.name, *fit.ties)]
        sizes = np.geomspace(max(first / BEYOND, 1.0), last * BEYOND, 9).tolist()
        spreads = [max(law.lr(size) for law in laws) / min(law.lr(size) for law in laws) for size in sizes]
        size, spread = sizes[int(np.argmax(spreads))], max(spreads)
        if spread > 1.1:
            return f"run B = {_number(size)}, where these laws differ most, by a factor of {spread:.2g}"
    if not fit.from_seeds:
        return "run the learning rates around each optimum with a second seed, for intervals that count noise"
    return "use it; --at BATCH_SIZE says its learning rate"


def _notes(fits: Iterable[GridFit]) -> list[str]:
    return [f"Note: {note}" for note in dict.fromkeys(note for fit in fits for note in fit.notes)]


def _table_of_answers(found: Found) -> list[str]:
    columns, targets = list(found[0].group), [] if found[0].target is None else ["target"]
    fits = [each for each in found if isinstance(each, GridFit)]
    at = [f"lr at {float(lr.name):,g}" for lr in fits[0].winner.at]
    last = "its parameters, and what is missing"
    rows = [[*columns, *targets, "runs", "optima", "best law", "held-out error", *at, last]]
    for each in found:
        row = [*each.group.values(), *([] if each.target is None else [f"{each.target:.5g}"])]
        if isinstance(each, Unfitted):
            rows.append([*row, "-", "-", "none", "-", *("-" for _ in at), each.reason.partition(": ")[0]])
            continue
        best, used = each.winner, sum(valley.optimum.found for valley in each.valleys)
        row += [f"{each.runs:,}", f"{used} of {len(each.valleys)}", best.name + "~" * bool(each.ties)]
        row += [_error(best), *(_number(lr.value) for lr in best.at)]
        rows.append([*row, _parameters(best)])
    lines = [*aligned(rows, left=(len(rows[0]) - 1,)), ""]
    if any(each.ties for each in fits):
        lines.append("~ other laws are not told from it by these batch sizes")
    options = [f"--where {column}=VALUE" for column in columns] + ["--target LOSS" for _ in targets]
    return [*lines, f"Next: {' '.join(options)} says more of one of them.", *_notes(fits)]


def _tables(fit: GridFit) -> list[str]:
    what = fit.measure if fit.measure == "steps" else "final loss"
    rows = [["batch size", "best lr", f"{CONFIDENCE:.0%} interval", what, "optimum"]]
    for valley, lr in zip(fit.valleys, fit.lrs, strict=True):
        optimum, note = valley.optimum, remedy(valley)
        status = optimum.status.replace("_", " ") + (f": {note}" if note else "")
        numbers = (_number(optimum.lr), _interval(lr), _number(optimum.outcome, 4))
        rows.append([f"{valley.batch_size:,g}", *numbers, status])
    title = "Best learning rates" + ("" if fit.target is None else f" to the loss {fit.target:.5g}")
    lines = [title, *aligned(rows, left=(4,)), ""]
    lines += [
        "Laws, by the mean |log2(predicted / found)| at batch sizes left out (* best, ~ within its error)"
    ]
    marks = {fit.best: "* "} | dict.fromkeys(fit.ties, "~ ")
    rows = [[marks.get(law.name, "  ") + law.name, _error(law), _parameters(law)] for law in fit.laws]
    lines += [*aligned([["law", "held-out error", "parameters"], *rows], left=(0, 2)), ""]
    if fit.tradeoff:
        scale, steps, examples = (_with_interval(each) for each in fit.tradeoff)
        lines.append(f"Eq. 22: critical batch size {scale}, fewest steps {steps}, fewest examples {examples}")
    tuned = any(valley.optimum.status == "tuned" for valley in fit.valleys)
    why = "the table does not say how well they were tuned" if tuned else "no learning rate has two seeds"
    source = "the seeds" if fit.from_seeds else f"the learning rates around each law: {why}"
    return [
        *lines,
        f"Intervals ({CONFIDENCE:.0%}): {fit.repetitions} repetitions with the scatter of {source}",
    ]


def _error(law: FittedLaw) -> str:
    return "-" if law.held_out is None else f"{law.held_out.error:.3f}"


def _parameters(law: FittedLaw) -> str:
    text = ", ".join(f"{each.name} {_with_interval(each)}" for each in law.parameters)
    return text + (" (at the end of the range searched)" if law.limited else "")


def _fit_json(fit: GridFit) -> dict[str, Any]:
    optima = [
        {
            "batch_size": valley.batch_size,
            "lr": valley.optimum.lr,
            "interval": _ends(lr),
            fit.measure: valley.optimum.outcome,
            "status": valley.optimum.status,
            "used": valley.optimum.found,
            "message": remedy(valley) or None,
        }
        for valley, lr in zip(fit.valleys, fit.lrs, strict=True)
    ]
    return {
        "runs": fit.runs,
        "intervals_from": "seeds" if fit.from_seeds else "residuals",
        "optima": optima,
        "tradeoff": _estimates(fit.tradeoff) or None,
        "laws": [_law_json(law, [valley.batch_size for valley in fit.valleys]) for law in fit.laws],
        "best": fit.best,
        "ties": fit.ties,
        "next": _next(fit),
        "notes": fit.notes,
    }


def _law_json(law: FittedLaw, sizes: Sequence[float]) -> dict[str, Any]:
    pairs = () if law.held_out is None else law.held_out.by_batch_size
    return {
        "name": law.name,
        "parameters": _estimates(law.parameters),
        **_estimates([law.peak_batch_size, law.peak_lr, law.critical_batch_size]),
        "at_end_of_range": law.limited,
        "residual": law.residual,
        "held_out_error": None if law.held_out is None else law.held_out.error,
        "held_out": [{"batch_size": size, "log2_ratio": error} for size, error in pairs],
        "lrs": [{"batch_size": size, "lr": law.law.lr(size)} for size in sizes],
        "at": [{"batch_size": float(lr.name), "lr": lr.value, "interval": _ends(lr)} for lr in law.at],
    }


def _estimates(estimates: Iterable[Estimate]) -> dict[str, Any]:
    return {each.name: {"value": each.value, "interval": _ends(each)} for each in estimates}


def _ends(estimate: Estimate) -> list[float] | None:
    return None if math.isnan(estimate.low) else [estimate.low, estimate.high]


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    large = abs(value) >= 10**digits
    return f"{value:,.0f}" if large and abs(value) < 1e12 else f"{value:.{digits}g}"


def _interval(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.low) else f"[{_number(estimate.low)}, {_number(estimate.high)}]"


def _with_interval(estimate: Estimate) -> str:
    value = "none" if math.isinf(estimate.value) else _number(estimate.value)
    if math.isnan(estimate.low) or (math.isinf(estimate.low) and math.isinf(estimate.high)):
        return value
    return f"{value} {_interval(estimate)}"
