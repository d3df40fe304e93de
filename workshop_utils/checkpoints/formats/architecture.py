"""The shape of a decoder-only transformer, in one vocabulary for every checkpoint format."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from workshop_utils.checkpoints.formats.qkv import Heads


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer. ``rope_scaling`` is None, the four numbers of Llama
    3.1's rule, or another rule as it is; ``family`` a name such as ``Llama``, ``experts`` their
    number in each layer, ``qk_norm`` whether queries and keys are normalised, ``activation``
    that of the MLP by NeMo 1's name. What is None is not known.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int | None = None
    tied: bool | None = None
    rope_base: float | None = None
    rope_scaling: dict[str, Any] | None = None
    family: str | None = None
    experts: int | None = None
    qk_norm: bool = False
    activation: str | None = None

    @property
    def qkv(self) -> Heads:
        """The numbers that the rows of a fused q, k and v depend on."""
        return Heads(self.heads, self.groups, self.head_dim)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, by NeMo 1's name of its activation (``fast-swiglu``)."""
        return str(self.activation).endswith("glu")


def read(
    config: Mapping[str, Any], names: Iterable[str], ffn_factor: int | None = None, **more: Any
) -> Architecture | None:
    """The architecture whose sizes ``config`` has, or None when one that has no default is missing.

    ``names`` are those of layers, hidden, heads, ffn, groups and head_dim there. ffn may be left
    out where there is an ``ffn_factor`` (of hidden); ``more`` are the other fields.
    """
    layers, hidden, heads, ffn, groups, head_dim = (size(config, name) for name in names)
    if not (layers and hidden and heads and (ffn or ffn_factor)):
        return None
    sizes = (groups or heads, head_dim or hidden // heads, ffn or ffn_factor * hidden)
    return Architecture(layers, hidden, heads, *sizes, **more)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping ``config[name]``, or an empty one."""
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def text(config: Mapping[str, Any], name: str) -> str | None:
    """The text ``config[name]``, or None where there is none."""
    value = config.get(name)
    return value if isinstance(value, str) else None


def size(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """The positive whole number ``config[name]``, or ``default`` where there is none."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else default


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """The number ``config[name]``, or ``default`` where there is none."""
    value = config.get(name)
    return value if type(value) in (int, float) else default
