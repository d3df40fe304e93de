"""The server as a process: load, listen, stop; and the same in the background of a notebook."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from workshop_utils import orphans
from workshop_utils.errors import NotACheckpoint, WorkshopError
from workshop_utils.paths import shown

if TYPE_CHECKING:
    from workshop_utils.serve.engine import Engine, Row

API_KEY = "WORKSHOP_API_KEY"
_LISTENING = "listening on "
_GRACE = 5
"""Seconds that what is under way has to finish when the server is stopped."""


@dataclass(frozen=True)
class Limits:
    """What the server takes on. ``max_length``: tokens of prompt and answer together; ``max_batch``: texts at once in one batch, and
    in one request; ``max_queue``: texts that wait; ``max_body``: bytes of a request; ``max_rank``: rank of an adapter (None: any)."""

    max_length: int = 2048
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 1 << 20
    max_rank: int | None = None


class Service:
    """A base and the adapters of a store. Loading happens in :meth:`load`, in a thread of its own; :attr:`ready` says when it is done.

    Raises:
        NotACheckpoint: ``base`` is no Hugging Face model directory, or ``store`` no directory; the message says what to do.
    """

    def __init__(
        self,
        base: Path | str,
        store: Path | str | None = None,
        limits: Limits | None = None,
        refresh: float = 5,
        trust: bool = False,
    ):
        self.base, self.store = _base_directory(Path(base)), Path(store) if store else None
        if self.store and not self.store.is_dir():
            raise NotACheckpoint(
                f"{shown(self.store)} is no directory: make it (mkdir -p), and put each adapter in a directory of its own there."
            )
        # As the directory is called here, which may be a link: one into the cache of Hugging Face leads to a hash.
        self.name = Path(os.path.abspath(self.base)).name
        self.limits, self._refresh, self._trust = limits or Limits(), refresh, trust
        self.max_length, self.max_batch = self.limits.max_length, self.limits.max_batch
        self.engine: Engine | None = None
        self.ready = self._closed = False
        self._store = None
        self._created = int(time.time())

    def load(self) -> None:
        """Load the base and the adapters. Errors as :func:`workshop_utils.generate.load`."""
        from workshop_utils.generate import load
        from workshop_utils.serve.adapters import Store
        from workshop_utils.serve.engine import Engine

        model, self._tokenizer = load(self.base, trust=self._trust)
        self.max_length = min(
            self.limits.max_length, getattr(model.config, "max_position_embeddings", None) or self.limits.max_length
        )
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self.engine = Engine(model, self._tokenizer, self.max_batch, self.limits.max_queue)
        if self._closed:
            self.engine.close()
            return
        if self.store:
            self._store = Store(self.store, self.engine, self.name, self._trust, self.limits.max_rank, say=lambda line: print(line, flush=True))
            self._store.refresh()
            threading.Thread(target=self._store.watch, args=(self._refresh,), daemon=True).start()
        self.ready = not self._closed
        print(f"ready: {', '.join([self.name, *self.engine.adapters])}", flush=True)

    def close(self, grace: float = 0) -> None:
        """Take on nothing new, and stop the engine; what is under way after ``grace`` seconds ends with an error."""
        self.ready, self._closed = False, True
        if self._store:
            self._store.stop()
        if self.engine:
            self.engine.close(grace)

    def models(self) -> list[dict]:
        """The base and every adapter, as ``/v1/models`` lists them."""
        about = {
            "object": "model",
            "created": self._created,
            "owned_by": "workshop",
            "root": self.name,
            "max_model_len": self.max_length,
        }
        return [
            about | {"id": self.name, "parent": None},
            *(about | {"id": name, "parent": self.name} for name in self.engine.adapters),
        ]

    def chat_prompt(self, turns: list[dict]) -> list[int]:
        """Token ids of a conversation. Raises ``ValueError`` when the chat template refuses it."""
        import jinja2

        from workshop_utils.generate import prompt_ids

        try:
            return prompt_ids(self._tokenizer, turns)
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template refuses the conversation: {error}") from None

    def prompt(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt. Raises ``ValueError`` when it is empty or no id of this model."""
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        if not ids:
            raise ValueError("The prompt is empty.")
        if max(ids) >= self._vocabulary:
            raise ValueError(f"The prompt has the token id {max(ids)}; the model has {self._vocabulary}.")
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def submit(self, rows: list[Row], model: str) -> None:
        """See :meth:`workshop_utils.serve.engine.Engine.submit`; ``model`` is the base's id or an adapter's name."""
        self.engine.submit(rows, None if model == self.name else model)


def _base_directory(base: Path) -> Path:
    from workshop_utils.formats.identify import identify
    from workshop_utils.formats.summary import Kind
    from workshop_utils.generate import model_directory

    if not base.exists() or (base / "config.json").is_file():
        return model_directory(base)
    kind = identify(base).kind
    fix = {
        Kind.NEMO2: f"convert it: workshop import {shown(base)} --to-huggingface",
        Kind.PEFT: "put it into the store, and give its base as --base",
    }
    raise NotACheckpoint(
        f"{shown(base)} is a {kind}; the server needs a Hugging Face model directory: {fix.get(kind, 'give one as --base')}."
    )


def run(service: Service, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM. Port 0: any free one, which is printed.

    Raises:
        WorkshopError: the address cannot be had, or the base not be loaded.
    """
    listener = _listen(host, port)
    import signal

    import uvicorn

    from workshop_utils.serve.app import create_app

    app = create_app(service, api_key, service.limits.max_body)

    class Server(uvicorn.Server):
        """Closes the service when it stops."""
        async def shutdown(self, sockets=None) -> None:
            """End the engine while there are clients to hear of it, then the connections."""
            await asyncio.to_thread(service.close, _GRACE)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE))
    print(
        f"{_LISTENING}http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}  (/v1/health/ready says when the model is loaded)",
        flush=True,
    )
    loading = ThreadPoolExecutor(1).submit(service.load)
    loading.add_done_callback(lambda done: _stop_after_failure(done, server, service))
    # uvicorn hands the signal on when it has stopped. That is the wanted end, not an error.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
    if loading.done():
        loading.result()
        service.engine.thread.result()
    print("stopped", flush=True)
    if not loading.done():
        os._exit(0)  # Python would wait for the thread that loads


def _stop_after_failure(done: Future, server, service: Service) -> None:
    """A server without a model, or whose engine has ended, is of no use."""

    def end(_: Future) -> None:
        """Answer no more requests, and have uvicorn stop."""
        service.ready, server.should_exit = False, True

    if done.exception():
        end(done)
    else:
        service.engine.thread.add_done_callback(end)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise WorkshopError(
            f"cannot listen on {host}:{port}: {reason}. Stop the program that uses it, or choose another --port or --host."
        ) from None


@dataclass
class Handle:
    """A server in the background. ``url`` is ``http://HOST:PORT``; clients of OpenAI want ``f"{url}/v1"``. Ends with this process."""

    url: str
    log: Path
    process: subprocess.Popen

    def stop(self) -> None:
        """End it; a second time does nothing."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def start(base: Path | str, store: Path | str | None = None, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None,
          refresh: float = 2, timeout: float = 180, trust: bool = False, **limits: int) -> Handle:  # fmt: skip
    """Serve ``base`` and the adapters of ``store`` from a process in the background, and return when it is ready.

    Args:
        port: 0 for any free one.
        limits: fields of :class:`Limits`.

    Raises:
        WorkshopError: it did not get ready; the message ends with what it wrote last.
    """
    Service(base, store, Limits(**limits))  # what is wrong with these is said here, at once
    options = {"base": base, "store": store or None, "host": host, "port": port, "refresh": refresh, **limits}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "workshop_utils", "serve", *words, *([] if store else ["--no-store"]), *(["--trust"] if trust else [])]
    environment = os.environ | {orphans.VARIABLE: str(os.getpid())} | ({API_KEY: api_key} if api_key else {})
    with tempfile.NamedTemporaryFile("w", prefix="workshop-serve-", suffix=".log", delete=False) as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    log = Path(output.name)
    handle = Handle("", log, process)
    until = time.monotonic() + timeout
    ready = False
    try:
        while time.monotonic() < until and process.poll() is None:
            lines = log.read_text(errors="replace").splitlines()
            handle.url = next((line.removeprefix(_LISTENING).split()[0] for line in lines if line.startswith(_LISTENING)), "")
            ready = bool(handle.url) and _answers(f"{handle.url}/v1/health/ready")
            if ready:
                return handle
            time.sleep(0.2)
    finally:
        if not ready:  # also when a cell is interrupted
            handle.stop()
    why = f"did not get ready in {timeout:g} s" if time.monotonic() >= until else "ended"
    raise WorkshopError(f"the server {why}. It wrote:\n{log.read_text(errors='replace')[-2000:]}")


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False
