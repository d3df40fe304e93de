"""What pyproject.toml cannot say: a wheel carries the files that a clone has beside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = (
    "models/manifest.yaml",
    "requirements.txt",
    "data/make_tickets.py",
    "data/ticket_phrases.json",
)


class BuildWithFiles(build_py):
    """Copies :data:`FILES` to where ``workshop_utils.core.paths.repository_file`` looks for them;
    an editable install needs no copy."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            for name in FILES:
                target = Path(self.build_lib, "workshop_utils", "shipped", name)
                self.mkpath(str(target.parent))
                self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildWithFiles})
