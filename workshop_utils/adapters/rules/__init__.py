"""Would a given reader take this adapter, and would it do what it was trained to do? One line a
rule, and how to mend each fault.

Nothing imports torch, and nothing that a file contains is run:
:mod:`workshop_utils.checkpoints.formats` reads it.
"""

from workshop_utils.adapters.rules.judge import READERS, judge
from workshop_utils.adapters.rules.rules import Judgement, Rule

__all__ = ["READERS", "Judgement", "Rule", "judge"]
