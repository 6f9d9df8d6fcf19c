"""Libraries that only some commands and readers need, and that the package therefore does not depend on."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(what: str, install: str) -> Iterator[None]:
    """Around imports: where the library is missing, the error says what needs it and what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        said = f"{what}, got no module {error.name!r}: pip install {install}."
        raise ModuleNotFoundError(said, name=error.name) from error
