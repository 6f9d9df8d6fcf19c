"""Callbacks and schedules by name from a config file, through LightningCLI."""

import inspect
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_surge import ExactResume, SurgeLRCallback, schedules
from lightning_surge.schedules.seesaw import Seesaw
from lightning_surge.schedules.sizes import (
    BatchSizeRule,
    ConstantSize,
    CosineRamp,
    GeometricRamp,
    LinearRamp,
    Milestones,
    Phase,
    Phases,
    Schedule,
)

# What LightningCLI asks of jsonargparse in the way of older versions.
pytestmark = [
    pytest.mark.slow,  # every case builds a parser of the whole Trainer
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Linear(pl.LightningModule):
    pass


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


class _Parsed(Exception):
    pass


class ParsingCLI(LightningCLI):
    """Reads its arguments and builds callbacks, and no more."""

    def before_instantiate_classes(self) -> None:
        raise _Parsed(self)


def parse(tmp_path: Path, callbacks: str) -> tuple[list[Any], str]:
    """The callbacks that a file makes, and the configuration printed with all defaults."""
    config = tmp_path / "config.yaml"
    config.write_text("seed_everything: 0\ntrainer:\n  callbacks:\n" + callbacks)
    with pytest.raises(_Parsed) as caught:
        ParsingCLI(
            Linear,
            args=["fit", "--config", str(config)],
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
        )
    cli = caught.value.args[0]
    built = cli.parser.instantiate_classes(cli.config).fit.trainer.callbacks
    return built, cli.parser.dump(cli.config, skip_none=False)


def parse_one(tmp_path: Path, name: str, arguments: str) -> tuple[Any, str]:
    """The callback of that name with these arguments, and the configuration printed."""
    (callback,), printed = parse(tmp_path, f"    - {{class_path: {name}, init_args: {{{arguments}}}}}\n")
    return callback, printed


FUNCTIONS = """
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor


def count(batch: Any) -> float:
    return 2.0 * len(batch)


def cut(batch: Any, num_slices: int) -> Sequence[Any]:
    return batch.chunk(num_slices)


def loss(module: pl.LightningModule, batch: Any) -> Tensor:
    return module.layer(batch).square().mean()


def bare_loss(module, batch):
    return module.layer(batch).square().mean()
"""

ARGUMENTS = """
    - class_path: SurgeLRCallback
      init_args:
        base_batch_size: 16
        law: measured
        objective: progress
        lr_scale_bounds: [0.25, 8]
        probe_every: 3
        batch_size_fn: named_functions.count
        split_batch: named_functions.cut
        loss_fn: named_functions.loss
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "named_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("named_functions", None)
    import named_functions

    return named_functions


def test_every_kind_of_argument_of_the_callback(tmp_path: Path, functions: Any) -> None:
    (callback,), printed = parse(tmp_path, ARGUMENTS)
    assert isinstance(callback, SurgeLRCallback)
    settings = callback.settings
    assert (settings.law, settings.objective) == ("measured", "progress")
    assert (settings.lr_scale_bounds, settings.probe_every) == ((0.25, 8.0), 3)
    assert callback._loss_fn is functions.loss
    assert callback._split_batch is functions.cut
    assert callback._examples_in(torch.zeros(8)) == 16.0
    # What was printed says the same again, functions too.
    assert "loss_fn: named_functions.loss" in printed
    config = tmp_path / "printed.yaml"
    config.write_text(printed)
    with pytest.raises(_Parsed) as caught:
        ParsingCLI(Linear, args=["--config", str(config)])
    again = caught.value.args[0]
    assert again.parser.dump(again.config, skip_none=False) == printed


@pytest.mark.parametrize(
    ("name", "written", "meant"),
    [
        ("split_batch", "false", False),
        ("split_batch", "null", None),
        ("scale_weight_decay", "false", False),
        ("scale_weight_decay", "true", True),
        ("scale_weight_decay", "per_example", "per_example"),
    ],
)
def test_switches_that_are_also_something_else(tmp_path: Path, name: str, written: str, meant: Any) -> None:
    callback, printed = parse_one(tmp_path, "SurgeLRCallback", f"{name}: {written}")
    found = {"split_batch": callback._split_batch, "scale_weight_decay": callback.settings.scale_weight_decay}
    assert found[name] is meant or found[name] == meant == "per_example"
    assert f"{name}: {written}" in printed


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("law: meassured", ["law", "'measured', 'theorem2'", "meassured"]),
        ("lr_scale_bounds: [0.5]", ["lr_scale_bounds", "a tuple with 2 elements"]),
        ("probe_every: 2.5", ["probe_every", "Expected a <class 'int'>"]),
        ("split_batch: true", ["split_batch", "Expected a typing.Literal[False]"]),
        ("loss_fn: named_functions.missing", ["loss_fn", "has no attribute 'missing'"]),
        # jsonargparse goes by the annotation where the type is one function's.
        ("loss_fn: named_functions.bare_loss", ["loss_fn", "a function that returns <class 'Tensor'>"]),
        ("base_batch_sise: 16", ["Option 'base_batch_sise' is not accepted"]),
        ("max_overhead: 0", ["Expected 0 < max_overhead <= 1e+12, got max_overhead=0"]),
        ("lr_scale_bounds: [2, 4]", ["Expected 0 < lr_scale_bounds[0] <= 1, got lr_scale_bounds[0]=2.0"]),
    ],
)
def test_mistakes_in_arguments_of_the_callback_are_named(
    tmp_path: Path, functions: Any, arguments: str, messages: list[str]
) -> None:
    # jsonargparse's own errors, and the callback's where the type is right and the value is not.
    with pytest.raises((ArgumentError, ValueError)) as caught:
        parse_one(tmp_path, "SurgeLRCallback", arguments)
    said = " ".join(str(caught.value).split())
    for message in messages:
        assert message in said


SCHEDULES: list[tuple[str, BatchSizeRule]] = [
    ("{class_path: ConstantSize, init_args: {size: 8}}", ConstantSize(8)),
    (
        "{class_path: LinearRamp, init_args: {start: 8, end: 32, duration: 9, unit: examples,"
        " multiple_of: 4}}",
        LinearRamp(8, 32, 9, unit="examples", multiple_of=4),
    ),
    ("{class_path: GeometricRamp, init_args: {start: 8, end: 32, duration: 9}}", GeometricRamp(8, 32, 9)),
    (
        "{class_path: CosineRamp, init_args: {start: 8, end: 32, duration: 1.5, unit: epochs}}",
        CosineRamp(8, 32, 1.5, unit="epochs"),
    ),
    ("{class_path: Milestones, init_args: {sizes: {0: 8, 100: 16}}}", Milestones({0: 8, 100: 16})),
    (
        "{class_path: Phases, init_args: {phases: [{begin: 0, end: null, schedule: {class_path: ConstantSize,"
        " init_args: {size: 8}}}]}}",
        Phases([Phase(0, None, ConstantSize(8))]),
    ),
    ("{class_path: Seesaw, init_args: {start: 8, maximum: 64, multiple_of: 8}}", Seesaw(8, 64, 8)),
]


@pytest.mark.parametrize(("written", "meant"), SCHEDULES)
@pytest.mark.parametrize("names", ["short", "full"])
def test_every_schedule_by_both_names(tmp_path: Path, names: str, written: str, meant: BatchSizeRule) -> None:
    callback = "BatchSizeScheduler"
    if names == "full":
        callback = f"lightning_surge.{callback}"
        written = written.replace("class_path: ", f"class_path: {type(meant).__module__}.")
    assert parse_one(tmp_path, callback, f"schedule: {written}")[0].schedule == meant


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{class_path: ConstantSize, init_args: {size: 0}}", "Expected a whole number size >= 1"),
        ("{class_path: ConstantSise, init_args: {size: 8}}", "ConstantSise"),
        (SCHEDULES[5][0].replace("begin: 0", "begin: 5"), "a gap before phases[0], end=0 and begin=5.0"),
    ],
)
def test_mistakes_in_schedules_are_named(tmp_path: Path, wrong: str, message: str) -> None:
    # A wrong value is found when the object is made, a wrong name already when the file is parsed.
    with pytest.raises((ArgumentError, ValueError)) as caught:
        parse_one(tmp_path, "BatchSizeScheduler", f"schedule: {wrong}")
    assert message in " ".join(str(caught.value).split())


def test_all_schedules_are_tried_here() -> None:
    public = [getattr(schedules, name) for name in schedules.__all__]
    kinds = {kind for kind in public if inspect.isclass(kind) and issubclass(kind, BatchSizeRule)}
    assert {type(meant) for _, meant in SCHEDULES} == kinds - {Schedule}


@pytest.mark.parametrize("prefix", ["", "lightning_surge."])
def test_other_callbacks_by_both_names(tmp_path: Path, prefix: str) -> None:
    written = (
        f"    - class_path: {prefix}BatchSizeWarmup\n      init_args: {{start: 8, end: 32, num_steps: 9}}\n"
    )
    (warmup, resume), printed = parse(tmp_path, f"{written}    - class_path: {prefix}ExactResume\n")
    assert warmup.schedule == GeometricRamp(8, 32, 9)
    assert "num_steps: 9" in printed
    assert type(resume) is ExactResume


@pytest.mark.usefixtures("same_rng_and_threads_afterwards")
def test_the_example_trains_and_round_trips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples.cli.main import main

    example = Path(__file__).parents[2] / "examples" / "cli" / "config.yaml"
    fast = ["max_steps=20", "enable_progress_bar=false", "enable_model_summary=false", "limit_val_batches=1"]
    fast += ["logger.init_args.save_dir=runs", "log_every_n_steps=4"]
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", "--config", str(example), *(f"--trainer.{option}" for option in fast)])
    assert cli.trainer.global_step == 20
    (saved,) = tmp_path.glob("runs/lightning_logs/version_0/config.yaml")
    # What it has saved, and what it prints, are configurations that say the same.
    printed: list[str] = []
    for config in (saved, tmp_path / "printed.yaml"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(config), "--print_config"])
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert "class_path: lightning_surge.BatchSizeScheduler" in printed[0]
