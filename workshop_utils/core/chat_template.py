"""A model's tokenizer and chat template without transformers or torch: ``tokenizers`` and Jinja2
answer in milliseconds.

Renders as transformers 4.51 documents it
(https://huggingface.co/docs/transformers/chat_templating): an immutable sandbox with
``trim_blocks`` and ``lstrip_blocks``, the special tokens as variables. A test compares both on the
same conversations.
"""

import json
from datetime import datetime
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import DataError


class ChatTokenizer:
    """``tokenizer.json`` and the chat template of a Hugging Face directory.

    Raises:
        DataError: the directory lacks one of them.
    """

    def __init__(self, directory: Path):
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
        self._template = self._compiled()
        tokens = {key: value for key, value in config.items() if key.endswith("_token")}
        self.special_tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in tokens.items()
            if value is not None
        }

    def _compiled(self):
        import jinja2

        try:
            return _environment().from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template of {paths.shown(self.directory)} is broken at line "
                f"{error.lineno}: {error.message}"
            ) from None

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{paths.shown(self.directory)} has no {name}: give the directory of a Hugging "
                "Face tokenizer."
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{paths.shown(self.directory / name)} is not JSON ({error.msg} at line "
                f"{error.lineno})."
            ) from None

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text; with ``add_generation_prompt`` it ends where the assistant's
        answer begins."""
        import jinja2

        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
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
        return [
            len(found.ids)
            for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]


def read_tokenizer(file: Path):
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``. Raises :class:`DataError` when it is
    none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise DataError(
            f"{paths.shown(file)} is no tokenizer: {error}. Get the model again."
        ) from None


def _environment():
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        """What templates call to refuse a conversation. Raises :class:`jinja2.TemplateError`."""
        import jinja2

        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment
