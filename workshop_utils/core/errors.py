"""What can go wrong that a person can put right.

Every class is raised with a message that names the file, the field and the fix. The command line
prints the message without a traceback and exits with ``exit_code``; anything that is not a
``WorkshopError`` is a bug and keeps its traceback.
"""


class WorkshopError(Exception):
    """A mistake or a missing thing that the message tells how to fix."""

    exit_code = 1


class CheckpointError(WorkshopError):
    """Something is wrong with a checkpoint. ``tensor`` names what is affected, where it is one
    tensor; ``code`` is that of :class:`.formats.findings.Code`, where the class says too little."""

    def __init__(self, message: str, tensor: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.code = code


class NotACheckpoint(CheckpointError):
    """The path holds no checkpoint that this workshop knows."""

    exit_code = 2


class UnsafeCheckpoint(CheckpointError):
    """It would run code or write elsewhere if it were loaded. Nothing was executed."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint with a missing, truncated or contradictory part."""


class UnsupportedCheckpoint(CheckpointError):
    """Sound, but of a kind that this command cannot take. The message says what can."""


class FetchError(WorkshopError):
    """A model could not be downloaded: from where, why, and whether a new start resumes."""


class GatedModel(FetchError):
    """The licence of a model has to be accepted, or a key is missing."""


class DataError(WorkshopError):
    """A row or a column of a data file is not what training needs."""


class TrainingFailed(WorkshopError):
    """The training process ended with an error: its cause, and the path of the log."""


class GenerationFailed(WorkshopError):
    """NeMo ended with an error while it answered; the message ends with what it wrote last."""


class UnsupportedAdapter(WorkshopError):
    """A sound adapter that the chosen reader, or this workshop, cannot take."""


class OutputExists(WorkshopError):
    """Something else stands where an export would go. Nothing was replaced."""


class ConformanceFailed(WorkshopError):
    """What was just written breaks a rule of its reader; it was not kept."""


class WaitedTooLong(WorkshopError):
    """Another process did not finish in time: which one, what it does, and what to do."""


class NimFailed(WorkshopError):
    """A NIM could not be started, or did not become ready: what is missing, or its log says."""
