"""What a person should know of training rows before a training: which columns are used, which rows
cannot be, and what would make its figures untrue. Nothing is written."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workshop_utils.core import chat_data, data_files, paths, row_shapes
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError
from workshop_utils.training.data_check import Template, measured
from workshop_utils.training.recipe.splits import key

EXAMPLES = 2
MEANING = {
    "unusable": "rows that cannot be used",
    "empty_prompt": "rows with an empty prompt",
    "answer_cut": "rows that lose a part of the answer at {length:,} tokens",
    "prompt_cut": "rows that lose a part of the prompt at {length:,} tokens",
    "contradiction": "prompts with different answers (case and white space aside)",
    "repeated": "rows that are there already, prompt and answer",
    "test_row_in_training": "rows of the test set in the training set",
    "test_prompt_in_training": "other rows of the test set with a prompt of the training set (case "
    "and white space aside)",
}
REFUSED = ("unusable", "empty_prompt")
"""A training refuses the file for these."""


@dataclass(frozen=True)
class Row:
    """A row as messages, and where it stands."""

    where: str
    turns: list[dict]

    @property
    def prompt(self) -> str:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns[:-1])

    @property
    def answer(self) -> str:
        return self.turns[-1]["content"].strip()

    def __str__(self) -> str:
        asked = " ".join(self.turns[-2]["content"].split())
        return f"{self.where}: {asked if len(asked) <= 60 else asked[:57] + '...'}"


@dataclass
class Report:
    """``files``: rows and the shapes of each. ``findings``: for each code of :data:`MEANING` how
    many, and examples. ``not_checked`` says what was not looked at."""

    files: dict[str, dict] = field(default_factory=dict)
    findings: dict[str, dict] = field(default_factory=dict)
    seq_length: int = 0
    longest: int | None = None
    not_checked: list[str] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        return not any(code in self.findings for code in REFUSED)

    def add(self, code: str, examples: Sequence[object]) -> None:
        """Count ``examples``, of which the first are told."""
        if examples:
            found = self.findings.setdefault(code, {"count": 0, "examples": []})
            found["count"] += len(examples)
            found["examples"] = [*found["examples"], *map(str, examples)][:EXAMPLES]

    def told(self, *codes: str) -> list[str]:
        """Counts and examples of those ``codes`` that were found."""
        lines = []
        for code in codes:
            if found := self.findings.get(code):
                meaning = MEANING[code].format(length=self.seq_length)
                lines += [
                    f"{meaning}: {found['count']:,}",
                    *(f"  {it}" for it in found["examples"]),
                ]
        return lines

    def __str__(self) -> str:
        lines = []
        for name, about in self.files.items():
            lines += [f"{name}: {about['rows']:,} rows", *(f"  {text}" for text in about["shapes"])]
        if self.longest is not None:
            lines.append(f"longest row: {self.longest:,} tokens; {self.seq_length:,} are kept")
        lines += self.told(*self.findings)
        lines += [f"not checked: {text}" for text in self.not_checked]
        return "\n".join(lines if self.findings else [*lines, "nothing wrong was found"])


def check(
    files: Sequence[Path],
    test: Path | None = None,
    tokenizer: ChatTokenizer | None = None,
    seq_length: int = 512,
) -> Report:
    """Look at the training rows of ``files``, together, and at those of ``test``. DataError where a
    file cannot be read at all."""
    report = Report(seq_length=seq_length)
    rows = [row for file in files for row in _rows(Path(file), report)]
    tested = _rows(Path(test), report) if test else []
    if tokenizer:
        _lengths(rows, tokenizer, report)
    else:
        report.not_checked.append("lengths, as no tokenizer was given (--model)")
    _repetitions(rows, report)
    if test:
        _leaks(rows, tested, report)
    else:
        report.not_checked.append("rows of the test set among these, as none was given (--test)")
    return report


def _rows(file: Path, report: Report) -> list[Row]:
    found, shapes, faults = [], [], defaultdict(list)
    read = data_files.rows(file)
    for where, row in read:
        try:
            shape = row_shapes.shape_of(row, where)
            found.append(Row(where, shape.messages(row, where)))
            shapes.append((shape, found[-1].turns))
        except row_shapes.EmptyPrompt as error:
            faults["empty_prompt"].append(error)
        except DataError as error:
            faults["unusable"].append(error)
    said = row_shapes.said(shapes, all_of_it=True)
    report.files[paths.shown(file)] = {"rows": len(read), "shapes": said}
    for code in REFUSED:
        report.add(code, faults[code])
    return found


def _lengths(rows: list[Row], tokenizer: ChatTokenizer, report: Report) -> None:
    rule = Template("{input}{output}", "output", ("input",), report.seq_length, extra=1)
    texts = [
        {"input": chat_data.render_prompt(tokenizer, row.turns), "output": row.answer}
        for row in rows
    ]
    lengths, cut = measured(texts, rule, tokenizer)
    report.longest = max(lengths, default=0)
    too_long = [length > report.seq_length for length in lengths]
    each = list(zip(rows, too_long, cut, strict=True))
    report.add("answer_cut", [row for row, _, lost in each if lost])
    report.add("prompt_cut", [row for row, over, lost in each if over and not lost])


def _by(rows: Iterable[Row], what: Callable[[Row], object]) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[what(row)].append(row)
    return groups


def _repetitions(rows: list[Row], report: Report) -> None:
    contradictions = []
    for same in _by(rows, lambda row: key(row.prompt)).values():
        if len(answers := _by(same, lambda row: row.answer)) > 1:
            first, second = [group[0] for group in answers.values()][:2]
            contradictions.append(f"{first} ({second.where} answers otherwise)")
    report.add("contradiction", contradictions)
    again = _by(rows, lambda row: (row.prompt, row.answer)).values()
    report.add("repeated", [row for same in again for row in same[1:]])


def _leaks(rows: list[Row], tested: list[Row], report: Report) -> None:
    exact = _by(rows, lambda row: (row.prompt, row.answer))
    alike = _by(rows, lambda row: key(row.prompt))
    same, near = [], []
    for row in tested:
        if found := exact.get((row.prompt, row.answer)):
            same.append(f"{row} (and {found[0].where})")
        elif found := alike.get(key(row.prompt)):
            near.append(f"{row} (and {found[0].where})")
    report.add("test_row_in_training", same)
    report.add("test_prompt_in_training", near)


def convert(file: Path, target: Path) -> chat_data.Rows:
    """Write the rows of ``file`` to ``target`` as ``{"messages": [...]}``, one a line."""
    rows = chat_data.read_rows(file)
    paths.write_text(target, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return rows
