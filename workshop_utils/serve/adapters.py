"""The store of adapters: ``<store>/<name>/`` holds one ``.nemo``, or what PEFT writes. It is looked at again and again.

A directory is read only when it has stopped changing, after the doctor has found it whole, and not kept if it changed meanwhile.
A replacement that is broken or half-written leaves the adapter that is served in place.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.doctor.verify import require_sound
from workshop_utils.errors import NotACheckpoint, UnsupportedAdapter, WorkshopError
from workshop_utils.formats.safe_text import read_json
from workshop_utils.formats.summary import Kind
from workshop_utils.paths import shown
from workshop_utils.terminal import one_line

if TYPE_CHECKING:
    import torch

    from workshop_utils.serve.engine import Engine

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SETTLE = 0.3
"""Seconds that a directory has to stay as it is before it is read."""
_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
)
_REFUSED = ("use_dora", "modules_to_save", "lora_bias", "use_qalora", "target_parameters", "trainable_token_indices", "layer_replication",
            "alora_invocation_tokens", "arrow_config", "fan_in_fan_out")  # fmt: skip

Signature = tuple[tuple[str, int, int, int], ...]


def read(directory: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields of PEFT's ``LoraConfig`` and the tensors under PEFT's names of the adapter in ``directory``.

    The row order and the scale of a ``.nemo`` are those that its YAML states (see :mod:`workshop_utils.export`).

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: it holds no adapter, more than one, or not a sound one.
        UnsupportedAdapter: a kind that cannot share a batch with others.
    """
    archives, config = sorted(directory.glob("*.nemo")), directory / "adapter_config.json"
    if len(archives) + config.is_file() != 1:
        found = (
            ", ".join([*(file.name for file in archives), *(["adapter_config.json"] if config.is_file() else [])]) or "neither"
        )
        raise NotACheckpoint(f"{shown(directory)} has to hold one .nemo or one adapter_config.json; it holds {found}.")
    if archives:
        from workshop_utils.export import hf_peft
        from workshop_utils.export.adapter import read_adapter
        from workshop_utils.export.record import make_record

        require_sound(archives[0], trust)
        adapter = read_adapter(archives[0])
        fields = hf_peft.config_for(adapter, make_record(adapter, "hf-peft", None, adapter.base))
        tensors = hf_peft.tensors_for(adapter)
    else:
        require_sound(directory, trust, (Kind.PEFT,))
        fields = _served_fields(directory, read_json(config))
        tensors = _tensors(directory)
    # PEFT itself widens half precision when it loads an adapter.
    return {name: fields[name] for name in _FIELDS if fields.get(name) is not None}, {
        key: value.float() for key, value in tensors.items()
    }


def _served_fields(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    refused = [name for name in _REFUSED if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        refused.append("peft_type" if config.get("peft_type") != "LORA" else "bias")
    if refused:
        raise UnsupportedAdapter(f"{shown(directory)}: adapter_config.json sets {refused[0]} to {config.get(refused[0])!r}; this server, like vLLM, "
                                 "takes plain LoRA. Merge such an adapter into its base instead.")  # fmt: skip
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise UnsupportedAdapter(f"{shown(directory)}: adapter_config.json needs the numbers r and lora_alpha.")
    return config


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load

    file = directory / "adapter_model.safetensors"
    if file.is_file():
        return load(
            file.read_bytes()
        )  # load_file would map the file: writing to it changes what is served, cutting it kills us
    return torch.load(directory / "adapter_model.bin", map_location="cpu", weights_only=True)


class Store:
    """Keeps the adapters of ``engine`` those of ``directory``; ``say`` gets one line about each change.

    ``base`` is the base's id, which no adapter may have.
    """

    def __init__(self, directory: Path, engine: Engine, base: str, trust: bool = False, say: Callable[[str], None] = print):
        self.directory, self._engine, self._base, self._trust, self._say = Path(directory), engine, base, trust, say
        self._seen: dict[str, Signature] = {}
        self._stop = threading.Event()

    def watch(self, seconds: float) -> None:
        """Look every ``seconds`` until :meth:`stop`."""
        while not self._stop.wait(seconds):
            self.refresh()

    def stop(self) -> None:
        """End :meth:`watch`."""
        self._stop.set()

    def refresh(self) -> None:
        """Take in what is new, replace what has changed, drop what is gone."""
        found = self._scan()
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            if name in self._engine.adapters:
                self._engine.remove(name).result()
                self._say(f"adapter {name}: removed")
        changed = {name: signature for name, signature in found.items() if self._seen.get(name) != signature}
        if not changed or self._stop.wait(_SETTLE):
            return
        again = self._scan()
        for name, signature in changed.items():
            if again.get(name) == signature:
                self._take(name, signature)

    def _take(self, name: str, signature: Signature) -> None:
        had = name in self._engine.adapters
        try:
            if name == self._base:
                raise UnsupportedAdapter("it has the base's name, give it another one.")
            config, tensors = read(self.directory / name, self._trust)
            if self._signature(self.directory / name) != signature:
                return  # it is being written: the next look will see it
            self._engine.install(name, config, tensors).result()
        except (WorkshopError, OSError) as error:
            kept = "; the one before is still served" if had else ""
            self._say(f"adapter {name}: NOT served{kept}. {one_line(str(error))}")
        else:
            self._say(f"adapter {name}: {'replaced' if had else 'served'}")
        self._seen[name] = signature

    def _scan(self) -> dict[str, Signature]:
        try:
            names = [entry.name for entry in self.directory.iterdir() if _NAME.fullmatch(entry.name)]
        except OSError as error:
            self._say(f"the store {shown(self.directory)} cannot be read: {error.strerror}")
            return dict(self._seen)
        signatures = {name: self._signature(self.directory / name) for name in names}
        return {name: signature for name, signature in signatures.items() if signature is not None}

    @staticmethod
    def _signature(directory: Path) -> Signature | None:
        """What changes when a file of ``directory`` does; None when it is no directory, or going."""
        try:
            files = [(entry.name, entry.stat()) for entry in directory.iterdir()]
        except OSError:
            return None
        return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files))
