"""The store of adapters: ``<store>/<name>/`` holds one ``.nemo``, or what PEFT writes. It is looked
at again and again.

A directory is read only when it has stopped changing, after it has been verified and keeps the
rules of this server, and not kept if it changed meanwhile. A replacement that is broken or
half-written leaves the adapter that is served in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.adapters.adapter import NAME, NAME_RULE
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.rules import Facts, check
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core.errors import UnsupportedAdapter, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.core.terminal import one_line

if TYPE_CHECKING:
    import torch

    from workshop_utils.serving.server.engine import Engine

_SETTLE = 0.3
"""Seconds that a directory has to stay as it is before it is read."""
Signature = tuple[tuple[str, int, int, int], ...]


def read(
    directory: Path, trust: bool = False, max_rank: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields of PEFT's ``LoraConfig`` and the tensors under PEFT's names of the adapter in
    ``directory``.

    They are those that an export to PEFT writes (see :mod:`workshop_utils.adapters`): one rank and
    one scale, and no pattern of a stranger's configuration for PEFT to match.

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: it holds no adapter, or not a sound
            one.
        UnsupportedAdapter: more than one, or a kind that cannot share a batch with others.
    """
    from workshop_utils.adapters import write_peft

    facts = Facts.of(directory)
    if facts.form:
        require_sound(facts.file, trust, (Kind.PEFT,) if facts.form == "hf-peft" else ())
    for rule in check(facts, "serve", max_rank).broken:
        fix = f"{rule.fix[:1].upper()}{rule.fix[1:]}"
        raise UnsupportedAdapter(f"{rule.rule}: {rule.fault}. {fix}.")
    adapter = read_adapter(facts.file)
    fields = write_peft.config_for(adapter, adapter.base)
    # PEFT itself widens half precision when it loads an adapter.
    tensors = {key: value.float() for key, value in write_peft.tensors_for(adapter).items()}
    names = ("r", "lora_alpha", "target_modules", "layers_to_transform")
    return {name: fields[name] for name in names}, tensors


class Store:
    """Keeps the adapters of ``engine`` those of ``directory``; ``say`` gets one line about each
    change.

    ``base`` is the base's id, which no adapter may have; ``max_rank`` is the largest rank that one
    may have, None for any.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        base: str,
        trust: bool = False,
        max_rank: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.directory, self._engine, self._base = Path(directory), engine, base
        self._trust, self._max_rank, self._say = trust, max_rank, say
        self._seen: dict[str, Signature] = {}
        self._stop = threading.Event()

    def watch(self, seconds: float) -> None:
        """Look every ``seconds`` until :meth:`stop`."""
        while not self._stop.wait(min(seconds, threading.TIMEOUT_MAX)):
            self.refresh()

    def stop(self) -> None:
        """End :meth:`watch`."""
        self._stop.set()

    def refresh(self) -> None:
        """Take in what is new, replace what has changed, drop what is gone."""
        present = self._scan()
        if present == self._seen or self._stop.wait(_SETTLE):
            return
        again = self._scan()
        for name in (
            self._seen.keys() - present.keys() - again.keys()
        ):  # one that is being replaced may be away for a moment
            del self._seen[name]
            if name in self._engine.adapters:
                self._engine.remove(name).result()
                self._say(f"adapter {name}: removed")
        for name, signature in present.items():
            if self._seen.get(name) != signature == again.get(name):
                self._take(name, signature)

    def _take(self, name: str, signature: Signature) -> None:
        had = name in self._engine.adapters
        try:
            if name == self._base:
                raise UnsupportedAdapter("it has the base's name, give it another one.")
            if not NAME.fullmatch(name):
                raise UnsupportedAdapter(
                    f"its directory's name cannot be a model's id, rename it: {NAME_RULE}."
                )
            config, tensors = read(self.directory / name, self._trust, self._max_rank)
            if self._signature(self.directory / name) != signature:
                return  # it is being written: the next look will see it
            self._engine.install(name, config, tensors).result()
        except (WorkshopError, OSError) as error:
            kept = "; the one before is still served" if had else ""
            self._say(one_line(f"adapter {name}: NOT served{kept}. {error}"))
        else:
            self._say(f"adapter {name}: {'replaced' if had else 'served'}")
        self._seen[name] = signature

    def _scan(self) -> dict[str, Signature]:
        try:
            names = [
                entry.name for entry in self.directory.iterdir() if not entry.name.startswith(".")
            ]
        except OSError as error:
            self._say(f"the store {shown(self.directory)} cannot be read: {error.strerror}")
            return dict(self._seen)
        signatures = {name: self._signature(self.directory / name) for name in names}
        return {name: signature for name, signature in signatures.items() if signature is not None}

    @staticmethod
    def _signature(directory: Path) -> Signature | None:
        """What changes when a file of ``directory`` does; None when it is none, or going."""
        try:
            files = [(entry.name, entry.stat()) for entry in directory.iterdir()]
        except OSError:
            return None
        return tuple(
            sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files)
        )
