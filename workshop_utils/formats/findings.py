"""How a reader says what is wrong: by default it stops at the first fault, for a diagnosis it goes on and names them all."""

from collections.abc import Callable

from workshop_utils.errors import CheckpointError

Report = Callable[[CheckpointError], None]
"""What a reader calls for each fault it finds. If it returns, the reader leaves the faulty entry out and goes on."""


def stop(fault: CheckpointError) -> None:
    """The default: raise ``fault``."""
    raise fault
