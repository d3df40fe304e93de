"""The API as its own client and curl see it."""

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import openai
import pytest
from fastapi.testclient import TestClient
from serve_samples import held, running, write_base, write_nemo, write_peft

from workshop_utils.adapters.export import export
from workshop_utils.inference.generate import generate, load
from workshop_utils.serving.server.app import create_app
from workshop_utils.serving.server.service import RequestLimits, Service

KEY = "secret-of-the-tests"
HELLO = [{"role": "user", "content": "Hello"}]
MODELS = ("tiny", "fused", "peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_base(folder / "tiny")
    write_peft(folder / "store" / "peft", 1)
    write_nemo(folder / "store" / "fused")
    return folder


@pytest.fixture(scope="module")
def service(folder):
    limits = RequestLimits(max_length=20000, max_batch=8, max_queue=8)
    return Service(folder / "tiny", folder / "store", limits, refresh=3600)


@pytest.fixture(scope="module")
def url(service):
    with running(service, KEY, max_body=100_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


USUAL = {"temperature": 0, "max_tokens": 10}


def chat(client, model="tiny", **options):
    return client.chat.completions.create(model=model, messages=HELLO, **USUAL | options)


def complete(client, prompt="Hello", model="tiny", **options):
    return client.completions.create(model=model, prompt=prompt, **USUAL | options)


def said(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models(client):
    assert [model.id for model in client.models.list()] == [*MODELS]
    assert client.models.retrieve("fused").parent == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../fused")


def test_answers_are_those_of_the_offline_path(client, folder, tmp_path):
    fused = export(folder / "store/fused/lora.nemo", "hf-peft", tmp_path / "hf")
    peft = {"tiny": None, "peft": folder / "store" / "peft", "fused": fused}
    expected = {
        name: generate(*load(folder / "tiny", adapter), [HELLO], 10, progress=False)[0]
        for name, adapter in peft.items()
    }
    assert {name: chat(client, name).choices[0].message.content for name in MODELS} == expected
    assert len(set(expected.values())) == 3


def test_chat_answer_and_usage(client):
    answer = chat(client)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    choice, usage = answer.choices[0], answer.usage
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert (usage.completion_tokens, usage.total_tokens) == (10, usage.prompt_tokens + 10)
    short = chat(client, max_tokens=openai.omit, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3


@pytest.mark.parametrize("model", MODELS)
def test_streams_say_the_same(client, model):
    whole = chat(client, model)
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert said(chunks) == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert ends == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    streamed = complete(client, model=model, stream=True)
    text = "".join(chunk.choices[0].text for chunk in streamed)
    assert text == complete(client, model=model).choices[0].text


def test_async_client(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            many = await asyncio.gather(*(chat(client, model) for model in MODELS))
            stream = await chat(client, stream=True)
            return many, said([chunk async for chunk in stream])

    many, streamed = asyncio.run(ask())
    texts = [answer.choices[0].message.content for answer in many]
    assert texts[0] == streamed
    assert len(set(texts)) == 3


def test_stop_of_a_stream_is_never_given_out(client):
    whole = complete(client, max_tokens=30).choices[0].text
    stop = whole[5:8]
    for given in (stop, [stop, "never"]):
        answer = complete(client, max_tokens=30, stop=given)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    streamed = list(complete(client, max_tokens=30, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]


def test_n_and_seed(client):
    def texts(**options):
        answer = complete(client, **{"temperature": 1, "seed": 3} | options)
        return [choice.text for choice in answer.choices]

    three = texts(n=3)
    assert len(set(three)) == 3
    assert texts(n=3) == three
    assert texts() == three[:1]
    assert texts(seed=4) != three[:1]
    streamed = ["", "", ""]
    for chunk in complete(client, temperature=1, seed=3, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == three


def test_prompts_of_every_form(client, service):
    one, two = (complete(client, prompt).choices[0].text for prompt in ("Hello", "there"))
    assert [choice.text for choice in complete(client, ["Hello", "there"]).choices] == [one, two]
    ids = [service.prompt(text) for text in ("Hello", "there")]
    assert complete(client, ids[0]).choices[0].text == one
    several = complete(client, ids, n=2, echo=True)
    assert [choice.text for choice in several.choices] == [f"Hello{one}"] * 2 + [f"there{two}"] * 2
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.completion_tokens == 40


def test_logprobs_of_both_apis(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 10
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
        assert len(token.top_logprobs) == 3
    streamed = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, stream=True)]
    assert sum(len(part.content) for part in streamed if part) == 10
    assert chat(client).choices[0].logprobs is None
    answer = complete(client, logprobs=2).choices[0]
    told = answer.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 10
    # Two tokens may look the same.
    assert all(1 <= len(top) <= 2 for top in told.top_logprobs)
    assert "".join(told.tokens) == answer.text or "\ufffd" in answer.text
    assert told.text_offset[0] == 0


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"top_k": 4}, "top_k", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 30000}]},
            "messages",
            "context_length_exceeded",
        ),
        ({"max_tokens": 20000}, "messages", "context_length_exceeded"),
        ({"messages": None}, "messages", "missing_required_parameter"),
    ],
)
def test_refusals_name_the_parameter(url, change, param, code):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3} | change
    status, answer, _ = post(url, body)
    fault = answer["error"]
    found = status, fault["param"], fault["code"], fault["type"]
    assert found == (400, param, code, "invalid_request_error")
    named = (param.split(".")[0], "tokens in all", "texts in one request")
    assert any(words in fault["message"] for words in named)


NOTHING = [
    *("tool_choice", "none"), *("tool_choice", "auto"), *("parallel_tool_calls", True),
    *("parallel_tool_calls", False), *("metadata", {}), *("top_k", -1), *("top_k", 0),
    *("repetition_penalty", 1.0), *("n", 1), *("logprobs", False), *("top_logprobs", 0),
    *("stream_options", {}), *("stream_options", {"include_usage": False}), *("store", False),
    *("user", "me"), *("safety_identifier", "me"), *("prompt_cache_key", "k"), *("tools", None),
    *("functions", []), *("function_call", "none"), *("service_tier", "default"), *("min_p", 0.0),
    *("modalities", ["text"]), *("ignore_eos", False), *("skip_special_tokens", True),
    *("stop_token_ids", []), *("stop", []), *("echo", False), *("chat_template_kwargs", {}),
    *("min_tokens", 0), *("length_penalty", 1), *("verbosity", "medium"), *("seed", None),
]  # fmt: skip
NOTHING = list(zip(NOTHING[::2], NOTHING[1::2], strict=True))


def test_a_field_that_asks_for_nothing_changes_nothing(url):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0}
    _, plain, _ = post(url, body)
    for name, value in NOTHING:
        status, answer, _ = post(url, body | {name: value})
        assert status == 200, (name, value, answer)
        assert answer["choices"] == plain["choices"], name
    status, answer, _ = post(url, body | dict(NOTHING))
    assert status == 200 and answer["choices"] == plain["choices"]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0}
    for name, value in NOTHING:
        if name not in ("top_logprobs",):
            assert post(url, body | {name: value}, path="/v1/completions")[0] == 200, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("repetition_penalty", 1.1),
        ("top_k", 40),
        ("min_p", 0.1),
        ("ignore_eos", True),
        ("modalities", ["text", "audio"]),
        ("response_format", {"type": "json_schema"}),
        ("reasoning_effort", "high"),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("best_of", True),
        ("no_such_field", 1),
        ("stream_options", {"include_obfuscation": True}),
    ],
)
def test_a_field_that_asks_for_what_is_not_served_is_named(url, name, value):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, name: value}
    status, answer, _ = post(url, body)
    param = next(iter(value)) if name == "stream_options" else name
    assert (status, answer["error"]["param"]) == (400, param)
    assert param in answer["error"]["message"]


def test_a_conversation_sent_back_by_a_client(url):
    """With the fields that an answer has, and OpenAI's newer name of the system's role."""
    back = {"role": "assistant", "content": "b", "refusal": None, "annotations": []}
    back |= {"tool_calls": [], "function_call": None, "audio": None}
    turns = [{"role": "user", "content": "a"}, back, {"role": "user", "content": "c"}]
    body = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    answers = [
        post(url, body | {"messages": [{"role": role, "content": "s"}, *turns]})
        for role in ("developer", "system")
    ]
    assert [status for status, *_ in answers] == [200, 200]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]


def test_options_that_ask_for_nothing_are_taken(url):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "response_format": {"type": "text"},
        "user": "me",
        "seed": None,
        "stop": None,
    }
    part = {"type": "text", "text": "Hello"}
    neutral["messages"] = [{"role": "user", "content": [part], "name": None}]
    assert post(url, {"model": "tiny", "max_tokens": 2} | neutral)[0] == 200


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 50000, b"", b'{"model": "\\ud800"}']
)
def test_bodies_that_are_no_request(url, body):
    status, answer, _ = post(url, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [999999]},
        {"prompt": [-1]},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": {}},
        {"echo": True, "logprobs": 1},
        {"best_of": 3},
        {"suffix": "x"},
        {"prompt": ["a"] * 9},
        {"prompt": "\ud800"},
    ],
)
def test_completions_that_are_refused(url, change):
    status, answer, _ = post(url, {"model": "tiny", "prompt": "x"} | change, path="/v1/completions")
    assert status == 400
    assert answer["error"]["message"]


PATHS = ("../store/peft", "peft/../peft", "/etc/passwd", "", "peft\x00")


@pytest.mark.parametrize("name", ["unknown", "__base__", "version1", *PATHS])
def test_unknown_models(url, name):
    status, answer, _ = post(url, {"model": name, "messages": HELLO})
    fault = answer["error"]
    assert (status, fault["code"], fault["param"]) == (404, "model_not_found", "model")


@pytest.fixture
def touched(monkeypatch):
    """Names that the file system is asked for while ``touched.on`` is set, by any thread: by events
    of Python, and where it raises none."""

    class Touched(list):
        on = False

        def take(self, *values) -> None:
            kinds = str, bytes, os.PathLike
            self.extend(os.fsdecode(value) for value in values if isinstance(value, kinds))

    names = Touched()

    def hook(event: str, values: tuple) -> None:
        # Those of http.client have the request that the test sends.
        if names.on and not event.startswith(("http.client", "socket")):
            names.take(event, *values)

    def watched(function):
        def asked(path, *rest, **more):
            if names.on:
                names.take(path)
            return function(path, *rest, **more)

        return asked

    sys.addaudithook(hook)  # it cannot be taken away again
    for name in ("stat", "lstat", "access", "readlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    yield names
    names.on = False


def test_no_word_of_a_request_reaches_the_file_system(url, folder, touched):
    word = "canary-of-this-test"
    touched.on = True
    Path(f"/tmp/{word}/stat").exists()
    with pytest.raises(OSError, match=word):
        Path(f"{word}/open").read_text()
    assert {f"/tmp/{word}/stat", f"{word}/open"} <= set(touched)  # it sees what it is to see
    touched.clear()
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = (word, f"../{word}", f"/etc/{word}", f"{folder}/store/{word}", f"peft/../{word}")
    for name in (*paths, f"~/{word}", f"file:///{word}", f"{word}\x00"):
        assert post(url, {"model": name, "messages": HELLO})[0] == 404
        assert post(url, {"model": name, "prompt": name}, path="/v1/completions")[0] == 404
        assert request(url, "GET", f"/v1/models/{quote(name, safe='')}", None, headers)[0] == 404
        assert request(url, "GET", f"/{quote(name)}", None, headers)[0] == 404
        more = {"stop": name, "user": name, "max_tokens": 2}
        turns = [{"role": "user", "content": name, "name": word}]
        for model in MODELS:
            assert post(url, {"model": model, "messages": turns, **more})[0] in (200, 400)
            body = {"model": model, "prompt": name, **more}
            assert post(url, body, path="/v1/completions")[0] == 200
    touched.on = False
    assert not [name for name in touched if word in name or str(folder) in name]


def test_other_routes(url):
    assert post(url, {}, path="/v1/embeddings")[0] == 404
    assert post(url, {}, path="/v1/models")[0] == 405


def test_key(url):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        status, answer, _ = post(url, {"model": "tiny", "messages": HELLO}, headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert KEY not in json.dumps(answer)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert request(url, "GET", "/v1/health/ready", None, {})[0] == 200


def test_body_too_large(url):
    assert post(url, b" " * 100_001)[0] == 413
    parts, headers = iter([b" " * 60_000] * 2), {"Authorization": f"Bearer {KEY}"}
    status, answer, _ = request(url, "POST", "/v1/completions", parts, headers)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_busy(client, service):
    with held(service.engine):
        waiting = [ThreadPoolExecutor(1).submit(chat, client) for _ in range(8)]
        deadline(lambda: len(service.engine._waiting) == 8)
        with pytest.raises(openai.RateLimitError) as refused:
            chat(client)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["Retry-After"] == "1"
    assert len({thread.result().choices[0].message.content for thread in waiting}) == 1


def test_loading(folder):
    with TestClient(create_app(Service(folder / "tiny", folder / "store"))) as unloaded:
        assert unloaded.get("/v1/health/live").status_code == 200
        for answer in (
            unloaded.get("/v1/health/ready"),
            unloaded.get("/v1/models"),
            unloaded.post("/v1/completions", json={"model": "tiny", "prompt": "x"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_stops_its_request(url, service, stream):
    asked = {"model": "peft", "messages": HELLO, "temperature": 0, "max_tokens": 19000}
    body = json.dumps(asked | {"stream": stream})
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            f"{KEY}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        deadline(lambda: service.engine._running)
        row = service.engine._running[0].row
        if stream:
            assert b"200 OK" in connection.recv(100)
    deadline(lambda: not service.engine._running)
    assert row.cancelled and len(row.tokens) < 19000


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url):
    def curl(path, *options):
        command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", "-H"]
        command += [f"Authorization: Bearer {KEY}", *options, f"{url}{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert [model["id"] for model in json.loads(curl("/v1/models"))["data"]] == [*MODELS]
    body = {"model": "peft", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    send = "-H", "Content-Type: application/json", "-d"
    path = "/v1/chat/completions"
    text = json.loads(curl(path, *send, json.dumps(body)))["choices"][0]["message"]["content"]
    streamed = curl(path, "--no-buffer", *send, json.dumps(body | {"stream": True}))
    *events, done = re.findall(r"^data: (.*)\n\n", streamed, re.MULTILINE)
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert ("".join(deltas), done) == (text, "[DONE]")
    untyped = json.loads(curl(path, "-d", json.dumps(body)))
    assert "Content-Type: application/json" in untyped["error"]["message"]


def request(url, method, path, body, headers):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers


def post(url, body, headers=None, path="/v1/chat/completions"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
    return request(url, "POST", path, content, headers)


def deadline(true, seconds=30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
