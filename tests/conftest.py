import logging
import signal
from collections.abc import Iterator

import pytest

from tests import trainings


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
def make_trainer() -> trainings.MakeTrainer:
    """A Trainer on one CPU thread that writes nothing unless asked to."""
    return trainings.make_trainer
