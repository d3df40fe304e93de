"""A note for a description: what a configuration would have imported or called, and NeMo never
writes."""

from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import safe_text
from workshop_utils.core.paths import shown


def note(tree: Any, file: Path | str) -> tuple[str, ...]:
    """One sentence that names them, or nothing. ``tree`` is the content of ``file``; nothing of it
    is imported."""
    targets = safe_text.foreign_targets(tree)
    if not targets:
        return ()
    names = "; ".join(f"{place}: {value}" for place, value in targets[:5])
    more = f" and {len(targets) - 5} more" if len(targets) > 5 else ""
    return (
        (
            f"do not load it unless you know why: {shown(file)} names what no model of NeMo needs "
            f"({names}{more})"
        ),
    )
