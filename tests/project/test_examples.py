import csv
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from examples import ddp, dry_run, offline_fit, plain_callback, ramp
from examples.digits_model import Digits
from examples.report import stages
from lightning_surge import SurgeLRCallback
from lightning_surge.policy.estimates import EstimatedLaw
from lightning_surge.runs.log_files import read_run

ROOT = Path(__file__).parents[2]
# Lightning is slow to import: one process runs all examples.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_rng_and_threads_afterwards")]


@pytest.fixture(params=["stdlib_transformer", "digits"])
def example(request):
    return importlib.import_module(f"examples.{request.param}")


def test_fast_run_leaves_a_table_a_picture_and_logs(example, tmp_path, capsys):
    picture = example.main(["--fast", "--seed", "1", "--output", str(tmp_path)])
    assert picture.read_bytes().startswith(b"\x89PNG")

    run = read_run(picture.parent, also=["val_loss"])
    rows = stages(run)
    # Every stage of the ramp was reached and has a validation loss of its own.
    assert [row.batch_size for row in rows] == [8, 16, 32, 64, 128]
    assert all(math.isfinite(row.val_loss) for row in rows)
    assert rows[-1].val_loss < rows[0].val_loss
    assert rows[0].lr_scale == pytest.approx(1.0)

    printed = capsys.readouterr().out
    assert "The batch size grew from 8 to 128" in printed
    assert f"That took {rows[-1].last_step + 1:,} optimizer steps; batches of 8 take" in printed
    for row in rows:
        assert f"{row.val_loss:.4f}" in printed

    # The scheduled lr warms up and ends at zero with the ramp's last step.
    scheduled = run.series["surge/lr_scheduled"].values
    assert scheduled.max() == pytest.approx(example.BASE_LR, rel=0.05)
    assert scheduled[-1] < 0.05 * example.BASE_LR
    for name in ("lr_predicted", "lr_used"):
        assert run.series[f"surge/{name}"].steps.tolist() == run.series["surge/lr_scheduled"].steps.tolist()

    (metrics,) = tmp_path.glob("csv/version_*/metrics.csv")
    with metrics.open() as file:
        assert "surge/lr_used" in next(csv.reader(file))


def measured(trainer: pl.Trainer) -> SurgeLRCallback:
    (surge,) = (one for one in trainer.callbacks if isinstance(one, SurgeLRCallback))
    assert isinstance(surge.law, EstimatedLaw)
    return surge


def lines_of_epochs(printed: str) -> list[list[str]]:
    rows = [line.split() for line in printed.splitlines()]
    return [row for row in rows if len(row) == 7 and row[0].isdigit()]


def test_plain_callback_trains_better_than_a_learning_rate_tuned_elsewhere(capsys):
    before, after = plain_callback.main(["--fast"])
    # 72 steps at 8 times the batch size that the learning rate was tuned at: far from where either would end.
    assert after < before
    printed = capsys.readouterr().out
    assert f"{before:.4f}" in printed
    assert f"with SurgeLRCallback: {after:.4f}" in printed
    assert [row[2] for row in lines_of_epochs(printed)] == ["64"] * 3


def test_ramp_takes_fewer_steps_and_its_schedule_ends_with_the_data(capsys):
    trainer = ramp.main(["--fast"])
    # At least what the largest size alone would take, at most what the smallest would.
    assert trainer.global_step > 3 * Digits.TRAINING_EXAMPLES / ramp.LARGEST
    assert trainer.global_step < 3 * Digits.TRAINING_EXAMPLES / ramp.TUNED_AT
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    measured(trainer)
    rows = lines_of_epochs(capsys.readouterr().out)
    assert int(rows[-1][1]) == trainer.global_step
    assert float(rows[-1][6]) < float(rows[0][6])


def test_dry_run_leaves_the_weights_alone_and_says_what_it_would_do(capsys):
    surge = dry_run.main(["--fast"])
    printed = capsys.readouterr().out
    assert "equal, bit for bit" in printed
    assert "NOT equal" not in printed
    table = [line.split() for line in printed.splitlines() if re.fullmatch(r"\s*\d+ +[\d.]+ +\S+", line)]
    assert [row[0] for row in table] == ["8", "16", "32", "64", "128", "256"]
    for size, factor, rate in table:
        assert float(factor) == pytest.approx(surge.lr_scale(int(size)), abs=0.006)
        assert float(rate) == pytest.approx(0.004 * surge.lr_scale(int(size)), rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's threads do not survive a fork")
def test_ddp_counts_the_examples_of_both_ranks(capfd):
    # Forked, the second process need not import Lightning again.
    ddp.main(["--fast"], strategy="ddp_fork")
    printed = capfd.readouterr().out
    rows = lines_of_epochs(printed)
    # One rank prints. The ramp ends at 64 examples, 1,536 of which are 24 steps of an epoch.
    assert [row[0] for row in rows] == ["1", "2"]
    assert rows[-1][2] == "64"
    assert int(rows[1][1]) - int(rows[0][1]) == Digits.TRAINING_EXAMPLES // 64
    assert f"2 ranks, {rows[-1][1]} optimizer steps" in printed
    assert "factors equal on all ranks" in printed
    (factor,) = re.findall(r" 64: ([\d.]+)", printed)
    assert 1.0 < float(factor) <= 8.0
    assert re.search(r"law from \d+ measurements: noise scale \d+, critical batch size \d+ examples", printed)


def test_offline_fit_finds_the_peak_of_the_committed_table(tmp_path, capsys):
    picture = offline_fit.main(["--fast", "--output", str(tmp_path)])
    assert picture == tmp_path / "perceptron_sign.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # One target after the other, and the numbers that docs/fitting.md has for the first.
    _, first, _, third = capsys.readouterr().out.split("to the loss ")
    optima = [line.split() for line in first.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in optima] == ["4", "16", "64", "256", "1024"]
    assert [row[2] for row in optima] == ["0.00489", "0.00967", "0.0224", "0.0124", "0.00673"]
    assert "best law: Adam, B of Eq. 22, wrong by a factor of 1.21 on average" in first
    assert re.search(r"peak: 0.0137 \[\S+, \S+\] at B = 84.6 \[", first)
    assert "no fit: Expected 3 batch sizes with an optimum inside their grid, got 2" in third


def test_the_index_lists_every_example():
    index = (ROOT / "examples" / "README.md").read_text()
    shared = {"digits_model", "epoch_table", "report", "story"}
    files = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}
    listed = set(re.findall(r"\]\((\w+)\.py\)", index))
    assert listed == files
    assert set(re.findall(r"python -m examples\.(\w+)", index)) == files - shared


def test_the_configuration_of_the_command_line_trains(tmp_path):
    """In a process of its own, where nothing has imported the callbacks that the file names."""
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    words = ["fit", "--config", "examples/cli/config.yaml", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    command = [sys.executable, "-m", "examples.cli.main", *words, *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
