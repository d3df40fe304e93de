"""The plain facts of an adapter that the rules ask about: its files, its configuration, the names,
shapes and dtypes of its tensors, and, only when a rule asks, their values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from workshop_utils.checkpoints.formats import huggingface, nemo1, nemo2, nemo_archive, values
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lora_layout import (
    PEFT_CONFIG,
    Key,
    parse,
    peft_faults,
    read_layout,
    stated_lora,
)
from workshop_utils.checkpoints.formats.safe_text import foreign_targets, read_json
from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import CheckpointError, NotACheckpoint, WorkshopError
from workshop_utils.core.paths import shown


class Numbers(NamedTuple):
    """Of the tensors, one at a time: those that cannot be read, those that are not finite, and of
    the Bs those that are zero, and how many there are."""

    unread: list[str]
    infinite: list[str]
    zero: list[str]
    count: int


@dataclass(frozen=True)
class Facts:
    """An adapter at ``path``, in ``file``: its ``form`` is ``nemo``, ``hf-peft`` or None. Then
    ``what`` says what is there instead, and ``exportable`` whether ``workshop export`` takes it.

    ``unreadable`` are the faults of reading it, ``unsafe`` what it would run.
    """

    path: Path
    file: Path
    form: str | None
    what: str
    exportable: bool = True
    several: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    unreadable: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Facts:
        """The facts of what lies at ``path``. Raises :class:`NotACheckpoint` where that is no
        checkpoint at all."""
        if not path.exists():
            gone = f"is a link to {os.readlink(path)}, which is gone" if path.is_symlink() else ""
            raise NotACheckpoint(f"{shown(path)} {gone or 'does not exist'}.")
        inside = sorted(path.glob("*.nemo")) if path.is_dir() else []
        if (path / PEFT_CONFIG).is_file():
            return _of_peft(path)
        if len(inside) > 1:
            names = ", ".join(file.name for file in inside)
            return cls(path, path, None, f"it holds {names}", exportable=False, several=True)
        if path.is_file() or inside:
            return _of_nemo(path, path if path.is_file() else inside[0])
        if nemo2.looks_like(path):
            if (path / "weights" / "adapter_metadata.json").is_file():
                what = "an adapter as NeMo 2.0 saves it (weights/*.distcp)"
                return cls(path, path, None, f"this is {what}, which no server reads")
            what = "this is a whole model of NeMo 2.0, which no server reads"
            return cls(path, path, None, what, exportable=False)
        return cls(path, path, None, f"this is a {identify(path).kind}", exportable=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.checkpoint.tensors if self.checkpoint else ()

    @cached_property
    def keys(self) -> list[tuple[str, Key | None]]:
        """Name and meaning of each tensor."""
        return [(tensor.name, parse(tensor.name)) for tensor in self.tensors]

    @cached_property
    def ranks(self) -> list[int]:
        """The different ranks, sorted: of a ``.nemo`` the stated one, where it fits."""
        if self.form == "nemo":
            return [self.layout[0]] if self.layout[0] else []
        first = (
            tensor.shape[0]
            for tensor, (_, key) in zip(self.tensors, self.keys, strict=True)
            if key and key.half == "A" and tensor.shape
        )
        return sorted(set(first))

    @cached_property
    def layout(self) -> tuple[int | None, list[str]]:
        """The rank of the adapter, and what is wrong with its layers, halves, ranks and shapes."""
        if self.form == "hf-peft":
            return None, [fault for code, fault in self._peft_faults if code is not Code.UNEVEN]
        faults: list[str] = []
        state = {tensor.name: tensor for tensor in self.tensors}
        try:
            layout = read_layout(
                self.file, dict(self.config), state, lambda fault: faults.append(str(fault))
            )
        except WorkshopError as error:
            return None, [*faults, str(error)]
        return layout.rank, faults

    @cached_property
    def _peft_faults(self) -> list[tuple[Code, str]]:
        return [(code, fault) for code, fault, _ in peft_faults(self.config, self.tensors)]

    @property
    def uneven(self) -> str | None:
        """Which modules have no tensors, where nothing tells whether that is a fault."""
        faults = self._peft_faults if self.form == "hf-peft" else ()
        return next((fault for code, fault in faults if code is Code.UNEVEN), None)

    @cached_property
    def no_lora(self) -> str | None:
        """Why the configuration of a ``.nemo`` is none of plain LoRA."""
        try:
            stated_lora(self.file, dict(self.config))
        except WorkshopError as error:
            return str(error)
        return None

    @cached_property
    def member_names(self) -> list[str]:
        """The files of a ``.nemo``, as they are stored."""
        return [member.stored_name for member in nemo_archive.members(self.file)]

    @cached_property
    def numbers(self) -> Numbers:
        import numpy

        numbers = Numbers([], [], [], sum(bool(key and key.half == "B") for _, key in self.keys))
        for tensor, (name, key) in zip(self.tensors, self.keys, strict=True):
            try:
                array = values.read_tensor(self.checkpoint, tensor).astype(numpy.float32)
            except CheckpointError as error:
                numbers.unread.append(str(error))
                continue
            if not numpy.isfinite(array).all():
                numbers.infinite.append(f"{name} holds NaN or infinity")
            elif key and key.half == "B" and not array.any():
                numbers.zero.append(name)
        return numbers


def _of_peft(path: Path) -> Facts:
    faults: list[str] = []
    config, checkpoint, unsafe = {}, None, ()
    try:
        config = read_json(path / PEFT_CONFIG)
        # PEFT would import that module.
        if (module := config.get("megatron_core")) not in (None, "megatron.core"):
            unsafe = (
                f"{PEFT_CONFIG} names the module {module!r} as megatron_core, which PEFT would "
                "import; the only genuine one is megatron.core",
            )
        checkpoint = huggingface.describe_peft(path, lambda fault: faults.append(str(fault)))
    except CheckpointError as error:
        faults.append(str(error))
    what = "this is a Hugging Face PEFT directory"
    return Facts(
        path, path, "hf-peft", what, config=config, checkpoint=checkpoint,
        unreadable=tuple(faults), unsafe=unsafe,
    )  # fmt: skip


def _of_nemo(path: Path, file: Path) -> Facts:
    with file.open("rb") as opened:
        start = opened.read(512)
    if start[257:262] != b"ustar" and start[:2] != b"\x1f\x8b":
        try:
            kind = identify(file).kind
        except NotACheckpoint:
            raise
        except CheckpointError as error:
            raise NotACheckpoint(f"{shown(file)} is no .nemo archive (a tar): {error}") from error
        raise NotACheckpoint(
            f"{shown(file)} is a {kind}, no .nemo and no PEFT directory. Export it: workshop "
            f"export {shown(file)} --to hf-peft"
        )
    faults: list[str] = []
    config, checkpoint, unsafe = {}, None, ()
    try:
        config = nemo_archive.read_config(file)
        unsafe = tuple(
            f"{shown(file)}:{nemo_archive.CONFIG}: {place} names {value!r}, which is not on the "
            "list of what a model of NeMo needs; loading it would import or call that"
            for place, value in foreign_targets(config)
        )
        checkpoint = nemo1.describe(file, lambda fault: faults.append(str(fault)))
    except CheckpointError as error:
        faults.append(str(error))
    return Facts(
        path, file, "nemo", "this is a .nemo", config=config, checkpoint=checkpoint,
        unreadable=tuple(faults), unsafe=unsafe,
    )  # fmt: skip
