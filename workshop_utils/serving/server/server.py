"""The server as a process: load, listen, stop; and the same in the background of a notebook."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime import processes
from workshop_utils.serving.server.service import RequestLimits, Service

API_KEY = "WORKSHOP_API_KEY"
_LISTENING = "listening on "
_GRACE = 5
"""Seconds that what is under way has to finish when the server is stopped."""


def run(
    service: Service, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM. Port 0: any free one, which is printed."""
    listener = _listen(host, port)
    import signal

    import uvicorn

    from workshop_utils.serving.server.app import create_app

    app = create_app(service, api_key, service.limits.max_body)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None) -> None:
            # The engine first, while there are clients to hear of it.
            await asyncio.to_thread(service.close, _GRACE)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE))
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    print(f"{_LISTENING}{url}  (/v1/health/ready says when the model is loaded)", flush=True)

    def end(_: Future) -> None:
        service.ready, server.should_exit = False, True

    def end_if_useless(loaded: Future) -> None:
        """Without a model, or once the engine has ended."""
        end(loaded) if loaded.exception() else service.engine.thread.add_done_callback(end)

    loading = ThreadPoolExecutor(1).submit(service.load)
    loading.add_done_callback(end_if_useless)
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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise WorkshopError(
            f"cannot listen on {host}:{port}: {reason}. Stop the program that uses it, or choose "
            "another --port or --host."
        ) from None


@dataclass
class Handle:
    """A server in the background, which ends with this process; ``url`` is without ``/v1``."""

    url: str
    log: Path
    process: subprocess.Popen

    def stop(self) -> None:
        """End it; a second time does nothing."""
        processes.end(self.process, 3 * _GRACE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def start(
    base: Path | str,
    store: Path | str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    refresh: float = 2,
    timeout: float = 180,
    trust: bool = False,
    **limits: int,
) -> Handle:
    """Serve ``base`` and the adapters of ``store`` in the background; returns when it is ready.

    ``port`` 0 is any free one; ``limits`` are fields of :class:`RequestLimits`. The message of a
    WorkshopError ends with what the server wrote last.
    """
    Service(base, store, RequestLimits(**limits))  # what is wrong with these is said here, at once
    options = {"base": base, "store": store or None, "host": host, "port": port}
    options |= {"refresh": refresh, **limits}
    command = [sys.executable, "-m", "workshop_utils", "serve"]
    for name, value in options.items():
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    command += [] if store else ["--no-store"]
    command += ["--trust"] if trust else []
    environment = processes.environment(**{API_KEY: api_key} if api_key else {})
    handle, name = tempfile.mkstemp(prefix="workshop-serve-", suffix=".log")
    with open(handle, "wb") as output:
        process = processes.start(command, output, environment)
    server, ready = Handle("", Path(name), process), False
    until = time.monotonic() + timeout
    try:
        while time.monotonic() < until and process.poll() is None:
            for line in server.log.read_text(errors="replace").splitlines():
                if line.startswith(_LISTENING):
                    server.url = line.removeprefix(_LISTENING).split()[0]
            ready = bool(server.url) and _answers(f"{server.url}/v1/health/ready")
            if ready:
                return server
            time.sleep(0.2)
    finally:
        if not ready:  # also when a cell is interrupted
            server.stop()
    why = f"did not get ready in {timeout:g} s" if time.monotonic() >= until else "ended"
    raise WorkshopError(f"the server {why}. It wrote:\n{processes.tail(server.log)}")


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False
