"""Where a person chooses model, device and data: ``workshop.yaml``, or the environment."""

import os
from dataclasses import asdict, dataclass, fields

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError

SEED = 1234


@dataclass(frozen=True)
class Settings:
    """``model``: a name from ``workshop models``. ``device``: auto, cpu or gpu. ``data``: a JSON
    Lines file, or None for the tickets."""

    model: str = "smollm2-135m-instruct"
    device: str = "auto"
    data: str | None = None


def load_settings() -> Settings:
    """Defaults, overridden by ``workshop.yaml``, overridden by WORKSHOP_MODEL, WORKSHOP_DEVICE and
    WORKSHOP_DATA."""
    file = paths.root() / "workshop.yaml"
    chosen = {}
    if file.exists():
        import yaml  # late: choosing a device wants no package

        try:
            chosen = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            fix = "Put it right, or delete it to go back to the defaults."
            raise WorkshopError(f"workshop.yaml is not YAML: {error}. {fix}") from None
    names = [field.name for field in fields(Settings)]
    if not isinstance(chosen, dict) or not set(chosen) <= set(names):
        raise WorkshopError(f"workshop.yaml may hold {', '.join(names)}, and nothing else.")
    for name in names:
        if os.environ.get(f"WORKSHOP_{name.upper()}"):
            chosen[name] = os.environ[f"WORKSHOP_{name.upper()}"]
    return Settings(**chosen)


def save_settings(settings: Settings) -> None:
    """Write ``workshop.yaml``; the defaults need no file, so then it is removed."""
    file = paths.root() / "workshop.yaml"
    if settings == Settings():
        file.unlink(missing_ok=True)
    else:
        import yaml

        paths.write_text(file, yaml.safe_dump(asdict(settings), sort_keys=False))
