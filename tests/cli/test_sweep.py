"""`lightning-surge sweep` on a training of some milliseconds."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_surge
from lightning_surge.cli import main
from lightning_surge.sweep import run
from lightning_surge.sweep import study as study_module
from lightning_surge.sweep.cells import Outcome
from lightning_surge.sweep.study import SweepStudy
from tests.processes import is_running, wait

pytestmark = [
    pytest.mark.slow,  # every cell is a training
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    # What LightningCLI asks of jsonargparse in the way of older versions.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups"),
]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

# A parabola. With SGD at rate lr the weight, and so the square root of the loss, shrinks by 1 - lr per step,
# whatever the batch size.
MODULE = """
import os, signal, time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_surge import by_examples


class Parabola(pl.LightningModule):
    def __init__(
        self, lr: float = 0.1, start: float = 1.0, total: int = 0, event: str = "hang", at=0.0, per="step"
    ):
        super().__init__()
        self.per = per
        self.lr, self.start, self.total, self.event, self.at = lr, start, total, event, at
        self.weight = torch.nn.Parameter(torch.tensor([start]))

    def training_step(self, batch, batch_idx):
        if self.lr == self.at:
            if self.event == "hang" and not Path("hangs").exists():
                Path("hangs").write_text(str(os.getpid()))
                time.sleep(60)
            if self.event == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if self.event == "full":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\\nMore.")
        with open("batches", "a") as file:
            file.write(f"{len(batch)} ")
        loss = 0.5 * (self.weight.square() * torch.ones(len(batch))).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.5 * self.weight.square().sum())
        self.log("gain", -0.5 * self.weight.square().sum())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if not self.total:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.total))
        return [optimizer], [{"scheduler": by_examples(schedule, 1), "interval": self.per}]


class Zeros(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, deaf: bool = False, half: bool = False, form: str = ""):
        super().__init__()
        self.collate = {"list": list, "mixed": lambda rows: [torch.zeros(3), torch.stack(rows)]}.get(form)
        self.batch_size = 4 if deaf else batch_size // 2 if half else batch_size

    def train_dataloader(self):
        return DataLoader(torch.zeros(64, 1), batch_size=self.batch_size, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


def numel(batch: torch.Tensor) -> float:
    return 2.0 * batch.numel()
"""

CONFIG = """
seed_everything: 7
model: {class_path: parabola.Parabola}
data: {class_path: parabola.Zeros}
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: true
  log_every_n_steps: 1
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: Patch) -> Path:
    torch.set_num_threads(1)
    (tmp_path / "parabola.py").write_text(MODULE)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # For real processes: this package and no other that is installed.
    monkeypatch.setenv("PYTHONPATH", str(Path(lightning_surge.__file__).parent.parent))
    sys.modules.pop("parabola", None)
    # seed_everything tells workers by the environment.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    return path


def arguments(**changes: str) -> list[str]:
    options = {
        "config": "run.yaml", "batch-sizes": "4 8", "lrs": "0.1 0.2", "examples": "64", "processes": "0",
    }  # fmt: skip
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["sweep"]
    for name, value in options.items():
        words += [f"--{name}", *(value.split() or [value])] if value != "-" else []
    return words


def sweep(**changes: str) -> int:
    return main(arguments(**changes))


def table(name: str = "sweep.csv") -> list[dict[str, str]]:
    with Path(name).open() as file:
        return list(csv.DictReader(file))


def study() -> SweepStudy:
    return SweepStudy("sweep.study.log", "sweep")


def outcomes() -> dict[tuple[int, float], Outcome]:
    return {(cell.batch_size, cell.lr): outcome for cell, outcome in study().records().items()}


def settings() -> dict[str, Any]:
    said: dict[str, Any] = study().study.user_attrs["settings"]
    return said


def refused(capsys: Capture, **changes: str) -> str:
    """What a sweep says that does not begin; there is nothing left of it."""
    assert sweep(**changes) == 2
    assert not Path("batches").exists()
    return capsys.readouterr().err


def loss_after(steps: int, lr: float) -> float:
    return 0.5 * (1 - lr) ** (2 * steps)


def test_a_grid_is_trained_with_equal_examples(config: Path, capsys: Capture) -> None:
    assert sweep() == 0
    said = capsys.readouterr()
    rows = table()
    assert len(rows) == 4
    for row in rows:
        steps = 64 // int(row["batch_size"])
        assert (int(row["steps"]), int(row["examples"]), row["status"]) == (steps, 64, "finished")
        assert float(row["loss"]) == pytest.approx(loss_after(steps, float(row["lr"])), rel=1e-4)
    assert {row["seed"] for row in rows} == {"7"}
    assert said.out.splitlines()[0] == "table: sweep.csv"
    assert said.out.splitlines()[-1] == "next: lightning-surge fit sweep.csv"
    assert re.search(r"^ +4 +0\.2 .*highest tried: --refine", said.out, re.MULTILINE)
    assert "batch size: data.init_args.batch_size, learning rate: model.init_args.lr" in said.err
    assert "batch_size=8 lr=0.2 seed=7: loss " in said.err
    # Neither logs nor checkpoints nor configurations of cells.
    left = {path.name for path in Path().iterdir()} - {"__pycache__", "batches", "parabola.py", "run.yaml"}
    assert left == {"sweep.csv", "sweep.study.log"}

    # The same command finds everything finished, and says the same. Comments are not the configuration.
    before = Path("batches").read_text()
    config.write_text("# a comment\n" + CONFIG)
    assert sweep() == 0
    assert Path("batches").read_text() == before
    assert capsys.readouterr().out == said.out


def test_another_grid_needs_a_word(config: Path, capsys: Capture) -> None:
    one = {"batch_sizes": "8", "lrs": "0.1"}
    assert sweep(**one) == 0
    for word in ("", "--dry-run"):
        assert main([*arguments(**one, seeds="2"), *word.split()]) == 2
        assert "1 others, such as batch_size=8 lr=0.1 seed=8: pass --extend" in capsys.readouterr().err
    assert main([*arguments(**one, seeds="2"), "--extend", "--dry-run"]) == 0
    assert len(study().trials()) == 1
    # With it only the new cells run, of the same configuration.
    assert main([*arguments(**one, seeds="2"), "--extend"]) == 0
    assert [row["seed"] for row in table()] == ["7", "8"]
    assert len(Path("batches").read_text().split()) == 16  # two cells of eight steps
    config.write_text(CONFIG.replace("parabola.Parabola}", "parabola.Parabola, init_args: {start: 2.0}}"))
    assert main([*arguments(**one, seeds="2"), "--extend"]) == 2
    assert "the configuration says something else" in capsys.readouterr().err


def test_json_and_targets(capsys: Capture) -> None:
    assert main([*arguments(batch_sizes="4", target_loss="0.1 0.3 1e-9", checks="100"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["table"] == "sweep.csv"
    assert answer["cells"] == {"finished": 2}
    assert answer["fit"] == "lightning-surge fit sweep.csv"
    rows = table()
    assert len(rows) == 6
    for row in rows:
        # Steps until 0.5 (1 - lr)^(2 s) is at most the target; looked at after every step.
        needed = math.ceil(math.log(float(row["target"]) / 0.5) / (2 * math.log(1 - float(row["lr"]))))
        if needed > 64 // int(row["batch_size"]):
            assert (row["steps"], row["examples"], row["status"]) == ("", "", "not_reached")
        else:
            assert (int(row["steps"]), row["status"]) == (needed, "finished")
            assert int(row["examples"]) == needed * int(row["batch_size"])
    best = {(entry["target"], entry["batch_size"]): entry for entry in answer["best"]}
    assert best[0.1, 4]["steps"] == 4
    assert best[0.1, 4]["lr"] == 0.2
    assert best[1e-9, 4]["steps"] is None


def test_a_cell_may_end_at_its_target() -> None:
    words = arguments(batch_sizes="4", lrs="0.2", target_loss="0.3", checks="100", examples="400")
    assert main([*words, "--stop-at-target"]) == 0
    assert len(Path("batches").read_text().split()) == 2  # 0.5 * 0.8^4 = 0.2
    assert outcomes()[4, 0.2].steps == 2
    assert float(table()[0]["loss"]) == pytest.approx(0.5 * 0.8**4)


def test_the_training_loss_is_averaged() -> None:
    assert sweep(batch_sizes="4", lrs="0.2", metric="loss", smoothing="4", max_micro_batch_size="2") == 0
    losses = [0.5 * 0.8 ** (2 * step) for step in range(16)]
    kept = math.exp(-1)
    weights = [kept ** (15 - step) for step in range(16)]
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert float(table()[0]["loss"]) == pytest.approx(expected, rel=1e-4)
    assert set(Path("batches").read_text().split()) == {"2"}  # two of them make a step
    assert sweep(batch_sizes="4", lrs="0.2", metric="train_loss", smoothing="4", output="logged.csv") == 0
    assert float(table("logged.csv")[0]["loss"]) == pytest.approx(expected, rel=1e-4)


def test_divergence_is_recorded_and_refining_goes_on(capsys: Capture) -> None:
    # The loss grows by (1 - lr)^2 a step: sixteen of them overflow from lr = 17 on. Smaller ones are tried.
    assert sweep(batch_sizes="4", lrs="20 200", refine="1") == 0
    rows = [(row["lr"], row["status"], row["loss"]) for row in table()]
    assert rows == [("2.0", "finished", "0.5"), ("20.0", "diverged", ""), ("200.0", "diverged", "")]
    capsys.readouterr()
    assert sweep(batch_sizes="4 8", lrs="0.5 1e20", output="other.csv") == 0
    said = capsys.readouterr()
    assert "batch_size=4 lr=1e+20 seed=7: diverged (the training loss became inf at step" in said.err
    assert re.search(r"^ +8 +0\.5 ", said.out, re.MULTILINE)
    assert sweep(batch_sizes="4", lrs="1e20", output="third.csv") == 2
    assert "Expected cells that finish, got none of 1, see third.csv" in capsys.readouterr().err


def test_larger_may_be_better(capsys: Capture) -> None:
    words = arguments(batch_sizes="4", lrs="0.1 0.2 0.3", target_loss="-0.3", metric="gain", checks="100")
    assert main([*words, "--maximize"]) == 0
    said = capsys.readouterr().out
    # -0.5 * 0.7^2 after a step.
    assert re.search(r"^ +4 +0\.3 .* +-0\.3 +1  highest tried", said, re.MULTILINE)
    assert said.endswith("next: lightning-surge fit sweep.csv --maximize\n")
    assert study().study.best_params["lr"] == 0.3
    assert [row["steps"] for row in table()] == ["3", "2", "1"]


def test_without_a_batch_size(config: Path, capsys: Capture) -> None:
    config.write_text(CONFIG.replace("data: {class_path: parabola.Zeros}", ""))
    assert "no usual one (such as batch_size)" in refused(capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": "1,024"}, "Expected --batch-sizes to be positive whole numbers"),
        ({"config": "missing.yaml"}, "Expected --config to be a file, got missing.yaml"),
        ({"set": "model.init_args.lrr=1"}, "lrr"),
        ({"set": "trainer.max_stepz=1"}, "max_stepz"),
        ({"lrs": "0"}, "Expected --lrs to be positive numbers"),
        ({"examples": "6"}, "--examples 6 and a batch size of 8"),
        ({"seeds": "0"}, "Expected --seeds of at least 1, got 0"),
        ({"replicas": "3"}, "batch sizes that 3 replicas can share, got 4"),
        ({"target_loss": "1 low"}, "argument --target-loss: invalid float value: 'low'; see"),
        ({"target_loss": "1 nan"}, "Expected --target-loss to be finite, got nan"),
        ({"set": "ckpt_path=last"}, "got ckpt_path='last'"),
        ({"model_class": "parabola.Missing"}, "Expected --model-class to be the dotted path"),
        ({"cli_class": "parabola.Zeros"}, "Expected --cli-class to be a LightningCLI"),
        (
            {"lr_key": "model.init_args.rate"},
            "--lr-key to be a key of the configuration, got 'model.init_args.rate': the classes in it take "
            "model.init_args.lr, model.init_args.start, model.init_args.total, model.init_args.event, ",
        ),
        ({"lr_key": "data.init_args.deaf"}, "LightningCLI refuses"),
        ({"batch_size_key": "trainer.max_epochs"}, "Expected --batch-size-key to be a key"),
        ({"steps_key": "model.init_args.length"}, "Expected --steps-key and --examples-key to be a key"),
        ({"steps_key": ""}, "Expected --steps-key and --examples-key to be a key of the configuration, got"),
    ],
)
def test_mistakes_are_named_before_anything_runs(capsys: Capture, changes: dict[str, str], said: str) -> None:
    message = refused(capsys, **changes)
    assert said in message
    assert re.match("lightning-surge: (Expected|argument)", message)


def test_without_jsonargparse(capsys: Capture, monkeypatch: Patch) -> None:
    from lightning_surge.sweep import config as sweep_config

    monkeypatch.setattr(sweep_config, "RequirementCache", lambda requirement: False)
    assert "pip install 'lightning-surge[cli]'" in refused(capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "val_los"}, "to log 'val_los' in training or validation, got gain, train_loss, val_loss"),
        ({"replicas": "2"}, "with 2 data-parallel replicas, got 1: pass --replicas 1"),
        ({"set": "data.init_args.form=mixed"}, "A sweep cannot tell how many examples a list holds"),
        (
            {"set": "model.init_args.total=64 model.init_args.per=epoch"},
            "Expected interval='step' for a learning-rate schedule that counts examples, got",
        ),
    ],
)
def test_what_no_cell_can_do_ends_the_sweep(capsys: Capture, changes: dict[str, str], said: str) -> None:
    assert sweep(**changes) == 2
    assert said in capsys.readouterr().err
    assert outcomes() == {}


def test_a_batch_size_that_does_not_arrive(capsys: Capture) -> None:
    words = arguments(lrs="0.1", set="data.init_args.deaf=true")
    assert main(words) == 1
    assert [row["status"] for row in table()] == ["finished", "failed"]
    said = capsys.readouterr()
    assert "Expected 8 examples in the first step, got 4" in said.err
    assert "without a loss: 1 failed, of 2 cells; --retry-failed runs them again" in said.out
    # They stay as they are, unless they are to be tried again.
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    assert len(study().study.trials) == 2
    assert main([*words, "--retry-failed"]) == 1
    assert len(study().study.trials) == 3


def test_batches_may_be_counted_by_a_function(capsys: Capture) -> None:
    words = arguments(batch_sizes="8", lrs="0.1", batch_size_fn="parabola.numel")
    assert main(words) == 2
    assert "Expected 8 examples in the first step, got 16" in capsys.readouterr().err
    assert main([*words, "--output", "other.csv", "--set", "data.init_args.half=true"]) == 0
    assert [row["examples"] for row in table("other.csv")] == ["64"]


@pytest.mark.parametrize("model", ["model: {start: 2.0}\n", ""])
def test_classes_of_configurations_that_name_none(config: Path, capsys: Capture, model: str) -> None:
    config.write_text(model + "data: {deaf: false}\ntrainer: {accelerator: cpu, log_every_n_steps: 1}\n")
    said = refused(capsys)
    assert "LightningCLI(Model, Data), pass --model-class and --data-class too." in said
    classes = {"model_class": "parabola.Parabola", "data_class": "parabola.Zeros"}
    assert sweep(batch_sizes="8", lrs="0.1", **classes) == 0
    start = 4 if model else 1
    assert float(table()[0]["loss"]) == pytest.approx(start * loss_after(8, 0.1), rel=1e-4)
    assert settings()["lr_key"] == "model.lr"


def test_an_optimizer_beside_the_model_has_the_learning_rate(config: Path) -> None:
    config.write_text(CONFIG + "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 5.0}}\n")
    with pytest.warns(UserWarning, match="will be overridden"):
        assert sweep(batch_sizes="8", lrs="0.1") == 0
    assert settings()["lr_key"] == "optimizer.init_args.lr"
    assert float(table()[0]["loss"]) == pytest.approx(loss_after(8, 0.1), rel=1e-4)


CALLBACKS = """
  callbacks:
    - {class_path: lightning_surge.SurgeLRCallback, init_args: {base_batch_size: 4, law: linear}}
    - {class_path: lightning_surge.BatchSizeWarmup, init_args: {start: 4, end: 16, num_steps: 4}}
    - {class_path: EarlyStopping, init_args: {monitor: val_loss, min_delta: 1.0, patience: 1}}
    - {class_path: ModelCheckpoint, init_args: {monitor: val_loss}}
    - {class_path: LearningRateMonitor}
"""


def test_callbacks_that_would_spoil_a_cell_are_left_out(config: Path, capsys: Capture) -> None:
    config.write_text(CONFIG + CALLBACKS)
    assert sweep(batch_sizes="8", lrs="0.1", set="model.init_args.total=100") == 0
    said = capsys.readouterr().err
    assert "go without SurgeLRCallback, BatchSizeWarmup, EarlyStopping, ModelCheckpoint of the" in said
    # A schedule that counts examples goes on counting: 100 in all, eight a step.
    weight = math.prod(1 - 0.1 * (1 - 8 * step / 100) for step in range(8))
    assert float(table()[0]["loss"]) == pytest.approx(0.5 * weight**2, rel=1e-4)


def test_a_dry_run_says_what_would_run(capsys: Capture) -> None:
    words = arguments(batch_sizes="4 12", lrs="0.1:0.4:3", examples="120", max_micro_batch_size="4")
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "learning rates: 0.1, 0.2, 0.4" in said.out
    assert "seeds: 7" in said.out
    assert re.search(r"^ +12 +4 +3 +10 +120$", said.out, re.MULTILINE)
    assert "6 cells, 0 of them finished; table: sweep.csv" in said.out
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"][1] == {
        "batch_size": 12, "micro_batch": 4, "accumulated": 3, "steps": 10, "examples": 120,
    }  # fmt: skip
    assert (plan["cells"], plan["finished"], plan["study"]) == (6, 0, "sweep.study.log")
    assert {path.name for path in Path().iterdir()} <= {"__pycache__", "parabola.py", "run.yaml"}


def test_lengths_go_where_they_are_wanted() -> None:
    # The schedule is as long as the cell, and ends it at zero.
    assert sweep(batch_sizes="4 8", lrs="0.1", examples_key="model.init_args.total") == 0
    for row in table():
        size = int(row["batch_size"])
        weight = math.prod(1 - 0.1 * (1 - size * step / 64) for step in range(64 // size))
        assert float(row["loss"]) == pytest.approx(0.5 * weight**2, rel=1e-4)


def test_a_cell_that_does_not_fit_is_recorded() -> None:
    where = "model.init_args.event=full model.init_args.at=0.2"
    assert sweep(batch_sizes="8", set=where) == 1
    assert [row["status"] for row in table()] == ["finished", "out_of_memory"]
    assert outcomes()[8, 0.2].message == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."


def test_an_interrupt_in_this_process() -> None:
    # Lightning makes an exit of it, which must not count as a failure of the cell.
    where = "model.init_args.event=interrupt model.init_args.at=0.2"
    assert sweep(batch_sizes="8", set=where) == 130
    assert [row["lr"] for row in table()] == ["0.1"]


def test_devices_and_cores_are_shared_out(monkeypatch: Patch) -> None:
    given = []

    class Pretence:
        ended = True

        def __init__(self, order: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
            given.append(environment)
            SweepStudy(order["where"], order["name"]).tell(order["trial"], Outcome("finished", 1.0))

        def stop(self, *, forget: bool) -> None:
            assert forget

    monkeypatch.setattr(run, "CellProcess", Pretence)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main([*arguments(processes="-"), "--devices", "0", "3"]) == 0
    # Two at a time, each on a device of its own.
    assert given[:2] == [{"CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": "4"} for device in "03"]
    assert len(given) == 4
    assert sweep(processes="4", output="other.csv") == 0
    assert given[4:] == [{"OMP_NUM_THREADS": "2"}] * 4


ROOT = Path(lightning_surge.__file__).parent.parent
PAGE = (ROOT / "docs" / "sweeping.md").read_text()
COMMANDS = re.findall(r"^lightning-surge (sweep .*)$", PAGE, re.MULTILINE)


@pytest.mark.usefixtures("same_rng_and_threads_afterwards")
@pytest.mark.parametrize("command", COMMANDS or ["none: the page has lost them"])
def test_the_commands_of_the_page(command: str, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """As they stand but for the size of the grid."""
    monkeypatch.chdir(ROOT)
    output = tmp_path / "sweep.csv"
    words = [*command.split(), "--output", str(output)]
    if "--dry-run" in words:
        assert main(words) == 0
        said = capsys.readouterr().out.replace(str(output), "runs/cli/sweep.csv")
        assert textwrap.indent(said, "    ") in PAGE
        return
    small = ["--batch-sizes", "64", "--lrs", "3e-2", "--examples", "512", "--refine", "0", "--processes", "0"]
    quiet = ["--set", "trainer.log_every_n_steps=1", "--checks", "2"]
    assert main([*words, *small, *quiet]) == 0
    rows = table(str(output))
    assert {row["status"] for row in rows} <= {"finished", "not_reached"}
    assert len(rows) == (2 if "--target-loss" in words else 1)
    # The page tells of every column that there is.
    assert all(f"`{column}`" in PAGE for column in rows[0])


# Signs of life come and are missed sooner, so that tests do not wait; as another process of the same command.
QUICK = """
import sys
from lightning_surge.sweep import study
study.BEAT, study.GRACE = 1, 4
from lightning_surge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def launch(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", QUICK, *words], stderr=subprocess.DEVNULL)


def hanging() -> int:
    """The process of the cell that hangs, once it does."""
    return int(wait(lambda: Path("hangs").exists() and Path("hangs").read_text()))


def test_a_killed_sweep_goes_on_with_two_at_once(monkeypatch: Patch) -> None:
    """kill -9 while one cell has finished and another trains; what has finished is not trained again."""
    words = [*arguments(batch_sizes="8", lrs="0.1 0.2", set="model.init_args.at=0.2", processes="2")]
    words += ["--study", "sweep.study.log"]
    first = launch(words)
    cell = hanging()
    wait(study().records)
    first.kill()
    first.wait()
    wait(lambda: not is_running(cell))  # no process is left behind
    # Another command, and one in this process.
    other = launch([*words, "--output", "a/sweep.csv"])
    for module, name, seconds in ((study_module, "GRACE", 4), (study_module, "BEAT", 1), (run, "BEAT", 1)):
        monkeypatch.setattr(module, name, seconds)
    assert main([*words, "--output", "b/sweep.csv", "--processes", "0"]) == 0
    assert other.wait(200) == 0
    rows = table("a/sweep.csv")
    assert rows == table("b/sweep.csv")
    assert [(row["lr"], row["status"]) for row in rows] == [("0.1", "finished"), ("0.2", "finished")]
    assert len(Path("batches").read_text().split()) == 16  # eight steps each
    for row in rows:
        assert float(row["loss"]) == pytest.approx(loss_after(8, float(row["lr"])), rel=1e-4)


def test_a_killed_cell_costs_a_cell(capsys: Capture) -> None:
    """As by a kernel without memory."""
    hang = {"batch_sizes": "8", "set": "model.init_args.at=0.1"}
    assert sweep(**hang, lrs="0.2") == 0
    thread = threading.Thread(target=lambda: os.kill(hanging(), signal.SIGKILL))
    thread.start()
    words = [*arguments(**hang, processes="1"), "--extend"]
    assert main(words) == 1
    thread.join()
    assert [row["status"] for row in table()] == ["killed", "finished"]
    said = capsys.readouterr()
    assert "lr=0.1 seed=7: killed (ended by SIGKILL (out of memory?); see sweep.logs/trial-1.log)" in said.err
    assert "without a loss: 1 killed, of 2 cells" in said.out
    assert "Seed set to 7" in Path("sweep.logs/trial-1.log").read_text()
    assert main([*words, "--retry-failed", "--processes", "0"]) == 0
    assert [row["status"] for row in table()] == ["finished", "finished"]


def test_an_interrupt_stops_the_cells(capsys: Capture) -> None:
    """One real process; Ctrl-C comes while it trains."""

    def interrupt() -> None:
        hanging()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    words = arguments(batch_sizes="8", lrs="0.2", set="model.init_args.at=0.2", processes="1")
    assert main(words) == 130
    thread.join()
    assert not is_running(int(Path("hangs").read_text()))
    assert "the same command goes on" in capsys.readouterr().err
    assert outcomes() == {}
    assert table() == []
    assert not Path("sweep.logs").exists()
    # At once: nobody has to be missed first.
    assert main([*words, "--processes", "0"]) == 0
    assert [row["status"] for row in table()] == ["finished"]
