"""YAML that a person wrote: options, configurations of NeMo 1.0."""

import re
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.core.errors import WorkshopError


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice. Takes 1e-4 for a number, as Hydra does; YAML 1.1 wants
    1.0e-4."""

    def construct_mapping(self, node, deep=False):
        """As PyYAML, which lets the last of two equal keys win."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key, deep=True)
                if isinstance(name, str) and name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name!r} stands twice", key.start_mark
                    )
                seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one. WorkshopError for others."""
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise WorkshopError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise WorkshopError(
            f"{path} is no UTF-8 text, and so no YAML. `workshop inspect` tells what a checkpoint "
            "is."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or error
        raise WorkshopError(f"{where}: is not YAML that can be read here ({problem}).") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WorkshopError(
            f"{path}: holds a {type(value).__name__}; a mapping is needed, one `name: value` a "
            "line."
        )
    return value
