"""Training rows: read, checked, and rendered through the model's own chat template.

NeMo's script path takes rows ``{"input", "output"}`` and glues them with a prompt template. Here
``input`` is everything the chat template puts before the answer, ``output`` is the answer, and the
tokenizer's stop token follows (``add_eos``). That is, token for token, what the model sees later
when a server renders the same conversation.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError

ROLES = ("system", "user", "assistant")


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file as ``{"messages": [...]}``, the last one the answer; rows
    ``{"input": str, "output": str}`` become two messages. DataError names file, line and field."""
    rows = [
        _checked_row(line, f"{paths.shown(path)}, line {number}")
        for number, line in enumerate(lines(path), 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{paths.shown(path)} holds no rows: write one JSON object a line.")
    return rows


def lines(path: Path) -> list[str]:
    """The lines of a text file, ended by newlines alone; DataError where it is no UTF-8 text."""
    path, name = Path(path), paths.shown(path)
    if not path.is_file():
        raise DataError(f"{name} {'is not a file' if path.exists() else 'does not exist'}.")
    try:
        return path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{name} is not UTF-8 text ({where}).") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from None


def json_object(line: str, where: str) -> dict:
    """The object in ``line``; DataError where there is none, or one no tokenizer takes."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a {type(row).__name__}, not an object with `messages`, or `input` and "
            "`output`."
        )
    if "\\u" in line and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise DataError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character. Take it out."
        )
    return row


def _checked_row(line: str, where: str) -> dict:
    row = json_object(line, where)
    if "messages" not in row:
        if not {"input", "output"} <= row.keys():
            has = ", ".join(sorted(row)) or "nothing"
            raise DataError(f"{where}: needs `messages`, or `input` and `output`; it has {has}.")
        asked = {"role": "user", "content": row["input"]}
        row = {"messages": [asked, {"role": "assistant", "content": row["output"]}]}
    check_messages(row["messages"], where)
    return row


def check_messages(messages: object, where: str) -> None:
    """Raise DataError unless ``messages`` is a conversation that ends with an answer."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{where}: `messages` has to be a list of at least a user and an assistant message."
        )
    for position, message in enumerate(messages):
        turn = message if isinstance(message, dict) else {}
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{where}: messages[{position}] needs a `role` ({', '.join(ROLES)}) and a "
                "`content` that is a text."
            )
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(
            f"{where}: the last message has to be the assistant's answer, and not empty."
        )


def prompt_turns(messages: list[dict]) -> list[dict]:
    """``messages`` without the assistant's last turn, that is, what the model is asked."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def render_prompt(tokenizer: ChatTokenizer, messages: list[dict]) -> str:
    """The text before the answer, ending with the template's opening of the assistant's turn."""
    return tokenizer.render(prompt_turns(messages))


@dataclass(frozen=True)
class Rendered:
    """Rows ready for NeMo, one ``{"input", "output"}`` a line, and the ``path`` they are for."""

    path: Path
    lines: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.lines)

    @property
    def content(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()

    def write(self) -> None:
        with paths.new_file(self.path) as part:
            part.write_bytes(self.content)
        # NeMo keeps an index beside the file and trusts it while it is newer than nothing: an old
        # one would point into the old text.
        for stale in self.path.parent.glob(f"{self.path.name}.idx.*"):
            stale.unlink()


def render(source: Path, tokenizer: ChatTokenizer, target: Path) -> Rendered:
    """The rows of ``source`` as they are to stand in ``target``. Nothing is written."""
    lines = [
        {
            "input": render_prompt(tokenizer, row["messages"]),
            "output": row["messages"][-1]["content"].strip(),
        }
        for row in read_rows(source)
    ]
    return Rendered(target, tuple(json.dumps(line, ensure_ascii=False) for line in lines))


def make_tickets(folder: Path | None = None) -> Path:
    """The folder of the workshop's data set (default: ``data/tickets``), generated if it is not
    there. Raises :class:`DataError` where that fails."""
    folder = folder or paths.data_dir() / "tickets"
    if not (folder / "test.jsonl").exists():
        script = paths.repository_file("data/make_tickets.py")
        command = [sys.executable, str(script), "--out", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"{paths.shown(folder)} cannot be made by {paths.shown(script)}: {said}. Give "
                "rows of your own (--data)."
            )
    return folder
