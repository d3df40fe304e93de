"""A served model is asked and scored as the same model is here, and what a server refuses is said
in words."""

import json
import socket

import pytest
from serve_samples import running, write_base, write_peft
from test_evaluate import TEST

from workshop_utils.cli import main
from workshop_utils.core.errors import GenerationFailed
from workshop_utils.inference import evaluate
from workshop_utils.inference.client import KEY as KEY_VARIABLE
from workshop_utils.inference.client import URL, Timing, answers, connect, stream
from workshop_utils.inference.generate import generate, load
from workshop_utils.serving.server.service import RequestLimits, Service

KEY = "learning"
TURNS = [row["messages"] for row in TEST]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_base(folder / "tiny")
    write_peft(folder / "store" / "one", 1)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEST))
    return folder


@pytest.fixture(scope="module")
def url(folder):
    limits = RequestLimits(max_length=400)
    with running(Service(folder / "tiny", folder / "store", limits), KEY) as url:
        yield url


@pytest.fixture
def client(url):
    return connect(url, KEY)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    for name in (URL, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("adapter", [None, "one"])
def test_the_served_answers_are_those_of_the_model_here(folder, client, adapter):
    peft = folder / "store" / adapter if adapter else None
    here = generate(*load(folder / "tiny", peft), TURNS, 12, progress=False)
    assert answers(client, adapter or "tiny", TURNS, 12, concurrency=3, progress=False) == here
    assert len(set(here)) > 1


def test_the_scores_are_those_of_the_evaluation_here(folder, url, root):
    test = folder / "test.jsonl"
    data = test, test, root / "a", ["adapter"]
    one = folder / "store" / "one"
    here = evaluate.evaluate(folder / "tiny", one, *data, max_new_tokens=12)
    there = evaluate.evaluate_served(url, "one", test, root / "b", max_new_tokens=12, api_key=KEY)
    assert there.scores["served"] == here.scores["adapter"]
    assert there.predictions("served") == here.predictions("adapter")
    (entry,) = json.loads((root / "b" / "scores.json").read_text())["variants"].values()
    assert entry["model"] == "one"
    assert KEY not in (root / "b" / "scores.json").read_text()


def test_a_stream_is_the_answer_and_is_measured(client):
    timing = stream(client, "one", TURNS[0][:1], 12)
    assert timing.text == answers(client, "one", TURNS[:1], 12, progress=False)[0]
    assert timing.tokens == 12
    assert 0 < timing.first <= timing.total
    assert timing.rate > 0
    assert Timing("", 1, 1, 1).rate == 0


def test_the_command(folder, url, root, monkeypatch, capsys):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    data = f"--data {folder / 'test.jsonl'} --limit 2"
    words = f"evaluate --url {url}/v1/ --model-id one {data}".split()
    assert main(words) == 0
    assert "served" in capsys.readouterr().out
    out = root / "runs" / "evaluation" / "served-one-first-2"
    assert (out / "scores.png").exists()
    assert len((out / "served" / "predictions.jsonl").read_text().splitlines()) == 2
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["served"]["rows"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "two"}, "no model 'two'.*It serves tiny, one"),
        ({"api_key": "wrong"}, "refuses the key.*WORKSHOP_API_KEY"),
        (
            {"conversations": [[{"role": "user", "content": "on and on " * 400}]]},
            "answered 400:.*400 tokens",
        ),
        ({"url": "/elsewhere"}, "has to end in /v1"),
    ],
)
def test_a_refusal_is_explained(url, change, said):
    options = {"url": "", "api_key": KEY, "model": "one", "conversations": TURNS[:1]} | change
    client = connect(url + options["url"], options["api_key"])
    with pytest.raises(GenerationFailed, match=said):
        answers(client, options["model"], options["conversations"], 4, progress=False)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = connect(f"http://127.0.0.1:{free.getsockname()[1]}").with_options(max_retries=0)
        said = "no answer from http://127.*Is the server started"
        with pytest.raises(GenerationFailed, match=said):
            answers(client, "a", TURNS[:1], progress=False)


@pytest.mark.parametrize(
    "words",
    [
        "--url http://x",
        "--model-id a",
        "--url x:1 --model-id a",
        "--url http://x --model-id a --adapter b",
    ],
)
def test_options_that_do_not_go_together_are_named(words, capsys):
    assert main(["evaluate", *words.split()]) == 1
    assert "--url" in capsys.readouterr().err
