"""Where a benchmark's numbers go: raw JSON, and a summary with one row per target."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lightning-surge", "lightning", "torch", "numpy", "scipy")


def row(name: str, value: float, bound: float, command: str) -> dict[str, Any]:
    """One target, met if the value is at most the bound."""
    return {
        "name": name,
        "value": round(value, 4),
        "bound": bound,
        "better": "lower",
        "met": value <= bound,
        "command": command,
    }


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


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def write(directory: Path, raw: dict[str, Any], summary: Sequence[dict[str, Any]]) -> None:
    """Write `raw.json` and `summary.json`, and print the summary."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "raw.json").write_text(json.dumps(finite({"machine": machine(), **raw}), indent=1) + "\n")
    (directory / "summary.json").write_text(json.dumps(list(summary), indent=1) + "\n")
    width = max(len(entry["name"]) for entry in summary)
    for entry in summary:
        verdict = "met" if entry["met"] else "MISSED"
        print(f"{entry['name']:{width}}  {entry['value']:8.4f}  at most {entry['bound']:<6g}  {verdict}")
    print(f"written to {directory}")
