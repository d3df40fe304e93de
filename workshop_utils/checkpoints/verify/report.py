"""What a look at a checkpoint found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats.findings import Code, Finding, Severity
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.torch_dist import StoredObject
from workshop_utils.core.errors import CheckpointError
from workshop_utils.core.paths import shown


@dataclass
class Report:
    """The answer of :func:`workshop_utils.checkpoints.verify.verify.verify`.

    ``checked`` are the statements that were looked at: they hold but for what is ``refused``.
    ``checkpoint`` is None when it could not be read at all. ``where`` names the file or directory
    of the weights in messages; ``objects`` are the entries of its index that are no tensors.
    """

    path: Path
    checkpoint: Checkpoint | None = None
    where: str = ""
    checked: list[str] = field(default_factory=list)
    objects: Mapping[str, StoredObject] = field(default_factory=dict, repr=False)
    _by_message: dict[str, Finding] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.where = self.where or shown(self.path)

    @property
    def findings(self) -> list[Finding]:
        return list(self._by_message.values())

    @property
    def refused(self) -> list[Finding]:
        """What is wrong."""
        return [item for item in self.findings if item.severity is Severity.REFUSED]

    @property
    def notes(self) -> list[Finding]:
        """What is odd but harms nothing."""
        return [item for item in self.findings if item.severity is Severity.NOTE]

    @property
    def not_known(self) -> list[Finding]:
        """What could not be checked from what is there."""
        return [item for item in self.findings if item.severity is Severity.NOT_KNOWN]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, as far as can be told."""
        return not self.refused

    @property
    def worst(self) -> Finding | None:
        """The most serious of what is refused: what is unsafe before what is damaged, that before
        what is not supported."""
        last = (Code.UNSUPPORTED, Code.NOT_A_CHECKPOINT)
        ranked = ((item.code is not Code.UNSAFE, item.code in last, item) for item in self.refused)
        return min(ranked, key=lambda entry: entry[:2], default=[None])[-1]

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        gaps, refused = len(self.not_known), len(self.refused)
        if self.sound:
            rest = f"; {gaps} thing{'s' * (gaps > 1)} not known" if gaps else ""
            return f"sound: {shown(self.path)}, {len(self.checked)} checks passed{rest}"
        unsafe = "UNSAFE" if self.worst.code is Code.UNSAFE else "unsound"
        return f"{unsafe}: {shown(self.path)}, {refused} finding{'s' * (refused > 1)}"

    def keep(self, finding: Finding) -> None:
        """Once."""
        self._by_message.setdefault(finding.message, finding)

    def add(self, fault: CheckpointError) -> None:
        """What the readers of :mod:`workshop_utils.checkpoints.formats` report faults to."""
        self.keep(Finding.of(fault))

    def damaged(
        self, message: str, tensor: str | None = None, code: Code = Code.DAMAGED, **more: Any
    ) -> None:
        """Refused, be it for being unsafe."""
        self.keep(Finding(code, Severity.REFUSED, message, tensor, **more))

    def tensor(self, name: str, text: str, code: Code, **more: Any) -> None:
        """What ``text`` says of the tensor ``name`` is wrong."""
        self.damaged(f"{self.where}: {name} {text}", name, code, **more)

    def note(self, message: str, code: Code, **more: Any) -> None:
        self.keep(Finding(code, Severity.NOTE, message, **more))

    def unknown(self, message: str, code: Code, **more: Any) -> None:
        self.keep(Finding(code, Severity.NOT_KNOWN, message, **more))
