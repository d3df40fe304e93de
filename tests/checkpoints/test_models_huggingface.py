"""Fetching from the Hub: the real huggingface_hub against a double of the few endpoints it asks."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from http_double import Answer, Request, Root, failed_with, serve, succeeded_with, workshop
from safetensors.numpy import save

REPO = "maker/tiny-llama"
SHA = "0123456789abcdef0123456789abcdef01234567"
MODEL = "tiny"
MIB = 1 << 20


PAGE = f"https://huggingface.co/{REPO}"
WEIGHTS = f"/{REPO}/resolve/{SHA}/model.safetensors"
KEPT = {"LICENSE.txt", "config.json", "generation_config.json", "model.safetensors"}
KEPT |= {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}


def tiny_repository() -> dict[str, bytes]:
    """Files of a repository as published: a pad token that is the end token, and second copies of
    the weights."""
    weights = save({"model.embed_tokens.weight": np.zeros((6 * MIB,), np.float32)})  # 24 MiB
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens = [{"id": i, "content": token} for i, token in enumerate(names)]
    described = {
        "config.json": {"model_type": "llama", "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": 2, "pad_token_id": 2},
        "tokenizer.json": {"added_tokens": tokens, "model": {"vocab": {}}},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        "special_tokens_map.json": {"pad_token": {"content": "<|im_end|>"}},
    }
    others = ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx")
    return {
        "model.safetensors": weights,
        "LICENSE.txt": b"the licence",
        **{name: json.dumps(content).encode() for name, content in described.items()},
        **dict.fromkeys(others, b"x" * 100),
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
    usual = {"HF_ENDPOINT": hub.double.url, "HF_HOME": str(root.path / "hf-home")}
    return workshop(root, "models", "fetch", MODEL, "--quiet", **usual | environment)


def test_a_model_is_fetched_once_and_is_usable(root, hub):
    succeeded_with(fetch(root, hub), f"models/huggingface/{MODEL}")
    assert root.fetched(MODEL) == KEPT
    directory = root.path / "models" / "huggingface" / MODEL

    def held(name: str) -> dict:
        return json.loads((directory / name).read_text())

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert held(name)["pad_token"] == "<|endoftext|>"
    for name in ("config.json", "generation_config.json"):
        assert (held(name)["pad_token_id"], held(name)["eos_token_id"]) == (0, 2)
    links = (directory / "model.safetensors").stat().st_nlink
    assert links == 2, "the weights lie on the disk once"
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
    assert [request.method for request in hub.double.seen(WEIGHTS)].count("GET") == 1


def cut(answer: Answer) -> int:
    answer.cut = 15 * MIB
    return answer.cut


def truncate(answer: Answer) -> int:
    answer.headers["X-Linked-Size"] = str(len(answer.body))
    answer.body = answer.body[: len(answer.body) // 2]
    return len(answer.body)


@pytest.mark.parametrize("damage", [cut, truncate])
def test_a_broken_connection_is_resumed_with_a_range_request(root, hub, damage):
    whole, sent = hub.files["model.safetensors"], []

    def break_off(request: Request, answer: Answer) -> Answer:
        if request.path == WEIGHTS and request.method == "GET":
            sent.append(damage(answer))
        elif request.path == WEIGHTS:
            answer.headers["X-Linked-Size"] = str(len(answer.body))
        return answer

    hub.damage = break_off
    result = fetch(root, hub)
    said = f"broke after {sent[0]} of {len(whole)} bytes"
    failed_with(result, "model.safetensors", said, "resumes")
    assert root.fetched(MODEL) == set()

    hub.damage = lambda request, answer: answer
    assert fetch(root, hub).returncode == 0
    asked = [request.headers.get("range") for request in hub.double.seen(WEIGHTS)]
    assert [part for part in asked if part] == [f"bytes={sent[0]}-"]
    weights = root.path / "models" / "huggingface" / MODEL / "model.safetensors"
    assert weights.read_bytes() == whole


def test_wrong_bytes_are_refused_and_fetched_again(root, hub, tmp_path_factory):
    def corrupt(request: Request, answer: Answer) -> Answer:
        if request.path.endswith("/config.json") and request.method == "GET":
            answer.body = answer.body.replace(b"llama", b"lamma")
        return answer

    hub.damage = corrupt
    failed_with(fetch(root, hub), "config.json", "checksum")
    hub.damage = lambda request, answer: answer
    assert fetch(root, hub).returncode == 0
    config = root.path / "models" / "huggingface" / MODEL / "config.json"
    assert config.read_text().count("llama") == 1
    # The manifest's sha256 counts.
    other = Root(tmp_path_factory.mktemp("other"))
    other.add(MODEL, source="huggingface", address=REPO, files={"model.safetensors": "0" * 64})
    failed_with(fetch(other, hub), "model.safetensors", "checksum", "0" * 64)


def test_a_gated_repository_says_what_to_accept_and_where(root, hub):
    hub.token = "good"
    failed_with(fetch(root, hub), "gated", PAGE, "Test Licence", "HF_TOKEN")
    stranger = fetch(root, hub, HF_TOKEN="stranger")
    failed_with(stranger, "no access (403)", PAGE, "Test Licence")
    assert fetch(root, hub, HF_TOKEN="good").returncode == 0


REFUSED = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, REFUSED, ("refuses the token (401)", "HF_TOKEN")),
        (404, {"X-Error-Code": "RepoNotFound"}, ("no such repository", REPO)),
        (404, {"X-Error-Code": "RevisionNotFound"}, ("no revision", "manifest.yaml")),
        (503, {}, ("answered 503", "resumes")),
    ],
)
def test_other_answers_of_the_hub(root, status, headers, words):
    with serve(lambda request: Answer(status=status, headers=headers)) as double:
        environment = {"HF_ENDPOINT": double.url, "HF_HOME": str(root.path), "HF_TOKEN": "old"}
        failed_with(workshop(root, "models", "fetch", MODEL, **environment), *words)


def test_no_hub_at_all(root):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root.path)}
    failed_with(workshop(root, "models", "fetch", MODEL, **environment), "cannot be reached")
    environment |= {"HF_HUB_OFFLINE": "1"}
    failed_with(workshop(root, "models", "fetch", MODEL, **environment), "HF_HUB_OFFLINE is set")


def test_offline_uses_the_hubs_cache(root, hub, tmp_path_factory):
    assert fetch(root, hub).returncode == 0
    asked, home = len(hub.double.requests), root.path / "hf-home"

    def offline() -> tuple:
        other = Root(tmp_path_factory.mktemp("other"))
        other.add(MODEL, source="huggingface", address=REPO)
        return other, fetch(other, hub, HF_HUB_OFFLINE="1", HF_HOME=str(home))

    assert offline()[1].returncode == 0
    assert len(hub.double.requests) == asked
    next(home.rglob("snapshots/*/model.safetensors")).unlink()
    other, result = offline()
    failed_with(result, "only a part", "HF_HUB_OFFLINE")
    assert other.fetched(MODEL) == set()
