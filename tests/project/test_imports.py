"""Users of `pytorch_lightning`, in a process of their own, are served as those of `lightning.pytorch`."""

import json
import logging
import math
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_surge.callbacks.lightning_host import overrides

# {host} is either package: everything but our callbacks comes from it.
DEFINITIONS = """
import json, logging, sys, warnings
{imports}
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning_surge
from lightning_surge import SurgeLRCallback, BatchSizeScheduler, BatchSizeWarmup

warnings.simplefilter("ignore")
logging.getLogger("{host}").setLevel(logging.ERROR)
torch.manual_seed(0)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.lrs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.trainer.current_epoch, batch_idx) == (1, 12) else None

    def train_dataloader(self):
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), 4)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        ask = optimizer._init_group
        optimizer._init_group = lambda group, *rest: (self.lrs.append(group["lr"]), ask(group, *rest))[1]
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def trainer(*callbacks, **options):
    options = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2,
                   enable_progress_bar=False, enable_model_summary=False) | options
    return pl.Trainer(callbacks=list(callbacks), **options)


def refused(*callbacks, **options):
    try:
        trainer(*callbacks, **options).fit(Net())
    except Exception as error:
        return type(error).__name__, str(error)
"""

# What it prints is compared.
TRAINING = """
module, surge = Net(), SurgeLRCallback(4, probe_every=2)
warmup, other = BatchSizeWarmup(4, 16, 8), pl.callbacks.LambdaCallback()
whole = trainer(other, surge, warmup)
whole.fit(module)
accumulated, scheduler = Net(), pl.callbacks.GradientAccumulationScheduler({{0: 1, 1: 2}})
trainer(SurgeLRCallback(4, "linear"), scheduler).fit(accumulated)
print(json.dumps(dict(
    lrs=module.lrs,
    measurements=surge.history.num_measurements,
    norms=surge.history.state_dict()["records"][-1]["norms"],
    order=[type(one).__name__ for one in whole.callbacks if one in (other, surge, warmup)],
    accumulated=accumulated.lrs,
    two_writers=refused(BatchSizeScheduler(lightning_surge.schedules.sizes.ConstantSize(8)), scheduler),
)))
"""

CLI = """
from {host}.cli import LightningCLI

cli = LightningCLI(Net, save_config_callback=None, args={{
    "fit": {{"trainer": {{
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [
            {{"class_path": "lightning_surge." + name, "init_args": arguments}}
            for name, arguments in (
                ("BatchSizeWarmup", dict(start=4, end=8, num_steps=2)),
                ("SurgeLRCallback", dict(base_batch_size=4, law="sqrt")),
            )
        ],
    }}}},
    "subcommand": "fit",
}})
surge = next(one for one in cli.trainer.callbacks if type(one).__name__ == "SurgeLRCallback")
print("trained with", surge.decision.used)
"""


def code(host: str, *parts: str) -> str:
    return "".join(part.format(host=host, imports=f"import {host} as pl") for part in (DEFINITIONS, *parts))


def run(program: str) -> str:
    """What a new process prints, and says where it fails."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + (done.stderr if done.returncode else "")


@pytest.fixture(scope="module")
def here() -> Any:
    """What the training leads to with `lightning.pytorch`."""
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings(), redirect_stdout(StringIO()) as printed:
        exec(code("lightning.pytorch", TRAINING), {"__name__": "training"})
    logging.getLogger("lightning.pytorch").setLevel(level)
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def there() -> list[str]:
    """What a process prints that knows `pytorch_lightning` only: of the training, and of its LightningCLI."""
    lines = run(code("pytorch_lightning", TRAINING, CLI)).splitlines()
    assert len(lines) == 2, "\n".join(lines)
    return lines


@pytest.mark.slow
def test_a_trainer_of_pytorch_lightning_does_the_same(here: Any, there: list[str]) -> None:
    assert json.loads(there[0]) == here
    # And it is something to compare.
    assert here["measurements"] >= 3
    assert len(set(here["lrs"])) > 4
    assert here["order"] == ["BatchSizeWarmup", "SurgeLRCallback", "LambdaCallback"]
    # 4 examples, then 8 by Lightning's own schedule, where the rule doubles what the decay has halved.
    assert set(here["accumulated"]) == {0.01}
    name, message = here["two_writers"]
    assert name == "MisconfigurationException"
    assert "BatchSizeScheduler and GradientAccumulationScheduler: remove one" in message


@pytest.mark.slow
class TestLightningCLIOfPytorchLightning:
    def test_takes_our_callbacks(self, there: list[str]) -> None:
        assert there[1] == f"trained with {math.sqrt(2.0)}"

    def test_must_be_imported_before_ours(self) -> None:
        """The limit that the documentation names. Importing it for everybody has a price."""
        ours = "import sys\nfrom lightning_surge import BatchSizeWarmup\n"
        said = run(f"{ours}print('pytorch_lightning' in sys.modules)" + code("pytorch_lightning", CLI))
        # Else Lightning's messages would go to the other package's logger.
        assert said.startswith("False\n")
        assert "lightning_surge.BatchSizeWarmup" in said
        assert "trained" not in said


def test_only_what_a_module_brings_is_its_own() -> None:
    class Module(pl.LightningModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            return None

    assert overrides(Module(), "on_train_batch_start")
    assert not overrides(Module(), "configure_gradient_clipping")
