"""Put adapters where a NIM looks for them, start the NIM, and wait until it serves.
https://docs.nvidia.com/nim/large-language-models/

from workshop_utils.serving.nim import stage

stage("runs/exports/NAME/hf-peft", "triage", "runs/store")
"""

from workshop_utils.serving.nim.store import Staged, stage

__all__ = ["Staged", "stage"]
