"""``workshop serve``: a base and its adapters behind the API of OpenAI."""

import os
import sys
from pathlib import Path

from workshop_utils.cli import options

DESCRIPTION = """\
Serve a base model and the adapters of a store, with the routes of NIM and the API of OpenAI. For
learning and testing: production is NIM or vLLM. What you write against this server runs against
them with another address and key.

The store has a directory for each adapter, DIR/NAME/, with one .nemo or with adapter_config.json
and adapter_model.safetensors (as `workshop export --to hf-peft` writes them). NAME is the "model"
to ask for; the base's is its directory's name. New, replaced and removed adapters are noticed while
the server runs. Requests for different adapters share one batch.
"""

EXAMPLES = """\
examples:
  workshop serve --base smollm2-135m-instruct
  curl http://127.0.0.1:8000/v1/models
  curl http://127.0.0.1:8000/v1/chat/completions \\
       -H 'Content-Type: application/json' \\
       -d '{"model": "smollm2-135m-instruct", "max_tokens": 20,
            "messages": [{"role": "user", "content": "Hello"}]}'
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    words = {"description": DESCRIPTION, "epilog": EXAMPLES}
    short = "a NIM-like server on this machine, for learning and testing"
    parser = subparsers.add_parser("serve", help=short, **words)
    add = parser.add_argument
    base = "a Hugging Face model directory, or a name from `workshop models`"
    add("--base", required=True, help=base)
    store = parser.add_mutually_exclusive_group()
    place = "the directory of the adapters (default: runs/store)"
    store.add_argument("--store", type=Path, metavar="DIR", help=place)
    options.flag(store, "--no-store", "serve only the base")
    host = "address to listen on (default: 127.0.0.1, this machine only)"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=8000, help="port (default: 8000; 0: any free one)")
    key = "key that clients have to send; better in the environment: WORKSHOP_API_KEY "
    add("--api-key", metavar="KEY", help=f"{key}(default: none)")
    rank = "largest rank of an adapter, as NIM_MAX_LORA_RANK of a NIM (default: any)"
    for name, kind, default, unit, text in (
        ("--refresh", float, 5, "SECONDS", "how often to look at the store (default: 5)"),
        ("--max-length", int, 2048, "N", "tokens of prompt and answer together (default: 2048)"),
        ("--max-batch", int, 16, "N", "texts generated at once (default: 16)"),
        (
            "--max-queue",
            int,
            64,
            "N",
            "texts that may wait; more are refused with 429 (default: 64)",
        ),
        ("--max-body", int, 1 << 20, "BYTES", "largest request (default: 1 MiB)"),
        ("--max-rank", int, None, "N", rank),
    ):
        add(name, type=kind, default=default, metavar=unit, help=text)
    options.add_trust(parser, "base and adapters")
    parser.set_defaults(run=run)


def run(args) -> int:
    """Serve until stopped."""
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.runtime import orphans
    from workshop_utils.serving.server import server

    orphans.die_with_parent()
    for name in ("refresh", "max_length", "max_batch", "max_queue", "max_body", "max_rank"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise WorkshopError(f"--{name.replace('_', '-')} is {value}; it has to be above 0.")
    if args.api_key == "":
        raise WorkshopError(
            "--api-key is empty. Give a key, or leave the option out to serve without."
        )
    key = args.api_key or os.environ.get(server.API_KEY) or None
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: {args.host} can be reached from other machines, and no --api-key is set: "
            "anybody there can use this server.",
            file=sys.stderr,
        )
    limits = server.RequestLimits(
        args.max_length, args.max_batch, args.max_queue, args.max_body, args.max_rank
    )
    store = None if args.no_store else args.store or _own_store()
    service = server.Service(args.base, store, limits, args.refresh, args.trust)
    # Read when torch is loaded. Threads that spin while they wait take the processor from the
    # clients, which often run on this machine; benchmarks/waiting_threads.json has the cost.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    server.run(service, args.host, args.port, key)
    return 0


def _own_store() -> Path:
    """The store of the workshop, made where it is missing: adapters that are staged later are
    noticed."""
    from workshop_utils.core import paths
    from workshop_utils.core.errors import WorkshopError

    store = paths.adapter_store()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkshopError(
            f"{paths.shown(store)} cannot be made: {error.strerror}. Give --store DIR, or "
            "--no-store."
        ) from None
    return store
