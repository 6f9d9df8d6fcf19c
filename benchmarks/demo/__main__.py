"""Train the demo with every rule, and write the table of what came of it.

python -m benchmarks.demo                        # about 35 minutes on two cores
python -m benchmarks.demo --quick                # every rule on the demo's few-seconds plan, nothing written
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.fidelity import markdown
from benchmarks.fidelity.markdown import number
from benchmarks.results import commit, target, write
from examples import stdlib_transformer
from examples.report import stages
from lightning_surge import SurgeLRCallback
from lightning_surge.laws.objectives import OBJECTIVES
from lightning_surge.runs import read_run

RESULTS = Path(__file__).parent / "results"
FIXED = {"constant": "constant lr", "sqrt": "sqrt", "linear": "linear"}
MEASURED = {objective: f'measured, objective="{objective}"' for objective in OBJECTIVES}
RULES = FIXED | MEASURED
DEFAULT = MEASURED[SurgeLRCallback().settings.objective]
SEEDS = (0, 1)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: final validation loss of every seed, and their mean."""
    seeds = sorted({record["seed"] for record in records})
    lines = []
    for rule in RULES.values():
        losses = {record["seed"]: record["val_loss"] for record in records if record["rule"] == rule}
        if losses:
            cells = [number(losses.get(seed), 4) for seed in seeds]
            lines.append([rule, *cells, number(statistics.mean(losses.values()), 4)])
    return markdown.table(["rule on the ramp 8 to 128", *(f"seed {seed}" for seed in seeds), "mean"], lines)


def targets(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The default against leaving the learning rate alone, and against the best fixed rule."""
    names = {record["rule"] for record in records}
    if not names >= {*FIXED.values(), DEFAULT}:
        return []

    def mean(rule: str) -> float:
        return statistics.mean(record["val_loss"] for record in records if record["rule"] == rule)

    default, fixed = mean(DEFAULT), {rule: mean(rule) for rule in FIXED.values()}
    against = {"a constant lr": fixed["constant lr"], "the best fixed rule": min(fixed.values())}
    title = "demo's ramp, validation loss of the default minus that of"
    return [
        target(f"{title} {name}, nats per byte", default - loss, 0.0, "make bench-demo")
        for name, loss in against.items()
    ]


def save(records: list[dict[str, Any]]) -> None:
    """Write what there is, after every run: half an hour is long."""
    records.sort(key=lambda record: (record["seed"], list(RULES.values()).index(record["rule"])))
    write(RESULTS, targets(records), records=records)
    (RESULTS / "table.md").write_text(table(records) + "\n")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, nothing written")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in SEEDS[: 1 if options.quick else None]:
            for name in RULES:
                begin = time.perf_counter()
                flags = ["--law" if name in FIXED else "--objective", name]
                arguments = ["--seed", str(seed), "--output", f"{directory}/{name}-{seed}", *flags]
                picture = stdlib_transformer.main([*arguments, *(["--fast"] if options.quick else [])])
                run = read_run(picture.parent, also=["val_loss"])
                rows = stages(run)
                seconds = round(time.perf_counter() - begin, 1)
                record = {"rule": RULES[name], "seed": seed, "val_loss": rows[-1].val_loss}
                record |= {"seconds": seconds, "commit": commit()}
                records.append(record | {"stages": [row._asdict() for row in rows]})
                if not options.quick:
                    save(records)
    print("\nFinal validation loss, nats per byte\n\n" + table(records))


if __name__ == "__main__":
    main()
