"""A LoRA adapter in memory, whoever wrote it: NeMo's script path, NeMo 2.0, or Hugging Face PEFT.

One vocabulary for all: a target is a linear layer of NeMo (``attention_qkv``: q, k and v fused) or of Hugging Face
(``self_attn.q_proj``). :mod:`.modules` goes from the one to the other.
"""

from __future__ import annotations

import glob
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workshop_utils.digests import sha256
from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.export.qkv import Heads, Order
from workshop_utils.formats import nemo2, safe_text
from workshop_utils.formats.nemo1_config import ACTIVATIONS
from workshop_utils.paths import shown

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

#: The adapter's name in a key of NeMo's script path, and the target it belongs to, in the order of a forward pass.
TARGETS = {
    "lora_kqv_adapter": "attention_qkv",
    "lora_dense_attention_adapter": "attention_dense",
    "lora_hto4h_adapter": "mlp_fc1",
    "lora_4htoh_adapter": "mlp_fc2",
}
PEFT_CONFIG = "adapter_config.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""An adapter's name: a directory, a model's id and a word in a URL alike."""
NAME_RULE = "up to 128 letters, digits, '.', '_' and '-', a letter or digit first"


class Halves(NamedTuple):
    """The two matrices of one adapter: ``linear_in`` (A) ``[r, in]`` and ``linear_out`` (B) ``[out, r]``."""

    linear_in: Tensor
    linear_out: Tensor


@dataclass(frozen=True)
class Architecture:
    """The numbers of the base model that fix the shapes of an adapter. ``activation`` is that of the MLP, by NeMo 1's name."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    heads: Heads
    activation: str | None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: mlp_fc1 is then gate_proj and up_proj, else up_proj alone."""
        return ACTIVATIONS.get(self.activation, ("", False))[1]

    def features(self, target: str) -> tuple[int, int]:
        """Input and output features of the linear layer that ``target`` names, NeMo's or Hugging Face's."""
        attention, groups = self.heads.attention * self.heads.channels, self.heads.groups * self.heads.channels
        return {
            "attention_qkv": (self.hidden_size, self.heads.rows),
            "attention_dense": (attention, self.hidden_size),
            "mlp_fc1": (self.hidden_size, self.ffn_hidden_size * (2 if self.gated else 1)),
            "mlp_fc2": (self.ffn_hidden_size, self.hidden_size),
            "self_attn.q_proj": (self.hidden_size, attention),
            "self_attn.k_proj": (self.hidden_size, groups),
            "self_attn.v_proj": (self.hidden_size, groups),
            "self_attn.o_proj": (attention, self.hidden_size),
            "mlp.gate_proj": (self.hidden_size, self.ffn_hidden_size),
            "mlp.up_proj": (self.hidden_size, self.ffn_hidden_size),
            "mlp.down_proj": (self.ffn_hidden_size, self.hidden_size),
        }[target]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter in memory. ``weights`` maps (layer from 0, target) to its two matrices, in the file's dtype.

    ``config`` has the names of NeMo's ``model_config.yaml``, also where another format was read. ``architecture`` is None for a PEFT
    adapter whose base is not known. ``magnitudes`` are DoRA's, ``[out]``, by the same keys. ``notes`` say what reading it changed.
    ``some_layers``: PEFT was told to adapt only those layers that are there.
    """

    source: Path
    sha256: str
    config: dict[str, Any]
    architecture: Architecture | None
    rank: int
    alpha: float
    targets: tuple[str, ...]
    qkv_order: Order
    base: str
    weights: dict[tuple[int, str], Halves]
    magnitudes: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    some_layers: bool = False

    @property
    def scale(self) -> float:
        """What the reader multiplies ``linear_out @ linear_in`` with: ``alpha / adapter_dim``."""
        return self.alpha / self.rank

    @property
    def layers(self) -> int:
        """Layers of the base, or as far as the adapter tells."""
        return self.architecture.num_layers if self.architecture else 1 + max(layer for layer, _ in self.weights)


def find_adapter(path: Path | str) -> Path:
    """The adapter at ``path``: a file, a PEFT or NeMo 2.0 directory, or the only ``.nemo`` in the ``checkpoints`` folders below it.

    Raises:
        NotACheckpoint: there is none, or more than one.
    """
    path = Path(path)
    if path.is_file() or (path / PEFT_CONFIG).is_file() or (path / "weights" / "adapter_metadata.json").is_file():
        return path
    if not path.exists():
        raise NotACheckpoint(
            f"{shown(path)} does not exist. Give an adapter, or the run directory of a script-path training.{_kept(path)}"
        )
    if nemo2.looks_like(path):
        raise NotACheckpoint(
            f"{shown(path)} is a NeMo 2.0 distributed checkpoint of a whole model: it has no weights/adapter_metadata.json."
        )
    found = sorted(file for file in path.rglob("*.nemo") if file.parent == path or file.parent.name == "checkpoints")
    if not found:
        raise NotACheckpoint(
            f"{shown(path)} holds no adapter: no .nemo (NeMo writes one to checkpoints/ when a training ends normally), no {PEFT_CONFIG} and "
            f"no weights/adapter_metadata.json.{_state(path)}{_kept(path)}"
        )
    if len(found) > 1:
        names = "\n".join(f"  {shown(file)}" for file in found)
        raise NotACheckpoint(f"{shown(path)} holds {len(found)} .nemo files; name the one to export:\n{names}")
    return found[0]


def _state(run: Path) -> str:
    """What the record in the directory ``run`` says of its training, as a sentence; empty where there is none."""
    record = run / "workshop" / "run.json"
    status = safe_text.read_json(record).get("status") if record.is_file() else None
    return f" {shown(record)} has its training as {status}." if isinstance(status, str) else ""


def _kept(run: Path) -> str:
    """Adapters of earlier trainings that are kept beside ``run`` under a number, as a sentence; empty where there are none."""
    folders = [folder for folder in run.parent.glob(f"{glob.escape(run.name)}.*") if folder.suffix[1:].isdecimal()]
    found = [shown(folder) for folder in sorted(folders) if any(folder.glob("checkpoints/*.nemo"))]
    return f" An earlier run of that name, with an adapter, is kept as {' and as '.join(found)}." if found else ""


def read_adapter(path: Path | str, base: Path | None = None) -> LoraAdapter:
    """Read and validate the LoRA or DoRA adapter at ``path``: ``.nemo``, ``.ckpt``, NeMo 2.0 or PEFT directory, or a run directory.

    Nothing is executed or extracted. The base model is not read; of ``base``, its directory, only the configuration is, and only for a
    PEFT adapter, which does not tell the base's sizes (:mod:`.modules` needs them to fuse q, k and v).

    Raises:
        NotACheckpoint: not a LoRA adapter, or not one adapter.
        UnsafeCheckpoint: the weights hold something else than tensors.
        DamagedCheckpoint: a field or a tensor is missing, contradicts the others, or is not finite.
        UnsupportedAdapter: another variant of LoRA, or a target this workshop does not know.
    """
    from workshop_utils.export import nemo2_adapter, peft_adapter, script_path

    source = find_adapter(path)
    if (source / PEFT_CONFIG).is_file():
        adapter = peft_adapter.read(source, base)
    elif source.is_dir():
        adapter = nemo2_adapter.read(source)
    elif source.suffix == ".ckpt":
        adapter = script_path.read_ckpt(source)
    else:
        adapter = script_path.read_nemo(source)
    _check_numbers(adapter)
    return adapter


def fingerprint(*files: Path) -> str:
    """sha256 of one file, or of the digests of several, in hexadecimal."""
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def as_tensor(array: numpy.ndarray) -> Tensor:
    """``array`` as a tensor, also of ml_dtypes' bfloat16, which torch does not take."""
    import torch

    # A copy where the bytes belong to a file: torch warns otherwise.
    plain = array.reshape(-1).view("uint8")
    plain = plain if plain.flags.writeable else plain.copy()
    return torch.from_numpy(plain).view(getattr(torch, array.dtype.name)).reshape(array.shape)


def _check_numbers(adapter: LoraAdapter) -> None:
    """Every number is a finite floating-point one."""
    import torch

    named = [
        (f"layer {layer}, {target} {half}.weight", tensor)
        for (layer, target), halves in adapter.weights.items()
        for half, tensor in zip(Halves._fields, halves, strict=True)
    ]
    named += [(f"layer {layer}, {target} magnitude", tensor) for (layer, target), tensor in adapter.magnitudes.items()]
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise UnsupportedAdapter(
                f"{shown(adapter.source)}: {name} is {tensor.dtype}; only floating-point weights can be exported."
            )
        if not torch.isfinite(tensor).all():
            raise DamagedCheckpoint(
                f"{shown(adapter.source)}: {name} holds NaN or infinity. The training diverged: lower the rate."
            )
