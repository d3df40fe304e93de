"""What an adapter records as its base: the model's id on the Hub, which is the same on every
machine. The exporters write it, ``workshop conform`` asks for it, the store compares two."""

from __future__ import annotations

import re
from pathlib import Path

from workshop_utils.checkpoints.sources.catalogue import catalogue
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


def same_base(one: str, other: str) -> bool:
    """Whether two ids, names or directories are the same model's. Organisations differ (meta,
    meta-llama), and so do capital letters."""
    first, second = (base_id(base).rpartition("/")[2].casefold() for base in (one, other))
    return first == second


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
    return {name: model.hub_id for name, model in catalogue().items() if model.hub_id}
