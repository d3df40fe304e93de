"""How a reader says what is wrong: by default it stops at the first fault, for a diagnosis it goes
on and names them all."""

from collections.abc import Callable

from workshop_utils.core.errors import CheckpointError, UnsafeCheckpoint

Report = Callable[[CheckpointError], None]
"""What a reader calls for each fault it finds. If it returns, the reader leaves the faulty entry
out and goes on."""


def stop(fault: CheckpointError) -> None:
    """The default: raise ``fault``."""
    raise fault


def pass_over(trust: bool) -> Report:
    """What a reader calls that is given a verified checkpoint: with ``trust``, what is unsafe has
    been printed and is passed over."""

    def report(fault: CheckpointError) -> None:
        """Raise ``fault``, unless it is an :class:`UnsafeCheckpoint`."""
        if not isinstance(fault, UnsafeCheckpoint):
            raise fault

    return report if trust else stop
