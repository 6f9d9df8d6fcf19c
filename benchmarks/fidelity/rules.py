"""What rules lose after a change of the batch size, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.fidelity.analysis import Mean, Record, Row, groups, mean, pick
from benchmarks.fidelity.markdown import average, number, table
from benchmarks.fidelity.regrets import DEFAULT, shared
from benchmarks.fidelity.workloads import WORKLOADS

__all__ = ["NATS", "RULE_HEADERS", "at_default", "of_unit", "rule_columns", "rules", "true_ratio"]

NATS = tuple(name for name, workload in WORKLOADS.items() if workload.cross_entropy)
PERCENT = tuple(name for name in WORKLOADS if name not in NATS)
RULE_HEADERS = (
    "mean absolute log2(R / R_true)",
    *(f"regret {base}, {unit}" for base in ("at the best base lr", "as run") for unit in ("nats", "%")),
)


def at_default(rows: Sequence[Row]) -> list[Row]:
    """Rules without a callback, and the callback at the cost of most of its runs."""
    return pick(rows, overhead=(None, DEFAULT["max_overhead"]))


def of_unit(rows: Sequence[Row], *, nats: bool) -> list[Row]:
    """Those whose regret is in nats, or those in percent."""
    return pick(rows, workload=NATS if nats else PERCENT)


def _mean(rows: Sequence[Row], field: str) -> Mean:
    return mean(abs(row[field]) if field == "error" else row[field] for row in rows if row[field] is not None)


def rules(records: Mapping[str, Sequence[Record]]) -> str:
    """Every rule on the cells that all of them have, in few columns."""
    rows = at_default(records["rules"])
    names = [rule for (rule,) in groups(rows, "rule")]
    same = shared(rows, names)
    lines = []
    for (rule,), found in groups(same, "rule").items():
        lines.append([rule, *rule_columns(found)])
    count = f"{len(same) // max(len(names), 1)} cells that every rule has."
    return "\n\n".join([count, table(["rule", *RULE_HEADERS], lines)])


def rule_columns(rows: Sequence[Row]) -> list[str]:
    """Of one rule, under `RULE_HEADERS`."""
    units = [
        average(_mean(of_unit(rows, nats=nats), field))
        for field in ("tuned", "regret")
        for nats in (True, False)
    ]
    return [average(_mean(rows, "error")), *units]


def true_ratio(truth: Row) -> str:
    """R_true and its standard deviation over seeds as a factor; `*` where it is a bound."""
    return f"{2 ** truth['ratio']:.2f}{'*' if truth['censored'] else ''} ({number(2 ** truth['spread'])})"
