"""What an adapter records as its base: the model's id on the Hub, which is the same on every
machine. The exporters write it, ``workshop conform`` asks for it, the store compares two."""

from __future__ import annotations

import re
from pathlib import Path

from workshop_utils.core import paths

_NAME = re.compile(r"\w[\w.-]*")


def base_id(base: str) -> str:
    """``base`` if it is an id already; else the id that the catalogue has for that name or
    directory, else its last part."""
    if is_hub_id(base):
        return base
    name = Path(base).name.removesuffix(".nemo")
    return _catalogued().get(name) or name


def of_directory(directory: Path, recorded: str) -> str:
    """The id of the model in ``directory``, where an adapter of it has ``recorded`` its base: an id
    that is recorded is kept."""
    known = _catalogued().get(directory.name)
    return known or (recorded if is_hub_id(recorded) else directory.name)


#: The same weights under other names: Meta's repositories lost a prefix (Meta-Llama-3.1-8B is
#: Llama-3.1-8B now), ids of NIM leave out a dash (meta/llama3-8b-instruct) or a dot
#: (mistral-7b-instruct-v03), Unsloth's copies say how they are packed, and Llama 2 that it is of
#: transformers (-hf).
_ALIASES = (
    (re.compile(r"^meta-(?=llama)"), ""),
    (re.compile(r"^(llama|qwen|gemma|phi)(?=\d)"), r"\1-"),
    (re.compile(r"(-unsloth)?-bnb-4bit$|-unsloth$|-hf$"), ""),
    (re.compile(r"-v0(?=\d$)"), "-v0."),
)


def same_base(base: str, other: str) -> bool:
    """Whether two ids, names or directories are the same model's. Organisations differ (meta,
    meta-llama, unsloth), and so do capital letters. False says nothing: one model has many
    names."""
    return _plain_name(base) == _plain_name(other)


def _plain_name(base: str) -> str:
    name = base_id(base).rpartition("/")[2].casefold()
    for pattern, text in _ALIASES:
        name = pattern.sub(text, name)
    return name


def local_model(base: str) -> Path | None:
    """The Hugging Face directory of ``base``, where ``workshop models`` has fetched it."""
    for name, its_id in _catalogued().items():
        if base in (name, its_id) and (place := paths.huggingface_model(name)).is_dir():
            return place
    return None


def is_hub_id(base: str) -> bool:
    """Whether ``base`` reads ``ORGANISATION/NAME``."""
    organisation, slash, name = base.partition("/")
    return bool(slash and _NAME.fullmatch(organisation) and _NAME.fullmatch(name))


def is_place(base: str) -> bool:
    """Whether ``base`` can only be a place on some machine: an absolute path, one with ``.`` or
    ``~`` in front, or one of several folders."""
    return not (is_hub_id(base) or _NAME.fullmatch(base))


def _catalogued() -> dict[str, str]:
    """Ids on the Hub of the models of the manifest, by name, where they have one."""
    # The package alone, copied into another project, has no manifest.
    if not paths.repository_file("models/manifest.yaml").is_file():
        return {}
    from workshop_utils.checkpoints.sources.catalogue import catalogue

    return {name: model.hub_id for name, model in catalogue().items() if model.hub_id}
