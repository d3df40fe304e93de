"""A row of a data set -> prompt and answer: by templates, by the user's converter, or by the
model's chat template."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from workshop_utils.core import chat_data, paths, row_shapes
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError
from workshop_utils.training.recipe import splits
from workshop_utils.training.recipe.row_templates import RowTemplate

Converter = Callable[[dict[str, Any]], dict[str, Any] | None]
COLUMNS = ("input", "output", "key", "reason", "ends")
"""What a row becomes: the two texts, the input's key for finding leaks, why the row is left out,
and how the prompt ends."""
ANYTHING = (Exception, SystemExit)
"""What a converter of the user's may raise: anything, so that nothing narrower would do, and
``sys.exit(0)`` would end this program as if all were done. None is swallowed: each becomes a
DataError with the line that raised it. Ctrl-C is not among them."""


@dataclass
class Conversion:
    """From a row of the data set to prompt and answer; is sent to worker processes. Raises
    :class:`DataError` at once when a column is missing, or a chat template is needed and there is
    none."""

    name: str
    columns: list[str]
    tokenizer_dir: Path | None
    templates: tuple[RowTemplate, RowTemplate] | None
    mapping: Mapping[str, str]
    converter: Converter | None
    converter_name: str

    def __post_init__(self) -> None:
        for template in self.templates or ():
            template.require_columns(self.mapping, self.columns)
        self.shape = None
        if not self.converter and not self.templates:
            self.shape = self._shape()
        self.is_chat = bool(self.shape) and not self.shape.is_text
        if self.is_chat and self.tokenizer_dir is None:
            raise DataError(
                f"{self.name} holds conversations ({self.shape}): give the tokenizer, whose chat "
                "template renders them (`workshop recipe import` first)."
            )
        self._tokenizer = ChatTokenizer(self.tokenizer_dir) if self.is_chat else None

    def _shape(self) -> row_shapes.Shape:
        try:
            return row_shapes.shape(tuple(self.columns), self.name)
        except DataError as error:
            raise DataError(
                f"{error} Or give input_template and output_template, or a custom_converter."
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        # The tokenizer is read again in each worker: the templates it compiled cannot be sent.
        return self.__dict__ | {"_tokenizer": None}

    def __call__(self, row: dict[str, Any], position: int) -> dict[str, str]:
        """:data:`COLUMNS` of a row; ``reason`` is "" for one that is kept."""
        texts, reason = self._texts(row, f"{self.name}, row {position + 1}")
        if texts is None:
            return dict.fromkeys(COLUMNS, "") | {"reason": reason}
        prompt, answer, ends = texts
        if not ends and prompt[-1:].isspace() and not prompt.endswith(" "):
            ends = "new line"
        reason = "" if answer.strip() else "empty"
        reason = reason if prompt.strip() else "no prompt"
        values = (prompt, answer, splits.key(prompt), reason, ends)
        return dict(zip(COLUMNS, values, strict=True))

    def _texts(self, row: dict[str, Any], where: str) -> tuple[tuple[str, str, str] | None, str]:
        """Prompt, answer, and "chat" where a chat template made them; or why there are none."""
        if self.converter:
            return self._converted(row, where), "converter"
        if self.templates:
            texts = [template.render(row, self.mapping) for template in self.templates]
            return None if None in texts else _require_texts(texts, where), "null"
        # Rows of several shapes in one file: each has its own columns, and null in the others.
        shape = row_shapes.shape_of(row, where) if self.is_chat else self.shape
        if any(row[name] is None for name in shape.needed):
            return None, "null"
        if not self.is_chat and isinstance(row[shape.answer], str):
            return (shape.prompt_text(row, where), row[shape.answer], ""), ""
        return self._chat(shape.messages(row, where), where), ""

    def _converted(self, row: dict[str, Any], where: str) -> tuple[str, str, str] | None:
        try:
            answer = self.converter(dict(row))
        except ANYTHING as error:
            raise DataError(
                f"{where}: {self.converter_name} failed: {_last_line(error)}. The row has "
                f"{', '.join(self.columns)}."
            ) from error
        if answer is None:
            return None
        if isinstance(answer, Mapping) and "messages" in answer:
            turns = row_shapes.check_messages(answer["messages"], where)
            return self._chat(turns, where)
        if not isinstance(answer, Mapping) or not {"input", "output"} <= answer.keys():
            raise DataError(
                f"{where}: {self.converter_name} returned {answer!r:.80}; it has to return "
                "{'input': ..., 'output': ...}, {'messages': [...]} or None."
            )
        return _require_texts([answer["input"], answer["output"]], where)

    def _chat(self, turns: list[dict[str, Any]], where: str) -> tuple[str, str, str]:
        if self._tokenizer is None:
            if self.tokenizer_dir is None:
                raise DataError(
                    f"{where}: a conversation (`messages`): give the tokenizer, whose chat "
                    "template renders it."
                )
            self._tokenizer = ChatTokenizer(self.tokenizer_dir)
        return chat_data.render_prompt(self._tokenizer, turns), turns[-1]["content"].strip(), "chat"


def _require_texts(texts: list[Any], where: str) -> tuple[str, str, str]:
    for name, value in zip(("input", "output"), texts, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r:.80}, not a text.")
    return *texts, ""


def place_of_converter(name: str) -> tuple[str, str]:
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
    place, attribute = place_of_converter(name)
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    except ANYTHING as error:
        raise DataError(
            f"custom_converter: {name} cannot be imported: {_last_line(error)}."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise DataError(
            f"custom_converter: {place} has no function {attribute!r}; its functions: "
            f"{', '.join(known) or 'none'}."
        )
    return function


def _module_of_file(file: Path) -> ModuleType:
    # Its own name, so that worker processes find the function again by it.
    content = str(file.resolve()).encode() + file.read_bytes()
    name = f"workshop_converter_{hashlib.sha256(content).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except ANYTHING:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _module(place: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        # A notebook may have changed the file since.
        known = sys.modules.get(place)
        return importlib.reload(known) if known else importlib.import_module(place)
    finally:
        sys.path.remove(os.getcwd())


def _last_line(error: BaseException) -> str:
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

    digest, source = hashlib.sha256(Hasher.hash(function).encode()), None
    if inspect.isroutine(function):
        source = inspect.getsourcefile(inspect.unwrap(function))
    if source and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()
