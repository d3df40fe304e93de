"""Score a base model and an adapter on held-out rows, beside two baselines.

Variants: the plain base; the base that sees the schema and five examples in its prompt; the
majority class of the training data; the base with the adapter. All metrics are exact and need no
torch; a finished variant is kept and used again while nothing that it depends on has changed.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workshop_utils.core import paths, terminal
from workshop_utils.core.chat_data import prompt_turns, read_rows
from workshop_utils.core.errors import NotACheckpoint
from workshop_utils.core.hashing import sha256, sha256_of_text
from workshop_utils.core.settings import SEED
from workshop_utils.inference.metrics import exact_match

BASE, FEW_SHOT, MAJORITY, ADAPTER = "base", "base-few-shot", "majority-class", "adapter"
VARIANTS = BASE, FEW_SHOT, MAJORITY, ADAPTER
SERVED = "served"
_TITLES = ("base", "base + 5 examples", "majority class", "adapter")
TITLES = dict(zip(VARIANTS, _TITLES, strict=True))
EXAMPLES = 5
MAX_CLASSES = 12
"""A field with at most so many values among the labels counts as a class; others (a reply) are free
text."""
NO_ANSWER, OTHER = "no answer", "other"


@dataclass(frozen=True)
class Scores:
    """What one variant reached on ``rows`` rows. Rates are fractions of all rows.

    Attributes:
        exact_match: answer and label are the same text once blanks at both ends are gone.
        valid_json: the answer is a JSON object; None when the labels are not JSON objects.
        fields: for each field of the labels, how often the answer has the same value.
        confusion: for each field that is a class: label -> answer -> rows. Answers that no label
            has count as "other", answers without the field as "no answer".
    """

    rows: int
    exact_match: float
    valid_json: float | None
    fields: dict[str, float]
    confusion: dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Evaluation:
    """Scores and seconds (loading included) of each variant; ``directory`` holds its answers."""

    directory: Path
    scores: dict[str, Scores]
    seconds: dict[str, float]

    def predictions(self, variant: str) -> list[dict[str, str]]:
        """The rows of one variant, in the order of the test file: ``input`` (last user turn),
        ``label``, ``prediction``."""
        text = _predictions_file(self.directory, variant).read_text("utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def __str__(self) -> str:
        return table(self.scores)


def score(predictions: Sequence[str], labels: Sequence[str]) -> Scores:
    """Compare ``predictions`` with ``labels`` one by one; ValueError for other lengths, or none."""
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    rows = len(labels)
    exact = sum(exact_match(predictions, labels)) / rows
    expected = _objects(labels)
    if None in expected:
        return Scores(rows, exact, None, {}, {})
    given = _objects(predictions)
    pairs = list(zip(given, expected, strict=True))
    valid = sum(answer is not None for answer in given) / rows
    names = dict.fromkeys(name for label in expected for name in label)
    right = {name: sum(_same(*pair, name) for pair in pairs) / rows for name in names}
    confusion = {name: _confusion(name, pairs) for name in _class_fields(expected)}
    return Scores(rows, exact, valid, right, confusion)


def majority_class(train_rows: Sequence[dict], test_rows: Sequence[dict]) -> list[str]:
    """The commonest value of each field, or whole answer if not JSON, for every test row."""
    answers = [label_of(row) for row in train_rows]
    labels = _objects(answers)
    if None in labels:
        best = Counter(answers).most_common(1)[0][0]
    else:
        values: dict[str, Counter] = {}
        for label in labels:
            for name, value in label.items():
                values.setdefault(name, Counter())[json.dumps(value)] += 1
        commonest = {name: json.loads(count.most_common(1)[0][0]) for name, count in values.items()}
        best = json.dumps(commonest, ensure_ascii=False)
    return [best] * len(test_rows)


def few_shot_prefix(train_rows: Sequence[dict], seed: int = SEED) -> list[dict]:
    """Turns to put before a question: a sentence that states the schema, in the first user turn
    since not every chat template takes a system message, and :data:`EXAMPLES` training rows: drawn
    at random, then chosen one at a time so that each adds as many classes not seen yet as there
    are."""

    def asks_once(row: dict) -> bool:
        return [turn["role"] for turn in row["messages"]].count("user") == 1

    rows = list(filter(asks_once, train_rows)) or list(train_rows)
    random.Random(seed).shuffle(rows)
    labels = _objects([label_of(row) for row in train_rows])
    classes = {} if None in labels else _class_fields(labels)
    chosen: list[dict] = []
    seen: Counter = Counter()
    while rows and len(chosen) < EXAMPLES:
        row = min(rows, key=lambda row: sum(seen[value] for value in _classes_of(row, classes)))
        rows.remove(row)
        chosen.append(row)
        seen.update(_classes_of(row, classes))
    turns = [dict(turn) for row in chosen for turn in row["messages"] if turn["role"] != "system"]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first:
        first["content"] = f"{schema_sentence(labels, classes)}\n\n{first['content']}"
    return turns


def schema_sentence(labels: Sequence[dict | None], classes: Mapping[str, Sequence[str]]) -> str:
    """What an answer looks like, in words: fields, and the values of those that are a class."""
    if None in labels:
        return "Answer in the form of these examples."
    names = dict.fromkeys(name for label in labels for name in label)
    kinds = {name: f"one of {', '.join(values)}" for name, values in classes.items()}
    fields = [f'"{name}" ({kinds.get(name, "text")})' for name in names]
    return f"Answer with one line of JSON and nothing else. Its fields: {'; '.join(fields)}."


def label_of(row: dict) -> str:
    """The answer of a row: its last turn."""
    return row["messages"][-1]["content"]


def evaluate(
    hf_model: Path | str,
    adapter: Path | str | None,
    test_file: Path | str,
    train_file: Path | str,
    out_dir: Path | str,
    variants: Sequence[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: bool = True,
    trust: bool = False,
) -> Evaluation:
    """Answer every row of ``test_file`` with each variant, score it, and keep both in ``out_dir``.

    ``out_dir/VARIANT/predictions.jsonl`` and ``out_dir/scores.json`` are written when a variant is
    complete, so an interrupted call goes on with the next. A variant is used again when model,
    adapter, files and settings have the same contents.

    Args:
        hf_model: Hugging Face model directory.
        adapter: a PEFT directory or a ``.nemo``; without one the variant "adapter" is left out.
        test_file, train_file: rows as :func:`workshop_utils.core.chat_data.read_rows` takes them.
        variants: some of :data:`VARIANTS`; all by default.
        limit: only so many rows, from the start of the file.
        trust: what is found wrong with model or adapter is printed and not raised.

    Raises:
        CheckpointError, DataError: model, adapter, or a file is missing or not what it should be.
    """
    from workshop_utils.inference import generate
    from workshop_utils.runtime.device import choose_device

    hf_model, out_dir = generate.sound_model(hf_model, trust), Path(out_dir)
    test, train = read_rows(test_file, say=True)[:limit], read_rows(train_file)
    peft = generate.as_peft(adapter, trust) if adapter is not None else None
    answering = {"model": _digest(hf_model), "max_new_tokens": max_new_tokens}
    answering |= {"batch_size": batch_size, "dtype": choose_device().dtype}
    data = {"test": _digest(Path(test_file)), "rows": len(test)}
    learnt = {"train": _digest(Path(train_file))}
    inputs = {
        BASE: answering | data,
        FEW_SHOT: answering | data | learnt | {"examples": EXAMPLES, "seed": SEED},
        MAJORITY: data | learnt,
    }
    if peft:
        inputs[ADAPTER] = answering | data | {"adapter": _digest(peft)}
    chosen = [variant for variant in variants or VARIANTS if variant in inputs]
    entries = {name: entry for name, entry in _read_entries(out_dir).items() if name in inputs}
    questions, loaded = [row["messages"] for row in test], None
    for variant in chosen:
        if _is_current(entries.get(variant), inputs[variant], out_dir, variant):
            continue
        began = time.perf_counter()
        if variant == MAJORITY:
            predictions = majority_class(train, test)
        else:
            with_adapter = peft if variant == ADAPTER else None
            if loaded is None or loaded[0] != with_adapter:
                loaded = None  # frees the model before the next one is read
                loaded = with_adapter, generate.load(hf_model, with_adapter, trust)
            prefix = few_shot_prefix(train) if variant == FEW_SHOT else None
            how = {"prefix": prefix, "progress": progress}
            predictions = generate.generate(
                *loaded[1], questions, max_new_tokens, batch_size, **how
            )
        seconds = time.perf_counter() - began
        written = _write_predictions(out_dir, variant, test, predictions)
        entries[variant] = {
            "inputs": inputs[variant],
            "predictions": _digest(written),
            "seconds": round(seconds, 2),
            **asdict(score(predictions, [label_of(row) for row in test])),
        }
        _write_entries(out_dir, entries)
    return Evaluation(
        out_dir,
        {name: _scores(entries[name]) for name in chosen},
        {name: entries[name]["seconds"] for name in chosen},
    )


def evaluate_served(
    url: str | None,
    model_id: str,
    test_file: Path | str,
    out_dir: Path | str,
    limit: int | None = None,
    max_new_tokens: int = 48,
    api_key: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score the model ``model_id`` of the server at ``url`` as :func:`evaluate` does.

    The figures of a served adapter are those of the adapter, but for ties that another precision or
    another order of additions decides. Nothing is reused: what a server holds can change. ``url``
    and ``api_key`` default to the environment (:mod:`workshop_utils.inference.client`).
    """
    from workshop_utils.inference.client import answers, connect

    test, out_dir = read_rows(test_file, say=True)[:limit], Path(out_dir)
    began = time.perf_counter()
    client = connect(url, api_key)
    questions = [row["messages"] for row in test]
    predictions = answers(client, model_id, questions, max_new_tokens, progress=progress)
    seconds = time.perf_counter() - began
    scores = score(predictions, [label_of(row) for row in test])
    _write_predictions(out_dir, SERVED, test, predictions)
    entry = {"url": str(client.base_url), "model": model_id, "seconds": round(seconds, 2)}
    entry |= asdict(scores)
    _write_entries(out_dir, {SERVED: entry})
    return Evaluation(out_dir, {SERVED: scores}, {SERVED: seconds})


def table(scores: Mapping[str, Scores]) -> str:
    """The scores as a text table, one line a variant, rates in per cent."""
    fields = list(dict.fromkeys(name for entry in scores.values() for name in entry.fields))
    lines = [["variant", "rows", "exact match", "valid JSON", *fields]]
    for variant, entry in scores.items():
        rates = [entry.exact_match, entry.valid_json, *(entry.fields.get(name) for name in fields)]
        shown = ("-" if rate is None else f"{rate:.1%}" for rate in rates)
        lines.append([TITLES.get(variant, variant), str(entry.rows), *shown])
    head, *rows = terminal.columns(lines, left=1)
    return "\n".join([head, "-" * len(head), *rows])


def _predictions_file(out_dir: Path, variant: str) -> Path:
    return out_dir / variant / "predictions.jsonl"


def _write_predictions(
    out_dir: Path, variant: str, rows: Sequence[dict], predictions: Sequence[str]
) -> Path:
    lines = []
    for row, text in zip(rows, predictions, strict=True):
        asked = prompt_turns(row["messages"])[-1]["content"]
        lines.append(json.dumps({"input": asked, "label": label_of(row), "prediction": text}))
    return paths.write_text(_predictions_file(out_dir, variant), "\n".join(lines) + "\n")


def _write_entries(out_dir: Path, entries: Mapping[str, dict]) -> None:
    text = json.dumps({"variants": entries}, indent=2)
    paths.write_text(out_dir / "scores.json", text + "\n")


def _read_entries(out_dir: Path) -> dict[str, dict]:
    """The finished variants in ``scores.json``; none where this module did not write it."""
    try:
        entries = json.loads((out_dir / "scores.json").read_text("utf-8"))["variants"]
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_current(entry: dict | None, inputs: dict, out_dir: Path, variant: str) -> bool:
    file = _predictions_file(out_dir, variant)
    return (
        entry is not None
        and entry.get("inputs") == inputs
        and file.is_file()
        and entry.get("predictions") == _digest(file)
        and {"seconds", *Scores.__dataclass_fields__} <= entry.keys()
    )


def _scores(entry: Mapping[str, Any]) -> Scores:
    return Scores(**{name: entry[name] for name in Scores.__dataclass_fields__})


def _digest(path: Path) -> str:
    """sha256 of a file, or of the files of a directory that decide what a model answers."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise NotACheckpoint(f"{paths.shown(path)} does not exist.")
    kinds = (".json", ".safetensors", ".bin", ".model", ".jinja")
    files = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
    return sha256_of_text("".join(f"{file.name} {_digest(file)}\n" for file in files))


def _objects(texts: Sequence[str]) -> list[dict | None]:
    """Each text as the JSON object it is, else None."""
    values = []
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        values.append(value if isinstance(value, dict) else None)
    return values


def _same(answer: dict | None, label: dict, name: str) -> bool:
    """Same value and JSON type: true is not 1. What the label leaves out has to be left out."""
    if answer is None or name not in answer or name not in label:
        return answer is not None and name not in answer and name not in label
    return json.dumps(answer[name], sort_keys=True) == json.dumps(label[name], sort_keys=True)


def _class_fields(labels: Sequence[dict]) -> dict[str, list[str]]:
    """Fields with text values of which there are few -> their values in order. Every row different
    is no class."""
    values: dict[str, set] = {}
    for label in labels:
        for name, value in label.items():
            values.setdefault(name, set()).add(value if isinstance(value, str) else None)
    return {
        name: sorted(texts)
        for name, texts in values.items()
        if None not in texts and len(texts) <= MAX_CLASSES and len(texts) < len(labels)
    }


def _classes_of(row: dict, classes: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    label = _objects([label_of(row)])[0] or {}
    return [(name, label[name]) for name in classes if name in label]


def _confusion(name: str, pairs: Sequence[tuple[dict | None, dict]]) -> dict[str, dict[str, int]]:
    known = sorted({label[name] for _, label in pairs if name in label})
    columns = [*known, OTHER, NO_ANSWER]
    counts = {label: dict.fromkeys(columns, 0) for label in known}
    for answer, label in pairs:
        if name in label:
            value = NO_ANSWER if answer is None or name not in answer else answer[name]
            counts[label[name]][value if value in known or value is NO_ANSWER else OTHER] += 1
    return counts
