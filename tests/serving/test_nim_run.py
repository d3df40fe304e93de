"""``workshop nim``: the docker command, a container that starts, fails or hangs, and the files for
Compose and Kubernetes.

No NIM runs here. A program called docker on the PATH writes down its arguments and behaves like
one, and a small server is the NIM.
"""

import http.server
import json
import os
import shlex
import stat
import threading
from pathlib import Path

import pytest
import yaml

from workshop_utils.cli import main
from workshop_utils.core.errors import NimFailed, WorkshopError
from workshop_utils.serving.nim import compose as compose_file
from workshop_utils.serving.nim import docker, readiness
from workshop_utils.serving.nim.compose import as_yaml, compose
from workshop_utils.serving.nim.docker import Nim
from workshop_utils.serving.nim.kubernetes import check, manifest

IMAGE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.6"
KEY = "nvapi-not-to-be-seen"
DOCKER = """#!/bin/sh
echo "$@" >> {folder}/calls
env > {folder}/environment
case "$1" in
  run) cat {folder}/run.err >&2; echo 0123abcd; exit $(cat {folder}/run.status) ;;
  inspect) cat {folder}/state ;;
  logs) cat {folder}/log ;;
esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A machine with docker, a GPU and a key: a folder whose files say how docker behaves."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (
        ("docker", DOCKER.format(folder=folder)),
        ("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA L40S (UUID: GPU-1)'\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    for name, text in (
        ("run.err", ""),
        ("run.status", "0"),
        ("state", "true 0 false"),
        ("log", ""),
    ):
        (folder / name).write_text(text)
    (tmp_path / "runs" / "store" / "triage").mkdir(parents=True)
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("NGC_API_KEY", KEY)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readiness.time, "sleep", lambda _: None)
    return folder


@pytest.fixture
def nim_server():
    """Answers as a NIM does; ``unready`` times with 503 first."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ready = self.server.unready <= 0
            self.server.unready -= self.path.endswith("ready")
            body = (
                {"data": [{"id": name} for name in self.server.models]}
                if self.path == "/v1/models"
                else {"message": "ready" if ready else "no"}
            )
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.unready, server.models = 0, ["meta/llama-3.1-8b-instruct", "triage"]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(server, *options):
    port = str(server.server_address[1])
    words = ["nim", "run", "--image", IMAGE, "--cache", "cache", "--port", port]
    return main([*words, *options])


def nim(tmp_path=Path("/x"), **changes):
    return Nim(
        **{"image": IMAGE, "store": tmp_path / "store", "cache": tmp_path / "cache"} | changes
    )


def test_a_cache_that_cannot_be_made(fake, nim_server, capsys):
    assert run(nim_server, "--cache", f"{os.devnull}/cache") == 1
    assert (
        f"{os.devnull}/cache cannot be made (Not a directory): name another directory with --cache"
        in capsys.readouterr().err
    )


def test_it_starts_waits_and_says_what_is_served(fake, nim_server, capsys):
    nim_server.unready = 3
    (fake / "log").write_text("INFO Loaded new LoRA adapter: name 'triage'\n")
    assert run(nim_server) == 0
    said = capsys.readouterr()
    assert "models: meta/llama-3.1-8b-instruct, triage" in said.out
    assert "Loaded new LoRA adapter" in said.out
    assert KEY not in said.out + said.err
    assert Path("cache").is_dir()


def test_docker_gets_every_setting_and_the_key_by_its_name_only(fake, nim_server, tmp_path):
    options = "--refresh 30 --max-lora-rank 64 --gpus device=0,1 --profile p"
    assert run(nim_server, *options.split()) == 0
    port = nim_server.server_address[1]
    assert (fake / "calls").read_text().splitlines()[0] == " ".join(
        [
            'run --detach --name workshop-nim --gpus "device=0,1" --shm-size 16GB',
            f"-u {os.getuid()} -p 127.0.0.1:{port}:8000 -e NGC_API_KEY",
            "-e NIM_PEFT_SOURCE=/opt/nim/loras -e NIM_PEFT_REFRESH_INTERVAL=30",
            "-e NIM_MAX_LORA_RANK=64 -e NIM_MAX_GPU_LORAS=8 -e NIM_MAX_CPU_LORAS=16",
            f"-e NIM_MODEL_PROFILE=p -v {tmp_path}/cache:/opt/nim/.cache",
            f"-v {tmp_path}/runs/store:/opt/nim/loras:ro {IMAGE}",
        ]
    )
    assert KEY not in (fake / "calls").read_text()
    assert f"NGC_API_KEY={KEY}" in (fake / "environment").read_text()


@pytest.mark.parametrize("store", ["store", "a b $x", "new/$(id)"])
def test_the_printed_command_is_the_command_and_starts_nothing(fake, capsys, store):
    import subprocess

    assert (
        main(["nim", "run", "--image", IMAGE, "--store", store, "--cache", "a/cache", "--print"])
        == 0
    )
    text = capsys.readouterr().out
    assert KEY not in text
    assert not (fake / "calls").exists()
    assert not Path("a").exists()
    subprocess.run(["sh", "-c", text], check=True, capture_output=True)
    assert Path("a/cache").is_dir() and Path(store).is_dir()  # docker would have made them root's
    expected = docker.command(Nim(IMAGE, Path(store), Path("a/cache")))
    assert (fake / "calls").read_text().strip() == " ".join(expected[1:])


DAEMON = "docker: Error response from daemon:"


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the "
         "docker daemon running?", "systemctl start docker"),
        ("docker: permission denied while trying to connect to the Docker daemon socket at "
         "unix:///var/run/docker.sock", "group docker"),
        (f'{DAEMON} could not select device driver "" with capabilities: [[gpu]].',
         "Container Toolkit"),
        (f"{DAEMON} unauthorized: authentication required", "docker login nvcr.io"),
        (f"{DAEMON} manifest for nvcr.io/nim/x:9 not found: manifest unknown", "no such image"),
        (f'{DAEMON} Conflict. The container name "/workshop-nim" is already in use by "1"',
         "docker rm -f"),
        ("Bind for 127.0.0.1:8000 failed: port is already allocated.", "another --port"),
        ("something new", "something new"),
    ],
)  # fmt: skip
def test_docker_s_refusal_is_explained(fake, nim_server, capsys, stderr, advice):
    (fake / "run.err").write_text(stderr + "\n")
    (fake / "run.status").write_text("125")
    assert run(nim_server) == 1
    said = capsys.readouterr()
    assert advice in said.err
    assert "status 125" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "GPU memory"),
        ("ValueError: LoRA rank 64 is greater than max_lora_rank 32.", "NIM_MAX_LORA_RANK"),
        ("Authentication Error: the NGC API key is rejected", "refused the key"),
        ("ERROR: No compatible profiles found for this GPU", "--profile"),
        ("OSError: [Errno 28] No space left on device: '/opt/nim/.cache/x'", "disk"),
        ("PermissionError: [Errno 13] Permission denied: '/opt/nim/.cache/ngc'", "--cache"),
        (
            "ValueError: Loading lora broken failed: No adapter found for /opt/nim/loras/broken",
            "workshop conform",
        ),
    ],
)
def test_a_container_that_ends_is_read_for_its_cause(fake, nim_server, capsys, line, meaning):
    nim_server.unready = 10**6
    (fake / "state").write_text("false 1 false")
    (fake / "log").write_text(f"INFO starting\n{line}\nINFO stopping\n")
    assert run(nim_server) == 1
    said = capsys.readouterr().err
    assert "it ended with status 1" in said
    assert meaning in said
    assert line in said
    assert "docker rm -f workshop-nim" in said


def test_waiting_ends(fake, nim_server, capsys):
    nim_server.unready = 10**6
    (fake / "log").write_text("INFO downloading, 3 %\n")
    assert run(nim_server, "--timeout", "0.05") == 1
    said = capsys.readouterr().err
    assert "not ready after 0.05 s: it answers 503" in said
    assert "downloading, 3 %" in said
    assert "still runs" in said


def test_nobody_answers(fake):
    with pytest.raises(NimFailed, match="no answer yet"):
        readiness.wait("http://127.0.0.1:1", 0.01, progress=False)


def test_an_adapter_of_the_store_that_is_not_served_is_a_failure(fake, nim_server, capsys):
    Path("runs/store/other").mkdir()
    assert run(nim_server) == 1
    said = capsys.readouterr()
    assert "not served: other" in said.err
    assert "models:" in said.out


def test_all_that_is_missing_is_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NGC_API_KEY", " ")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    cache = tmp_path / "cache"
    places = ["--store", str(tmp_path / "none"), "--cache", str(cache)]
    assert main(["nim", "run", "--image", IMAGE, *places]) == 1
    said = capsys.readouterr().err
    for missing in ("docker is not installed", "no NVIDIA GPU", "NGC_API_KEY is not set", "stage"):
        assert missing in said
    assert not cache.exists()


DIGEST = f"@sha256:{'0' * 64}"


@pytest.mark.parametrize(
    "image", [IMAGE, "a:1", "localhost:5000/a/b:1.0", f"a/b{DIGEST}", f"a/b:latest{DIGEST}"]
)
def test_a_pinned_image_is_taken(image):
    assert docker.command(nim(image=image))[-1] == image


@pytest.mark.parametrize(
    "image",
    ["a", "a/b", "a:latest", "localhost:5000/a", "a@sha256:12", "a:1 --privileged", "", "a:1@",
     "--privileged", "--privileged:1", "$(x):1"],
)  # fmt: skip
def test_an_image_that_is_not_pinned_is_refused(image):
    with pytest.raises(WorkshopError, match="--image"):
        nim(image=image)


@pytest.mark.parametrize(
    "change",
    [{"name": "A_b"}, {"name": "-a"}, {"name": "a\n"}, {"port": 0}, {"port": 65536},
     {"shm_size": "lots"}, {"gpus": "two"}, {"gpus": "1\n"}, {"refresh": 0}, {"max_lora_rank": -1},
     {"max_gpu_loras": 20}, {"store": Path("a:b")}],
)  # fmt: skip
def test_a_setting_that_docker_or_nim_would_refuse_is_named(change):
    with pytest.raises(WorkshopError, match=next(iter(change)).replace("_", "-")):
        nim(**change)


@pytest.mark.parametrize(
    "odd", ["yes", "1e3", "a b", "x # y", "- z", "{a}", "'q' \"r\"", "ü", "null", "& *"]
)
def test_values_come_back_from_the_yaml(tmp_path, odd):
    settings = nim(tmp_path, profile=odd, store=tmp_path / odd)
    service = yaml.safe_load(as_yaml(compose(settings)))["services"]["nim"]
    assert f"NIM_MODEL_PROFILE={odd}" in service["environment"]
    assert service["volumes"][1]["source"] == str(tmp_path / odd)
    objects = list(yaml.safe_load_all(as_yaml(*manifest(nim(tmp_path, gpus="1", profile=odd)))))
    container = objects[2]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "NIM_MODEL_PROFILE", "value": odd} in container["env"]


def test_compose_says_what_docker_run_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NGC_API_KEY", KEY)
    one = nim(tmp_path / "a$b")
    text = as_yaml(compose(one))
    service = yaml.safe_load(text)["services"]["nim"]
    assert KEY not in text
    assert "*id" not in text
    assert service["environment"][0] == "NGC_API_KEY"
    mounts = service["volumes"]
    assert mounts[0]["source"] == f"{tmp_path}/a$$b/cache"
    # The fields of the long form in the reference; that directory is never made as root's.
    fields = {"type", "source", "target", "read_only", "bind"}
    assert all(mount.keys() <= fields for mount in mounts)
    assert [
        (mount["target"], mount.get("read_only", False), mount["bind"]) for mount in mounts
    ] == [
        ("/opt/nim/.cache", False, {"create_host_path": False}),
        ("/opt/nim/loras", True, {"create_host_path": False}),
    ]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "capabilities": ["gpu"], "count": "all"}]
    words = docker.command(one)
    assert [word for word in words if word.startswith("NIM_")] == service["environment"][1:]
    assert service["image"] == words[-1]
    for name, option in (("container_name", "--name"), ("user", "-u"), ("shm_size", "--shm-size")):
        assert service[name] == words[words.index(option) + 1]


def test_the_compose_file_says_what_to_do_first(tmp_path, capsys, monkeypatch):
    import subprocess

    monkeypatch.chdir(tmp_path)
    cache = "c\n- x"  # a line break does not end the comment
    assert main(["nim", "compose", "--image", IMAGE, "--store", "a $b", "--cache", "cache"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "mkdir" in line)
    subprocess.run(["sh", "-c", line.removeprefix("#")], check=True)
    assert (tmp_path / "a $b").is_dir() and (tmp_path / "cache").is_dir()
    one = nim(tmp_path, cache=tmp_path / cache)
    assert yaml.safe_load(compose_file.header(one) + as_yaml(compose(one))) == yaml.safe_load(
        as_yaml(compose(one))
    )


def test_the_manifest_says_how_to_make_secrets_and_fill_the_store(capsys):
    assert main(["nim", "kubernetes", "--image", IMAGE, "--port", "9000", "--name", "one"]) == 0
    text = capsys.readouterr().out
    objects = list(yaml.safe_load_all(text))
    assert objects[3]["spec"]["ports"] == [{"name": "http", "port": 9000, "targetPort": "http"}]
    comments = [line for line in text.splitlines() if line.startswith("#   kubectl")]
    lines = [shlex.split(line.removeprefix("#")) for line in comments]
    pod = objects[2]["spec"]["template"]["spec"]
    secrets = {words[4]: words for words in lines if words[1:3] == ["create", "secret"]}
    key = pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]["name"]
    assert secrets.keys() == {key, pod["imagePullSecrets"][0]["name"]}
    assert "--docker-username=$oauthtoken" in secrets["ngc-registry"]
    overrides = [word for words in lines for word in words if word.startswith("--overrides")]
    copier = json.loads(overrides[0].partition("=")[2])
    check(copier | {"kind": "Pod", "metadata": {"name": "one-fill"}})
    stores = [volume for volume in pod["volumes"] if volume["name"] == "store"]
    assert copier["spec"]["volumes"] == stores
    assert copier["spec"]["securityContext"] == pod["securityContext"]


@pytest.mark.parametrize("option", ["--store", "--cache"])
def test_a_manifest_has_claims_and_no_directories(option, capsys):
    with pytest.raises(SystemExit):
        main(["nim", "kubernetes", "--image", IMAGE, option, "runs/store"])
    assert f"arguments: {option} runs/store" in capsys.readouterr().err


def test_the_manifest_refers_to_secrets_and_probes_and_asks_for_a_gpu(tmp_path):
    cache, store, deployment, service = manifest(nim(tmp_path, gpus="2"), "50Gi", "1Gi")
    template = deployment["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    secret = {"secretKeyRef": {"name": "ngc-api", "key": "NGC_API_KEY"}}
    assert container["env"][0]["valueFrom"] == secret
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    for probe, state in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        assert container[f"{probe}Probe"]["httpGet"]["path"] == f"/v1/health/{state}"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("cache", "store")}
    assert claims == {cache["metadata"]["name"], store["metadata"]["name"]}
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()


def test_the_check_of_the_manifest_can_fail(tmp_path):
    deployment = manifest(nim(tmp_path, gpus="1"))[2]
    deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
    with pytest.raises(WorkshopError, match="containerPort"):
        check(deployment)
    for wrong in ({"gpus": "all"}, {"gpus": "device=0"}):
        with pytest.raises(WorkshopError, match="--gpus"):
            manifest(nim(tmp_path, **wrong))
    with pytest.raises(WorkshopError, match="--cache-size"):
        manifest(nim(tmp_path, gpus="1"), cache_size="lots")


def test_files_are_written(tmp_path, capsys):
    file = tmp_path / "k.yaml"
    assert main(["nim", "kubernetes", "--image", IMAGE, "--out", str(file)]) == 0
    kinds = [each["kind"] for each in yaml.safe_load_all(file.read_text())]
    assert kinds == ["PersistentVolumeClaim"] * 2 + ["Deployment", "Service"]
    capsys.readouterr()
    assert main(["nim", "compose", "--image", IMAGE]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["services"]["nim"]["image"] == IMAGE
