"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.fidelity.analysis import Mean, Summary

__all__ = ["average", "number", "share", "spread", "table", "targets_table"]

# From here on a number is written as a power of ten.
MANY = 1e4


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; bars inside cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headers), "|" + "---|" * len(headers), *map(line, rows)])


def number(value: float | None, digits: int = 2) -> str:
    """`-` for what is unknown, `inf` for what has no bound; as a power of ten where digits say nothing."""
    if value is None or math.isnan(value):
        return "-"
    if MANY <= abs(value) < math.inf:
        return f"{value:.1e}"
    # Adding 0 takes the sign off a rounded zero.
    return f"{round(value, digits) + 0.0:.{digits}f}"


def share(part: int, whole: int) -> str:
    """Percent, with the counts."""
    return f"{100 * part / whole:.0f} % ({part} of {whole})" if whole else "-"


def average(found: Mean, digits: int = 3) -> str:
    """A mean and its half-width, the latter only where there is one."""
    width = f" ± {number(found.half_width, digits)}" if math.isfinite(found.half_width) else ""
    return number(found.value, digits) + width


def spread(found: Summary) -> str:
    """Median and 90th percentile."""
    return f"{number(found.median)}, {number(found.high)}" if found.n else "-"


def targets_table(found: Iterable[Mapping[str, Any]], form: str = ".3g", of_error: str = ".2g") -> str:
    """The targets of a summary, a line each, with the error or the quartiles of the value, where it has them.

    A target's own `form` goes before the one for all.
    """
    lines = []
    for entry in found:
        own = entry.get("form", form)
        bound = f"at {'most' if entry['better'] == 'lower' else 'least'} "
        bound += format(entry["bound"], entry.get("form", "g"))
        error = entry.get("half_width", entry.get("standard_error", math.inf))
        value = format(entry["value"], own) + (f" ± {error:{of_error}}" if math.isfinite(error) else "")
        if "quartiles" in entry:
            value += " ({:{form}} to {:{form}})".format(*entry["quartiles"], form=own)
        value += f" ({entry['seeds']} pairs of seeds)" if "seeds" in entry else ""
        lines.append([entry["name"], value, bound, "met" if entry["met"] else "missed"])
    return table(["what", "value", "target", ""], lines)
