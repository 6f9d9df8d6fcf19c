"""Is one rule the best everywhere, or near it? Change by change of the batch size, instead of in the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fidelity.analysis import CHANGE, Record, Row, groups, mean
from benchmarks.fidelity.markdown import number, share, table
from benchmarks.fidelity.regrets import shared
from benchmarks.fidelity.run_tables import all_rows, at_default
from benchmarks.fidelity.workloads import WORKLOADS

__all__ = ["NEAR", "everywhere_rows", "everywhere_table"]

NEAR = {True: 0.005, False: 0.5}
"""By whether a loss is in nats: what a rule may lose against the best of its change, nats or percent."""
FIELDS = {"tuned": "at the best base lr", "regret": "as run"}


def everywhere_rows(rows: Sequence[Row], field: str) -> list[Row]:
    """By change of the batch size and rule: the mean regret over seeds, and whether it is near the lowest.

    Only changes and rules with a regret at every seed take part; the lowest is that of all rules there.
    """
    known = [row for row in rows if row[field] is not None]
    rules = [rule for (rule,) in groups(known, "rule")]
    found = []
    for key, part in groups(shared(known, rules, field), *CHANGE).items():
        by_rule = groups(part, "rule").items()
        means = {rule: mean(row[field] for row in of_rule).value for (rule,), of_rule in by_rule}
        nats = WORKLOADS[key[0]].cross_entropy
        for rule, value in means.items():
            row: dict[str, Any] = {"rule": rule, "nats": nats, "regret": value}
            found.append(row | {"near": value <= min(means.values()) + NEAR[nats]})
    return found


def everywhere_table(records: Mapping[str, Sequence[Record]]) -> str:
    """How often each rule is near the best, and what it loses where it loses most."""
    rows = at_default(all_rows(records))
    entries: dict[str, list[str]] = {}
    for index, field in enumerate(FIELDS):
        for (rule,), part in groups(everywhere_rows(rows, field), "rule").items():
            worst = [
                number(max((row["regret"] for row in part if row["nats"] == nats), default=math.nan), 3)
                for nats in NEAR
            ]
            found = [share(sum(row["near"] for row in part), len(part)), *worst]
            entries.setdefault(rule, ["-"] * 3 * len(FIELDS))[3 * index : 3 * index + 3] = found
    headers = [
        f"{what}, {base}" for base in FIELDS.values() for what in ("near the best", "worst, nats", "worst, %")
    ]
    return "\n\n".join(
        [
            "Share of changes of the batch size at which a rule's mean regret over seeds is within "
            f"{NEAR[True]} nats, or {NEAR[False]} % of the loss, of the lowest of all these rules; and its "
            "largest mean regret. Changes that every rule has.",
            table(["rule", *headers], [[rule, *found] for rule, found in entries.items()]),
        ]
    )
