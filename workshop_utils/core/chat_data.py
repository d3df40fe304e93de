"""Training rows: read, checked, and rendered through the model's own chat template.

NeMo's script path takes rows ``{"input", "output"}`` and glues them with a prompt template. Here
``input`` is everything the chat template puts before the answer, ``output`` is the answer, and the
tokenizer's stop token follows (``add_eos``). That is, token for token, what the model sees later
when a server renders the same conversation.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import data_files, paths, row_shapes
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError


class Rows(list):
    """Rows as ``{"messages": [...]}``; ``said`` are lines about the shapes that they had."""

    said: tuple[str, ...] = ()


def read_rows(path: Path | str, say: bool = False) -> Rows:
    """The rows of a data file as ``{"messages": [...]}``, the last one the answer; what shapes are
    known :mod:`.row_shapes` says. With ``say``, what is said of them goes to the screen.
    DataError names file, line and field."""
    rows, shapes = Rows(), []
    for where, row in data_files.rows(path):
        shape = row_shapes.shape_of(row, where)
        rows.append({"messages": shape.messages(row, where)})
        shapes.append((shape, rows[-1]["messages"]))
    rows.said = tuple(f"{paths.shown(path)}, {line}" for line in row_shapes.said(shapes))
    if say:
        print(*rows.said, sep="\n", end="\n" * bool(rows.said), file=sys.stderr)
    return rows


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
    said: tuple[str, ...] = ()

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
    rows = read_rows(source)
    lines = [
        {
            "input": render_prompt(tokenizer, row["messages"]),
            "output": row["messages"][-1]["content"].strip(),
        }
        for row in rows
    ]
    lines = tuple(json.dumps(line, ensure_ascii=False) for line in lines)
    return Rendered(target, lines, rows.said)


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
