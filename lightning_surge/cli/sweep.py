"""`lightning-surge sweep`: train a grid of batch sizes and learning rates, for `lightning-surge fit`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_surge.checking.answers import aligned
from lightning_surge.checking.libraries import needed
from lightning_surge.cli.command import Command
from lightning_surge.sweep.cells import Cell, Grid, Outcome, SweepSettings, best_lr, parse_numbers, planned
from lightning_surge.tables.study import local_file, write_study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_surge.sweep.run import CellProcess
    from lightning_surge.sweep.study import SweepStudy

# Learning rates that --refine without a number may add to a batch size.
REFINEMENTS = 4
# Validations per cell: with targets, what is between two of them is interpolated.
CHECKS, CHECKS_WITH_TARGETS = 10, 50
LEAST = {
    "seeds": 1, "examples": 1, "steps": 1, "checks": 1, "smoothing": 0, "max_micro_batch_size": 1,
    "replicas": 1, "refine": 0, "processes": 0,
}  # fmt: skip

EXAMPLES = """examples:
  lightning-surge sweep --config run.yaml --batch-sizes 16 64 256 --lrs 1e-4:1e-1:7 --examples 500000
  lightning-surge sweep --config run.yaml --batch-sizes 16:1024:4 --lrs 1e-3:1e-1:5 --seeds 3 --refine \\
      --examples 500000 --target-loss 0.5 0.3 --processes 2 --output sweep.csv
  lightning-surge sweep ... --dry-run      what would run, and with which keys

The same command goes on where it was stopped, by Ctrl-C or by a kill. Started several times, with
--study URL on several machines, it shares the cells out. Exit status: 1 if cells failed."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY"}
    add = parser.add_argument
    add("--config", dest="configs", action="append", required=True, metavar="FILE", help="of LightningCLI")
    add("--batch-sizes", nargs="+", required=True, metavar="B", help="examples per step, or first:last:count")
    add("--lrs", nargs="+", required=True, metavar="LR", help="learning rates, or first:last:count")
    add("--seeds", type=int, default=1, metavar="N", help="seeds per cell, from that of the configuration on")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--examples", type=float, metavar="N", help="per cell, whatever its batch size")
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps per cell instead")
    add("--metric", default="val_loss", help="logged name, or 'loss' for what training_step returns")
    add("--maximize", action="store_true", help="larger is better, as for an accuracy")
    add("--target-loss", dest="targets", type=float, nargs="+", default=[], metavar="L",
        help="record when it is reached")  # fmt: skip
    add("--stop-at-target", action="store_true", help="end a cell when it has reached all of them")
    add("--checks", type=int, metavar="N", help="validations per cell (10; 50 with targets)")
    add("--smoothing", type=float, metavar="N", help="examples to average a training loss over (1/50 cell)")
    add("--refine", nargs="?", type=int, const=REFINEMENTS, default=0, metavar="N",
        help=f"add up to N ({REFINEMENTS}) learning rates where the best one is at the edge")  # fmt: skip
    add = parser.add_argument_group("the configuration").add_argument
    add("--batch-size-key", metavar="KEY", help="where it has the DataLoader's batch size")
    add("--lr-key", metavar="KEY", help="where it has the learning rate")
    add("--steps-key", dest="steps_keys", **several, help="also gets the steps of the cell")
    add("--examples-key", dest="examples_keys", **several, help="also gets the examples of the cell")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--max-micro-batch-size", type=int, metavar="N", help="what fits into memory; more is accumulated")
    add("--replicas", type=int, default=1, metavar="N", help="data-parallel replicas of the Trainer")
    add("--batch-size-fn", metavar="PATH", help="function that counts the examples in a batch")
    add("--model-class", metavar="PATH", help="where `model` has no class_path")
    add("--data-class", metavar="PATH", help="where `data` has no class_path")
    add("--cli-class", metavar="PATH", help="an own LightningCLI")
    add = parser.add_argument_group("running").add_argument
    add("--processes", type=int, metavar="N", help="cells at a time (1, or one per device); 0: in this one")
    add("--devices", nargs="+", metavar="ID", help="CUDA devices to share out among the processes")
    add("--output", type=Path, default=Path("sweep.csv"), metavar="FILE", help="table, default %(default)s")
    add("--study", metavar="FILE|URL", help="of Optuna: journal (sweep.study.log) or database")
    add("--extend", action="store_true", help="the study exists and gets another grid")
    add("--retry-failed", action="store_true", help="run again what was killed, failed or out of memory")
    add("--dry-run", action="store_true", help="say what would run")
    add("--json", action="store_true", help="the result as JSON")


def _run(options: argparse.Namespace) -> int | None:
    output: Path = options.output
    options.study = options.study or str(output.with_suffix(".study.log"))
    settings, grid = _checked(options)
    # Imported here: they need Lightning, which other commands do not.
    with needed("A sweep needs Optuna, which keeps the study", "'lightning-surge[sweep]'"):
        from lightning_surge.sweep.study import SweepStudy
    from lightning_surge.sweep.config import read_config

    settings, grid = read_config(settings, grid)
    done: Mapping[Cell, Outcome] = {}
    file = local_file(options.study)
    exists = file is not None and file.exists()
    if output.exists() and file is not None and not exists and not options.dry_run:
        raise ValueError(
            f"Expected {output} to be new, got a file without its study {options.study}: choose another "
            "--output."
        )
    if exists or not options.dry_run:
        study = SweepStudy(options.study, output.stem, maximize=settings.maximize)
        study.begin(settings, grid.cells(), extend=options.extend, dry=options.dry_run)
        done = study.records()
    if options.dry_run:
        _print_plan(options, settings, grid, done)
        return None
    return _print_result(options, _sweep(options, settings, grid, study))


def _checked(options: argparse.Namespace) -> tuple[SweepSettings, Grid]:
    """What was typed, checked as far as it can be without the configuration."""
    if options.processes is None:
        options.processes = len(options.devices or "1")
    if options.checks is None:
        options.checks = CHECKS_WITH_TARGETS if options.targets else CHECKS
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < 1e15:
            raise ValueError(f"Expected --{name.replace('_', '-')} of at least {least}, got {value:g}.")
    if options.stop_at_target and not options.targets:
        raise ValueError("Expected --target-loss with --stop-at-target, got none.")
    if wrong := [loss for loss in options.targets if not math.isfinite(loss)]:
        raise ValueError(f"Expected --target-loss to be finite, got {wrong[0]}: name a loss.")
    options.targets = sorted(set(options.targets), reverse=not options.maximize)
    options.examples = None if options.examples is None else round(options.examples)
    sizes = tuple(int(size) for size in parse_numbers(options.batch_sizes, "--batch-sizes", whole=True))
    if options.examples is not None and options.examples < sizes[-1]:
        raise ValueError(
            f"Expected at least one step per cell, got --examples {options.examples} and a batch size of "
            f"{sizes[-1]}: use more examples."
        )
    names = [field.name for field in fields(SweepSettings) if getattr(options, field.name, None) is not None]
    settings = SweepSettings(**{name: getattr(options, name) for name in names})
    for size in sizes:
        settings.micro_batches_of(size)
    return settings, Grid(sizes, parse_numbers(options.lrs, "--lrs"), tuple(range(options.seeds)))


def _sweep(
    options: argparse.Namespace, settings: SweepSettings, grid: Grid, study: SweepStudy
) -> dict[Cell, Outcome]:
    from optuna.storages._heartbeat import get_heartbeat_thread

    from lightning_surge.sweep.run import CellProcess, run_cells

    ended = study.records()
    progress = Progress(options.output, ended)
    progress.say(f"batch size: {settings.batch_size_key}, learning rate: {settings.lr_key}")
    if settings.left_out:
        progress.say(f"cells go without {', '.join(settings.left_out)} of the configuration")
    if ended:
        progress.say(f"{len(ended)} finished cells found in {options.study}")

    wanted = {"refine": options.refine, "targets": settings.targets, "maximize": settings.maximize}
    plan = partial(planned, grid, **wanted)

    def start(trial: FrozenTrial, slot: int) -> CellProcess | None:
        cell = Cell(**trial.params)
        if options.processes == 0:
            from lightning_surge.sweep.worker import run_cell

            outcome = None
            try:
                # Standard output is for the result.
                with get_heartbeat_thread(trial._trial_id, study.storage), redirect_stdout(sys.stderr):
                    outcome = run_cell(settings, cell)
            finally:
                study.tell(trial._trial_id, outcome)
            return None
        environment = {}
        if options.devices:
            environment["CUDA_VISIBLE_DEVICES"] = options.devices[slot % len(options.devices)]
        if "OMP_NUM_THREADS" not in os.environ:
            # Cells that run side by side would otherwise each take all cores.
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.processes))
        order = {"where": options.study, "name": options.output.stem, "trial": trial._trial_id}
        log = options.output.with_suffix(".logs") / f"trial-{trial.number}.log"
        return CellProcess(order | {"settings": asdict(settings), "cell": cell}, log, environment)

    again = [cell for cell, outcome in ended.items() if options.retry_failed and not outcome.is_answer]
    slots = max(1, options.processes)
    try:
        return run_cells(study, plan, start, slots=slots, again=again, look=progress.look, say=progress.say)
    except KeyboardInterrupt:
        progress.say(f"stopped; what has finished is in {options.study}, the same command goes on")
        raise


def _print_plan(
    options: argparse.Namespace, settings: SweepSettings, grid: Grid, done: Collection[Cell]
) -> None:
    plan = []
    for size in grid.batch_sizes:
        parts = settings.micro_batches_of(size)
        row = {"batch_size": size, "micro_batch": size // (parts * settings.replicas), "accumulated": parts}
        plan.append(row | {"steps": settings.steps_of(size), "examples": settings.examples_of(size)})
    keys = {"batch_size_key": settings.batch_size_key, "lr_key": settings.lr_key}
    files = {"table": str(options.output), "study": options.study}
    count, finished = len(grid.cells()), len(set(grid.cells()).intersection(done))
    if options.json:
        cells = {"without": settings.left_out, "plan": plan, "cells": count, "finished": finished}
        print(json.dumps(keys | grid._asdict() | cells | files, indent=1))
        return
    print("batch size: {batch_size_key}, learning rate: {lr_key}".format(**keys))
    print(f"learning rates: {', '.join(f'{lr:g}' for lr in grid.lrs)}")
    print(f"seeds: {', '.join(map(str, grid.seeds))}")
    if settings.left_out:
        print(f"without: {', '.join(settings.left_out)}")
    titles = ["batch size", "micro-batch", "accumulated", "steps", "examples"]
    print(*aligned([titles, *([str(each) for each in row.values()] for row in plan)]), sep="\n")
    print(f"{count} cells, {finished} of them finished; table: {options.output}")


def _print_result(options: argparse.Namespace, records: Mapping[Cell, Outcome]) -> int:
    """Print the best learning rates and how many cells failed; return the exit status."""
    table, sizes = str(options.output), sorted({cell.batch_size for cell in records})
    found = [
        best_lr(records, size, target, maximize=options.maximize)
        for target in options.targets or (None,)
        for size in sizes
    ]
    best = [each for each in found if each is not None]
    cells = Counter(outcome.status for outcome in records.values())
    failed = Counter(outcome.status for outcome in records.values() if not outcome.is_answer)
    if not best:
        reasons = sorted({outcome.message for outcome in records.values() if outcome.message})[:3]
        remedy = "use smaller learning rates" if cells["diverged"] else "remedy that and pass --retry-failed"
        raise ValueError(
            f"Expected cells that finish, got none of {len(records)}, see {table} ({'; '.join(reasons)}): "
            f"{remedy}."
        )
    fit = shlex.join(["lightning-surge", "fit", table, *["--maximize"] * options.maximize])
    if options.json:
        answer = {"table": table, "cells": dict(sorted(cells.items())), "failed": failed.total()}
        print(json.dumps(answer | {"best": [each._asdict() for each in best], "fit": fit}, indent=1))
        return int(bool(failed))
    rows = [["batch size", "best lr", "loss", *(["target", "steps"] if options.targets else []), ""]]
    for each in best:
        reached = "never" if each.steps is None else f"{each.steps:g}"
        steps = [] if each.target is None else [f"{each.target:g}", reached]
        edge = f"{each.edge} tried: --refine goes beyond" if each.edge else ""
        rows.append([str(each.batch_size), f"{each.lr:.4g}", f"{each.loss:.5g}", *steps, edge])
    print(f"table: {table}", *aligned(rows, left=[len(rows[0]) - 1]), sep="\n")
    if failed:
        kinds = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in sorted(failed.items()))
        print(f"without a loss: {kinds}, of {len(records)} cells; --retry-failed runs them again")
    print(f"next: {fit}")
    return int(bool(failed))


class Progress:
    """A line for every cell that ends besides those `ended`, with the time left; and the table."""

    def __init__(self, table: Path, ended: Collection[Cell]) -> None:
        self._table = table
        self._ended, self._written = set(ended), False
        self._said = ""

    def say(self, text: str) -> None:
        """Print a line, unless it was the last one."""
        if text != self._said:
            print(text, file=sys.stderr, flush=True)
        self._said = text

    def look(self, records: Mapping[Cell, Outcome], trials: Mapping[Cell, FrozenTrial]) -> None:
        """Take note of what the cells have said, and of all their trials."""
        new = [cell for cell in records if cell not in self._ended]
        if new or not self._written:
            write_study(trials.values(), self._table)
        left = sum(not trial.state.is_finished() for trial in trials.values())
        running = sum(trial.state.name == "RUNNING" for trial in trials.values())
        spent = [outcome.seconds for outcome in records.values() if outcome.status == "finished"]
        about = f", about {_duration(fmean(spent) * left / max(1, running))}" if spent and left else ""
        for cell in new:
            outcome = records[cell]
            said = outcome.status.replace("_", " ") if outcome.loss is None else f"loss {outcome.loss:.5g}"
            said += f" ({outcome.message})" if outcome.message else ""
            done = f"{len(records)} done, {left or 'none'} left{about}"
            self.say(f"{cell}: {said}, {_duration(outcome.seconds)}; {done}")
        self._ended, self._written = set(records), True


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


SUMMARY = "Train a grid of batch sizes and learning rates from a LightningCLI configuration."
SWEEP = Command("sweep", SUMMARY, EXAMPLES, _add_arguments, _run)
