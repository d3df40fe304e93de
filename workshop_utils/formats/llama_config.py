"""Names of :mod:`.gpt_config` and :mod:`.gpt_classes` for code that has not moved yet."""

from workshop_utils.formats.gpt_classes import FAMILIES, ROPE_SCALING
from workshop_utils.formats.gpt_config import architecture, read_fields

DEFAULTS = FAMILIES["llama"].configs
__all__ = ["DEFAULTS", "ROPE_SCALING", "architecture", "read_fields"]
