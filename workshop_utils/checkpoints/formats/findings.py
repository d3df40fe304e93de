"""What a look at a checkpoint brings to light, as facts; and how a reader says it: by default it
stops at the first fault, for a diagnosis it goes on and names them all."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)


class Severity(StrEnum):
    """Not to be loaded, to be looked at, harmless, or not known from what is there."""

    REFUSED = "refused"
    WARNING = "warning"
    NOTE = "note"
    NOT_KNOWN = "not known"


class Code(StrEnum):
    """What it is about, whatever the words of the sentence."""

    UNSAFE = "unsafe"
    NOT_A_CHECKPOINT = "not a checkpoint"
    UNSUPPORTED = "unsupported"
    DAMAGED = "damaged"
    # files
    MISSING_FILE = "missing file"
    CUT_OFF = "cut off"
    OVERLAP = "overlap"
    NOBODYS_BYTES = "nobody's bytes"
    UNREAD_FILE = "unread file"
    LEFTOVER = "leftover"
    MANIFEST = "manifest"
    BACKEND = "backend"
    TOKENIZER = "tokenizer"
    INDEX = "index"
    # tensors
    MISSING_TENSOR = "missing tensor"
    FOREIGN_TENSOR = "foreign tensor"
    NOT_WHOLE = "not whole"
    LENGTH = "length"
    SHAPE = "shape"
    DTYPE = "dtype"
    LAYERS = "layers"
    RANKS = "ranks"
    CONTENT = "content"
    NOT_FINITE = "not finite"
    # adapters
    HALF = "half"
    RANK = "rank"
    PREFIX = "prefix"
    TARGETS = "targets"
    UNEVEN = "uneven"
    BASE = "base"
    # what nothing in the checkpoint tells
    ORIGIN = "origin"
    ARCHITECTURE = "architecture"
    SCHEME = "scheme"
    VALUES = "values"


_BY_ERROR = {
    UnsafeCheckpoint: Code.UNSAFE,
    NotACheckpoint: Code.NOT_A_CHECKPOINT,
    UnsupportedCheckpoint: Code.UNSUPPORTED,
}


@dataclass(frozen=True)
class Finding:
    """``tensor`` and ``file`` are what is affected, ``source`` the file or page that the rule comes
    from, where there is one."""

    code: Code
    severity: Severity
    message: str
    tensor: str | None = None
    file: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def where(self) -> str | None:
        return self.tensor or self.file

    @classmethod
    def of(cls, error: CheckpointError) -> "Finding":
        code = Code(error.code) if error.code else _BY_ERROR.get(type(error), Code.DAMAGED)
        return cls(code, Severity.REFUSED, str(error), error.tensor)

    def error(self) -> CheckpointError:
        """The exception to raise for it."""
        kinds = {code: kind for kind, code in _BY_ERROR.items()}
        return kinds.get(self.code, DamagedCheckpoint)(self.message, self.tensor, self.code)


Report = Callable[[CheckpointError], None]
"""What a reader calls for each fault that it meets. If it returns, the reader leaves the faulty
entry out and goes on."""


def stop(fault: CheckpointError) -> None:
    """The default: raise ``fault``."""
    raise fault


def pass_over(trust: bool) -> Report:
    """What a reader calls that is given a verified checkpoint: with ``trust``, what is unsafe has
    been printed and is passed over."""

    def report(fault: CheckpointError) -> None:
        if not isinstance(fault, UnsafeCheckpoint):
            raise fault

    return report if trust else stop
