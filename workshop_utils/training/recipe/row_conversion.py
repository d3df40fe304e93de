"""A row of a data set -> prompt and answer, by templates, by a converter, or by the model's chat
template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.core import chat_data
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError
from workshop_utils.training.recipe import splits
from workshop_utils.training.recipe.dataset_config import (
    ANYTHING,
    Converter,
    HFDatasetConfig,
    last_line,
)
from workshop_utils.training.recipe.row_templates import RowTemplate

COLUMNS = ("input", "output", "key", "reason", "ends")
"""What a row becomes: the two texts, the input's key for finding leaks, why the row is left out,
and how the prompt ends."""


class Conversion:
    """From a row of the data set to prompt and answer; is sent to worker processes.

    Raises :class:`DataError` at once when a column is missing or a chat template is needed and
    there is none.
    """

    def __init__(self, config: HFDatasetConfig, columns: list[str], tokenizer_dir: Path | None):
        self.mapping, self.tokenizer_dir, self.columns = (
            config.field_mapping,
            tokenizer_dir,
            columns,
        )
        self.converter: Converter | None = config.converter()
        self.converter_name = str(config.custom_converter)
        self.templates: tuple[RowTemplate, RowTemplate] | None = config.templates()
        self.is_chat = not self.converter and not self.templates and "messages" in columns
        if self.templates:
            for template in self.templates:
                template.columns(self.mapping, columns)
        elif not self.converter and not self.is_chat and not {"input", "output"} <= set(columns):
            raise DataError(
                f"{config.dataset_name} has neither `messages` nor `input` and `output`; its "
                f"columns are {', '.join(columns)}. Give input_template and output_template, or "
                "a custom_converter."
            )
        if self.is_chat and tokenizer_dir is None:
            raise DataError(
                f"{config.dataset_name} holds conversations (`messages`): give the tokenizer, "
                "whose chat template renders them (`workshop recipe import` first)."
            )
        self._tokenizer: ChatTokenizer | None = (
            ChatTokenizer(tokenizer_dir) if self.is_chat else None
        )

    def __getstate__(self) -> dict[str, Any]:
        # The tokenizer is read again in each worker: the templates it compiled cannot be sent.
        return self.__dict__ | {"_tokenizer": None}

    def __call__(self, row: dict[str, Any], position: int) -> dict[str, str]:
        """``input``, ``output``, the ``key`` of the input, the ``reason`` to leave the row out, or
        "", and how the prompt ``ends``."""
        where = f"row {position + 1}"
        found, reason = self._texts(row, where)
        if found is None:
            return dict.fromkeys(COLUMNS, "") | {"reason": reason}
        prompt, answer, ends = found
        if not ends and prompt[-1:].isspace() and not prompt.endswith(" "):
            ends = "new line"
        return {
            "input": prompt,
            "output": answer,
            "key": splits.key(prompt),
            "reason": "" if answer.strip() else "empty",
            "ends": ends,
        }

    def _texts(self, row: dict[str, Any], where: str) -> tuple[tuple[str, str, str] | None, str]:
        if self.converter:
            made = self._converted(row, where)
            return (None, "converter") if made is None else (made, "")
        if self.is_chat:
            return (
                (None, "null")
                if row["messages"] is None
                else (self._chat(row["messages"], where), "")
            )
        if self.templates:
            texts = tuple(template.render(row, self.mapping) for template in self.templates)
        else:
            texts = row["input"], row["output"]
        return (None, "null") if None in texts else (_require_texts(texts, where), "")

    def _converted(self, row: dict[str, Any], where: str) -> tuple[str, str, str] | None:
        try:
            made = self.converter(dict(row))
        except ANYTHING as error:
            raise DataError(
                f"{where}: {self.converter_name} failed: {last_line(error)}. The row has "
                f"{', '.join(self.columns)}."
            ) from error
        if made is None:
            return None
        if isinstance(made, Mapping) and "messages" in made:
            return self._chat(made["messages"], where)
        if not isinstance(made, Mapping) or not {"input", "output"} <= made.keys():
            raise DataError(
                f"{where}: {self.converter_name} returned {made!r:.80}; it has to return "
                "{'input': ..., 'output': ...}, {'messages': [...]} or None."
            )
        return _require_texts((made["input"], made["output"]), where)

    def _chat(self, messages: list[dict[str, Any]], where: str) -> tuple[str, str, str]:
        if self._tokenizer is None:
            if self.tokenizer_dir is None:
                raise DataError(
                    f"{where}: a conversation (`messages`): give the tokenizer, whose chat "
                    "template renders it."
                )
            self._tokenizer = ChatTokenizer(self.tokenizer_dir)
        chat_data.check_messages(messages, where)
        # Arrow gives every message the keys of all: those that were not there are None.
        turns = [
            {name: value for name, value in message.items() if value is not None}
            for message in messages
        ]
        return chat_data.render_prompt(self._tokenizer, turns), turns[-1]["content"].strip(), "chat"


def _require_texts(texts: tuple[Any, Any], where: str) -> tuple[str, str, str]:
    for name, value in zip(("input", "output"), texts, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r:.80}, not a text.")
    return *texts, ""
