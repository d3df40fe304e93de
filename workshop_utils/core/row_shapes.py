"""Which columns of a training row are the prompt and which the answer: the shapes that people have,
each joined to messages. Every command asks here."""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from workshop_utils.core.errors import DataError

ROLES = ("system", "user", "assistant")
_TURNS = ("messages", "conversations", "conversation")
_PROMPTS = ("instruction", "prompt", "question", "query", "input")
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "completion", "response", "answer")
_SYSTEMS = ("system", "system_prompt")
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
"""OpenAI's, ShareGPT's and Gemma's names of the roles."""
KNOWN = (
    "`messages`, `conversations`, or a prompt (instruction, prompt, question, query, input) and "
    "an answer (output, completion, response, answer)"
)


class EmptyPrompt(DataError):
    """A row that asks nothing."""


@dataclass(frozen=True)
class Shape:
    """``turns`` is the column of a conversation; else ``prompt`` holds the columns whose texts are
    joined by a blank line, and ``answer`` that of the answer. ``unused`` columns are nothing's."""

    turns: str | None = None
    prompt: tuple[str, ...] = ()
    answer: str | None = None
    system: str | None = None
    history: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns without which a row is none."""
        return (self.turns,) if self.turns else (self.prompt[0], self.answer)

    @property
    def is_text(self) -> bool:
        """One prompt and one answer, with nothing of a conversation."""
        return not (self.turns or self.system or self.history)

    @property
    def is_plain(self) -> bool:
        """The workshop's own, all columns used: nothing has to be said."""
        own = self.turns == "messages" or (self.prompt, self.answer) == (("input",), "output")
        return own and not (self.system or self.history or self.unused)

    def __str__(self) -> str:
        if self.turns:
            kind = "ShareGPT " if self.turns == "conversations" else ""
            text = f"{kind}{self.turns}"
        else:
            kind = "Alpaca: " if (self.prompt[0], self.answer) == ("instruction", "output") else ""
            joined = " and ".join(self.prompt) + " (a blank line between)" * (len(self.prompt) > 1)
            text = f"{kind}{joined} -> prompt, {self.answer} -> answer"
        text += f", {self.history} -> earlier turns" if self.history else ""
        text += f", {self.system} -> system message" if self.system else ""
        return text + (f"; not used: {', '.join(self.unused)}" if self.unused else "")

    def prompt_text(self, row: dict[str, Any], where: str) -> str:
        """The prompt's columns, joined; those that are empty or null are left out."""
        texts = [_text(row, name, where, name != self.prompt[0]) for name in self.prompt]
        return "\n\n".join(text for text in texts if text.strip())

    def messages(self, row: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """The row as a conversation that ends with an answer; DataError names the field."""
        if row.get("label") is False and self.answer == "completion":
            raise DataError(
                f"{where}: label is false, by which preference rows (KTO) mark an answer to avoid; "
                "fine-tuning would learn it. Take such rows out."
            )
        if self.turns:
            turns = _conversation(row[self.turns], where, self.turns)
        elif isinstance(row[self.prompt[0]], list) and isinstance(row[self.answer], list):
            turns = [  # TRL's conversational prompt and completion
                turn
                for name in (self.prompt[0], self.answer)
                for turn in _conversation(row[name], where, name)
            ]
        else:
            turns = [*self._earlier(row, where)]
            turns.append({"role": "user", "content": self.prompt_text(row, where)})
            turns.append({"role": "assistant", "content": _text(row, self.answer, where)})
        if self.system and (system := _text(row, self.system, where, True)).strip():
            if turns and turns[0]["role"] == "system":
                raise DataError(
                    f"{where}: both {self.system} and the first message hold a system text. Take "
                    "one of them out."
                )
            turns.insert(0, {"role": "system", "content": system})
        _check(turns, where, self)
        return turns

    def _earlier(self, row: dict[str, Any], where: str) -> Iterable[dict[str, str]]:
        pairs = (row.get(self.history) if self.history else None) or []
        for pair in pairs if isinstance(pairs, list) else [None]:
            if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
                raise DataError(
                    f"{where}: {self.history} has to be a list of pairs, each a question and its "
                    "answer."
                )
            yield {"role": "user", "content": pair[0]}
            yield {"role": "assistant", "content": pair[1]}


_KINDS = defaultdict(lambda: "no text", {type(None): "null", list: "a list", dict: "an object"})
_KINDS |= {int: "a number", float: "a number", bool: "true or false"}


def _text(row: dict[str, Any], name: str, where: str, may_be_null: bool = False) -> str:
    value = row.get(name)
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: `{name}` is {_KINDS[type(value)]}; it has to be a text, in quotes in JSON."
        )
    return value


def _conversation(turns: Any, where: str, column: str) -> list[dict[str, Any]]:
    """``turns`` with the keys and the names of the roles that chat templates know."""
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: `{column}` has to be a list of at least a user and an assistant message."
        )
    return [_turn(turn, f"{where}: {column}[{n}]") for n, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    given = {}
    if isinstance(turn, dict):  # Arrow gives every message the keys of all
        given = {name: value for name, value in turn.items() if value is not None}
    role, text = ("from", "value") if {"from", "value"} & given.keys() else ("role", "content")
    name = str(given.get(role, "")).lower()
    if given.get("tool_calls") or given.get("function_call") or name in _TOOLS:
        raise DataError(f"{where} is of a tool: calls of tools are not trained here.")
    content = given.get(text)
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        for part in content:
            if part.get("type", "text") != "text":
                raise DataError(
                    f"{where} holds a part of the type {str(part['type'])[:40]!r}: only text is "
                    "trained here. Take the part out."
                )
        content = "".join(part["text"] for part in content)
    known = _ROLE_NAMES.get(name)
    if not known or not isinstance(content, str):
        names = "system, human, gpt" if role == "from" else ", ".join(ROLES)
        raise DataError(f"{where} needs a `{role}` ({names}) and a `{text}` that is a text.")
    rest = {key: value for key, value in given.items() if key not in (role, text)}
    return {"role": known, "content": content} | rest


_TOOLS = ("tool", "function", "function_call", "observation")


def _check(turns: list[dict[str, Any]], where: str, shape: Shape) -> None:
    if len(turns) < 2:
        raise DataError(
            f"{where}: `{shape.turns}` has to be a list of at least a user and an assistant "
            "message."
        )
    *asked, answer = turns
    field = shape.turns or shape.answer
    if answer["role"] != "assistant" or not answer["content"].strip():
        raise DataError(
            f"{where}: the last message has to be the assistant's answer, and not empty "
            f"(`{field}`)."
        )
    for name, off in (("weight", 0), ("train", False)):
        if name in answer and answer[name] == off:
            raise DataError(
                f"{where}: {field}[{len(asked)}].{name} is {json.dumps(answer[name])}, so that "
                "nothing of this row is learnt; the last answer is what is trained here. Take the "
                f"row or the {name} out."
            )
    if asked[-1]["role"] == "system" or not asked[-1]["content"].strip():
        raise EmptyPrompt(
            f"{where}: the prompt is empty (`{shape.turns or ' and '.join(shape.prompt)}`)."
        )


def check_messages(messages: object, where: str) -> list[dict[str, Any]]:
    """``messages`` as a conversation that ends with an answer; DataError where they are none."""
    return Shape(turns="messages").messages({"messages": messages}, where)


def shape_of(row: dict[str, Any], where: str) -> Shape:
    """The shape of ``row``, by its columns that are not null; DataError for none that is known."""
    there = tuple(name for name, value in row.items() if value is not None)
    try:
        return shape(there, where)
    except DataError:
        # A null where the answer should be is a fault of the row, not of its shape.
        return shape(tuple(row), where)


@functools.lru_cache(maxsize=1000)
def _by_name(columns: tuple[str, ...]) -> dict[str, str]:
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(column.strip().casefold(), column)
    return names


def shape(columns: tuple[str, ...], where: str) -> Shape:
    """The shape of rows with these ``columns``. Upper and lower case are the same."""
    names = _by_name(columns)

    def first(known: tuple[str, ...]) -> str | None:
        return next((names[name] for name in known if name in names), None)

    def only(known: list[str], what: str) -> str | None:
        if len(known) > 1:
            raise DataError(
                f"{where}: {' and '.join(known)} could each be the {what}. Take out or rename all "
                "but one."
            )
        return names[known[0]] if known else None

    system = first(_SYSTEMS)
    if turns := first(_TURNS):
        found = Shape(turns, system=system)
    else:
        context = [
            name
            for name in _CONTEXTS
            if name in names
            and ({"instruction", "question", "prompt"} & names.keys() or name == "context")
        ]
        prompts = [name for name in _PROMPTS if name in names and name not in context]
        answers = [name for name in _ANSWERS if name in names]
        prompt, answer = only(prompts, "prompt"), only(answers, "answer")
        if not prompt or not answer:
            raise DataError(_unknown(columns, names, prompt, answer, where))
        prompt_columns = (prompt, *(names[name] for name in context))
        found = Shape(None, prompt_columns, answer, system, names.get("history"))
    used = {found.turns, *found.prompt, found.answer, found.system, found.history}
    unused = tuple(column for column in columns if column not in used)
    return Shape(**vars(found) | {"unused": unused})


def _unknown(columns, names, prompt, answer, where: str) -> str:
    has = ", ".join(sorted(columns)) or "nothing"
    if {"chosen", "rejected"} & names.keys():
        return (
            f"{where}: chosen and rejected are for preference training; fine-tuning needs one "
            f"answer. Rename chosen to output. The row has {has}."
        )
    missing = "no answer" if prompt else "no prompt" if answer else "neither prompt nor answer"
    return f"{where}: {missing} among its columns: it has {has}. Known are {KNOWN}."


def said(rows: Iterable[tuple[Shape, list[dict[str, Any]]]], all_of_it: bool = False) -> list[str]:
    """A line for each shape among the rows, and one for keys of messages; of plain ones only with
    ``all_of_it``."""
    shapes, unused, keys = Counter(), Counter(), Counter()
    for shape, turns in rows:
        shapes[replace(shape, unused=())] += 1
        unused.update(shape.unused)
        keys.update(key for turn in turns for key in turn if key not in ("role", "content"))
    text = [
        f"{shape}: {count:,} rows"
        for shape, count in shapes.items()
        if all_of_it or not shape.is_plain
    ]
    if unused:
        text.append(f"columns that are not used: {', '.join(unused)}")
    if keys.pop("weight", 0):
        text.append("weight of messages: not used; the last answer is what is trained")
    if keys:
        text.append(f"keys of messages that only a chat template may use: {', '.join(keys)}")
    return text
