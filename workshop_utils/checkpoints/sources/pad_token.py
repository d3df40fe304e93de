"""Give a Hugging Face directory a pad token that is not its end token.

Batched generation needs a pad token; where pad and end are one token, a model tuned with padding
masked out never learns to stop. Llama 3 ships none, SmolLM2 ships its end token.
"""

import json
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import FetchError

# Tokens that exist in these families and that no text uses.
CANDIDATES = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")


def ensure(directory: Path) -> None:
    """Set the pad token in tokenizer_config.json, special_tokens_map.json, config.json and
    generation_config.json.

    Leaves a pad token alone that differs from the end token. Raises FetchError when the vocabulary
    offers none.
    """
    tokenizer = _read(directory / "tokenizer_config.json")
    # Id of each added token; special tokens are all among them.
    added = _read(directory / "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    # A special token is stored as its text, or as an object that holds it.
    stated = (tokenizer.get(name) for name in ("eos_token", "pad_token"))
    end, pad = (token["content"] if isinstance(token, dict) else token for token in stated)
    if pad is None or pad == end:
        pad = next((token for token in CANDIDATES if token in ids and token != end), None)
        if pad is None:
            raise FetchError(
                f"{directory.name}: its tokenizer has none of {', '.join(CANDIDATES)}, so there "
                "is nothing to pad with"
            )
        _update(directory / "tokenizer_config.json", pad_token=pad)
        _update(directory / "special_tokens_map.json", pad_token=pad)
    for name in ("config.json", "generation_config.json"):
        _update(directory / name, pad_token_id=ids[pad])


def _update(file: Path, **values) -> None:
    if file.exists():
        text = json.dumps(_read(file) | values, indent=2, ensure_ascii=False)
        paths.write_text(file, f"{text}\n")


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FetchError(f"{file.parent.name}/{file.name}: cannot be read ({error})") from error
