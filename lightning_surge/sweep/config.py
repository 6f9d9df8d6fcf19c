"""A training as LightningCLI configures it: where it holds what a sweep varies, and what cells go without."""

from __future__ import annotations

import hashlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.imports import RequirementCache

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.callbacks.surge_lr import SurgeLRCallback
from lightning_surge.sweep.cells import Cell, Grid, SweepError, SweepSettings

# Where configurations hold them, best guess first. An `optimizer` beside the model replaces the model's own.
LR_OWNERS = (
    "optimizer.init_args", "optimizer", "model.init_args", "model",
    "model.init_args.optimizer.init_args", "model.optimizer.init_args",
)  # fmt: skip
LR_KEYS = tuple(f"{owner}.{name}" for name in ("lr", "learning_rate") for owner in LR_OWNERS)
BATCH_SIZE_KEYS = tuple(
    f"{owner}.{name}"
    for name in ("batch_size", "train_batch_size", "micro_batch_size")
    for owner in ("data.init_args", "data", "model.init_args", "model")
)
ROOTS = ("data", "model", "optimizer", "lr_scheduler")
# Callbacks that change the batch size or the learning rate, end a run early, or write checkpoints.
LEFT_OUT: tuple[type[pl.Callback], ...] = (
    SurgeLRCallback, BatchSizeScheduler, callbacks.GradientAccumulationScheduler, callbacks.BatchSizeFinder,
    callbacks.LearningRateFinder, callbacks.EarlyStopping, callbacks.Checkpoint, callbacks.Timer,
    callbacks.ProgressBar, callbacks.ModelSummary,
)  # fmt: skip


class _Parsed(Exception):
    """Ends a LightningCLI when it has read its arguments."""


def imported(path: str, name: str) -> Any:
    """What a dotted path means; a SweepError that names the argument if there is no such thing."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SweepError(
            f"Expected {name} to be the dotted path of something that can be imported from here, got "
            f"{path!r} ({error}): run the sweep where `python main.py fit` runs."
        ) from error


def cell_cli(settings: SweepSettings, cell: Cell | None, recorder: pl.Callback | None = None) -> LightningCLI:
    """Run the user's LightningCLI, or Lightning's, on a cell; without a recorder only read the arguments."""
    if not RequirementCache("jsonargparse[signatures]>=4.39"):
        raise SweepError(
            "Expected jsonargparse[signatures], which reads LightningCLI configurations, got an environment "
            "without it: pip install 'lightning-surge[cli]'."
        )
    # As `python main.py` has it.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    base = LightningCLI if settings.cli_class is None else imported(settings.cli_class, "--cli-class")
    if not (isinstance(base, type) and issubclass(base, LightningCLI)):
        raise SweepError(f"Expected --cli-class to be a LightningCLI, got {settings.cli_class}.")

    class CellCLI(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": base.subcommands()["fit"]}  # other commands take time to build

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            if recorder is None:
                raise _Parsed(self.config.fit, parser.dump(self.config, skip_none=False))

        def instantiate_trainer(self, **options: Any) -> pl.Trainer:
            # A logger that writes nothing, since callbacks may ask for one.
            trainer: Any = super().instantiate_trainer(**options, logger=DummyLogger())
            kept = [callback for callback in trainer.callbacks if not isinstance(callback, LEFT_OUT)]
            trainer.callbacks = [*kept, recorder]
            return trainer  # type: ignore[no-any-return]

    classes = {
        "model_class": settings.model_class and imported(settings.model_class, "--model-class"),
        "datamodule_class": settings.data_class and imported(settings.data_class, "--data-class"),
        # Errors as exceptions, not as a usage message and the end of the process.
        "parser_kwargs": {"exit_on_error": False, "fit": {"exit_on_error": False}},
    }
    with warnings.catch_warnings():
        # What it says about arguments that do not come from the command line.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
        configs = [word for path in settings.configs for word in ("--config", path)]
        words = ["fit", *configs, *(f"--{override}" for override in settings.overrides)]
        words += [] if cell is None else _cell_arguments(settings, cell)
        return CellCLI(args=words, save_config_callback=None, **classes)


def _cell_arguments(settings: SweepSettings, cell: Cell) -> list[str]:
    """What the command line of one cell adds."""
    steps = settings.steps_of(cell.batch_size)
    accumulation = settings.micro_batches_of(cell.batch_size)
    values: dict[str, object] = {
        "seed_everything": cell.seed,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        **dict.fromkeys(("trainer.min_steps", "trainer.min_epochs", "trainer.max_time"), "null"),
        "trainer.fast_dev_run": "false",
        "trainer.accumulate_grad_batches": accumulation,
        # In batches, across epochs: those of large batches may be shorter than any interval.
        "trainer.val_check_interval": max(1, round(steps / settings.checks)) * accumulation,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false",
        **dict.fromkeys(settings.steps_keys, steps),
        **dict.fromkeys(settings.examples_keys, settings.examples_of(cell.batch_size)),
        settings.batch_size_key: cell.batch_size // (accumulation * settings.replicas),
        settings.lr_key: cell.lr,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def _parse(settings: SweepSettings, cell: Cell | None = None) -> tuple[Any, str]:
    """The configuration of `fit`, and all of it as text; nothing is built."""
    try:
        cell_cli(settings, cell)
    except _Parsed as parsed:
        return parsed.args[0], parsed.args[1]
    except (SystemExit, Exception) as error:
        if isinstance(error, SweepError):
            raise
        hint = "\nWhere main.py has LightningCLI(Model, Data), pass --model-class and --data-class too."
        raise SweepError(
            f"Expected a configuration that `fit` takes, got one that LightningCLI refuses: {error}"
            + ("" if settings.cli_class or settings.model_class else hint)
        ) from error
    raise AssertionError("a LightningCLI that parses no arguments")


def files_digest(paths: Sequence[str]) -> str:
    """Digest of configuration files as they are; a SweepError if one cannot be read."""
    try:
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
    except OSError as error:
        raise SweepError(
            f"Expected --config to be a file, got {error.filename} ({error.strerror})."
        ) from error


def read_config(settings: SweepSettings, grid: Grid) -> tuple[SweepSettings, Grid]:
    """Complete both from a configuration, nothing of which is built; a SweepError if no sweep can take it."""
    digest = files_digest(settings.configs)
    config, text = _parse(settings)
    if config.get("ckpt_path"):
        raise SweepError(
            f"Expected cells that start afresh, got ckpt_path={config['ckpt_path']!r} in the configuration: "
            "take it out, and load weights in the model's __init__ to start from them."
        )
    keys = tuple(
        key
        for key, value in config.items()
        if key.partition(".")[0] in ROOTS and not key.endswith("class_path") and not isinstance(value, dict)
    )

    def chosen(name: str, wanted: str, usual: Sequence[str] = ()) -> str:
        key = wanted or next((key for key in usual if key in keys), "")
        if key not in keys:
            got = repr(key) if key or not usual else f"no usual one (such as {usual[0].rpartition('.')[2]})"
            raise SweepError(
                f"Expected {name} to be a key of the configuration, got {got}: the classes in it take "
                f"{', '.join(keys) or 'no arguments'}."
            )
        return key

    for key in (*settings.steps_keys, *settings.examples_keys):
        chosen("--steps-key and --examples-key", key)
    found = config.get("trainer.callbacks") or []
    found = found if isinstance(found, list) else [found]
    kinds = [imported(entry["class_path"], "the class_path of a callback") for entry in found]
    settings = replace(
        settings,
        config_digest=hashlib.sha256(text.encode()).hexdigest()[:12],
        files_digest=digest,
        batch_size_key=chosen("--batch-size-key", settings.batch_size_key, BATCH_SIZE_KEYS),
        lr_key=chosen("--lr-key", settings.lr_key, LR_KEYS),
        left_out=tuple(kind.__name__ for kind in kinds if issubclass(kind, LEFT_OUT)),
    )
    first = config.get("seed_everything")
    first = first if isinstance(first, int) and not isinstance(first, bool) else 0
    grid = grid._replace(seeds=tuple(first + seed for seed in grid.seeds))
    _parse(settings, grid.cells()[0])  # whether it takes what a cell would give it
    return settings, grid
