"""A model's tokenizer and chat template without transformers or torch, in milliseconds.

Renders as https://huggingface.co/docs/transformers/chat_templating says (4.51): an immutable
sandbox with ``trim_blocks`` and ``lstrip_blocks``, the special tokens as variables.
"""

import json
from datetime import datetime
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import DataError


class ChatTokenizer:
    """``tokenizer.json`` and the chat template of a Hugging Face directory; DataError without."""

    def __init__(self, directory: Path):
        import jinja2

        self.directory = Path(directory)
        config = self._json("tokenizer_config.json")
        template = self.directory / "chat_template.jinja"
        self.chat_template = (
            template.read_text() if template.is_file() else config.get("chat_template")
        )
        if not isinstance(self.chat_template, str):
            raise DataError(
                f"{paths.shown(directory)}: the tokenizer has no chat template. Use the instruct "
                "version of the model."
            )
        self._json("tokenizer.json")
        self._tokenizer = read_tokenizer(self.directory / "tokenizer.json")
        try:
            self._template = _environment().from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template of {paths.shown(self.directory)} is broken at line "
                f"{error.lineno}: {error.message}"
            ) from None
        self.special_tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and value is not None
        }

    def _json(self, name: str) -> dict:
        file = self.directory / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{paths.shown(self.directory)} has no {name}: give the directory of a Hugging "
                "Face tokenizer."
            ) from None
        except json.JSONDecodeError as error:
            where = f"{error.msg} at line {error.lineno}"
            raise DataError(f"{paths.shown(file)} is not JSON ({where}).") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text; where asked, it ends where the next answer begins."""
        import jinja2

        try:
            words = self.special_tokens | {"tools": None, "documents": None}
            words |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
            return self._template.render(words)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template of {paths.shown(self.directory)} refuses the conversation: "
                f"{error}"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written in it count as such, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def count(self, texts: list[str]) -> list[int]:
        """Number of tokens of each of ``texts``, as :meth:`encode` has them; on all cores."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding.ids) for encoding in encoded]


def read_tokenizer(file: Path):
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``; DataError when it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        said = f"{paths.shown(file)} is no tokenizer: {error}. Get the model again."
        raise DataError(said) from None


def _environment():
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):  # what templates call to refuse a conversation
        raise jinja2.TemplateError(message)

    def to_json(value, **options) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [loopcontrols]}
    environment = ImmutableSandboxedEnvironment(**how)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
