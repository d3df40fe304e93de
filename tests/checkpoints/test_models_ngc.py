"""Fetching from NGC: the real ngcsdk against a double (slow: its environment is made once), and a
stand-in for the ngc command."""

import os
import stat
import sys

import pytest
from http_double import Root, failed_with, serve, succeeded_with, workshop
from ngc_double import KEY, STORE, TARGET, Ngc, certificate, checkpoint

from workshop_utils.core.errors import FetchError

MODEL = "tiny"
LAST = "weights/__0_1.distcp"
KEYS = "https://org.ngc.nvidia.com/setup"
TERMS = "https://example.org/terms"
HERE = os.path.dirname(sys.executable)


@pytest.fixture
def root(tmp_path) -> Root:
    root = Root(tmp_path)
    entry = {"source": "ngc", "address": TARGET, "gated": True, "format": "nemo2"}
    root.add(MODEL, **entry, licence_url=TERMS)
    return root


@pytest.fixture(scope="module")
def environment():
    """The NGC client's environment, in the repository's own models/ so that it is made once."""
    from workshop_utils.checkpoints.sources import ngc

    try:
        return ngc._python_of_sdk().parent.parent
    except FetchError as error:
        pytest.skip(f"ngcsdk cannot be installed here: {error}")


def present(root: Root) -> set[str]:
    return root.fetched(MODEL, "nemo2")


def test_without_a_key(root):
    result = workshop(root, "models", "fetch", MODEL, PATH=HERE)
    failed_with(result, "NGC wants a key", KEYS, "NGC_API_KEY")
    assert root.leftovers() == []


class TestSdk:
    """Through ngcsdk in its own environment."""

    pytestmark = pytest.mark.slow

    @pytest.fixture
    def ngc(self, root, environment, tmp_path):
        (root.path / "models" / ".ngc-client").symlink_to(environment)
        answers = Ngc(checkpoint())
        answers.certificate, tls = certificate(tmp_path)
        with serve(answers, tls) as double:
            answers.url, answers.double = double.url, double
            yield answers

    def fetch(self, root: Root, ngc: Ngc, key: str = KEY):
        environment = {"NGC_API_KEY": key, "NGC_CLI_API_URL": ngc.url, "NGC_CLI_AUTH_URL": ngc.url}
        environment |= {"REQUESTS_CA_BUNDLE": str(ngc.certificate), "PATH": HERE}
        return workshop(root, "models", "fetch", MODEL, "--quiet", **environment)

    def test_a_cut_download_is_refused_and_resumed(self, root, ngc):
        ngc.cut = {LAST: 50_000}
        failed_with(self.fetch(root, ngc), LAST, "Failed", "finished files are kept")
        assert present(root) == set()

        ngc.cut = {}
        before = len(ngc.double.requests)
        succeeded_with(self.fetch(root, ngc), f"models/nemo2/{MODEL}")
        asked = [request.path for request in ngc.double.requests[before:]]
        stored = [path for path in asked if path.startswith(STORE)]
        assert stored == [STORE + LAST], "finished files are not fetched again"
        assert present(root) == set(ngc.files)
        for name, content in ngc.files.items():
            assert (root.path / "models" / "nemo2" / MODEL / name).read_bytes() == content

        asked = len(ngc.double.requests)
        assert self.fetch(root, ngc).returncode == 0
        assert len(ngc.double.requests) == asked

    def test_wrong_bytes(self, root, ngc):
        def change(request):
            answer = ngc(request)
            if request.path == STORE + "context/model.yaml":
                answer.body = answer.body[::-1]
            return answer

        with serve(change, certificate(root.path)[1]) as double:
            ngc.url, ngc.certificate = double.url, root.path / "certificate.pem"
            failed_with(self.fetch(root, ngc), "context/model.yaml", "sha256")
        assert present(root) == set()

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (401, ("refuses the key", "NGC_API_KEY")),
            (403, ("no access", TERMS, "accept the terms")),
            (404, ("no such model", "404")),
            (412, ("accept the terms", TERMS)),
            (500, ("failed", "500")),
        ],
    )
    def test_answers(self, root, ngc, status, words):
        ngc.status = status
        failed_with(self.fetch(root, ngc), TARGET, *words)
        assert present(root) == set()

    def test_a_refused_key_and_no_ngc_at_all(self, root, ngc):
        failed_with(self.fetch(root, ngc, key="nvapi-bad"), "refuses the key", "401", KEYS)
        ngc.url = "https://127.0.0.1:9"
        failed_with(self.fetch(root, ngc), TARGET, "cannot be reached")

    def test_a_dead_proxy(self, root, ngc):
        environment = {"NGC_API_KEY": KEY, "PATH": HERE}
        environment["HTTPS_PROXY"] = "http://me:secret@127.0.0.1:9"
        result = workshop(root, "models", "fetch", MODEL, "--quiet", **environment)
        dead = "The proxy http://127.0.0.1:9 of HTTPS_PROXY was used and does not answer"
        failed_with(result, TARGET, "cannot be reached", dead)
        assert "secret" not in result.stderr


COMMAND = """\
#!{python}
import os, pathlib, sys
assert sys.argv[1:5] == ["registry", "model", "download-version", "{target}"], sys.argv
print({said!r})
if {status}:
    sys.exit({status})
assert os.environ["NGC_CLI_API_KEY"] == "{key}"
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / "tiny_v2.0"
for name in {names!r}:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("content")
"""


def with_command(root: Root, said: str, status: int, names: list[str]):
    """Fetch with a stand-in for the ``ngc`` command that says ``said``, writes ``names`` and ends
    with ``status``."""
    command = root.path / "bin" / "ngc"
    command.parent.mkdir()
    words = {"python": sys.executable, "target": TARGET, "key": KEY}
    command.write_text(COMMAND.format(said=said, status=status, names=names, **words))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": str(command.parent), "NGC_API_KEY": KEY}
    return workshop(root, "models", "fetch", MODEL, "--quiet", **environment)


def test_the_ngc_command_is_used_where_it_is(root):
    result = with_command(root, '{"status": "Completed"}', 0, list(checkpoint()))
    assert (result.returncode, result.stderr) == (0, "")
    assert present(root) == set(checkpoint())
    assert root.leftovers() == [".metadata"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Client Error: 401 Response: nope", ("refuses the key",)),
        ("Client Error: 403 Response: nope", ("no access", TERMS)),
        ("Client Error: 404 Response: nope", ("no such model",)),
        ("the disk is on fire", ("the disk is on fire",)),
    ],
)
def test_the_ngc_command_fails(root, said, words):
    failed_with(with_command(root, said, 1, []), TARGET, *words)
    assert present(root) == set()


def test_the_ngc_command_sends_something_else(root):
    failed_with(with_command(root, "done", 0, ["model.nemo"]), "not a whole NeMo 2.0 checkpoint")
    assert present(root) == set()
