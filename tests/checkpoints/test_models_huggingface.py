"""Fetching from the Hub: the real huggingface_hub against a double of the few endpoints it asks."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from http_double import Answer, Request, Root, failed_with, serve, workshop
from safetensors.numpy import save

REPO = "maker/tiny-llama"
SHA = "0123456789abcdef0123456789abcdef01234567"
MODEL = "tiny"
MIB = 1 << 20


def tiny_repository() -> dict[str, bytes]:
    """Files of a repository as published: a pad token that is the end token, and second copies of
    the weights."""
    weights = save({"model.embed_tokens.weight": np.zeros((6 * MIB,), np.float32)})  # 24 MiB
    tokens = [
        {"id": i, "content": token}
        for i, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    ]
    return {
        "config.json": json.dumps({"model_type": "llama", "eos_token_id": 2}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": 2, "pad_token_id": 2}).encode(),
        "model.safetensors": weights,
        "tokenizer.json": json.dumps({"added_tokens": tokens, "model": {"vocab": {}}}).encode(),
        "tokenizer_config.json": json.dumps(
            {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        ).encode(),
        "special_tokens_map.json": json.dumps({"pad_token": {"content": "<|im_end|>"}}).encode(),
        "LICENSE.txt": b"the licence",
        "pytorch_model.bin": b"x" * 100,
        "original/consolidated.00.pth": b"x" * 100,
        "onnx/model.onnx": b"x" * 100,
    }


class Hub:
    """What the Hub answers. ``token`` gates the files; ``damage`` may change an answer once it is
    made."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.token: str | None = None
        self.damage = lambda request, answer: answer

    def __call__(self, request: Request) -> Answer:
        if request.path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in self.files]
            return Answer(json.dumps({"id": REPO, "sha": SHA, "siblings": siblings}).encode())
        prefix = f"/{REPO}/resolve/{SHA}/"
        if not request.path.startswith(prefix):
            return Answer(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            status = 403 if "authorization" in request.headers else 401
            return Answer(status=status, headers={"X-Error-Code": "GatedRepo"})
        content = self.files[request.path.removeprefix(prefix)]
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        return self.damage(request, Answer(content, headers=headers))


def etag(content: bytes) -> str:
    """The Hub's name of a file: sha256 of a large one, git blob id of a small one."""
    if len(content) > MIB:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@pytest.fixture
def root(tmp_path) -> Root:
    root = Root(tmp_path)
    root.add(MODEL, source="huggingface", address=REPO)
    return root


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return tiny_repository()


@pytest.fixture
def hub(files):
    answers = Hub(files)
    with serve(answers) as double:
        answers.double = double
        yield answers


def fetch(root: Root, hub: Hub, **environment: str):
    environment = {
        "HF_ENDPOINT": hub.double.url,
        "HF_HOME": str(root.path / "hf-home"),
    } | environment
    return workshop(root, "models", "fetch", MODEL, "--quiet", **environment)


def test_a_model_is_fetched_once_and_is_usable(root, hub):
    result = fetch(root, hub)
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        f"models/huggingface/{MODEL}\n",
        "",
    )
    directory = root.path / "models" / "huggingface" / MODEL
    assert {file.name for file in directory.iterdir()} == {
        "LICENSE.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (
        json.loads((directory / "tokenizer_config.json").read_text())["pad_token"]
        == "<|endoftext|>"
    )
    assert (
        json.loads((directory / "special_tokens_map.json").read_text())["pad_token"]
        == "<|endoftext|>"
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((directory / name).read_text())["pad_token_id"] == 0
        assert json.loads((directory / name).read_text())["eos_token_id"] == 2
    assert (directory / "model.safetensors").stat().st_nlink == 2, (
        "the weights lie on the disk once"
    )
    cached = next((root.path / "hf-home").rglob("snapshots/*/tokenizer_config.json"))
    assert b'"pad_token": "<|im_end|>"' in cached.read_bytes(), "the Hub's cache is left as it was"
    assert root.leftovers() == []

    asked = len(hub.double.requests)
    assert fetch(root, hub).returncode == 0
    assert len(hub.double.requests) == asked


def test_weights_that_others_may_not_read_in_the_cache_are_copied(root, hub):
    assert fetch(root, hub).returncode == 0
    weights = root.path / "models" / "huggingface" / MODEL / "model.safetensors"
    shutil.rmtree(weights.parent)
    (blob,) = {file.resolve() for file in (root.path / "hf-home").rglob("model.safetensors")}
    blob.chmod(0o600)
    before = os.umask(0o022)
    try:
        assert fetch(root, hub).returncode == 0
    finally:
        os.umask(before)
    assert (weights.stat().st_mode & 0o777, blob.stat().st_mode & 0o777) == (0o644, 0o600)


def test_two_at_once_fetch_once(root, hub):
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: fetch(root, hub), range(2)))
    assert [result.returncode for result in results] == [0, 0]
    weights = [
        request.method for request in hub.double.seen(f"/{REPO}/resolve/{SHA}/model.safetensors")
    ]
    assert weights.count("GET") == 1


def test_a_broken_connection_is_resumed_with_a_range_request(root, hub):
    path = f"/{REPO}/resolve/{SHA}/model.safetensors"

    def break_off(request: Request, answer: Answer) -> Answer:
        if request.path == path and request.method == "GET":
            answer.cut = 15 * MIB
        return answer

    hub.damage = break_off
    failed_with(fetch(root, hub), "model.safetensors", f"broke after {15 * MIB} of ", "resumes")
    assert not (root.path / "models" / "huggingface" / MODEL).exists()

    hub.damage = lambda request, answer: answer
    assert fetch(root, hub).returncode == 0
    resumed = [
        r.headers["range"]
        for r in hub.double.seen(path)
        if r.method == "GET" and "range" in r.headers
    ]
    assert resumed == [f"bytes={15 * MIB}-"]
    fetched = root.path / "models" / "huggingface" / MODEL / "model.safetensors"
    assert fetched.read_bytes() == hub.files["model.safetensors"]


def test_a_truncated_file_is_refused_then_resumed(root, hub):
    path = f"/{REPO}/resolve/{SHA}/model.safetensors"
    size = len(hub.files["model.safetensors"])

    def truncate(request: Request, answer: Answer) -> Answer:
        answer.headers["X-Linked-Size"] = str(len(answer.body))
        if request.path == path and request.method == "GET":
            answer.body = answer.body[: size // 2]
        return answer

    hub.damage = truncate
    failed_with(fetch(root, hub), "model.safetensors", f"broke after {size // 2} of {size} bytes")
    assert not (root.path / "models" / "huggingface" / MODEL).exists()

    hub.damage = lambda request, answer: answer
    assert fetch(root, hub).returncode == 0
    assert f"bytes={size // 2}-" in [r.headers.get("range") for r in hub.double.seen(path)]


def test_wrong_bytes_are_refused_and_fetched_again(root, hub):
    def corrupt(request: Request, answer: Answer) -> Answer:
        if request.path.endswith("/config.json") and request.method == "GET":
            answer.body = answer.body.replace(b"llama", b"lamma")
        return answer

    hub.damage = corrupt
    failed_with(fetch(root, hub), "config.json", "checksum")
    hub.damage = lambda request, answer: answer
    assert fetch(root, hub).returncode == 0
    assert (root.path / "models" / "huggingface" / MODEL / "config.json").read_text().count(
        "llama"
    ) == 1


def test_the_manifests_sha256_counts(tmp_path, hub):
    root = Root(tmp_path)
    root.add(MODEL, source="huggingface", address=REPO, files={"model.safetensors": "0" * 64})
    failed_with(fetch(root, hub), "model.safetensors", "checksum", "0" * 64)


def test_a_gated_repository_says_what_to_accept_and_where(root, hub):
    hub.token = "good"
    failed_with(
        fetch(root, hub), "gated", f"https://huggingface.co/{REPO}", "Test Licence", "HF_TOKEN"
    )
    failed_with(
        fetch(root, hub, HF_TOKEN="stranger"),
        "no access (403)",
        f"https://huggingface.co/{REPO}",
        "Test Licence",
    )
    assert fetch(root, hub, HF_TOKEN="good").returncode == 0


def test_a_refused_token(root):
    def refuse(request: Request) -> Answer:
        return Answer(
            status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}
        )

    with serve(refuse) as double:
        environment = {"HF_ENDPOINT": double.url, "HF_HOME": str(root.path), "HF_TOKEN": "old"}
        failed_with(
            workshop(root, "models", "fetch", MODEL, **environment),
            "refuses the token (401)",
            "HF_TOKEN",
        )


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", ("no such repository", REPO)),
        (404, "RevisionNotFound", ("no revision", "manifest.yaml")),
        (503, "", ("answered 503", "resumes")),
    ],
)
def test_other_answers_of_the_hub(root, status, code, words):
    with serve(lambda request: Answer(status=status, headers={"X-Error-Code": code})) as double:
        environment = {"HF_ENDPOINT": double.url, "HF_HOME": str(root.path)}
        failed_with(workshop(root, "models", "fetch", MODEL, **environment), *words)


def test_no_hub_at_all(root):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root.path)}
    failed_with(workshop(root, "models", "fetch", MODEL, **environment), "cannot be reached")
    environment |= {"HF_HUB_OFFLINE": "1"}
    failed_with(workshop(root, "models", "fetch", MODEL, **environment), "HF_HUB_OFFLINE is set")


def test_offline_uses_the_hubs_cache(root, hub, tmp_path_factory):
    assert fetch(root, hub).returncode == 0
    other = Root(tmp_path_factory.mktemp("other"))
    other.add(MODEL, source="huggingface", address=REPO)
    asked = len(hub.double.requests)
    home = str(root.path / "hf-home")
    assert fetch(other, hub, HF_HUB_OFFLINE="1", HF_HOME=home).returncode == 0
    assert len(hub.double.requests) == asked

    next((root.path / "hf-home").rglob("snapshots/*/model.safetensors")).unlink()
    another = Root(tmp_path_factory.mktemp("another"))
    another.add(MODEL, source="huggingface", address=REPO)
    failed_with(
        fetch(another, hub, HF_HUB_OFFLINE="1", HF_HOME=home), "only a part", "HF_HUB_OFFLINE"
    )
    assert not (another.path / "models" / "huggingface" / MODEL).exists()
