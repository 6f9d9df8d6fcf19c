"""Run the callback inside libraries that we did not write, with one added callback and nothing else changed.

    make field                               # builds .field/ with the libraries first: minutes
    python -m benchmarks.field MoCo darts      # some of them, and write nothing

Each training runs three times from the same seed: alone; with a dry run that measures at every other step;
and with a rule that doubles every learning rate. Weights and learning rates of the dry run must be those of
the run alone to the last bit. With the rule, every learning rate that an update reads must be exactly twice
the one that it reads alone. What the callback refuses is passed as its message asks, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from benchmarks.fidelity.markdown import number, table
from benchmarks.field.libraries import EXAMPLES, LIBRARIES, Library
from benchmarks.results import target, write, write_page
from lightning_surge import SurgeLRCallback

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
COMMAND = "make field"
FEWEST = 5
FACTOR = 2.0


class Watch(pl.Callback):
    """Notes what every update reads, and what there is at the end."""

    def __init__(self) -> None:
        self.read: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.left: list[float] = []
        self.optimizer = self.batch = ""
        self.started = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer: Any = trainer.optimizers[0]
        self.optimizer = f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"
        # What torch's optimizers, and transformers', read a group's learning rate with, inside the update.
        name = next(name for name in ("_init_group", "_get_lr") if hasattr(optimizer, name))
        reading = getattr(optimizer, name)

        def spy(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.read.append(float(group["lr"]))
            return reading(group, *args, **kwargs)

        setattr(optimizer, name, spy)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = kind_of(batch)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.started = True  # a refusal from here on comes too late

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.left = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]

    def equals(self, other: Watch) -> bool:
        """Whether two runs read the same learning rates and ended with the same weights, bit for bit."""
        if not self.read or (self.read, self.left) != (other.read, other.left):
            return False
        same = self.weights.keys() == other.weights.keys()
        return same and all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


def kind_of(batch: Any) -> str:
    """A batch's type, with the types in it where it is a plain list or tuple."""
    if type(batch) not in (list, tuple) or len(batch) > 3:
        return "None" if batch is None else type(batch).__name__
    return f"{type(batch).__name__}[{', '.join(map(kind_of, batch))}]"


def run(library: Library, callback: SurgeLRCallback | None) -> tuple[Watch, list[str]]:
    """Train once, and note what was said."""
    watch = Watch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pl.seed_everything(0, verbose=False)
        try:
            library.fit([watch] if callback is None else [callback, watch])
        except MisconfigurationException as error:
            if watch.started:
                raise RuntimeError("refused after the first step") from error
            raise
    return watch, [str(one.message) for one in said]


def train(
    library: Library, base: float, **settings: Any
) -> tuple[SurgeLRCallback, Watch, list[str], list[str]]:
    """Train with the callback, and with the arguments that its refusals name, which come last."""
    remedies: dict[str, Any] = {"batch_size_fn": library.count, "split_batch": False}
    given: dict[str, Any] = {}
    while True:
        callback = SurgeLRCallback(base, **settings, **given)
        try:
            return (callback, *run(library, callback), list(given))
        except MisconfigurationException as error:
            named = [name for name in remedies if f"{name}=" in str(error) and name not in given]
            if not named or remedies[named[0]] is None:
                raise
            given[named[0]] = remedies[named[0]]


class Row(NamedTuple):
    """What came of one training."""

    library: str
    version: str
    model: str
    optimizer: str
    batch: str  # its type
    asked: list[str]  # arguments that refusals named, and that were then passed
    dry_run_equal: bool
    factor_right: bool
    measurements: int  # in the dry run
    pieces: str  # what gradients were recomputed of
    passes: float  # examples passed for measurements, per example trained
    time: float  # share of wall time that they took
    updates: int  # at which the factor was looked at
    told: list[str]  # what was said in the dry run and not alone


def examine(library: Library) -> Row:
    """Train alone, twice to see that it can be repeated, then with a dry run, then with the factor.

    Raises:
        RuntimeError: if the training alone cannot be repeated, so that nothing can be compared with it.
    """
    torch.set_num_threads(1)
    base = EXAMPLES / FACTOR**2
    (alone, usual), (again, _) = run(library, None), run(library, None)
    if not again.equals(alone):
        raise RuntimeError("Expected a training that repeats itself bit for bit, got two different ones.")
    measuring, dry, said, asked = train(library, base, dry_run=True, probe_every=2)
    _, doubled, _, also_asked = train(library, base, law="sqrt")
    cut = measuring.state_dict()["measurer"]["may_split"]
    return Row(
        library=library.package,
        version=version(library.package),
        model=library.model,
        optimizer=alone.optimizer,
        batch=alone.batch,
        asked=list(dict.fromkeys([*asked, *also_asked])),
        dry_run_equal=dry.equals(alone),
        factor_right=doubled.read == [FACTOR * lr for lr in alone.read] and doubled.left == alone.left,
        measurements=measuring.history.num_measurements,
        pieces=("slices" if cut else "whole batches") if measuring.history.num_measurements else "nothing",
        passes=measuring.overhead,
        time=measuring.overhead_time,
        updates=len(doubled.read),
        told=[line for line in dict.fromkeys(said) if line not in usual],
    )


def in_its_own_process(name: str) -> Row | str:
    """One library cannot break another one's run; what went wrong if there is no row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.field", name, "--row", str(file)]
        # Some libraries write logs where they are.
        where = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        done = subprocess.run(command, capture_output=True, text=True, **where)  # type: ignore[call-overload]
        if done.returncode:
            return done.stderr.strip()
        return Row(**json.loads(file.read_text()))


def page(rows: Iterable[Row]) -> str:
    """One row per training, and below it what the callback said."""
    headers = [
        "library", "model", "optimizer", "batch", "asked for", "dry run equal", "factor right",
        "measurements", "from", "passes per example", "time",
    ]  # fmt: skip
    verdict = {True: "yes", False: "**no**"}
    shown = {"batch_size_fn": "`batch_size_fn=`", "split_batch": "`split_batch=False`"}
    lines = [
        [
            f"{row.library} {row.version}",
            row.model,
            row.optimizer,
            f"`{row.batch}`",
            ", ".join(shown[name] for name in row.asked) or "-",
            verdict[row.dry_run_equal],
            verdict[row.factor_right],
            row.measurements,
            row.pieces,
            number(row.passes),
            f"{row.time:.0%}",
        ]
        for row in rows
    ]
    told = [f"* {row.model}: {line}" for row in rows for line in row.told]
    return table(headers, lines) + (
        "\n\n## said\n\nSaid in the dry run:\n\n" + "\n".join(told) if told else ""
    )


def main() -> None:
    """Run what was asked for; everything is written down, a part is not."""
    known = ", ".join(LIBRARIES)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; all if left out")
    parser.add_argument("--row", type=Path, help="run one in this process, and write its row to a file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(LIBRARIES):
        parser.error(f"Expected names of {known}, got {', '.join(sorted(unknown))}.")
    if options.row is not None:
        options.row.write_text(json.dumps(examine(LIBRARIES[options.names[0]])._asdict()))
        return
    rows: dict[str, Row] = {}
    for name in options.names or LIBRARIES:
        found = in_its_own_process(name)
        print(name, found, sep="\n", flush=True)
        if isinstance(found, Row):
            rows[name] = found
    print(page(rows.values()))
    if not options.names:
        right = [row for row in rows.values() if row.dry_run_equal and row.factor_right]
        libraries, wrong = len({row.library for row in right}), len(LIBRARIES) - len(right)
        name = "libraries where the dry run is equal and the factor right"
        targets = [
            target(name, libraries, FEWEST, COMMAND, better="higher"),
            target("trainings where one of the two is not so", wrong, 0.0, COMMAND),
        ]
        write(RESULTS, targets, rows={name: row._asdict() for name, row in rows.items()})
        write_page(RESULTS, {"libraries": page(rows.values())})


if __name__ == "__main__":
    main()
