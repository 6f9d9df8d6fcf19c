"""A training as LightningCLI configures it: where it holds what a sweep varies, and what cells go without."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache

from lightning_surge.callbacks.batch_size_scheduler import BatchSizeScheduler
from lightning_surge.callbacks.surge_lr import SurgeLRCallback
from lightning_surge.sweep.cells import Cell, SweepError, SweepSettings
from lightning_surge.sweep.grid import accumulation_for

__all__ = [
    "LEFT_OUT",
    "TrainingConfig",
    "cell_arguments",
    "check_arguments",
    "cli_class",
    "cli_options",
    "cli_warnings",
    "files_digest",
    "imported",
    "read_config",
    "require_jsonargparse",
]

# Where configurations hold them, best guess first. An `optimizer` beside the model replaces the model's own.
LR_KEYS = tuple(
    key
    for name in ("lr", "learning_rate")
    for key in (
        f"optimizer.init_args.{name}",
        f"optimizer.{name}",
        f"model.init_args.{name}",
        f"model.{name}",
        f"model.init_args.optimizer.init_args.{name}",
        f"model.optimizer.init_args.{name}",
    )
)
BATCH_SIZE_KEYS = tuple(
    f"{owner}{arguments}.{name}"
    for name in ("batch_size", "train_batch_size", "micro_batch_size")
    for owner in ("data", "model")
    for arguments in (".init_args", "")
)
ROOTS = ("data", "model", "optimizer", "lr_scheduler")

# Callbacks that change the batch size or the learning rate, end a run early, or write checkpoints.
LEFT_OUT: tuple[type[pl.Callback], ...] = (
    SurgeLRCallback,
    BatchSizeScheduler,
    callbacks.GradientAccumulationScheduler,
    callbacks.BatchSizeFinder,
    callbacks.LearningRateFinder,
    callbacks.EarlyStopping,
    callbacks.Checkpoint,
    callbacks.Timer,
    callbacks.ProgressBar,
    callbacks.ModelSummary,
)


class TrainingConfig(NamedTuple):
    """What a configuration says about a sweep.

    Attributes:
        digest: of all that it says, defaults included.
        keys: places of plain values under the data, model, optimizer and schedule.
        batch_size_key: where the batch size is, if that can be told.
        lr_key: where the learning rate is, if that can be told.
        seed: the one it has, or 0.
        left_out: names of callbacks that cells go without.
    """

    digest: str
    keys: tuple[str, ...]
    batch_size_key: str | None
    lr_key: str | None
    seed: int
    left_out: tuple[str, ...]


class _Parsed(Exception):
    """Ends a LightningCLI when it has read its arguments."""


def require_jsonargparse() -> None:
    """Refuse to go on without the extra.

    Raises:
        SweepError: if it is not installed.
    """
    if not RequirementCache("jsonargparse[signatures]>=4.39"):
        raise SweepError(
            "Expected jsonargparse[signatures], which reads LightningCLI configurations, got an environment "
            "without it: pip install 'lightning-surge[cli]'."
        )


def imported(path: str, name: str) -> Any:
    """What a dotted path means.

    Raises:
        SweepError: if there is no such thing.
    """
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SweepError(
            f"Expected {name} to be the dotted path of something that can be imported from here, got "
            f"{path!r} ({error}): run the sweep where `python main.py fit` runs."
        ) from error


def cli_class(settings: SweepSettings) -> type[LightningCLI]:
    """The user's own LightningCLI, or Lightning's, with `fit` alone: other commands take time to build."""
    found = LightningCLI if settings.cli_class is None else imported(settings.cli_class, "--cli-class")
    if not (inspect.isclass(found) and issubclass(found, LightningCLI)):
        raise SweepError(f"Expected --cli-class to be a LightningCLI, got {settings.cli_class}.")

    class FitCLI(found):  # type: ignore[misc, valid-type]
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": found.subcommands()["fit"]}

    return FitCLI


def cli_options(settings: SweepSettings) -> dict[str, Any]:
    """What a LightningCLI is made with beside its arguments."""
    options: dict[str, Any] = {"save_config_callback": None}
    if settings.model_class is not None:
        options["model_class"] = imported(settings.model_class, "--model-class")
    if settings.data_class is not None:
        options["datamodule_class"] = imported(settings.data_class, "--data-class")
    # Errors as exceptions, not as a usage message and the end of the process.
    options["parser_kwargs"] = {"exit_on_error": False, "fit": {"exit_on_error": False}}
    return options


def cell_arguments(settings: SweepSettings, cell: Cell) -> list[str]:
    """The command line of one cell, after the name of the program.

    Raises:
        ValueError: if replicas cannot share the batch.
    """
    steps = settings.steps_of(cell.batch_size)
    accumulation = accumulation_for(
        cell.batch_size, largest=settings.max_micro_batch_size, replicas=settings.replicas
    )
    micro_batch_size = cell.batch_size // (accumulation * settings.replicas)
    values: dict[str, object] = {
        "seed_everything": cell.seed,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.min_steps": "null",
        "trainer.min_epochs": "null",
        "trainer.max_time": "null",
        "trainer.fast_dev_run": "false",
        "trainer.accumulate_grad_batches": accumulation,
        # In batches, across epochs: those of large batches may be shorter than any interval.
        "trainer.val_check_interval": max(1, round(steps / settings.checks)) * accumulation,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false",
        **dict.fromkeys(settings.steps_keys, steps),
        **dict.fromkeys(settings.examples_keys, settings.examples_of(cell.batch_size)),
        settings.batch_size_key: micro_batch_size,
        settings.lr_key: cell.lr,
    }
    configs = [word for path in settings.configs for word in ("--config", path)]
    overrides = [f"--{override}" for override in settings.overrides]
    return ["fit", *configs, *overrides, *(f"--{key}={value}" for key, value in values.items() if key)]


@contextmanager
def cli_warnings() -> Iterator[None]:
    """Without what LightningCLI says about arguments that do not come from the command line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
        yield


def _parse(settings: SweepSettings, arguments: Sequence[str]) -> tuple[Any, str]:
    """The configuration of `fit`, and all of it as text; nothing is built."""

    class ParsingCLI(cli_class(settings)):  # type: ignore[misc]
        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            super().parse_arguments(parser, args)
            config = self.config[self.config["subcommand"]]
            raise _Parsed(config, parser.dump(self.config, skip_none=False))

    # As `python main.py` has it.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with cli_warnings():
            ParsingCLI(args=list(arguments), **cli_options(settings))
    except _Parsed as parsed:
        return parsed.args[0], parsed.args[1]
    except (SystemExit, Exception) as error:
        if isinstance(error, SweepError):
            raise
        raise SweepError(
            f"Expected a configuration that `fit` takes, got one that LightningCLI refuses: {error}"
        ) from error
    raise AssertionError("a LightningCLI that parses no arguments")


def files_digest(paths: Sequence[str]) -> str:
    """Of configuration files as they are.

    Raises:
        SweepError: if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(Path(path).read_bytes())
        except OSError as error:
            raise SweepError(f"Expected --config to be a file, got {path} ({error.strerror}).") from error
    return digest.hexdigest()


def read_config(settings: SweepSettings) -> TrainingConfig:
    """Read what a configuration says, without building any of it.

    Args:
        settings: with the files, the overrides and the classes; keys may be missing.

    Raises:
        SweepError: if LightningCLI does not take it, or a sweep cannot.
    """
    require_jsonargparse()
    files_digest(settings.configs)
    configs = [word for path in settings.configs for word in ("--config", path)]
    config, text = _parse(settings, ["fit", *configs, *(f"--{override}" for override in settings.overrides)])
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
    found = config.get("trainer.callbacks") or []
    left_out = [_class_of(entry) for entry in (found if isinstance(found, list) else [found])]
    seed = config.get("seed_everything")
    return TrainingConfig(
        digest=hashlib.sha256(text.encode()).hexdigest()[:12],
        keys=keys,
        batch_size_key=next((key for key in BATCH_SIZE_KEYS if key in keys), None),
        lr_key=next((key for key in LR_KEYS if key in keys), None),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
        left_out=tuple(kind.__name__ for kind in left_out if issubclass(kind, LEFT_OUT)),
    )


def _class_of(entry: Any) -> type:
    return imported(entry["class_path"], "the class_path of a callback")  # type: ignore[no-any-return]


def check_arguments(settings: SweepSettings, cell: Cell) -> None:
    """See whether LightningCLI takes what a cell would give it.

    Raises:
        SweepError: if it does not.
    """
    _parse(settings, cell_arguments(settings, cell))
