"""How tokens are drawn: one description for every engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 and ``top_k`` 1 take the likeliest token, whatever else is set.

    ``top_k`` 0 draws among all tokens, ``top_p`` 0 or 1 too. ``max_new_tokens`` counts the answer
    alone. Without a ``seed`` no two draws are the same.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1
