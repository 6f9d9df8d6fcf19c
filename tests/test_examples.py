from __future__ import annotations

import csv
import importlib
import math

import pytest
import torch

from examples.report import stages
from lightning_surge.run_logs import read_run

# Lightning is slow to import: one process runs both examples.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 with a newer torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _same_rng_and_threads_afterwards():
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["stdlib_transformer", "digits"])
def example(request):
    return importlib.import_module(f"examples.{request.param}")


def test_fast_run_leaves_a_table_a_picture_and_logs(example, tmp_path, capsys):
    picture = example.main(["--fast", "--seed", "1", "--output", str(tmp_path)])
    assert picture.read_bytes().startswith(b"\x89PNG")

    run = read_run(picture.parent)
    rows = stages(run)
    # Every stage of the ramp was reached and has a validation loss of its own.
    assert [row.batch_size for row in rows] == [8, 16, 32, 64, 128]
    assert all(math.isfinite(row.val_loss) for row in rows)
    assert rows[-1].val_loss < rows[0].val_loss
    assert rows[0].lr_scale == pytest.approx(1.0)

    printed = capsys.readouterr().out
    for column in ("batch size", "peak batch size", "s.e.", "overhead", "val. loss"):
        assert column in printed
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
