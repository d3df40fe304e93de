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
from workshop_utils.core.nearest import did_you_mean
from workshop_utils.core.nearest import nearest as nearest_names

if TYPE_CHECKING:
    from omegaconf import DictConfig

_LOCK = threading.Lock()


def _defaults_file(script: Path) -> Path:
    file = Path(script).resolve().parent / "conf" / f"{Path(script).stem}_config.yaml"
    if not file.is_file():
        raise WorkshopError(f"{paths.shown(file)} is missing: the script has no defaults.")
    return file


def defaults(script: Path) -> "DictConfig":
    """What ``script`` does without overrides (``conf/NAME_config.yaml`` beside it)."""
    from omegaconf import OmegaConf

    return OmegaConf.load(_defaults_file(script))


def compose(script: Path, overrides: Sequence[str]) -> "DictConfig":
    """The configuration of ``script`` with ``overrides``. Raises WorkshopError where one cannot be
    parsed, or names a key that the script does not have; the nearest one is offered."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _defaults_file(script)
    # Hydra is one for the whole process: plans that are made in several threads wait, and whoever
    # has set it up finds it again.
    with _LOCK:
        kept = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(file.parent), version_base=None):
                config = hydra_compose(file.stem, overrides=list(overrides))
                OmegaConf.to_container(config, resolve=True)
                return config
        except (HydraException, OmegaConfBaseException) as error:
            raise WorkshopError(_explained(error, script)) from None
        finally:
            if kept is not None:
                GlobalHydra.instance().initialize(kept)


def _keys(script: Path) -> list[str]:
    """Every dotted key of the defaults of ``script``, branches included, without following
    interpolations."""
    from omegaconf import OmegaConf

    def below(node: Any, prefix: str) -> Iterator[str]:
        for name, child in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}"
            yield from below(child, f"{prefix}{name}.")

    return list(below(OmegaConf.to_container(defaults(script), resolve=False), ""))


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """The key among ``known`` that ``key`` was probably meant to be, if any: alike as a whole, or
    with the same last part elsewhere."""
    if close := nearest_names(key, known, cutoff=0.8):
        return close
    last = key.rpartition(".")[2]
    ends = {name: name.rpartition(".")[2] for name in known}
    if same := [name for name, end in ends.items() if end == last]:
        return [max(same, key=lambda name: difflib.SequenceMatcher(None, name, key).ratio())]
    close = nearest_names(last, ends.values(), cutoff=0.8)
    return [name for name, end in ends.items() if end in close][-1:]


def refuse_mistyped(script: Path, overrides: Mapping[str, str]) -> None:
    """Hydra adds whatever key has + or ++ in front. Refuse one that is nearly a key of ``script``:
    it would change nothing."""
    added = {mark: key for mark in overrides if (key := mark.lstrip("+")) != mark}
    known = [name.split(".") for name in _keys(script)] if added else []
    for mark, key in added.items():
        if meant := _misspelt(key.split("."), known):
            raise WorkshopError(
                f"{mark} would add a key to {Path(script).stem}. Did you mean {meant}, which it "
                "has? Write that without +."
            )


def _misspelt(parts: list[str], known: list[list[str]]) -> str | None:
    """The key in whose place ``parts`` stand, if at the first level where they differ one of the
    ``known`` names is written almost so."""
    for level, part in enumerate(parts):
        before = parts[:level]
        here = {name[level] for name in known if len(name) > level and name[:level] == before}
        if part not in here:
            swapped = [name for name in here if sorted(name) == sorted(part)]
            meant = swapped or nearest_names(part, here, cutoff=0.88)
            return ".".join([*before, meant[0], *parts[level + 1 :]]) if meant else None
    return None


def _explained(error: Exception, script: Path) -> str:
    """What Hydra says, in a sentence that names the override and the key that was probably
    meant."""
    text, name = str(error), Path(script).stem
    if unknown := re.match(r"Could not override '([^']+)'\.", text):
        offer = did_you_mean(_nearest(unknown[1], _keys(script)))
        return (
            f"{unknown[1]} is no key of {name}.{offer} To add a key that its defaults lack, write "
            f"+{unknown[1]}=..."
        )
    if there := re.match(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{there[1]} is a key of {name} already: write {there[1]}=... without +."
    if override := getattr(error, "override", None):
        return unreadable(override)
    if gone := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
        return (
            f"~{gone[1]}: {name} has no such key.{did_you_mean(_nearest(gone[1], _keys(script)))}"
        )
    # OmegaConf says the key in a line of its own.
    key, first = re.search(r"full_key: (\S+)", text), text.splitlines()[0]
    return f"{key[1]}: {first}" if key else first[:300]


def unreadable(override: str) -> str:
    """What is said of a word that Hydra's grammar does not know."""
    return (
        f"{override!r} cannot be read as an override. Hydra wants quotes around a value with other "
        "than plain characters, and the shell around the whole: 'key=\"value\"', 'key=[\"value\"]'."
    )


def word(key: str, value: str | None) -> str:
    """``key=value``; a ``~key`` may stand alone."""
    return key if value is None else f"{key}={value}"


def plain(value: str) -> str:
    """``value`` as Hydra's grammar reads it back as this very text: quoted, unless it is a path or
    a name of plain characters."""
    words = ("true", "false", "null", "nan", "inf")
    if re.fullmatch(r"[A-Za-z_./][\w./+-]*", value, re.ASCII) and value.lower() not in words:
        return value
    return "'" + value.replace("'", "\\'") + "'"
