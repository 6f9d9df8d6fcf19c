import logging
import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _lightning_speaks() -> Iterator[None]:
    """Benchmarks and examples silence Lightning's logger, for their process: not for the tests after them."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


class Unraised(logging.Handler):
    """Keeps the warnings that the package logs because they are errors in tests."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def unraised() -> Iterator[list[str]]:
    """Warnings of the package that nobody expects: a test that does takes them from this list."""
    handler, logger = Unraised(), logging.getLogger("lightning_surge")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    assert handler.messages == []


@pytest.fixture
def same_rng_and_threads_afterwards() -> Iterator[None]:
    """For programs that set both, as examples and the code of a page do."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> Iterator[None]:
    """Whoever runs tests in the background may have them ignored: tests of Ctrl-C would wait for ever."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
