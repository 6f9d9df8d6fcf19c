"""Run the tests with the versions that pyproject.toml claims; write down what passed.

    python -m benchmarks.matrix                # all, and write results/summary.md
    python -m benchmarks.matrix newest-3.13    # one of them, and write its row

The oldest are pyproject.toml's own lower bounds, so that what it claims is what was run; where only a new
torch can be had, `oldest_but_torch` has all others. The newest are those of constraints.txt, on every Python
of which an interpreter is at hand (on the PATH, or pyenv's). Each has an environment of its own under
.matrix/, kept for the next time. A Python belongs into the classifiers when its row says that tests passed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import commit

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
TESTS = (
    "tests/project/test_lightning_contract.py",
    "tests/callbacks/test_surge_lr.py",
    "tests/callbacks/test_surge_lr_lifecycle.py",
    "tests/callbacks/test_batch_size_scheduler.py",
    "tests/callbacks/resuming/test_resumed_runs.py",
    "tests/callbacks/test_several_optimizers.py",
    "tests/callbacks/test_other_callbacks.py",
    "tests/project/test_imports.py",
)
TOOLS = ("test", "docs", "dev")
SHOWN = ("lightning", "torch", "numpy", "scipy")
# Other versions deprecate other things; that is not what this is about.
PYTEST = ("-q", "--no-header", "-p", "no:cacheprovider", "--durations=0", "-o", "filterwarnings=default")


class Outcome(NamedTuple):
    """What one set of versions led to."""

    name: str
    versions: dict[str, str]
    passed: bool
    last_line: str
    commit: str | None


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def oldest() -> dict[str, str]:
    """The lower bounds that users get, of the extras too, with the tools that the tests are written for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in TOOLS}
    wanted = [*project["dependencies"], *itertools.chain(*extras.values())]
    bounds = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line) for line in wanted)
    lower = {bound[1]: bound[2] for bound in bounds if bound is not None}
    return pinned() | lower | {"pytorch-lightning": lower["lightning"]}


def newest() -> dict[str, str]:
    """What this repository is developed with."""
    return pinned() | {"pytorch-lightning": pinned()["lightning"]}


def oldest_but_torch() -> dict[str, str]:
    """Lower bounds without torch's, of which the registry may have no build for this machine."""
    return oldest() | {"torch": pinned()["torch"]}


PYTHONS = ("3.11", "3.12", "3.13")
LOWER = {f"{one.__name__}-{PYTHONS[0]}": one for one in (oldest, oldest_but_torch)}
CELLS = LOWER | {f"newest-{version}": newest for version in PYTHONS}


def interpreter(version: str) -> str | None:
    """A Python of that version; None if there is none."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in (shutil.which(f"python{version}"), *map(str, kept)):
        # pyenv puts a stand-in on the PATH for versions that are switched off.
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def python_with(name: str, versions: dict[str, str], basis: str) -> Path:
    """An interpreter that has these versions; built once, and again when they change."""
    folder = ROOT / ".matrix" / name
    python, stamp = folder / "bin" / "python", folder / "constraints.txt"
    wanted = "".join(f"{package}=={version}\n" for package, version in versions.items())
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"building {folder}: minutes", flush=True)
        subprocess.run([basis, "-m", "venv", "--clear", folder], check=True)
        constraints = folder / "wanted.txt"
        constraints.write_text(wanted)
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", constraints]
        subprocess.run([*command, "-e", f"{ROOT}[test]"], check=True)
        constraints.rename(stamp)
    return python


def run(name: str, tests: Sequence[str]) -> Outcome:
    """Run the tests with one set of versions."""
    basis = interpreter(name.partition("-")[2])
    if basis is None:
        return Outcome(name, {}, True, "not run: no interpreter at hand", commit())
    python = python_with(name, CELLS[name](), basis)
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
    return Outcome(name, versions, done.returncode == 0, last, commit())


def row(one: Outcome) -> str:
    """One line of the table."""
    name, _, python = one.name.partition("-")
    versions = " | ".join(one.versions.get(package, "-") for package in SHOWN)
    outcome = one.last_line if one.passed else f"failed: {one.last_line}"
    return f"| {name.replace('_', ' ')} | {python} | {versions} | {one.commit} | {outcome} |"


def page(outcomes: Sequence[Outcome], before: str) -> str:
    """The results as Markdown; what was not run now keeps its row."""
    rows = {
        tuple(line.split(" | ")[:2]): line for line in before.splitlines() if line.startswith(("| o", "| n"))
    }
    rows |= {tuple(line.split(" | ")[:2]): line for line in map(row, outcomes)}
    lines = [
        "Versions that were run (`make test-matrix`): the oldest that `pyproject.toml` claims, and those of "
        "`constraints.txt`. What has no row was not run.",
        "",
        f"| | Python | {' | '.join(SHOWN)} | commit | outcome |",
        "|---" * (len(SHOWN) + 4) + "|",
        *(rows[key] for key in sorted(rows, key=lambda key: (not key[0].startswith("| oldest"), key))),
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
    if tuple(options.tests) == TESTS:
        summary = RESULTS / "summary.md"
        summary.write_text(page(outcomes, summary.read_text() if summary.exists() else ""))
    return 0 if all(one.passed for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
