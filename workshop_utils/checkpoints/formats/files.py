"""The files of a checkpoint: those of a directory, or the members of a ``.nemo`` archive, which is
never unpacked."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from workshop_utils.checkpoints.formats import nemo_archive, restricted_pickle, torch_dist
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.core.paths import shown

_LEVELS = ("*", "*/*", "*/*/*")
"""How deep a directory is looked into: ``model_weights/`` of zarr has a directory for each
tensor."""


@dataclass(frozen=True)
class Files:
    """The files of the directory ``place``, or the members of the archive ``place`` whose names
    begin with ``inside``."""

    place: Path
    inside: str = ""

    @property
    def are_members(self) -> bool:
        return self.place.is_file()

    def below(self, folder: str) -> "Files":
        if self.are_members:
            return Files(self.place, f"{self.inside}{folder}/")
        return Files(self.place / folder)

    def where(self, name: str = "") -> str:
        """What messages call the file ``name``, or all of them."""
        if self.are_members:
            return f"{shown(self.place)}:{self.inside}{name}".rstrip("/")
        return shown(self.place / name)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name; a link counts as the file that it leads to."""
        if self.are_members:
            sizes = {member.name: member.size for member in nemo_archive.members(self.place)}
            own = (name for name in sizes if name.startswith(self.inside))
            return {name.removeprefix(self.inside): sizes[name] for name in own}
        below = sorted(path for level in _LEVELS for path in self.place.glob(level))
        files = (path for path in below if path.is_file())
        return {str(file.relative_to(self.place)): file.stat().st_size for file in files}

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        if self.are_members:
            return nemo_archive.open_member(self.place, self.inside + name)
        return (self.place / name).open("rb")

    def read(self, name: str) -> bytes:
        """The bytes of the file ``name``. Raises :class:`DamagedCheckpoint` where they are more
        than an index has."""
        if self.are_members:
            most = restricted_pickle.MAX_BYTES
            return nemo_archive.read_member(self.place, self.inside + name, most)
        return restricted_pickle.read_bytes(self.place / name)

    def read_index(self, report: Report = stop) -> torch_dist.Index:
        """The index of the torch_dist checkpoint that they are; errors and faults as
        :func:`.torch_dist.read_index`."""
        if self.are_members:
            index = self.read(torch_dist.INDEX)
            return torch_dist.read_index(index, self.where(), self.sizes(), report)
        return torch_dist.read_directory(self.place, report)
