"""``python -m workshop_utils``: the same as the ``workshop`` command."""

import sys

from workshop_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
