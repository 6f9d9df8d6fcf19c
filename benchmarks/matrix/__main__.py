"""Run the tests with the oldest and the newest versions that pyproject.toml claims; write down what passed.

    python -m benchmarks.matrix            # both, and write results/summary.md
    python -m benchmarks.matrix oldest     # one of them, and write nothing

The oldest are pyproject.toml's own lower bounds, so that what it claims is what was run. The newest are those
of constraints.txt. Each has an environment of its own under .matrix/, kept for the next time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
TESTS = (
    "tests/project/test_lightning_contract.py",
    "tests/callbacks/test_surge_lr.py",
    "tests/callbacks/test_surge_lr_lifecycle.py",
    "tests/callbacks/test_batch_size_scheduler.py",
    "tests/callbacks/test_resumed_runs.py",
    "tests/callbacks/test_several_optimizers.py",
    "tests/callbacks/test_other_callbacks.py",
    "tests/project/test_imports.py",
)
SHOWN = ("lightning", "torch", "numpy", "scipy")
# Other versions deprecate other things; that is not what this is about.
PYTEST = ("-q", "--no-header", "-p", "no:cacheprovider", "--durations=0", "-o", "filterwarnings=default")


class Outcome(NamedTuple):
    """What one set of versions led to."""

    name: str
    versions: dict[str, str]
    passed: bool
    last_line: str


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def oldest() -> dict[str, str]:
    """The lower bounds that users get, with the tools that the tests are written for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"])
    lower = {bound[1]: bound[2] for bound in bounds if bound is not None}
    return pinned() | lower | {"pytorch-lightning": lower["lightning"]}


def newest() -> dict[str, str]:
    """What this repository is developed with."""
    return pinned() | {"pytorch-lightning": pinned()["lightning"]}


CELLS = {"oldest": oldest, "newest": newest}


def python_with(name: str, versions: dict[str, str]) -> Path:
    """An interpreter that has these versions; built once, and again when they change."""
    folder = ROOT / ".matrix" / name
    python, stamp = folder / "bin" / "python", folder / "constraints.txt"
    wanted = "".join(f"{package}=={version}\n" for package, version in versions.items())
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"building {folder}: minutes", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        constraints = folder / "wanted.txt"
        constraints.write_text(wanted)
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", constraints]
        subprocess.run([*command, "-e", f"{ROOT}[test]"], check=True)
        constraints.rename(stamp)
    return python


def run(name: str, tests: Sequence[str]) -> Outcome:
    """Run the tests with one set of versions."""
    python = python_with(name, CELLS[name]())
    listed = "; ".join(f"print('{package}', version('{package}'))" for package in SHOWN)
    code = f"from importlib.metadata import version; {listed}"
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    versions = dict(line.split() for line in lines.splitlines())
    print(name, versions, flush=True)
    done = subprocess.run(
        [python, "-m", "pytest", *PYTEST, *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    last = re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1]).strip("= ")
    return Outcome(name, versions, done.returncode == 0, last)


def table(outcomes: Sequence[Outcome]) -> str:
    """The results as a Markdown page."""
    python = ".".join(map(str, sys.version_info[:2]))
    rows = [
        f"| {one.name} | {python} | " + " | ".join(one.versions[package] for package in SHOWN)
        + f" | {'passed' if one.passed else 'failed'}: {one.last_line} |"
        for one in outcomes
    ]  # fmt: skip
    head = f"| | Python | {' | '.join(SHOWN)} | outcome |"
    lines = [
        "Versions that were run (`make test-matrix`): the oldest that `pyproject.toml` claims, and those of "
        "`constraints.txt`.",
        "",
        head,
        "|---" * (len(SHOWN) + 3) + "|",
        *rows,
        "",
        f"Tests: {', '.join(f'`{Path(test).stem}`' for test in TESTS)}; warnings are not errors here.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CELLS)}; all if left out")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files to run in place of the chosen ones")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CELLS):
        parser.error(f"Expected names of {', '.join(CELLS)}, got {', '.join(sorted(unknown))}.")
    outcomes = [run(name, options.tests) for name in options.names or CELLS]
    if not options.names and tuple(options.tests) == TESTS:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "summary.md").write_text(table(outcomes))
        print(table(outcomes))
    return 0 if all(one.passed for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
