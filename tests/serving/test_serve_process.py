"""The command and the server in the background: start, stop, and every way not to start."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import openai
import pytest
from serve_samples import write_base, write_peft
from tiny_model import write_sharded

from workshop_utils.cli import main
from workshop_utils.core.errors import CheckpointError, NotACheckpoint, WorkshopError
from workshop_utils.serving.server import engine, start
from workshop_utils.serving.server.service import Service


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    write_base(folder / "tiny")
    write_peft(folder / "store" / "one", 1)
    return folder


def test_background_server(folder, monkeypatch):
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    options = {"api_key": "secret", "refresh": 0.2, "max_batch": 4}
    with start(folder / "tiny", folder / "store", **options) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert [model.id for model in client.models.list()] == ["tiny", "one"]
            write_peft(folder / "store" / "two", 2)
            until = time.monotonic() + 30
            while "two" not in [model.id for model in client.models.list()]:
                assert time.monotonic() < until
                time.sleep(0.1)
            answer = client.completions.create(model="two", prompt="x", max_tokens=3)
            assert answer.usage.completion_tokens == 3
        command = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert server.process.returncode == 0
    log = server.log.read_text()
    assert "secret" not in log + command
    assert log.splitlines()[-1] == "stopped"
    assert "GOMP_SPINCOUNT = '0'" in log  # OpenMP's own words
    server.stop()


@pytest.mark.slow
def test_ends_with_its_parent(folder):
    script = (
        "from workshop_utils.serving.server import start\ns = "
        f"start({str(folder / 'tiny')!r})\nprint(s.process.pid, s.url, flush=True)\nimport time; "
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid, url = parent.stdout.readline().split()
    assert urllib.request.urlopen(f"{url}/v1/health/live").status == 200
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and "Z" not in stat.read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_gracefully(folder, number):
    """Also while it answers: the one who waits gets an error and not half an answer."""
    with (
        start(folder / "tiny", max_length=30000) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        long = {"temperature": 0, "max_tokens": 29000, "stream": True}
        stream = client.completions.create(model="tiny", prompt="x", **long)
        next(stream)
        server.process.send_signal(number)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        assert server.process.wait(30) == 0
    log = server.log.read_text()
    assert log.splitlines()[-1] == "stopped"
    assert "Traceback" not in log


@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_while_it_loads(folder, monkeypatch, moment):
    """Whichever comes first, the engine's thread ends: else the process would not."""
    service = Service(folder / "tiny", folder / "store")
    made = []

    class Engine(engine.Engine):
        def __init__(self, *words):
            service.close() if moment == "before" else None
            super().__init__(*words)
            made.append(self)
            service.close() if moment == "after" else None

    monkeypatch.setattr(engine, "Engine", Engine)
    service.load()
    made[0].thread.result(10)
    assert not service.ready


def test_an_empty_key_is_no_key(folder, capsys):
    assert main(["serve", "--base", str(folder / "tiny"), "--api-key", ""]) == 1
    assert "--api-key is empty" in capsys.readouterr().err


def test_port_in_use(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--base", str(folder / "tiny"), "--port", port]) == 1
    said = f"cannot listen on 127.0.0.1:{port}: Address already in use. Stop the program"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("host", ["256.1.1.1", "no.such.host.invalid", "8.8.8.8"])
def test_addresses_that_are_not_ours(folder, host, capsys):
    assert main(["serve", "--base", str(folder / "tiny"), "--host", host, "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on {host}:0" in error
    assert ("anybody there can use this server" in error) == (host != "127.0.0.1")


def test_the_id_of_the_base_is_what_its_directory_is_called(folder, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(folder / "tiny")
    assert Service(tmp_path / "linked").name == "linked"
    monkeypatch.chdir(folder / "tiny")
    assert Service(".").name == "tiny"


def test_wrong_bases(folder, tmp_path):
    (tmp_path / "nemo2" / "context").mkdir(parents=True)
    (tmp_path / "nemo2" / "context" / "model.yaml").write_text("config: {}\n")
    (tmp_path / "nemo2" / "context" / "io.json").write_text("{}")
    write_sharded(tmp_path / "nemo2" / "weights")
    with pytest.raises(CheckpointError):
        Service(folder)
    for words, said in (
        ([tmp_path / "nemo2"], "NeMo 2.0 directory; .* workshop import .* --to-huggingface"),
        ([folder / "store" / "one"], "put it into the store"),
        (["no-such-model"], "workshop models fetch"),
        ([folder / "tiny", tmp_path / "no-store"], "mkdir -p"),
    ):
        with pytest.raises(NotACheckpoint, match=said):
            Service(*words)


def test_damaged_base_ends_the_server_with_the_reason(folder, tmp_path):
    weights = write_base(tmp_path / "broken") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    said = "(?s)the server ended. It wrote:.*error: .*model.safetensors"
    with pytest.raises(WorkshopError, match=said):
        start(tmp_path / "broken")


def test_limits_are_positive(folder, capsys):
    for name in ("refresh", "max-length", "max-batch", "max-queue", "max-body", "max-rank"):
        assert main(["serve", "--base", str(folder / "tiny"), f"--{name}", "0"]) == 1
        assert f"--{name} is 0" in capsys.readouterr().err
