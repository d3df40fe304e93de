r"""Which data set, and how a row of it becomes a prompt and an answer: :class:`HFDatasetConfig`.

    HFDatasetConfig("data/my.csv", input_template="Q: {question}\nA:", output_template="{answer}",
    field_mapping={"question": "q"})

The fields have the names and defaults of the reference pipeline's class of that name; ``seed`` is
added.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import DataError
from workshop_utils.training.recipe import row_templates

Converter = Callable[[dict[str, Any]], dict[str, Any] | None]
_OWN_ARGUMENTS = (
    "path",
    "name",
    "split",
    "streaming",
    "num_proc",
    "trust_remote_code",
    "cache_dir",
    "keep_in_memory",
)
OWN_SPLITS = "train/validation/test"
ANYTHING = (Exception, SystemExit)
"""What a converter of the user's may raise: anything, so that nothing narrower would do, and
``sys.exit(0)`` would end this program as if all were done. None is swallowed: each becomes a
DataError with the line that raised it. Ctrl-C is not among them."""


@dataclass(frozen=True)
class HFDatasetConfig:
    """A data set and how its rows are used.

    ``dataset_name`` is a data set of the Hugging Face Hub (``dataset_config`` its configuration,
    ``load_kwargs={"revision": ...}`` its version), a file (.jsonl, .json, .csv, .tsv, .parquet,
    .arrow), a folder of such files, or one that ``save_to_disk`` wrote.

    ``split`` is divided: ``train_split_ratio`` of its rows for training, ``val_test_split_ratio``
    of the rest for test, the others for validation, drawn with ``seed``. Three names with slashes,
    ``train/validation/test``, take the data set's own splits as they are.

    A row becomes a prompt by ``input_template`` and an answer by ``output_template`` (see
    :mod:`.row_templates`; ``field_mapping`` gives a field of a template another column). Without
    templates the columns ``messages`` (rendered with the model's chat template) or ``input`` and
    ``output`` are used. ``custom_converter``, a function or ``FILE.py:name`` or ``module:name``,
    does it instead: from a row (a dict) to ``{"input", "output"}``, to ``{"messages": [...]}``, or
    to None for a row to leave out.

    Raises :class:`DataError` at once for whatever is wrong without looking at the data.
    """

    dataset_name: str
    dataset_config: str | None = None
    split: str = "train"
    train_split_ratio: float = 0.9
    val_test_split_ratio: float = 0.5
    input_template: str | None = None
    output_template: str | None = None
    field_mapping: Mapping[str, str] | str | None = None
    num_proc: int = 8
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)
    custom_converter: Converter | str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not isinstance(self.dataset_name, str) or not self.dataset_name.strip():
            raise DataError(
                "dataset_name is missing: name a data set of the Hugging Face Hub, a file or a "
                "folder."
            )
        for name in ("train_split_ratio", "val_test_split_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise DataError(
                    f"{name} is {value!r}; it must lie between 0 and 1, both left out: no split "
                    "may be empty."
                )
        if (
            isinstance(self.num_proc, bool)
            or not isinstance(self.num_proc, int)
            or self.num_proc < 1
        ):
            raise DataError(
                f"num_proc is {self.num_proc!r}; it must be a whole number of processes, at "
                "least 1."
            )
        object.__setattr__(self, "field_mapping", _mapping(self.field_mapping))
        for name in sorted(set(self.load_kwargs) & set(_OWN_ARGUMENTS)):
            raise DataError(
                f"load_kwargs: {name} is not taken here; "
                + (f"set {_INSTEAD[name]}." if name in _INSTEAD else "it is chosen for you.")
            )
        self._check_templates()
        if "/" in self.split and len([part for part in self.split.split("/") if part]) != 3:
            raise DataError(
                f"split is {self.split!r}; give one split to divide, or three with slashes to "
                f"take as they are: {OWN_SPLITS}."
            )

    def _check_templates(self) -> None:
        if (self.input_template is None) != (self.output_template is None):
            missing = "output_template" if self.output_template is None else "input_template"
            raise DataError(f"{missing} is missing: give both templates, or neither.")
        if self.custom_converter and (self.input_template is not None or self.field_mapping):
            raise DataError(
                "custom_converter makes input and output itself: leave out input_template, "
                "output_template and field_mapping."
            )
        if isinstance(self.custom_converter, str):
            _place_of_converter(self.custom_converter)
        if self.field_mapping and self.input_template is None:
            raise DataError(
                "field_mapping names the fields of templates: give input_template and "
                "output_template."
            )
        if templates := self.templates():
            fields = {name for one in templates for name in one.fields}
            for name in self.field_mapping:
                if name not in fields:
                    raise DataError(
                        f"field_mapping: no template has a field {{{name}}}; they have "
                        f"{', '.join(f'{{{one}}}' for one in sorted(fields))}."
                    )

    def templates(self) -> tuple[row_templates.RowTemplate, row_templates.RowTemplate] | None:
        """Both templates, parsed; None when there are none."""
        if self.input_template is None:
            return None
        return row_templates.parse(self.input_template, "input_template"), row_templates.parse(
            self.output_template, "output_template"
        )

    def own_splits(self) -> list[str] | None:
        """The names of the data set's own splits, where these are to be used; else None."""
        return self.split.split("/") if "/" in self.split else None

    def converter(self) -> Converter | None:
        """``custom_converter`` as a function. Raises :class:`DataError` when there is none of that
        name."""
        return (
            load_converter(self.custom_converter)
            if isinstance(self.custom_converter, str)
            else self.custom_converter
        )

    def describe(self) -> dict[str, Any]:
        """Everything of it that shapes the rows, as JSON values: the configuration's part of the
        cache's key."""
        kept = {
            name: getattr(self, name)
            for name in (
                "dataset_name",
                "dataset_config",
                "split",
                "train_split_ratio",
                "val_test_split_ratio",
                "input_template",
                "output_template",
                "field_mapping",
                "load_kwargs",
                "seed",
            )
        }
        return kept | {"custom_converter": converter_hash(self.converter())}


_INSTEAD = {
    "path": "dataset_name",
    "name": "dataset_config",
    "split": "split",
    "num_proc": "num_proc",
}


def _mapping(given: Mapping[str, str] | str | None) -> dict[str, str]:
    """``given`` as a dict; a text is JSON, as on the command line."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DataError(
                f'field_mapping is no JSON ({error}). Example: \'{{"question": "instruction"}}\'.'
            ) from None
    if given is not None and not (
        isinstance(given, Mapping)
        and all(isinstance(one, str) for pair in given.items() for one in pair)
    ):
        raise DataError(
            f"field_mapping is {given!r}; it maps fields of the templates to columns: "
            "{'question': 'instruction'}."
        )
    return dict(given or {})


def _place_of_converter(name: str) -> tuple[str, str]:
    """File or module, and function, of ``name``. Raises :class:`DataError` when it is written
    otherwise, or the file is not there."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise DataError(
            f"custom_converter is {name!r}; write FILE.py:function or package.module:function."
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise DataError(f"custom_converter: {paths.shown(place)} does not exist.")
    return place, attribute


def load_converter(name: str) -> Converter:
    """The function that ``FILE.py:name`` or ``package.module:name`` names; the current directory is
    searched for modules, too.

    Its module is run, as any import does. Raises :class:`DataError` when the module or the function
    cannot be found.
    """
    place, attribute = _place_of_converter(name)
    module = _module_of_file(Path(place), name) if place.endswith(".py") else _module(place, name)
    found = getattr(module, attribute, None)
    if not callable(found):
        there = (
            ", ".join(
                sorted(one for one, value in vars(module).items() if inspect.isfunction(value))
            )
            or "none"
        )
        raise DataError(
            f"custom_converter: {place} has no function {attribute!r}; its functions: {there}."
        )
    return found


def _module_of_file(file: Path, name: str) -> ModuleType:
    # Its own name, so that worker processes find the function again by it.
    known = (
        "workshop_converter_"
        + hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:16]
    )
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        try:
            spec.loader.exec_module(module)
        except ANYTHING as error:
            del sys.modules[known]
            raise DataError(
                f"custom_converter: {name} cannot be imported: {last_line(error)}."
            ) from error
    return sys.modules[known]


def _module(place: str, name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        # A notebook may have changed the file since.
        return (
            importlib.reload(sys.modules[place])
            if place in sys.modules
            else importlib.import_module(place)
        )
    except ANYTHING as error:
        raise DataError(
            f"custom_converter: {name} cannot be imported: {last_line(error)}."
        ) from error
    finally:
        sys.path.remove(os.getcwd())


def last_line(error: BaseException) -> str:
    """What ``error`` of somebody's code says, and where it was raised: "KeyError: 'text' (my.py,
    line 7)"."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def converter_hash(function: Converter | None) -> str | None:
    """Changes with the source of ``function``: its code, the values it refers to, and the whole
    file that it stands in."""
    if function is None:
        return None
    from datasets.fingerprint import Hasher

    found = hashlib.sha256(Hasher.hash(function).encode())
    source = (
        inspect.getsourcefile(inspect.unwrap(function)) if inspect.isroutine(function) else None
    )
    if source and Path(source).is_file():
        found.update(Path(source).read_bytes())
    return found.hexdigest()
