import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

MakeTrainer = Callable[..., pl.Trainer]


@pytest.fixture(autouse=True)
def _lightning_speaks() -> Iterator[None]:
    """Benchmarks and examples silence Lightning's logger, for their process: not for the tests after them."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> Iterator[None]:
    """Whoever runs tests in the background may have them ignored: tests of Ctrl-C would wait for ever."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_trainer() -> MakeTrainer:
    """A Trainer on one CPU thread that writes nothing unless asked to."""
    torch.set_num_threads(1)

    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make
