r"""Train from a YAML file.

    python -m examples.cli.main fit --config examples/cli/config.yaml                    # half a minute
    python -m examples.cli.main fit --config examples/cli/config.yaml --trainer.max_epochs=2
    python -m examples.cli.main fit --config examples/cli/config.yaml --print_config     # with all defaults

The same file tells `lightning-surge sweep` what to train:

    lightning-surge sweep --config examples/cli/config.yaml --batch-sizes 8 32 128 --lrs 1e-3:1e-1:5 \
        --examples 15360 --examples-key model.init_args.total_examples --output runs/cli/sweep.csv
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LightningCLI

# So that the file may say SurgeLRCallback, without the name of the package.
from lightning_surge import BatchSizeScheduler, SurgeLRCallback  # noqa: F401


def main(arguments: Sequence[str] | None = None) -> LightningCLI:
    """Run what the arguments say; None takes those of the process."""
    # As in the other examples: the data fit in memory, and the model is too small for a second thread.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(1)
    return LightningCLI(
        save_config_kwargs={"overwrite": True}, args=None if arguments is None else list(arguments)
    )


if __name__ == "__main__":
    main()
