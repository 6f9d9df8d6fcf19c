"""What `lightning-surge fit` prints: a table to read, or JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_surge.tables.bootstrap import CONFIDENCE, Estimate
from lightning_surge.tables.fit import FittedLaw, GridFit, Unfitted, remedy
from lightning_surge.tables.law_fits import LAWS
from lightning_surge.tables.optima import Valley
from lightning_surge.tables.read import RunTable

__all__ = ["as_json", "as_text"]

VERSION = 1
"""Of the keys: raised when one changes its meaning or goes."""

Found = Sequence[GridFit | Unfitted]


def as_text(found: Found, table: RunTable, path: str, repetitions: int) -> str:
    """Tables and sentences."""
    lines = [f"{path}: {table.lrs.size} runs"]
    for each in found:
        if isinstance(each, Unfitted):
            lines += ["", f"No fit to the loss {each.target:.5g}: {each.reason}"]
        else:
            lines += ["", *_fit_lines(each, repetitions)]
    return "\n".join(lines) + "\n"


def _fit_lines(fit: GridFit, repetitions: int) -> list[str]:
    what = "final loss" if fit.measure == "loss" else "steps"
    title = "Best learning rates" + ("" if fit.target is None else f" to the loss {fit.target:.5g}")
    rows = [["batch size", "best lr", f"{CONFIDENCE:.0%} interval", what, "optimum"]]
    for valley, lr in zip(fit.valleys, fit.lrs, strict=True):
        optimum = valley.optimum
        note = remedy(valley)
        rows.append(
            [
                f"{valley.batch_size:g}",
                _number(optimum.lr),
                _interval(lr),
                _number(optimum.outcome, 4),
                optimum.status.replace("_", " ") + (f": {note}" if note else ""),
            ]
        )
    lines = [title, *_aligned(rows, left=4), ""]
    rows = [["law", "held-out error", "parameters"]]
    rows += [
        [
            ("* " if law.name == fit.best else "~ " if law.name in fit.ties else "  ") + law.name,
            "-" if law.held_out is None else f"{law.held_out.error:.3f}",
            ", ".join(f"{each.name} {_with_interval(each)}" for each in law.parameters)
            + (" (at the end of the range searched)" if law.limited else ""),
        ]
        for law in fit.laws
    ]
    lines += ["Laws, by the mean |log2(predicted / found)| at batch sizes left out of the fit"]
    lines += [*_aligned(rows, left=0, last_left=2), "", *_sentences(fit, repetitions)]
    return lines


def _sentences(fit: GridFit, repetitions: int) -> list[str]:
    lines = []
    best = next((law for law in fit.laws if law.name == fit.best), None)
    if best is not None and best.held_out is not None:
        factor = 2.0**best.held_out.error
        lines.append(
            f"* predicts best ({LAWS[best.name].label}): within a factor of {factor:.2f} on average"
            + ("; ~ not told from it by these batch sizes" if fit.ties else "")
        )
    elif fit.laws:
        lines.append("No law could be held out: it takes one batch size more than a law has parameters.")
    shown = [best] if best is not None else list(fit.laws[:1])
    shown += [law for law in fit.laws if law.name == "measured" and law not in shown]
    lines += [_peak_sentence(fit, law) for law in shown]
    if fit.tradeoff:
        scale, steps, examples = fit.tradeoff
        lines.append(
            f"Critical batch size by Eq. 22: {_with_interval(scale)} examples; fewest steps "
            f"{_with_interval(steps)}, fewest examples {_with_interval(examples)}"
        )
    if repetitions == 0:
        source = "none asked for"
    elif fit.from_seeds:
        source = f"{repetitions} repetitions with the scatter of the seeds"
    else:
        tuned = any(valley.optimum.status == "tuned" for valley in fit.valleys)
        why = "the table does not say how well they were tuned" if tuned else "no learning rate has two seeds"
        source = f"{repetitions} repetitions with the scatter of the learning rates around each law: {why}"
    lines.append(f"Intervals ({CONFIDENCE:.0%}): {source}")
    return lines + [f"Note: {note}" for note in fit.notes]


def _peak_sentence(fit: GridFit, law: FittedLaw) -> str:
    size, lr = law.peak_batch_size, law.peak_lr
    if not 0 < size.value < math.inf:
        peak = "no peak, the learning rate never falls as the batch grows"
    else:
        tried = [valley.batch_size for valley in fit.valleys]
        outside = "" if tried[0] <= size.value <= tried[-1] else ", outside the batch sizes tried"
        peak = f"peak lr {_with_interval(lr)} at B = {_with_interval(size)}{outside}"
    return f"{law.name}: {peak}; critical batch size {_with_interval(law.critical_batch_size)}"


def as_json(found: Found, table: RunTable, path: str, repetitions: int, seed: int) -> dict[str, Any]:
    """The document of `--json`; docs/fitting.md lists its keys."""
    return {
        "version": VERSION,
        "table": path,
        "runs": int(table.lrs.size),
        "measure": table.measure,
        "bootstrap": repetitions,
        "seed": seed,
        "confidence": CONFIDENCE,
        "fits": [
            {"target": each.target, "error": each.reason} if isinstance(each, Unfitted) else _fit_json(each)
            for each in found
        ],
    }


def _fit_json(fit: GridFit) -> dict[str, Any]:
    return {
        "target": fit.target,
        "error": None,
        "intervals_from": "seeds" if fit.from_seeds else "residuals",
        "optima": [
            {
                "batch_size": valley.batch_size,
                "lr": _finite(valley.optimum.lr),
                "interval": _ends(lr),
                fit.measure: _finite(valley.optimum.outcome),
                "status": valley.optimum.status,
                "used": valley.optimum.found,
                "message": remedy(valley) or None,
            }
            for valley, lr in zip(fit.valleys, fit.lrs, strict=True)
        ],
        "tradeoff": _estimates(fit.tradeoff) or None,
        "laws": [_law_json(law, fit.valleys) for law in fit.laws],
        "best": fit.best,
        "ties": list(fit.ties),
        "notes": list(fit.notes),
    }


def _law_json(law: FittedLaw, grid: Iterable[Valley]) -> dict[str, Any]:
    held = law.held_out
    return {
        "name": law.name,
        "parameters": _estimates(law.parameters),
        **_estimates([law.peak_batch_size, law.peak_lr, law.critical_batch_size]),
        "at_end_of_range": law.limited,
        "residual": law.residual,
        "held_out_error": None if held is None else held.error,
        "held_out": None
        if held is None
        else [{"batch_size": size, "log2_ratio": error} for size, error in held.by_batch_size],
        "lrs": [{"batch_size": each.batch_size, "lr": law.law.lr(each.batch_size)} for each in grid],
    }


def _estimates(estimates: Iterable[Estimate]) -> dict[str, Any]:
    return {each.name: {"value": _finite(each.value), "interval": _ends(each)} for each in estimates}


def _finite(value: float) -> float | None:
    """JSON has no infinity: null stands for it."""
    return value if math.isfinite(value) else None


def _ends(estimate: Estimate) -> list[float | None] | None:
    if math.isnan(estimate.low):
        return None
    return [_finite(estimate.low), _finite(estimate.high)]


def _number(value: float, digits: int = 3) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    large = abs(value) >= 10**digits
    return f"{value:.0f}" if large and abs(value) < 1e7 else f"{value:.{digits}g}"


def _interval(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.low) else f"[{_number(estimate.low)}, {_number(estimate.high)}]"


def _with_interval(estimate: Estimate) -> str:
    value = "none" if math.isinf(estimate.value) else _number(estimate.value)
    if math.isnan(estimate.low) or (math.isinf(estimate.low) and math.isinf(estimate.high)):
        return value
    return f"{value} {_interval(estimate)}"


def _aligned(rows: Sequence[Sequence[str]], *, left: int, last_left: int | None = None) -> list[str]:
    """Columns of equal width, to the right but for those named."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i in (left, last_left) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
