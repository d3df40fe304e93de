"""Hostile and damaged files: each is refused by the right class, nothing runs, in bounded time and
memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest
from places import TESTS

from workshop_utils.checkpoints.formats import restricted_pickle

READER = TESTS / "samples" / "hostile_reader.py"


def read_all(files: dict[str, bytes], directory: Path) -> dict[str, dict]:
    """Feed ``files`` (name -> content) to the readers in a process of its own; name -> what came
    out."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, READER, directory],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line["name"]: line for line in lines if "name" in line}
    assert len(found) == len(files), (
        f"{lines[-1]} was the last: {done.returncode} {done.stderr[-2000:]}"
    )
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """(case, what came out) for all of them, and the file that none may make."""
    canary = tmp_path_factory.mktemp("canary") / "touched"
    corpus = hostile_files.corpus(f"touch {canary}")
    files = {f"{number:04}.{case.reader}": case.content for number, case in enumerate(corpus)}
    results = read_all(files, tmp_path_factory.mktemp("hostile") / "files")
    return dict(
        zip((case.name for case in corpus), zip(corpus, results.values(), strict=True), strict=True)
    ), canary


NAMES = [case.name for case in hostile_files.corpus("true")]


@pytest.mark.parametrize("name", NAMES)
def test_is_refused(cases, name):
    case, result = cases[0][name]
    assert result["kind"] == case.expected, result["message"]
    assert "MemoryError" not in result["message"]
    assert str(READER.parent) not in result["message"]
    assert len(result["message"]) < 2000
    assert result["message"].isprintable()


def test_nothing_was_run(cases):
    assert not cases[1].exists()


def test_the_samples_are_real(tmp_path):
    """What the readers refuse does run when it is loaded carelessly."""
    for way in (
        "REDUCE",
        "STACK_GLOBAL",
        "INST",
        "OBJ",
        "eval",
        "getattr",
        "thrown away",
        "memo",
        "pickle in a pickle",
    ):
        canary = tmp_path / way.replace(" ", "-")
        pickle.loads(hostile_files.gadgets(f"touch {canary}")[way])
        assert canary.exists(), way


@pytest.mark.parametrize(
    ("way", "calls"),
    [
        ("REDUCE", ["posix.system('touch x')"]),
        ("NEWOBJ_EX", ["subprocess.Popen('touch x', {...})"]),
        ("INST", ["posix.system('touch x')"]),
        ("EXT1", ["copyreg._extension_registry[5]('touch x')"]),
        ("torch.load", ["torch.load('touch x')"]),
        ("named only", ["webbrowser.open"]),
        (
            "getattr",
            [
                "builtins.__import__('os')",
                "builtins.getattr(builtins.__import__(...), 'system')",
                "builtins.getattr(...)('touch x')",
            ],
        ),
        ("BUILD", ["foo.Bar()", "foo.Bar(...).__setstate__({...})"]),
        ("before a break", ["posix.system('touch x')"]),
        ("after a bad call", ["posix.system('touch x')"]),
    ],
)
def test_what_a_pickle_would_do_is_named(way, calls):
    assert restricted_pickle.survey(hostile_files.gadgets("touch x")[way], "x")[0] == calls


def test_cut_off_at_every_byte(tmp_path):
    """Every beginning of a sound file of each kind is refused."""
    import io

    import safetensors.numpy
    import torch
    from fuzz import seeds
    from numpy import zeros

    saved = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, saved)
    files = {
        "index": seeds._index(),
        "state": saved.getvalue(),
        "safetensors": safetensors.numpy.save({"a": zeros(3, dtype="int8")}),
    }
    files["nemo"] = hostile_files.tar(*hostile_files.GOOD)
    cuts = {}
    for kind, content in files.items():
        end = len(content.rstrip(b"\0")) if kind == "nemo" else len(content)
        for length in range(0, end, max(1, end // 400)):
            cuts[f"{kind}-{length:05}.{kind}"] = content[:length]
    results = read_all(cuts, tmp_path / "cuts")
    accepted = {
        name: result
        for name, result in results.items()
        if not result["kind"].endswith("Checkpoint")
    }
    assert not accepted
