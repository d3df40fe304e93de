"""The models that can be fetched, read from ``models/manifest.yaml``, and where each lies once it
is here."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from workshop_utils.checkpoints.sources import wholeness
from workshop_utils.core import paths
from workshop_utils.core.errors import NotACheckpoint, WorkshopError
from workshop_utils.core.nearest import did_you_mean, nearest
from workshop_utils.core.settings import load_settings

SOURCES = ("pypi", "huggingface", "ngc")
FORMATS = ("huggingface", "nemo2")


@dataclass(frozen=True)
class Model:
    """One entry of the manifest.

    ``size`` is bytes to download; ``parameters`` a count; ``files`` maps the downloaded files to
    their sha256 (empty where the source publishes none).
    """

    name: str
    description: str
    parameters: int
    source: str
    address: str
    revision: str | None
    size: int
    licence: str
    licence_url: str
    gated: bool
    format: str
    files: dict[str, str]

    @property
    def hub_id(self) -> str | None:
        """Id on the Hub of the model, or of the page there that has its licence."""
        page = self.licence_url.removeprefix("https://huggingface.co/")
        page = self.address if self.source == "huggingface" else page
        return page if page.count("/") == 1 else None


def catalogue() -> dict[str, Model]:
    """Every model of the manifest, by name."""
    return _read(paths.repository_file("models/manifest.yaml"))


def find(name: str) -> Model:
    """Raises WorkshopError with all names, and the nearest, when there is none."""
    models = catalogue()
    if name in models:
        return models[name]
    hint = did_you_mean(nearest(name, models, most=3, cutoff=0.4))
    raise WorkshopError(
        f"no model is called '{name}'.{hint} There are: {', '.join(models)}. `workshop models` "
        "lists them"
    )


def directory(given: Path | str, place: Callable[[str], Path] = paths.huggingface_model) -> Path:
    """The directory ``given``, or that of the model of this name below ``place``: what a command
    takes as MODEL.

    Raises:
        NotACheckpoint: it is the path of nothing, no name of a model (as :func:`find`), or one that
            is not here yet.
    """
    for path in (Path(given), place(str(given))):
        if path.is_dir():
            return path
    name = str(given)
    if Path(given).exists() or Path(given).name != name:
        what = (
            f"{paths.shown(given)} is a file" if Path(given).exists() else f"{name} does not exist"
        )
        raise NotACheckpoint(
            f"{what}: give the directory of a model, or a name from `workshop models`."
        )
    try:
        model = find(name)
    except WorkshopError as error:
        raise NotACheckpoint(
            f"{name} is no directory of a model: {error}, `workshop models fetch NAME` gets one."
        ) from None
    here = paths.shown(place(model.name))
    raise NotACheckpoint(f"{name} is not at {here}: `workshop models fetch {name}` gets it.")


def location(model: Model) -> Path:
    place = paths.nemo2_checkpoint if model.format == "nemo2" else paths.huggingface_model
    return place(model.name)


def is_present(model: Model) -> bool:
    """A directory with a part missing or cut off does not count."""
    return getattr(wholeness, model.format)(location(model))


@cache
def _read(manifest: Path) -> dict[str, Model]:
    try:
        entries = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkshopError(
            f"{paths.shown(manifest)}: cannot be read ({error.strerror}); restore it with git, "
            "or install the package again"
        ) from error
    except yaml.YAMLError as error:
        raise WorkshopError(f"{paths.shown(manifest)}: is not YAML: {error}") from error
    return {name: _model(manifest, name, entry) for name, entry in entries.items()}


def _model(manifest: Path, name: str, entry: dict) -> Model:
    known = {field.name for field in fields(Model)} - {"name"}
    where = f"{paths.shown(manifest)}, {name}"
    for key in sorted(known ^ entry.keys()):
        wrong = "missing" if key in known else "unknown"
        raise WorkshopError(f"{where}: the field '{key}' is {wrong}")
    for key, allowed in (("source", SOURCES), ("format", FORMATS)):
        if entry[key] not in allowed:
            none = f"which is none of {', '.join(allowed)}"
            raise WorkshopError(f"{where}: {key} is '{entry[key]}', {none}")
    return Model(name=name, **entry)


def chosen_model() -> Model:
    """The model of the settings. Raises WorkshopError where none is called so; the message says
    where the name comes from."""
    settings = load_settings()
    try:
        return find(settings.model)
    except WorkshopError as error:
        where = "WORKSHOP_MODEL" if os.environ.get("WORKSHOP_MODEL") else "workshop.yaml, model"
        raise WorkshopError(f"{where}: {error}") from None
