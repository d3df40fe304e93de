"""Coverage-guided fuzzing of one reader with atheris: ``run.py TARGET CORPUS [options of
libFuzzer]``; see README.md."""

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
with atheris.instrument_imports(include=["workshop_utils.checkpoints.formats", "readers"]):
    import readers


def main() -> None:
    target = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: readers.run(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
