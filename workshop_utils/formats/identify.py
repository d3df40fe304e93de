"""What is this checkpoint, and what can load it?"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workshop_utils.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.formats import huggingface, llama_config, nemo1_config, nemo2, nemo_archive, torch_archive, torch_dist
from workshop_utils.formats.safe_text import read_json, read_yaml
from workshop_utils.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.formats.tensor import Tensor, whole
from workshop_utils.paths import shown


def identify(path: Path | str) -> Checkpoint:
    """Tell what the checkpoint ``path`` is; reads headers and indexes, no weights, and runs nothing that a file contains.

    Raises :class:`NotACheckpoint` for anything else (naming the right path when ``path`` is above or inside a checkpoint), and
    :class:`DamagedCheckpoint`, :class:`UnsafeCheckpoint` or :class:`UnsupportedCheckpoint` for one that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise NotACheckpoint(f"{shown(path)} does not exist.")
    describe = _reader(path)
    if describe is None:
        raise NotACheckpoint(_hint(path))
    return describe(path)


def _reader(path: Path) -> Callable[[Path], Checkpoint] | None:
    """The function that describes ``path``, chosen by the names of the files there."""
    if path.is_file():
        return _archive if path.suffix == ".nemo" else None
    if (path / "bridge.json").is_file() or ((path / "model_config.yaml").is_file() and (path / "model_weights").is_dir()):
        return _nemo1_directory
    if nemo2.looks_like(path):
        return _nemo2
    if (path / "adapter_config.json").is_file():
        return _peft
    if (path / "config.json").is_file():
        return _huggingface
    return None


def _hint(path: Path) -> str:
    """Why ``path`` is no checkpoint, with the right path where one is near."""
    for above in path.resolve().parents[:2]:
        if _reader(above):
            return f"{shown(path)} is a part of a checkpoint. Give its top directory: {shown(above)}"
    if path.is_file():
        return f"{shown(path)} is not a .nemo archive, and no part of a checkpoint that is known here."
    below = sorted(child for child in path.iterdir() if _reader(child))
    if below:
        names = ", ".join(shown(child) for child in below[:5])
        return f"{shown(path)} is not a checkpoint but holds {len(below)}. Give one of them: {names}"
    return (
        f"{shown(path)} is not a checkpoint: it has none of context/model.yaml (NeMo 2.0), model_config.yaml (NeMo 1), "
        "config.json (Hugging Face) and adapter_config.json (PEFT)."
    )


def _nemo2(path: Path) -> Checkpoint:
    found = nemo2.read(path)
    tensors = found.model_tensors()
    embedding = tensors.get("module.embedding.word_embeddings.weight")
    notes = []
    try:
        fields = llama_config.read_fields(found.model, shown(path / "context" / "model.yaml"))
        architecture = llama_config.architecture(fields, embedding.shape[0] if embedding and embedding.shape else None)
    except UnsupportedCheckpoint as error:
        architecture = None
        notes.append(str(error))
    optimizer = len(found.tensors) - len(tensors)
    if optimizer:
        notes.append(f"{optimizer} tensors of optimizer state beside the weights")
    if found.is_adapter:
        kind, adapter = Kind.NEMO2_ADAPTER, _nemo2_adapter(found)
        loads_in = (
            "NeMo 2.0, on top of its base: llm.generate(path=...), peft.merge_lora(lora_checkpoint_path=...)",
            'PEFT and vLLM, after peft.export_lora or llm.export_ckpt(path=..., target="hf-peft")',
        )
    else:
        kind, adapter = Kind.NEMO2, None
        loads_in = (
            "NeMo 2.0: nemo.collections.llm (finetune, generate, export_ckpt)",
            f"the script path, after: workshop bridge {shown(path)}",
            f"Hugging Face, after: workshop import --to-huggingface {shown(path)}",
        )
    return Checkpoint(
        path=path,
        kind=kind,
        detail=found.backend["sharded_backend"],
        architecture=architecture,
        nbytes=found.nbytes,
        tensors=tuple(tensors.values()),
        tokenizer=_nemo2_tokenizer(found.model.get("tokenizer")),
        adapter=adapter,
        loads_in=loads_in,
        notes=tuple(notes),
    )


def _nemo2_tokenizer(described: Any) -> str | None:
    if not isinstance(described, Mapping):
        return None
    name = described.get("pretrained_model_name") or described.get("model_path")
    name = name.get("attr") if isinstance(name, Mapping) else name
    return f"{str(described.get('_target_')).rpartition('.')[2]}: {name}"


def _nemo2_adapter(found: nemo2.Nemo2Checkpoint) -> Adapter:
    """Rank and targets as the tensors have them: ``...layers.self_attention.linear_qkv.adapter.linear_in.weight`` (layers, r, in)."""
    ranks, targets = set(), set()
    for name, tensor in found.model_tensors().items():
        match = re.search(r"\.(\w+)\.adapter\.linear_in\.weight$", name)
        if match and len(tensor.shape) >= 2:
            targets.add(match[1])
            ranks.add(tensor.shape[-2])
    transform = found.model.get("model_transform")
    alpha = transform.get("alpha") if isinstance(transform, Mapping) else None
    base = found.adapter.get("model_ckpt_path")
    base = base if isinstance(base, str) else None
    return Adapter(
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alpha if isinstance(alpha, int | float) else None,
        targets=tuple(sorted(targets)),
        base=base,
        base_is_here=Path(base).exists() if base else None,
    )


def _nemo1_directory(path: Path) -> Checkpoint:
    config = read_yaml(path / "model_config.yaml")
    weights = path / "model_weights"
    bridged = (path / "bridge.json").is_file()
    if not weights.is_dir():
        raise DamagedCheckpoint(f"{shown(weights)} is missing.")
    tensors = tuple(torch_dist.read_directory(weights).tensors.values())
    notes = ()
    if bridged:
        notes = (f"a view of the NeMo 2.0 checkpoint {shown(path / str(read_json(path / 'bridge.json').get('view_of')))}",)
    return Checkpoint(
        path=path,
        kind=Kind.BRIDGED_VIEW if bridged else Kind.NEMO1_DIRECTORY,
        detail=None,
        architecture=nemo1_config.architecture(config),
        nbytes=sum(torch_dist.file_sizes(weights).values()),
        tensors=tensors,
        tokenizer=nemo1_config.tokenizer(config),
        adapter=None,
        loads_in=(f"the script path: workshop finetune model.restore_from_path={shown(path)}",),
        notes=notes,
    )


def _archive(path: Path) -> Checkpoint:
    members = nemo_archive.members(path)
    config = nemo_archive.read_config(path)
    tensors, notes = _archive_tensors(path, members)
    adapter = nemo1_config.adapter(config)
    if tensors and not all(".adapter_layer." in tensor.name for tensor in tensors):
        adapter = None
    exported = config.get("workshop")
    if isinstance(exported, Mapping):
        notes += (f"q, k, v rows: {exported.get('qkv_order')}; alpha baked in: {exported.get('alpha_baked_in')}",)
        loads_in = (str(exported.get("reader")),)
    elif adapter:
        loads_in = (
            f"the script path: model.peft.restore_from_path={shown(path)}",
            "NeMo's converter to Hugging Face PEFT: nemo/export/utils/lora_converter.py",
            f"PEFT, vLLM and NIM, after: workshop export {shown(path)} --to hf-peft",
            f"TensorRT-LLM, after: workshop export {shown(path)} --to nemo",
        )
    else:
        loads_in = (f"the script path: workshop finetune model.restore_from_path={shown(path)}",)
    return Checkpoint(
        path=path,
        kind=Kind.NEMO1_ARCHIVE_ADAPTER if adapter else Kind.NEMO1_ARCHIVE,
        detail=None,
        architecture=nemo1_config.architecture(config),
        nbytes=sum(member.size for member in members),
        tensors=tensors,
        tokenizer=nemo1_config.tokenizer(config),
        adapter=adapter,
        loads_in=loads_in,
        notes=notes,
    )


def _archive_tensors(path: Path, members: list[nemo_archive.Member]) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The tensors in the archive, with a note where they cannot be listed."""
    sizes = {member.name: member.size for member in members}
    if nemo_archive.WEIGHTS in sizes:
        with nemo_archive.open_member(path, nemo_archive.WEIGHTS) as file:
            saved = torch_archive.read_tensors(file, f"{shown(path)}:{nemo_archive.WEIGHTS}")
        return tuple(whole(name, found.shape, found.dtype, nemo_archive.WEIGHTS, 0, 0) for name, found in saved.items()), ()
    if f"model_weights/{torch_dist.INDEX}" in sizes:
        files = {name.partition("/")[2]: size for name, size in sizes.items() if name.startswith("model_weights/")}
        index = nemo_archive.read_member(path, f"model_weights/{torch_dist.INDEX}")
        return tuple(torch_dist.read_index(index, f"{shown(path)}:model_weights", files).tensors.values()), ()
    parts = sorted({name.partition("/")[0] for name in sizes if re.match(r"(mp_rank|tp_rank)_\d+", name)})
    if parts:
        return (), (f"written by {len(parts)} model-parallel ranks whose parts are not merged; no reader of adapters takes that",)
    raise DamagedCheckpoint(f"{shown(path)} has no weights: neither {nemo_archive.WEIGHTS} nor model_weights/.")


def _huggingface(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    files = huggingface.weight_files(path)
    name = path.resolve().name
    return Checkpoint(
        path=path,
        kind=Kind.HUGGINGFACE,
        detail=str(config.get("model_type")),
        architecture=huggingface.architecture(config),
        nbytes=sum(file.stat().st_size for file in files),
        tensors=tuple(huggingface.read_tensors(files)),
        tokenizer=_huggingface_tokenizer(path),
        adapter=None,
        loads_in=(
            f'transformers: AutoModelForCausalLM.from_pretrained("{shown(path)}")',
            f"vLLM: vllm serve {shown(path)}",
            f"NeMo 2.0, after: workshop import {name if shown(path) == f'models/huggingface/{name}' else shown(path)}",
        ),
    )


def _huggingface_tokenizer(path: Path) -> str | None:
    config = path / "tokenizer_config.json"
    if config.is_file():
        return str(read_json(config).get("tokenizer_class"))
    return next((file for file in ("tokenizer.json", "tokenizer.model") if (path / file).is_file()), None)


def _peft(path: Path) -> Checkpoint:
    config = read_json(path / "adapter_config.json")
    files = huggingface.weight_files(path, "adapter_model", "adapter_model")
    return Checkpoint(
        path=path,
        kind=Kind.PEFT,
        detail=str(config.get("peft_type")),
        architecture=None,
        nbytes=sum(file.stat().st_size for file in files),
        tensors=tuple(huggingface.read_tensors(files)),
        tokenizer=None,
        adapter=huggingface.adapter(config),
        loads_in=(
            f'transformers + PEFT: PeftModel.from_pretrained(base, "{shown(path)}")',
            f"vLLM: --enable-lora --lora-modules NAME={shown(path)}",
            "NIM: as a directory of its own in $NIM_PEFT_SOURCE (by NVIDIA's pages; not tested here)",
        ),
    )


