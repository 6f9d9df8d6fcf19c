"""Where a benchmark's numbers go: `summary.json`, with one row per target, and a page of Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lightning-surge", "lightning", "torch", "numpy", "scipy")


def target(
    name: str, value: float, bound: float, command: str, *, better: str = "lower", **details: Any
) -> dict[str, Any]:
    """A row of the summary, `better` being "lower" or "higher"; NaN, nothing measured, meets nothing."""
    met = bool(value <= bound if better == "lower" else value >= bound)
    row = {"name": name, "value": round(value, 4), "bound": bound, "better": better, "met": met}
    return row | details | {"command": command}


def finite(value: Any) -> Any:
    """The same structure with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """Hardware and versions behind the numbers."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def commit() -> str | None:
    """The commit that was measured, with a mark if code differed from it; None outside a clone.

    Results do not count: writing them is what a benchmark does.
    """
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    code = [".", ":(exclude,glob)benchmarks/*/results/**"]
    try:
        name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def measured_at(records: Iterable[Mapping[str, Any]]) -> str:
    """The commits of records, each of which has its own: a run of some leaves the others as they were."""
    return f"Measured at {', '.join(dict.fromkeys(str(record['commit']) for record in records))}."


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def write(directory: Path, targets: Sequence[dict[str, Any]], **raw: Any) -> None:
    """Write `summary.json`, the machine, the targets and what else there is; print the targets."""
    directory.mkdir(parents=True, exist_ok=True)
    found = finite({"machine": machine(), "targets": list(targets), **raw})
    (directory / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    for entry in targets:
        sign = "at most" if entry["better"] == "lower" else "at least"
        verdict = "met" if entry["met"] else "MISSED"
        print(f"{entry['value']:9.4f}  {sign} {entry['bound']:<7g} {verdict:7} {entry['name']}")
    print(f"written to {directory}")


def write_page(directory: Path, sections: Mapping[str, str]) -> None:
    """Write `report.md`, each section under a heading by which `benchmarks.publish` finds it."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"## {name}\n\n{section}" for name, section in sections.items())
    (directory / "report.md").write_text(text + "\n")
