"""What is said about a proxy when a download has failed. Nothing listens on port 9."""

import os
import socket

import pytest
from http_double import FOREIGN, Answer, Root, failed_with, serve, workshop

from workshop_utils.checkpoints.sources import proxy

SECRET = "hunter:2@x"
DEAD = f"http://me:{SECRET}@127.0.0.1:9"


@pytest.fixture
def clean(monkeypatch):
    for name in [name for name in os.environ if FOREIGN.search(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return monkeypatch


DIED = "was used and does not answer"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_variable_and_the_proxy_are_named_and_no_password(clean, name):
    clean.setenv(name, DEAD)
    said = proxy.of_environment("https://hub.invalid", "")
    assert said.startswith(f" The proxy http://127.0.0.1:9 of {name} {DIED} (Connection refused)")
    assert SECRET not in said


def test_the_one_that_is_used_is_named(clean):
    clean.setenv("http_proxy", "http://127.0.0.1:8")
    clean.setenv("ALL_PROXY", "socks5h://me:secret@127.0.0.1:9")
    assert "http://127.0.0.1:8 of http_proxy" in proxy.of_environment("http://hub.invalid", "")
    assert " socks5h://127.0.0.1:9 of ALL_PROXY" in proxy.of_environment("https://hub.invalid", "")
    clean.setenv("NO_PROXY", ".invalid")
    assert proxy.of_environment("https://hub.invalid", "") == ""


@pytest.mark.parametrize(
    "value, words",
    [
        ("http://", "no address"),
        ("http://me:secret@[", "no address"),
        ("http://me:secret@proxy:port", "no address"),
        ("me:secret@127.0.0.1:9", " The proxy 127.0.0.1:9 of HTTPS_PROXY"),
    ],
)
def test_what_is_no_address_or_has_no_scheme(clean, value, words):
    clean.setenv("HTTPS_PROXY", value)
    said = proxy.of_environment("https://hub.invalid", "")
    assert words in said and "HTTPS_PROXY" in said and "secret" not in said


def test_one_that_answers_says_what(clean):
    answer = "407 Proxy Authentication Required"
    refused = f"ProxyError('Cannot connect.', OSError('Tunnel connection failed: {answer}'))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        clean.setenv("HTTPS_PROXY", address)
        for printed, more in ((refused, f" and answered: {answer}"), ("reset", "")):
            said = proxy.of_environment("https://hub.invalid", printed)
            assert said == f" The proxy {address} of HTTPS_PROXY was used{more}."


def test_pips_own_setting_comes_first(clean, tmp_path):
    clean.setenv("HTTPS_PROXY", "http://127.0.0.1:8")
    printed = "Could not fetch URL https://index.invalid/simple/x/: connection error"
    assert "http://127.0.0.1:8 of HTTPS_PROXY" in proxy.of_pip(printed)
    (tmp_path / "pip.conf").write_text(f"[global]\nproxy = {DEAD}\n")
    clean.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert "The proxy http://127.0.0.1:9 of pip's setting global.proxy" in proxy.of_pip("")
    clean.setenv("PIP_PROXY", "http://127.0.0.1:7")
    assert "The proxy http://127.0.0.1:7 of PIP_PROXY" in proxy.of_pip("")


@pytest.fixture
def root(tmp_path):
    root = Root(tmp_path)
    files = {"tiny_gguf-1.0-py3-none-any.whl": "0" * 64}
    root.add("wheel", source="pypi", address="tiny-gguf==1.0", files=files)
    root.add("hub", source="huggingface", address="maker/tiny")
    root.add("ngc", source="ngc", address="nvidia/nemo/tiny:2.0", gated=True, format="nemo2")
    return root


INDEX = {"PIP_INDEX_URL": "https://index.invalid/simple", "PIP_RETRIES": "0"}
HUB = {"HF_ENDPOINT": "https://hub.invalid"}
NGC = INDEX | {"NGC_API_KEY": "x", "PATH": os.defpath}
NO_ADDRESS = "HTTPS_PROXY names the proxy"
WHEEL = "the package index cannot be reached"


@pytest.mark.parametrize(
    "model, environment, value, words",
    [
        ("wheel", INDEX, DEAD, (WHEEL, f"http://127.0.0.1:9 of HTTPS_PROXY {DIED}")),
        ("hub", HUB, DEAD, ("maker/tiny", f"of HTTPS_PROXY {DIED}")),
        ("hub", HUB, "socks5://me:secret@127.0.0.1:9", ("maker/tiny", f"of HTTPS_PROXY {DIED}")),
        ("hub", HUB, "http://me:secret@[", ("maker/tiny", NO_ADDRESS)),
        ("ngc", NGC, DEAD, ("cannot be installed for the NGC client", f"HTTPS_PROXY {DIED}")),
    ],
)
def test_a_download_through_a_dead_proxy(root, model, environment, value, words):
    environment = environment | {"HTTPS_PROXY": value}
    result = workshop(root, "models", "fetch", model, "--quiet", **environment)
    failed_with(result, *words)
    assert SECRET not in result.stderr and "secret" not in result.stderr


def test_a_proxy_that_refuses(root):
    with serve(lambda request: Answer(status=403)) as double:  # it knows no CONNECT
        environment = HUB | {"HTTPS_PROXY": double.url}
        result = workshop(root, "models", "fetch", "hub", "--quiet", **environment)
    failed_with(result, f"The proxy {double.url} of HTTPS_PROXY was used and answered: 501")
