"""The paper's procedure as tables: best learning rates and peaks, and how its two claims fare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.fidelity.markdown import table as markdown_table
from benchmarks.fidelity.procedure import BATCH_SIZES, BETAS
from benchmarks.fidelity.procedure_optima import (
    Case,
    Optimum,
    Records,
    best_over_following,
    cases,
    claims,
    line_of,
    shape,
)

__all__ = ["claims_of", "plus_minus", "table"]

SOURCES = {"runs": "runs to the loss", "following": "following steps", "callback": "callback"}


def table(records: Records) -> str:
    """Markdown: three rows per target, for whole runs, for the steps that follow, and for the callback."""
    lines: list[list[object]] = []

    def add(case: Case, source: str, lrs: Mapping[int, str], peak: str, scale: str) -> None:
        tried = {record["batch_size"] for record in case.grid} if source == "runs to the loss" else set()
        cut = [lrs.get(size, "not reached" if size in tried else "-") for size in BATCH_SIZES]
        start = [case.workload, f"{case.betas[0]:g}, {case.betas[1]:g}", f"{case.loss:.3f}", source]
        lines.append([*start, *cut, peak, scale])

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
    headers = ["workload", "betas", "target loss", "best lr by", *(f"B = {size}" for size in BATCH_SIZES)]
    counts = [
        [betas, SOURCES[source], *found.values()]
        for betas, by_source in claims_of(records).items()
        for source, found in by_source.items()
    ]
    claimed = ["cases", "rises and falls", "pairs of targets", "peak moves up", "moves down", "stays"]
    return "\n\n".join(
        [
            markdown_table([*headers, "peak at B", "B_noise or B_crit (examples)"], lines),
            "`*`: the smallest or the largest learning rate tried. Errors are standard errors; `?`: not "
            "finite.",
            "The paper's two claims, counted: does the best learning rate rise and fall within the batch "
            "sizes tried, and does its peak move to larger ones, by more than a factor of two, from one "
            "target to the next?",
            markdown_table(["betas", "best lr by", *claimed], counts),
        ]
    )


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


def claims_of(records: Records) -> dict[str, dict[str, dict[str, int]]]:
    """`claims` by betas, as text."""
    kinds = ("procedure_grid", "procedure_following")
    return {
        f"{beta_1:g}, {beta_2:g}": claims(
            {kind: [r for r in records.get(kind, ()) if r["beta_1"] == beta_1] for kind in kinds}
        )
        for beta_1, beta_2 in BETAS
    }
