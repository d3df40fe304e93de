"""The ticket data set: sizes, balance, unseen phrasings, and the same bytes from the same seed."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from workshop_utils.core import paths
from workshop_utils.core.chat_data import read_rows

SPLITS = ("train", "validation", "test")
REFERENCE = re.compile(r"\b[A-Z]{2}-\d{3}\b")


def make(out, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, paths.data_dir() / "make_tickets.py", "--out", out, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("tickets")
    assert make(out).returncode == 0
    return {split: read_rows(out / f"{split}.jsonl") for split in SPLITS}


def ticket(row):
    return row["messages"][0]["content"]


def answer(row):
    return json.loads(row["messages"][1]["content"])


def test_sizes(rows):
    assert len(rows["train"]) >= 640 and len(rows["validation"]) >= 100 and len(rows["test"]) >= 150


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_and_independent(rows, split):
    pairs = Counter((answer(row)["team"], answer(row)["priority"]) for row in rows[split])
    assert len(pairs) == 24 and len(set(pairs.values())) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_reply_repeats_the_only_reference_of_the_ticket(rows, split):
    for row in rows[split]:
        found = REFERENCE.findall(ticket(row))
        assert len(found) == 1 and found[0] in answer(row)["reply"]
        assert "\n" not in row["messages"][1]["content"]


def test_references_are_never_used_twice(rows):
    references = [REFERENCE.search(ticket(row))[0] for split in SPLITS for row in rows[split]]
    assert len(set(references)) == len(references)


def five_grams(row):
    words = re.findall(r"[a-z']+", REFERENCE.sub(" ", ticket(row)).lower())
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


@pytest.mark.parametrize("one, other", itertools.combinations(SPLITS, 2))
def test_no_five_words_in_a_row_are_shared(rows, one, other):
    assert not set().union(*map(five_grams, rows[one])) & set().union(*map(five_grams, rows[other]))


def test_no_sentence_is_shared():
    phrases = json.loads((paths.data_dir() / "ticket_phrases.json").read_text())
    seen = Counter()
    for split in SPLITS:
        groups = [texts for group in phrases[split].values() for texts in group.values()]
        seen.update({text.lower() for texts in groups for text in texts})
    assert [text for text, count in seen.items() if count > 1] == []


def test_a_label_is_not_written_into_the_ticket(rows):
    tickets = [ticket(row) for split in SPLITS for row in rows[split]]
    assert not [text for text in tickets if re.search(r"\b(team|priority):", text.lower())]


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert make(tmp_path / name, "--seed", seed).returncode == 0
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = make(tmp_path / "file" / "below")
    assert done.returncode == 1 and "Name another folder" in done.stderr
