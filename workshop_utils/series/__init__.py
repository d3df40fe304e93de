"""What a notebook starts with: the workshop, its settings form, plots, the report, and the runner
that executes the series. Of the rooms below, a notebook takes from here what every one of them
needs; what it teaches it imports from where that stands."""

from importlib import import_module
from typing import Any

_BELOW = {
    "ChatTokenizer": "chat_template",
    "DataError": "errors",
    "WorkshopError": "errors",
    "read_rows": "chat_data",
    "render_prompt": "chat_data",
}


def __getattr__(name: str) -> Any:
    # Late, so that `workshop preflight`, in this room, runs where packages are missing.
    if name == "paths":
        return import_module("workshop_utils.core.paths")
    if name in _BELOW:
        return getattr(import_module(f"workshop_utils.core.{_BELOW[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
