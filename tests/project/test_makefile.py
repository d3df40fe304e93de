"""The Makefile and the script that makes the environment, with stand-ins for Python, uname and
df."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from places import ROOT

PYTHON = """\
#!/bin/bash
case "$*" in
    *version_info*) echo "${VERSION:-3.11}" ;;
    *ensurepip*) [ -z "${NO_VENV:-}" ] ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/jupyter ;;
    "-m pip install"*) echo "$*" >>pip.log; [ ! -e no-network ] ;;
esac
"""  # noqa: E501


@pytest.fixture
def clone(tmp_path):
    """What the script needs of the repository, in a folder whose name has a space, and the
    stand-ins."""
    clone = tmp_path / "a clone"
    (clone / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    (clone / "requirements.txt").write_text("numpy==1.26.4\n")
    (clone / "pyproject.toml").write_text("[project]\n")
    # Only what the script calls: this machine's own Pythons must not be found.
    tools = "awk bash cat cp cut df dirname grep mkdir paste rm sha256sum tr uname"
    for tool in tools.split():
        (clone / "bin" / tool).symlink_to(shutil.which(tool))
    program(clone, "python3.11", PYTHON)
    return clone


def program(clone: Path, name: str, text: str) -> None:
    file = clone / "bin" / name
    file.unlink(missing_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def script(clone: Path, name: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script of the clone with the stand-ins and ``variables`` alone."""
    command = [str(clone / "bin" / "bash"), str(clone / "scripts" / name)]
    environment = {"PATH": str(clone / "bin")} | variables
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def make_environment(clone: Path, **variables: str) -> subprocess.CompletedProcess:
    usual = {"PATH": f"{clone / 'bin'}:{clone / '.venv/bin'}", "HOME": str(clone)}
    return script(clone, "environment.sh", **usual | {"MIN_DISK_GB": "0"} | variables)


def fails_with(done: subprocess.CompletedProcess, sentence: str) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert re.search(sentence, done.stderr), done.stderr


def installs(clone: Path) -> list[str]:
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_environment_is_made_once(clone):
    first = make_environment(clone)
    assert first.returncode == 0, first.stderr
    assert [re.search(r"--requirement \S+|--no-deps.*", line)[0] for line in installs(clone)] == [
        "--requirement requirements.txt",
        "--no-deps --no-build-isolation --editable .",
    ]
    second = make_environment(clone)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(installs(clone)) == 2


def test_pip_has_a_home(clone):
    program(clone, "python3.11", PYTHON.replace('echo "$*"', 'echo "home: $HOME"'))
    assert script(clone, "environment.sh", MIN_DISK_GB="0").returncode == 0
    assert len(installs(clone)) == 2
    assert all(re.fullmatch("home: /.*", line) for line in installs(clone))


@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml"])
def test_a_change_of_the_lock_is_installed(clone, changed):
    make_environment(clone)
    (clone / changed).write_text((clone / changed).read_text() + "# changed\n")
    assert make_environment(clone).returncode == 0
    assert len(installs(clone)) == 4


def test_an_interrupted_installation_is_taken_up_again(clone):
    (clone / "no-network").touch()
    fails_with(make_environment(clone), "pip could not install")
    (clone / "no-network").unlink()
    assert make_environment(clone).returncode == 0
    assert len(installs(clone)) == 3


def test_a_half_made_venv_is_made_again(clone):
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    (clone / ".venv" / "leftover").touch()
    assert make_environment(clone).returncode == 0
    assert not (clone / ".venv" / "leftover").exists()


@pytest.mark.parametrize(
    ("name", "sentence"), [("Darwin", "does not run on macOS"), ("MINGW64_NT-10.0", "WSL 2")]
)
def test_other_systems_get_a_sentence(clone, name, sentence):
    program(clone, "uname", f"#!/bin/bash\necho {name}\n")
    fails_with(make_environment(clone), sentence)
    assert not (clone / ".venv").exists()


def test_a_wrong_python_gets_a_sentence(clone):
    wrong = {"PYTHON": "python3.11", "VERSION": "3.12"}
    fails_with(make_environment(clone, **wrong), "PYTHON=python3.11 is not a Python 3.11")
    missing = make_environment(clone, PYTHON="no-such-python")
    fails_with(missing, "no-such-python is not a Python 3.11")
    (clone / "bin" / "python3.11").rename(clone / "bin" / "python3")
    assert make_environment(clone).returncode == 0


def test_no_python_gets_a_sentence(clone):
    for name in ("python3.11", "python3", "python"):
        program(clone, name, "#!/bin/bash\necho 3.13\n")
    sentence = r"Python 3\.11 was not found .*\n.*apt install python3\.11 python3\.11-venv"
    fails_with(make_environment(clone), sentence)


def test_a_missing_venv_module_gets_a_sentence(clone):
    sentence = r"has no venv module.*apt install python3\.11-venv"
    fails_with(make_environment(clone, NO_VENV="1"), sentence)
    assert not (clone / ".venv").exists()


def test_too_little_disk_gets_a_sentence(clone):
    program(clone, "df", "#!/bin/bash\nprintf 'x\\ntmpfs 9000000 1000000 3500000 30%% /\\n'\n")
    sentence = r"only 3 GB are free .* want 8.*make env MIN_DISK_GB=3"
    fails_with(make_environment(clone, MIN_DISK_GB="8"), sentence)
    assert make_environment(clone, MIN_DISK_GB="3").returncode == 0
    again = make_environment(clone, MIN_DISK_GB="8")
    assert again.returncode == 0, "what is complete needs no more space"


def test_a_limit_that_is_no_number_gets_a_sentence(clone):
    fails_with(make_environment(clone, MIN_DISK_GB="8G"), "MIN_DISK_GB is '8G'")


def test_chromium_is_used_where_it_is(clone):
    for name in ("chromium", "chromedriver"):
        program(clone, name, "#!/bin/bash\n")
    assert script(clone, "chromium.sh").returncode == 0


def test_chromium_is_not_installed_without_leave(clone):
    program(clone, "id", "#!/bin/bash\necho 1000\n")
    program(clone, "sudo", "#!/bin/bash\nexit 1\n")
    program(clone, "apt-get", "#!/bin/bash\ntouch called\n")
    fails_with(script(clone, "chromium.sh"), "apt install chromium chromium-driver")
    assert not Path("called").exists()


def test_chromium_is_installed_with_leave(clone):
    program(clone, "id", "#!/bin/bash\necho 0\n")
    install = f"""case "$*" in *install*) for one in chromium chromedriver; do cp "$0" {str(clone / "bin")!r}/$one; done ;; esac"""  # noqa: E501
    program(clone, "apt-get", f"#!/bin/bash\n{install}\n")
    done = script(clone, "chromium.sh")
    assert done.returncode == 0, done.stderr


def make(*arguments: str, cwd: Path = ROOT) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-C", str(cwd), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.replace("\\\n", " ")


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  make (\S+) +\S", make("--no-print-directory"), re.MULTILINE)
    assert sorted(listed) == sorted(phony)


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("workshop", [r"workshop preflight", r"workshop run"]),
        (
            "lab",
            [r"-m workshop_utils\.core\.home \S+jupyter lab .*--ip='127\.0\.0\.1' --port='8888'"],
        ),
        (
            "test",
            [
                r"pytest --numprocesses 2 --dist worksteal tests\n",
                r"pytest --nbval .*--nbval-sanitize-with tests/nbval_\S+ notebooks",
            ],
        ),
        ("test-all", [r"pytest --nbval .*-m 'not browser' tests notebooks"]),
        ("test-browser", [r"scripts/chromium\.sh", r"pytest -m browser tests/browser"]),
    ],
)
def test_what_a_target_runs(target, commands):
    lines = make("--dry-run", target)
    position = lines.index("scripts/environment.sh")
    for command in commands:
        match = re.compile(command).search(lines, position)
        assert match, lines
        position = match.end()


def test_lab_takes_host_and_port():
    command = make("--dry-run", "lab", "HOST=0.0.0.0", "PORT=9999")
    assert "--ip='0.0.0.0' --port='9999'" in command and "--no-browser" in command


def test_clean_keeps_what_is_not_made_here(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = ".venv .home/.cache runs/finetune data/tickets data/mine models/.ngc-client notebooks"
    for folder in (*made.split(), "models/huggingface/one"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models" / "manifest.yaml").touch()
    assert "models/ is kept" in make("clean", cwd=tmp_path)
    assert names(tmp_path) == ["Makefile", "data", "models", "notebooks"]
    assert names(tmp_path / "data") == ["mine"]
    assert (tmp_path / "models" / "huggingface" / "one").is_dir()
    make("clean", "CLEAN_MODELS=1", cwd=tmp_path)
    assert names(tmp_path / "models") == ["manifest.yaml"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_readme_has_the_plain_commands_behind_make():
    """What stands in README.md for those without make is what make calls."""
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"Without make.*?```bash\n(.*?)```", readme, re.DOTALL)[1]
    nbval = re.search(r"^NBVAL := (.*)$", makefile, re.MULTILINE)[1]
    quick = re.search(r"^test:.*\n\t@\$\(PYTEST\) (.*)$", makefile, re.MULTILINE)[1]
    assert f"python -m pytest {quick}\n" in block
    assert f"python -m pytest {nbval} notebooks" in block
    assert "bash scripts/environment.sh" in block and "bash scripts/environment.sh" in makefile
    assert "workshop preflight && workshop run" in block
    assert "workshop preflight\n\t@$(BIN)/workshop run\n" in makefile


def test_post_build_needs_nothing_but_pip():
    """The image of repo2docker may be without setuptools, or have one that cannot read this
    project."""
    commands = re.findall("^python.*", (ROOT / "postBuild").read_text(), re.MULTILINE)
    assert commands == ["python -m pip install --no-deps --editable ."]
