"""Libraries that only some commands and readers need, and that the package therefore does not depend on."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(what: str, install: str) -> Iterator[None]:
    """Around imports: where the library is missing, the error says what needs it and what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what}: pip install {install}.", name=error.name) from error
