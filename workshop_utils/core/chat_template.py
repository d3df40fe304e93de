"""A model's tokenizer and chat template without transformers or torch, in milliseconds.

Renders as https://huggingface.co/docs/transformers/chat_templating says (4.51): an immutable
sandbox with ``trim_blocks`` and ``lstrip_blocks``, the special tokens as variables.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import DataError

_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTokenizer:
    """``tokenizer.json`` and the chat template of a Hugging Face directory; DataError without."""

    def __init__(self, directory: Path):
        import jinja2

        self.directory = Path(directory)
        where, config = paths.shown(directory), read_json(self.directory, "tokenizer_config.json")
        self.chat_template = default_template(templates(self.directory, config), where)
        read_json(self.directory, "tokenizer.json")
        self._tokenizer = read_tokenizer(self.directory / "tokenizer.json")
        try:
            self._template = _environment().from_string(self.chat_template)
            used = jinja2.meta.find_undeclared_variables(
                self._template.environment.parse(self.chat_template)
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template of {where} is broken at line {error.lineno}: {error.message}"
            ) from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"the chat template of {where} is broken: {error}") from None
        self.special_tokens = self._special_tokens(config, used)

    def _special_tokens(self, config: dict, used: Collection[str]) -> dict[str, Any]:
        """As transformers gives them to the template: those of the files, where these name none
        the class's own."""
        beside = self.directory / "special_tokens_map.json"
        if "added_tokens_decoder" not in config and beside.is_file():
            config = config | read_json(self.directory, beside.name)
        if any(name in used and name not in config for name in _TOKENS):
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(self.directory).special_tokens_map
            except Exception:
                pass  # A class that is unknown has no tokens of its own.
        stated = {name: config.get(name) for name in _TOKENS}
        for table in ("extra_special_tokens", "model_specific_special_tokens"):
            stated |= its if isinstance(its := config.get(table), dict) else {}
        words = {
            name: token["content"] if isinstance(token, dict) and "content" in token else token
            for name, token in stated.items()
            if token is not None
        }
        for name, token in words.items():
            if not isinstance(token, str):
                raise DataError(
                    f"{paths.shown(self.directory / 'tokenizer_config.json')}: {name} is "
                    f"{json.dumps(token)}, and no text. Copy the file again."
                )
        if isinstance(more := config.get("additional_special_tokens"), list):
            words["additional_special_tokens"] = [
                token["content"] if isinstance(token, dict) else token for token in more
            ]
        return words

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text; where asked, it ends where the next answer begins."""
        words = self.special_tokens | {"tools": None, "documents": None}
        words |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        with refusing(self.directory):
            return self._template.render(words)

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


def read_json(directory: Path, name: str) -> dict:
    """The object in the file ``name`` of a tokenizer; DataError where there is none."""
    file = directory / name
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(
            f"{paths.shown(directory)} has no {name}: give the directory of a Hugging Face "
            "tokenizer."
        ) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}"
        raise DataError(f"{paths.shown(file)} is not JSON ({where}).") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{paths.shown(file)} cannot be read: {why}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{paths.shown(file)} holds a {type(value).__name__}, and no JSON object.")
    return value


def templates(directory: Path, config: Mapping) -> str | dict[str, str] | None:
    """The chat template of a tokenizer, or those that it has by name, wherever transformers 4 and 5
    keep them: ``chat_template.jinja``, else ``chat_template`` of ``config``
    (``tokenizer_config.json``), and ``additional_chat_templates/``."""
    stated, where = config.get("chat_template"), paths.shown(directory / "tokenizer_config.json")
    if isinstance(stated, list):
        if not all(isinstance(each, dict) and {"name", "template"} <= {*each} for each in stated):
            raise DataError(
                f"{where}: chat_template is a list, and not of a name and a template each."
            )
        stated = {entry["name"]: entry["template"] for entry in stated}
    texts = stated.values() if isinstance(stated, dict) else [stated] * (stated is not None)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: chat_template is no text. Copy the file again.")
    files = [directory / "chat_template.jinja"]
    files += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    read = {}
    for file in filter(Path.is_file, files):
        try:
            read[file.stem] = file.read_bytes().decode()
        except (OSError, ValueError) as error:
            raise DataError(f"{paths.shown(file)} cannot be read: {error}.") from None
    if "chat_template" in read:
        stated = read.pop("chat_template")
    if read:
        known = stated if isinstance(stated, dict) else {"default": stated} if stated else {}
        return known | read
    return stated or None


def default_template(found: str | dict[str, str] | None, where: str) -> str:
    """The template that transformers takes; ``where`` names the tokenizer in a DataError."""
    if isinstance(found, dict) and "default" not in found:
        raise DataError(
            f"{where}: its chat templates are called {', '.join(map(str, found))}, and none "
            "'default'. Name the one to use so in tokenizer_config.json."
        )
    text = found["default"] if isinstance(found, dict) else found
    if not text or not isinstance(text, str):
        raise DataError(
            f"{where}: the tokenizer has no chat template. Use the instruct version of the model."
        )
    return text


@contextlib.contextmanager
def refusing(directory: Path | str) -> Iterator[None]:
    """DataError for whatever the chat template of ``directory`` fails with."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever a template calls
        raise DataError(
            f"the chat template of {paths.shown(directory)} refuses the conversation: "
            f"{error or type(error).__name__}"
        ) from None


def _environment():
    """That of transformers (``_compile_jinja_template``), which a test compares: loading it takes
    two seconds, as it loads torch."""
    import jinja2
    import jinja2.meta
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant said, and prints it."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller) -> str:
            return caller()

    def raise_exception(message):  # what templates call to refuse a conversation
        raise jinja2.TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        how = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return json.dumps(x, sort_keys=sort_keys, **how)

    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, loopcontrols]}
    environment = ImmutableSandboxedEnvironment(**how)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
