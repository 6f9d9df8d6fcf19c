"""Is the installed package whole? Run outside the repository, with the wheel and what it depends on alone.

Trains the first Python block of README.md on random tensors, and asks the command line for its version.
"""

import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_surge

ROOT = Path(__file__).resolve().parent.parent
QUICK = "Trainer(max_steps=12, accelerator='cpu', logger=False, enable_checkpointing=False, "
QUICK += "enable_progress_bar=False, enable_model_summary=False, "


class Regression(pl.LightningModule):
    """A linear layer that brings its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def train_dataloader(self) -> DataLoader:
        """2,048 random examples in batches of 32, so that a learning rate tuned at 16 is raised."""
        return DataLoader(TensorDataset(torch.randn(2048, 4)), batch_size=32)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The mean squared output."""
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


installed = Path(lightning_surge.__file__)
assert ROOT / "lightning_surge" not in installed.parents, f"Expected the wheel, got {installed}."
code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
names = {"model": Regression()}
exec(code.replace("Trainer(\n", QUICK + "\n").replace("start=16", "start=32"), names)
assert names["trainer"].global_step == 12
version = subprocess.run(
    [Path(sys.executable).with_name("lightning-surge"), "--version"],
    check=True,
    capture_output=True,
    text=True,
).stdout.strip()
assert version.endswith(lightning_surge.__version__), version
python = sys.version.split()[0]
print(f"{version}: works on Python {python}, torch {torch.__version__}, lightning {pl.__version__}")
