"""Data sets of the Hub by name: the real ``datasets`` library, in processes of its own, against a
double of what it asks."""

import hashlib
import json
import os
import subprocess
import sys
from urllib.parse import parse_qs

import pytest
from http_double import FOREIGN, REPOSITORY, Answer, Request, serve

REPO = "maker/questions"
CONFIGS = ("easy", "hard")
CODE = """
import sys
from workshop_utils.core.errors import WorkshopError
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.prepare_data import prepare
templates = {"input_template": "{question}", "output_template": "{answer}"}
for place in sys.argv[2:]:
    name, config, split = place.split("|")
    try:
        config = HFDatasetConfig(name, config or None, split, **templates)
        done = prepare(config, sys.argv[1], progress=False)
        print("reused" if done.reused else "made", done.revision)
    except WorkshopError as error:
        print(type(error).__name__, error)
"""


class Hub:
    """The endpoints that ``datasets`` 3.6 asks for one data set. A later ``sha`` is a later
    commit."""

    def __init__(self):
        self.sha = "1" * 40
        card = "".join(f"- config_name: {c}\n  data_files: {c}/*.jsonl\n" for c in CONFIGS)
        self.files = {"README.md": f"---\nconfigs:\n{card}---\n".encode()}
        for name in CONFIGS:
            rows = [{"question": f"{name} {n}", "answer": f"a {n}"} for n in range(40)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self.files[f"{name}/train.jsonl"] = text.encode()

    def __call__(self, request: Request) -> Answer:
        path = request.path.split("?")[0]
        if path.startswith(f"/datasets/{REPO}/resolve/"):
            return self._file(path.split("/", 6)[6])
        if not path.startswith(f"/api/datasets/{REPO}"):
            return Answer(status=404, headers={"X-Error-Code": "RepoNotFound"})
        kind, *rest = path.removeprefix(f"/api/datasets/{REPO}").strip("/").split("/")
        if kind == "tree":
            return Answer(json.dumps(self._listing("/".join(rest[1:]))).encode())
        if kind == "paths-info":
            paths = parse_qs(request.body.decode())["paths"]
            entries = [self._entry(name) for name in self.files if name in paths]
            return Answer(json.dumps(entries).encode())
        about = {"id": REPO, "sha": self.sha, "private": False, "tags": []}
        about["siblings"] = [{"rfilename": name} for name in self.files]
        return Answer(json.dumps(about).encode())

    def _file(self, name: str) -> Answer:
        commit = {"X-Repo-Commit": self.sha}
        if name not in self.files:
            return Answer(status=404, headers=commit | {"X-Error-Code": "EntryNotFound"})
        etag = {"ETag": f'"{self._entry(name)["oid"]}"'}
        return Answer(self.files[name], headers=commit | etag)

    def _entry(self, name: str) -> dict:
        content = self.files[name]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
        return {"type": "file", "path": name, "size": len(content), "oid": blob.hexdigest()}

    def _listing(self, folder: str) -> list[dict]:
        own = {"type": "directory", "oid": self.sha, "size": 0}
        folders = [] if folder else [own | {"path": name} for name in CONFIGS]
        return folders + [self._entry(name) for name in self.files if name.startswith(folder)]


pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    answers = Hub()
    with serve(answers) as double:
        answers.double = double
        yield answers


@pytest.fixture
def prepared(tmp_path, hub):
    """Prepare data sets ``name|config|split``, one after the other in one process; its lines."""

    def prepare(*places: str, **environment: str) -> list[str]:
        clean = {name: value for name, value in os.environ.items() if not FOREIGN.search(name)}
        clean |= {"HF_ENDPOINT": hub.double.url, "HF_HOME": str(tmp_path / "hf")}
        clean |= {"PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", CODE, str(tmp_path / "out"), *places]
        pipes = {"capture_output": True, "text": True, "timeout": 120, "check": False}
        done = subprocess.run(command, env=clean | environment, **pipes)
        assert not done.returncode, done.stderr
        return done.stdout.splitlines()

    return prepare


def test_by_name_with_the_commit_in_the_key_and_offline_from_the_cache(hub, prepared, tmp_path):
    easy, hard = f"{REPO}|easy|train", f"{REPO}|hard|train"
    made, reused = f"made {hub.sha}", f"reused {hub.sha}"
    assert prepared(easy, easy, hard) == [made, reused, made]
    assert "hard" in (tmp_path / "out" / "test.jsonl").read_text()
    asked = len(hub.double.requests)
    assert prepared(hard, easy, HF_HUB_OFFLINE="1") == [reused, made]
    assert len(hub.double.requests) == asked
    hub.sha = "2" * 40
    hub.files["easy/train.jsonl"] = hub.files["easy/train.jsonl"].replace(b"a 1", b"b 1")
    assert prepared(easy) == [f"made {hub.sha}"]
    assert "b 1" in "".join(file.read_text() for file in (tmp_path / "out").glob("*.jsonl"))


def test_what_is_not_there_is_said(hub, prepared):
    wrong = ("maker/nothing||train", f"{REPO}||train", f"{REPO}|esay|train", f"{REPO}|easy|test")
    said = (
        "DataError dataset_name: Dataset 'maker/nothing' doesn't exist on the Hub or cannot be acc",
        "DataError dataset_config: maker/questions: Config name is missing. Please pick one among "
        "the available configs: ['easy', 'hard']",
        "BuilderConfig 'esay' not found. Available: ['easy', 'hard']",
        "has no split 'test'; it has train",
    )
    for line, words in zip(prepared(*wrong), said, strict=True):
        assert words in line
    (line,) = prepared("maker/other||train", HF_HUB_OFFLINE="1")
    assert line.startswith("FetchError maker/other: the Hub cannot be reached")
    assert "HF_HUB_OFFLINE is set" in line


def test_code_of_a_data_set_is_never_run(hub, prepared, tmp_path):
    hub.files = {"questions.py": f"open({str(tmp_path / 'ran')!r}, 'w')".encode()}
    (line,) = prepared(f"{REPO}||train")
    assert "a script of its own, which is never run here" in line and "refs/convert/parquet" in line
    assert not (tmp_path / "ran").exists()
