"""Schedules by name from a config file, through LightningCLI."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_surge import BatchSizeScheduler, SurgeLRCallback
from lightning_surge.follow_peak import FollowPeak
from lightning_surge.schedules import ConstantSize, GeometricRamp, Milestones, Phase, Phases

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # What LightningCLI asks of jsonargparse in the way of older versions.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(64, 4), batch_size=4)  # type: ignore[arg-type]


HEAD = """
seed_everything: 0
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
  callbacks:
    - class_path: lightning_surge.SurgeLRCallback
      init_args: {base_batch_size: 4}
    - class_path: lightning_surge.BatchSizeScheduler
      init_args:
        schedule:
"""

PHASES = """
          class_path: Phases
          init_args:
            unit: steps
            phases:
              - {begin: 0, end: 3, schedule: {class_path: ConstantSize, init_args: {size: 4}}}
              - begin: 3
                end: null
                schedule:
                  class_path: lightning_surge.schedules.GeometricRamp
                  init_args: {start: 4, end: 16, duration: 4}
"""


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


def run(tmp_path: Path, schedule: str, subcommand: str = "fit") -> LightningCLI:
    config = tmp_path / "config.yaml"
    config.write_text(HEAD + schedule)
    arguments = [subcommand, "--config", str(config)]
    return LightningCLI(Linear, args=arguments, save_config_callback=None)


def schedule_of(cli: LightningCLI) -> Any:
    callbacks: list[pl.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (scheduler,) = [callback for callback in callbacks if isinstance(callback, BatchSizeScheduler)]
    assert any(isinstance(callback, SurgeLRCallback) for callback in callbacks)
    return scheduler.schedule


def test_phases(tmp_path: Path) -> None:
    cli = run(tmp_path, PHASES)
    expected = Phases([Phase(0, 3, ConstantSize(4)), Phase(3, None, GeometricRamp(4, 16, 4))])
    assert schedule_of(cli) == expected
    # 3 steps of 4, then requests of 4, 5, 8, 11, 16, 16: windows begin at micro-batches 3, 4, 5, 6, 8, 12.
    assert cli.trainer.global_step == 9


def test_milestones(tmp_path: Path) -> None:
    cli = run(tmp_path, "          {class_path: Milestones, init_args: {sizes: {0: 4, 8: 8}}}\n")
    assert schedule_of(cli) == Milestones({0: 4, 8: 8})
    assert cli.trainer.global_step == 12


def test_follow_peak(tmp_path: Path) -> None:
    schedule = "          {class_path: FollowPeak, init_args: {start: 4, maximum: 64, target: peak}}\n"
    assert schedule_of(run(tmp_path, schedule)) == FollowPeak(4, 64, target="peak")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PHASES.replace("begin: 3\n", "begin: 5\n"), "a gap between phases[0] with end=3.0"),
        (PHASES.replace("begin: 3\n", "begin: 2\n"), "an overlap between phases[0] with end=3.0"),
        (PHASES.replace("{size: 4}", "{size: 0}"), "Expected size to be a whole number of at least 1"),
        (PHASES.replace("ConstantSize", "ConstantSise"), "ConstantSise"),
    ],
)
def test_mistakes_are_named_before_training(
    tmp_path: Path, wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A wrong value is found when the object is made, a wrong name already when the file is parsed.
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(tmp_path, wrong)
    assert message in " ".join((str(caught.value) + capsys.readouterr().err).split())


def test_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(HEAD + PHASES)
    with pytest.raises(SystemExit):
        LightningCLI(Linear, args=["fit", "--config", str(config), "--print_config"])
    printed = capsys.readouterr().out
    assert "class_path: lightning_surge.schedules.GeometricRamp" in printed
    assert "multiple_of: 1" in printed
