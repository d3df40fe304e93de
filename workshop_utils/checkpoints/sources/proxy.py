"""The proxy that a failed download went through, as a sentence for its error. Names and passwords
in a proxy's URL are not shown."""

import ast
import os
import re
import socket
import subprocess
import sys
from urllib.parse import urlsplit

PATIENCE = 3  # seconds that a proxy has to take a connection
PORTS = {"http": 80, "https": 443}
SOCKS_PORT = 1080


def of_environment(url: str, said: str) -> str:
    """For a client that takes its proxy from the environment and failed at ``url`` with the words
    ``said``; empty without a proxy."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return ""
    names = (f"{urlsplit(url).scheme}_proxy", "all_proxy")
    # The order of Python's urllib: lower case first.
    set_here = (
        name
        for name in sorted(os.environ, reverse=True)
        if name.lower() in names and os.environ[name] == proxy
    )
    return _sentence(proxy, next(set_here, "this system"), said)


def of_pip(said: str) -> str:
    """For pip, which printed ``said``, and may have a proxy in its own configuration."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    own = {
        section: ast.literal_eval(value)
        for section, value in re.findall(r"^(\S+)\.proxy=(.+)$", listed, re.MULTILINE)
    }
    for section in (":env:", "download", "global"):
        if own.get(section):
            origin = "PIP_PROXY" if section == ":env:" else f"pip's setting {section}.proxy"
            return _sentence(own[section], origin, said)
    url = re.search(r"Could not fetch URL (\S+):", said) or re.search(r"(https?://\S+)", said)
    return of_environment(url[1] if url else "https://package.index", said)


def without_credentials(text: str) -> str:
    """``text`` without the user names and passwords of the URLs in it."""
    return re.sub(r"(\w://)\S*@|(\w://)[^\s/@]*:[^\s/@]*(?=\[)", r"\1\2", text)


def _sentence(proxy: str, origin: str, said: str) -> str:
    shown = re.sub(r"^((?:\w+:)?//)?.*@", r"\1", proxy)
    try:
        parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        place = parts.hostname, parts.port or PORTS.get(parts.scheme, SOCKS_PORT)
        if not parts.hostname:
            raise ValueError
        socket.create_connection(place, timeout=PATIENCE).close()
    except ValueError:
        return (
            f" {origin} names the proxy {shown!r}, which is no address: write http://HOST:PORT, "
            "or unset it."
        )
    except OSError as error:
        reason = error.strerror or error
        return (
            f" The proxy {shown} of {origin} was used and does not answer ({reason}): start it, "
            f"or correct or unset {origin}."
        )
    answer = re.search(r"Tunnel connection failed: (\d+[^')\"]*)", said)
    return (
        f" The proxy {shown} of {origin} was "
        f"used{f' and answered: {answer[1].strip()}' if answer else ''}."
    )
