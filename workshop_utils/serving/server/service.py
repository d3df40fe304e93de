"""The base, the adapters and the engine behind the routes."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.core.errors import NotACheckpoint
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from workshop_utils.serving.server.engine import Engine, Row


@dataclass(frozen=True)
class RequestLimits:
    """What the server takes on. ``max_length``: tokens of prompt and answer together;
    ``max_batch``: texts at once in one batch, and in one request; ``max_queue``: texts that wait;
    ``max_body``: bytes of a request; ``max_rank``: rank of an adapter (None: any)."""

    max_length: int = 2048
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 1 << 20
    max_rank: int | None = None


class Service:
    """A base and the adapters of a store. :meth:`load` runs in a thread of its own; :attr:`ready`
    says when it is done. NotACheckpoint where ``base`` is no model, or ``store`` no directory."""

    def __init__(
        self,
        base: Path | str,
        store: Path | str | None = None,
        limits: RequestLimits | None = None,
        refresh: float = 5,
        trust: bool = False,
    ):
        self.base, self.store = _base_directory(Path(base)), Path(store) if store else None
        if self.store and not self.store.is_dir():
            raise NotACheckpoint(
                f"{shown(self.store)} is no directory: make it (mkdir -p), and put each adapter "
                "in a directory of its own there."
            )
        # As the directory is called here: a link into the cache of Hugging Face leads to a hash.
        self.name = Path(os.path.abspath(self.base)).name
        self.limits, self._refresh, self._trust = limits or RequestLimits(), refresh, trust
        self.max_length, self.max_batch = self.limits.max_length, self.limits.max_batch
        self.engine: Engine | None = None
        self.ready = self._closed = False
        self._store = None
        self._created = int(time.time())

    def load(self) -> None:
        """Load the base and the adapters."""
        from workshop_utils.inference.generate import load
        from workshop_utils.serving.server.adapters import Store
        from workshop_utils.serving.server.engine import Engine

        model, self._tokenizer = load(self.base, trust=self._trust)
        longest = getattr(model.config, "max_position_embeddings", None) or self.max_length
        self.max_length = min(self.max_length, longest)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self.engine = Engine(model, self._tokenizer, self.max_batch, self.limits.max_queue)
        if self._closed:
            self.engine.close()
            return
        if self.store:
            of_store = self.store, self.engine, self.name, self._trust, self.limits.max_rank
            self._store = Store(*of_store, say=lambda line: print(line, flush=True))
            self._store.refresh()
            threading.Thread(target=self._store.watch, args=(self._refresh,), daemon=True).start()
        self.ready = not self._closed
        print(f"ready: {', '.join([self.name, *self.engine.adapters])}", flush=True)

    def close(self, grace: float = 0) -> None:
        """Take on nothing new, and stop the engine (see :meth:`Engine.close`)."""
        self.ready, self._closed = False, True
        if self._store:
            self._store.stop()
        if self.engine:
            self.engine.close(grace)

    def models(self) -> list[dict]:
        """The base and every adapter, as ``/v1/models`` lists them."""
        about = {"object": "model", "created": self._created, "owned_by": "workshop"}
        about |= {"root": self.name, "max_model_len": self.max_length}
        adapters = [about | {"id": name, "parent": self.name} for name in self.engine.adapters]
        return [about | {"id": self.name, "parent": None}, *adapters]

    def chat_prompt(self, turns: list[dict]) -> list[int]:
        """Token ids of a conversation. Raises ``ValueError`` when the chat template refuses it."""
        from workshop_utils.core.errors import DataError
        from workshop_utils.inference.generate import prompt_ids

        try:
            return prompt_ids(self._tokenizer, turns)
        except DataError as error:
            raise ValueError(str(error)) from None

    def prompt(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt. Raises ``ValueError`` when it is empty or no id of this model."""
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        if not ids:
            raise ValueError("The prompt is empty.")
        if max(ids) >= self._vocabulary:
            raise ValueError(
                f"The prompt has the token id {max(ids)}; the model has {self._vocabulary}."
            )
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def submit(self, rows: list[Row], model: str) -> None:
        """As ``Engine.submit``; ``model`` is the base's id or an adapter's name."""
        self.engine.submit(rows, None if model == self.name else model)


def _base_directory(base: Path) -> Path:
    from workshop_utils.checkpoints.formats.identify import identify
    from workshop_utils.checkpoints.formats.summary import Kind
    from workshop_utils.inference.generate import model_directory

    if not base.exists() or (base / "config.json").is_file():
        return model_directory(base)
    kind = identify(base).kind
    fix = {
        Kind.NEMO2: f"convert it: workshop import {shown(base)} --to-huggingface",
        Kind.PEFT: "put it into the store, and give its base as --base",
    }
    raise NotACheckpoint(
        f"{shown(base)} is a {kind}; the server needs a Hugging Face model directory: "
        f"{fix.get(kind, 'give one as --base')}."
    )
