"""`lightning-surge sweep`: train a grid of batch sizes and learning rates, for `lightning-surge fit`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_surge.cli.command import Command, CommandError
from lightning_surge.cli.sweep_output import SweepProgress, print_plan, print_result
from lightning_surge.sweep.cells import (
    Cell,
    CellSpec,
    Grid,
    Outcome,
    Record,
    SweepError,
    SweepSettings,
)
from lightning_surge.sweep.grid import accumulation_for, parse_numbers, planned
from lightning_surge.sweep.pool import CellProcess, Job, run_cells
from lightning_surge.sweep.table import SweepTable

if TYPE_CHECKING:
    from lightning_surge.sweep.config import TrainingConfig

__all__ = ["SWEEP"]

# Learning rates that --refine without a number may add to a batch size.
REFINEMENTS = 4
# Validations per cell: with targets, what is between two of them is interpolated.
CHECKS, CHECKS_WITH_TARGETS = 10, 50

EXAMPLES = """examples:
  lightning-surge sweep --config run.yaml --batch-sizes 16 64 256 --lrs 1e-4:1e-1:7 --examples 500000
  lightning-surge sweep --config run.yaml --batch-sizes 16:1024:4 --lrs 1e-3:1e-1:5 --seeds 3 --refine \\
      --examples 500000 --target-loss 0.5 0.3 --processes 2 --output sweep.csv
  lightning-surge sweep ... --dry-run      what would run, and with which keys

The same command goes on where it was stopped, by Ctrl-C or by a kill."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="of LightningCLI; may be repeated")
    add("--batch-sizes", nargs="+", required=True, metavar="B", help="examples per step, or first:last:count")
    add("--lrs", nargs="+", required=True, metavar="LR", help="learning rates, or first:last:count")
    add("--seeds", type=int, default=1, metavar="N", help="seeds per cell, from that of the configuration on")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--examples", type=float, metavar="N", help="per cell, whatever its batch size")
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps per cell instead")
    add("--metric", default="val_loss", help="logged name, or 'loss' for what training_step returns")
    add("--target-loss", nargs="+", type=float, default=[], metavar="L", help="record when it is reached")
    add("--stop-at-target", action="store_true", help="end a cell when it has reached all of them")
    add("--checks", type=int, metavar="N", help="validations per cell (10; 50 with targets)")
    add(
        "--smoothing",
        type=float,
        metavar="N",
        help="examples a training loss is averaged over (1/50 of a cell)",
    )
    add("--refine", nargs="?", type=int, const=REFINEMENTS, default=0, metavar="N",
        help=f"add up to N ({REFINEMENTS}) learning rates where the best one is at the edge")  # fmt: skip
    places = parser.add_argument_group("the configuration")
    add = places.add_argument
    add("--batch-size-key", metavar="KEY", help="where it has the DataLoader's batch size")
    add("--lr-key", metavar="KEY", help="where it has the learning rate")
    add("--steps-key", action="append", default=[], metavar="KEY", help="also gets the steps of the cell")
    add(
        "--examples-key",
        action="append",
        default=[],
        metavar="KEY",
        help="also gets the examples of the cell",
    )
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every cell")
    add(
        "--max-micro-batch-size", type=int, metavar="N", help="what fits into memory; the rest is accumulated"
    )
    add("--replicas", type=int, default=1, metavar="N", help="data-parallel replicas of the Trainer")
    add("--batch-size-fn", metavar="PATH", help="function that counts the examples in a batch")
    add("--model-class", metavar="PATH", help="where `model` has no class_path")
    add("--data-class", metavar="PATH", help="where `data` has no class_path")
    add("--cli-class", metavar="PATH", help="an own LightningCLI")
    running = parser.add_argument_group("running")
    add = running.add_argument
    add(
        "--processes",
        type=int,
        metavar="N",
        help="cells at a time (1, or one per device); 0: in this process",
    )
    add("--devices", nargs="+", metavar="ID", help="CUDA devices to share out among the processes")
    add("--output", type=Path, default=Path("sweep.csv"), metavar="FILE", help="table, default %(default)s")
    add("--extend", action="store_true", help="the table exists and gets another grid")
    add("--retry-failed", action="store_true", help="run again what was killed, failed or out of memory")
    add("--dry-run", action="store_true", help="say what would run")
    add("--json", action="store_true", help="the result as JSON")


def _run(options: argparse.Namespace) -> None:
    try:
        settings, grid = _settings(options), _grid(options)
        settings, grid, training = _with_config(settings, grid, options)
        with SweepTable(options.output) as table:
            announce = table.read(settings, grid, extend=options.extend)
            if options.dry_run:
                print_plan(settings, grid, training, table)
                return
            table.begin(settings, grid, announce=announce)
            records = _sweep(options, settings, grid, training, table)
    except (SweepError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print_result(options.output, settings, records, as_json=options.json)


def _settings(options: argparse.Namespace) -> SweepSettings:
    """What was typed, checked as far as it can be without the configuration."""
    checks = CHECKS_WITH_TARGETS if options.target_loss else CHECKS
    checks = checks if options.checks is None else options.checks
    if options.processes is None:
        options.processes = len(options.devices or "1")
    for name, value, least in (
        ("--seeds", options.seeds, 1),
        ("--examples", options.examples, 1),
        ("--steps", options.steps, 1),
        ("--checks", checks, 1),
        ("--refine", options.refine, 0),
        ("--max-micro-batch-size", options.max_micro_batch_size, 1),
        ("--replicas", options.replicas, 1),
        ("--processes", options.processes, 0),
    ):
        if value is not None and not value >= least:
            raise ValueError(f"Expected {name} of at least {least}, got {value:g}.")
    if options.stop_at_target and not options.target_loss:
        raise ValueError("Expected --target-loss with --stop-at-target, got none.")
    return SweepSettings(
        configs=tuple(options.config),
        overrides=tuple(options.set),
        steps_keys=tuple(options.steps_key),
        examples_keys=tuple(options.examples_key),
        examples=None if options.examples is None else round(options.examples),
        steps=options.steps,
        metric=options.metric,
        targets=tuple(sorted(set(options.target_loss), reverse=True)),
        stop_at_target=options.stop_at_target,
        checks=checks,
        smoothing=options.smoothing,
        max_micro_batch_size=options.max_micro_batch_size,
        replicas=options.replicas,
        batch_size_fn=options.batch_size_fn,
        model_class=options.model_class,
        data_class=options.data_class,
        cli_class=options.cli_class,
    )


def _grid(options: argparse.Namespace) -> Grid:
    sizes = tuple(int(size) for size in parse_numbers(options.batch_sizes, "--batch-sizes", whole=True))
    for size in sizes:
        accumulation_for(size, largest=options.max_micro_batch_size, replicas=options.replicas)
    if options.examples is not None and options.examples < sizes[-1]:
        raise ValueError(
            f"Expected at least one step per cell, got --examples {options.examples:g} and a batch size of "
            f"{sizes[-1]}: use more examples."
        )
    return Grid(sizes, parse_numbers(options.lrs, "--lrs"), tuple(range(options.seeds)))


def _with_config(
    settings: SweepSettings, grid: Grid, options: argparse.Namespace
) -> tuple[SweepSettings, Grid, TrainingConfig]:
    """The same, with what the configuration says; and that it takes what cells will give it."""
    # Imported here: it needs the parser of LightningCLI, which other commands do not.
    from lightning_surge.sweep.config import check_arguments, files_digest, read_config

    training = read_config(settings)
    settings = replace(
        settings,
        config_digest=training.digest,
        files_digest=files_digest(settings.configs),
        batch_size_key=_key("--batch-size-key", options.batch_size_key, training.batch_size_key, training),
        lr_key=_key("--lr-key", options.lr_key, training.lr_key, training),
    )
    for key in (*settings.steps_keys, *settings.examples_keys):
        _key("--steps-key and --examples-key", key, None, training)
    grid = replace(grid, seeds=tuple(training.seed + seed for seed in grid.seeds))
    check_arguments(settings, grid.cells()[0])
    return settings, grid, training


def _key(name: str, given: str | None, guess: str | None, training: TrainingConfig) -> str:
    key = given or guess
    if key is None or key not in training.keys:
        got = f"no usual one (such as {'lr' if 'lr' in name else 'batch_size'})" if key is None else repr(key)
        raise SweepError(
            f"Expected {name} to be a key of the configuration, got {got}: the classes in it take "
            f"{', '.join(training.keys) or 'no arguments'}."
        )
    return key


def _sweep(
    options: argparse.Namespace,
    settings: SweepSettings,
    grid: Grid,
    training: TrainingConfig,
    table: SweepTable,
) -> list[Record]:
    kept = [record for record in table.records if record.outcome.is_answer or not options.retry_failed]
    examples = {size: settings.examples_of(size) for size in grid.batch_sizes}
    progress = SweepProgress(sys.stderr, examples, processes=max(1, options.processes))
    progress.say(f"batch size: {settings.batch_size_key}, learning rate: {settings.lr_key}")
    if training.left_out:
        progress.say(f"cells go without {', '.join(training.left_out)} of the configuration")
    if table.damaged:
        progress.say(
            f"{table.damaged} damaged lines of {table.journal} are passed over: those cells run again"
        )
    if kept:
        progress.say(f"{len(kept)} finished cells found in {table.journal}")

    def finished(record: Record) -> None:
        table.add(record)
        progress.finished(record)

    try:
        return run_cells(
            partial(planned, grid, refine=options.refine, targets=settings.targets),
            partial(_start, options, settings, table.logs),
            kept,
            slots=max(1, options.processes),
            finished=finished,
            watch=progress.watch,
        )
    except KeyboardInterrupt:
        progress.say(f"stopped; what has finished is in {table.journal}, the same command goes on")
        raise
    finally:
        progress.close()


class _Here:
    """A cell that has run in this process."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def poll(self) -> Outcome:
        return self._outcome

    def stop(self) -> None:
        pass


def _start(options: argparse.Namespace, settings: SweepSettings, logs: Path, cell: Cell, slot: int) -> Job:
    spec = CellSpec(settings, cell)
    if options.processes == 0:
        from lightning_surge.sweep.worker import run_cell

        with redirect_stdout(sys.stderr):  # standard output is for the result
            return _Here(run_cell(spec))
    environment = {}
    if options.devices:
        environment["CUDA_VISIBLE_DEVICES"] = options.devices[slot % len(options.devices)]
    if "OMP_NUM_THREADS" not in os.environ:
        # Cells that run side by side would otherwise each take all cores.
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.processes))
    return CellProcess(spec, logs, environment)


SWEEP = Command(
    name="sweep",
    summary="Train a grid of batch sizes and learning rates from a LightningCLI configuration.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
)
