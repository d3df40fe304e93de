"""What a look at a checkpoint found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown

_BY_WEIGHT = (UnsafeCheckpoint, DamagedCheckpoint)


@dataclass
class Report:
    """The answer of :func:`workshop_utils.checkpoints.verify.verify.verify`.

    ``checked`` are the statements that were looked at: they hold but for the ``findings``.
    ``untold`` is what cannot be told from what is there, ``notes`` what is odd but harms nothing.
    ``checkpoint`` is None when it could not be read at all; ``objects`` are the entries of its
    index that are no tensors.
    """

    path: Path
    checkpoint: Checkpoint | None = None
    checked: list[str] = field(default_factory=list)
    findings: list[CheckpointError] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    objects: Mapping[str, StoredObject] = field(default_factory=dict, repr=False)
    _seen: set[str] = field(default_factory=set, repr=False)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, as far as can be told."""
        return not self.findings

    @property
    def worst(self) -> CheckpointError | None:
        """The most serious finding: what is unsafe before what is damaged, that before what is not
        supported."""
        weight = {kind: at for at, kind in enumerate(_BY_WEIGHT)}
        return min(
            self.findings, key=lambda error: weight.get(type(error), len(weight)), default=None
        )

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        if not self.findings:
            told = (
                f"; {len(self.untold)} thing{'s' if len(self.untold) > 1 else ''} cannot be told"
                if self.untold
                else ""
            )
            return f"sound: {shown(self.path)}, {len(self.checked)} checks passed{told}"
        unsafe = "UNSAFE" if isinstance(self.worst, UnsafeCheckpoint) else "unsound"
        return (
            f"{unsafe}: {shown(self.path)}, {len(self.findings)} "
            f"finding{'s' if len(self.findings) > 1 else ''}"
        )

    def add(self, finding: CheckpointError) -> None:
        """Keep ``finding``, once. This is what the readers of
        :mod:`workshop_utils.checkpoints.formats` report faults to."""
        if str(finding) not in self._seen:
            self._seen.add(str(finding))
            self.findings.append(finding)

    def damaged(self, message: str, tensor: str | None = None) -> None:
        """Keep a :class:`DamagedCheckpoint`."""
        self.add(DamagedCheckpoint(message, tensor))

    def note(self, message: str) -> None:
        """Keep a note, once."""
        if message not in self.notes:
            self.notes.append(message)
