"""A small HTTP server on 127.0.0.1 for tests, and the ``workshop`` command run against it in a
process of its own.

The clients under test (pip, huggingface_hub, ngcsdk) are the real ones: only the far end of the
wire is ours.
"""

import contextlib
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
# Settings of the person or the machine that would lead a client elsewhere.
FOREIGN = re.compile(
    r"(?i)^(pip|hf|huggingface|ngc)_|_proxy$|^(requests_ca_bundle|curl_ca_bundle|ssl_cert_file)$"
)


@dataclass
class Answer:
    """One response. ``cut`` closes the connection after that many bytes of a body that was
    announced longer."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Double:
    """A running server: its URL and every request it has seen."""

    url: str
    requests: list[Request]

    def seen(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path.split("?")[0] == path]


@contextlib.contextmanager
def serve(
    answer: Callable[[Request], Answer], tls: ssl.SSLContext | None = None
) -> Iterator[Double]:
    """Serve ``answer`` on a free port until the block ends. Range requests are cut out of the body
    here."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            requests.append(request)
            response = _ranged(request, answer(request))
            self.send_response(response.status)
            length = {"Content-Length": str(len(response.body))}
            for name, value in (length | response.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if request.method != "HEAD":
                self.wfile.write(response.body[: response.cut])
            if response.cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = _handle

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Double(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", requests)
    finally:
        server.shutdown()
        server.server_close()


def _ranged(request: Request, response: Answer) -> Answer:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked or response.status != 200:
        return response
    size = len(response.body)
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
    headers = response.headers | {"Content-Range": f"bytes {start}-{end}/{size}"}
    return Answer(response.body[start : end + 1], 206, headers, response.cut)


@dataclass
class Root:
    """A workshop root with a manifest of its own."""

    path: Path

    def add(self, name: str, **entry) -> None:
        manifest = self.path / "models" / "manifest.yaml"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        usual = {
            "description": "a test model",
            "parameters": 1,
            "revision": None,
            "size": 1,
            "licence": "Test Licence",
            "licence_url": "https://example.org/licence",
            "gated": False,
            "format": "huggingface",
            "files": {},
        }
        with manifest.open("a") as file:
            yaml.safe_dump({name: usual | entry}, file)

    def leftovers(self) -> list[str]:
        """Names of hidden files and directories in models/: staging that should be gone."""
        hidden = {file.name for file in (self.path / "models").rglob(".*")} - {".ngc-client"}
        return sorted(name for name in hidden if not name.endswith(".lock"))

    def fetched(self, name: str, folder: str = "huggingface") -> set[str]:
        """The files of the model ``name``."""
        directory = self.path / "models" / folder / name
        files = (file for file in directory.rglob("*") if file.is_file())
        return {str(file.relative_to(directory)) for file in files}


def workshop(root: Root, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``workshop ARGUMENTS`` in ``root``; ``environment`` is added to one without foreign
    settings."""
    clean = {name: value for name, value in os.environ.items() if not FOREIGN.search(name)}
    clean |= {"WORKSHOP_ROOT": str(root.path), "PYTHONPATH": str(REPOSITORY)}
    clean |= {"HOME": str(root.path), "PIP_CONFIG_FILE": os.devnull, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "workshop_utils", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 240, "check": False}
    return subprocess.run(command, env=clean | environment, **options)


def succeeded_with(result: subprocess.CompletedProcess, printed: str) -> None:
    """Assert that nothing but ``printed`` was said."""
    said = result.returncode, result.stdout, result.stderr
    assert said == (0, f"{printed}\n", "")


def failed_with(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert an error of one sentence that holds ``words``, without a traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    for word in words:
        assert word in result.stderr, f"{word!r} is not in {result.stderr!r}"
