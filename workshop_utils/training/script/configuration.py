"""The configuration that the script will see: its defaults with the overrides on top, composed by
Hydra itself, without torch."""

import difflib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import nearest as nearest_names

if TYPE_CHECKING:
    from omegaconf import DictConfig

_LOCK = threading.Lock()


def _defaults(script: Path) -> "DictConfig":
    from omegaconf import OmegaConf

    return OmegaConf.load(_defaults_file(script))


def _defaults_file(script: Path) -> Path:
    file = Path(script).resolve().parent / "conf" / f"{Path(script).stem}_config.yaml"
    if not file.is_file():
        raise WorkshopError(f"{paths.shown(file)} is missing: the script has no defaults.")
    return file


def compose(script: Path, overrides: Sequence[str]) -> "DictConfig":
    """The configuration of ``script`` (``conf/NAME_config.yaml`` beside it) with ``overrides``.

    Raises:
        WorkshopError: an override cannot be parsed, or names a key that the script does not have;
            the nearest one is offered.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults = _defaults_file(script)
    # Hydra is one for the whole process: plans that are made in several threads wait, and whoever
    # has set it up finds it again.
    with _LOCK:
        kept = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(defaults.parent), version_base=None):
                config = hydra_compose(defaults.stem, overrides=list(overrides))
                OmegaConf.to_container(config, resolve=True)
                return config
        except (HydraException, OmegaConfBaseException) as error:
            raise WorkshopError(_explained(error, defaults)) from None
        finally:
            if kept is not None:
                GlobalHydra.instance().initialize(kept)


def keys(config: "DictConfig") -> list[str]:
    """Every dotted key of ``config``, branches included, without following interpolations."""
    from omegaconf import OmegaConf

    return list(_keys(OmegaConf.to_container(config, resolve=False), ""))


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The key among ``known`` that ``key`` was probably meant to be: alike as a whole, or with the
    same last part elsewhere."""
    if close := nearest_names(key, known, cutoff=0.8):
        return close[0]
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    if same:
        return max(same, key=lambda name: difflib.SequenceMatcher(None, name, key).ratio())
    ends = {name.rpartition(".")[2]: name for name in known}
    close = nearest_names(last, ends, cutoff=0.8)
    return ends[close[0]] if close else None


def refuse_mistyped(script: Path, overrides: Mapping[str, str]) -> None:
    """Hydra adds whatever key has + or ++ in front. Refuse one that is nearly a key of ``script``:
    it would change nothing.

    Raises:
        WorkshopError: with the key that was meant.
    """
    added = {mark: key for mark in overrides if (key := mark.lstrip("+")) != mark}
    known = keys(_defaults(script)) if added else []
    for mark, key in added.items():
        if meant := _misspelt(key.split("."), [name.split(".") for name in known]):
            raise WorkshopError(
                f"{mark} would add a key to {Path(script).stem}. Did you mean {meant}, which it "
                "has? Write that without +."
            )


def _misspelt(parts: list[str], known: list[list[str]]) -> str | None:
    """The key in whose place ``parts`` stand, if at the first level where they differ one of the
    ``known`` names is written almost so."""
    for level, part in enumerate(parts):
        here = {
            name[level] for name in known if len(name) > level and name[:level] == parts[:level]
        }
        if part not in here:
            swapped = [name for name in here if sorted(name) == sorted(part)]
            meant = swapped or nearest_names(part, here, cutoff=0.88)
            return ".".join([*parts[:level], meant[0], *parts[level + 1 :]]) if meant else None
    return None


def _keys(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield f"{prefix}{name}"
            yield from _keys(child, f"{prefix}{name}.")


def _explained(error: Exception, defaults: Path) -> str:
    """What Hydra says, in a sentence that names the override and the key that was probably
    meant."""
    text = str(error)
    if unknown := re.match(r"Could not override '([^']+)'\.", text):
        from omegaconf import OmegaConf

        key = unknown[1]
        meant = nearest(key, keys(OmegaConf.load(defaults)))
        offer = f" Did you mean {meant}?" if meant else ""
        return (
            f"{key} is no key of {defaults.stem.removesuffix('_config')}.{offer} To add a key "
            f"that its defaults lack, write +{key}=..."
        )
    if there := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return (
            f"{there[1]} is a key of {defaults.stem.removesuffix('_config')} already: write "
            f"{there[1]}=... without +."
        )
    if override := getattr(error, "override", None):
        return (
            f"{override!r} cannot be read as an override. Hydra wants quotes around a value with "
            "other than plain characters, and the shell around the whole: 'key=\"value\"', "
            "'key=[\"value\"]'."
        )
    # OmegaConf says the key in a line of its own.
    key = re.search(r"full_key: (\S+)", text)
    return f"{key[1]}: {text.splitlines()[0]}" if key else text.splitlines()[0][:300]


def plain(value: str) -> str:
    """``value`` as Hydra's grammar reads it back as this very text: quoted, unless it is a path or
    a name of plain characters."""
    if re.fullmatch(r"[A-Za-z_./][\w./+-]*", value, re.ASCII) and value.lower() not in (
        "true",
        "false",
        "null",
        "nan",
        "inf",
    ):
        return value
    return "'" + value.replace("'", "\\'") + "'"
