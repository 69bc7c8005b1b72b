"""Build the CPU image where no container engine runs and no image registry is reached, and let it answer.

    apt-get install buildah debootstrap
    python3 docker/build_cpu.py --work DIR          as root; DIR takes a few times the image's 4 GB, and goes at the end

Debian's packages become the base image, buildah builds docker/Dockerfile.cpu on it without a daemon, a server inside
the result serves examples/tiny_pair to docker/smoke.py. Then docker/Dockerfile, the one for GPUs, is built on that
image in place of vLLM's: each of its steps runs. Exit code 0 only if all of it worked.

This machine's pip configuration is lent to the build and checked not to be in the image.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = "bookworm"  # the Debian that has Python 3.11
BASE, IMAGE, GPU_IMAGE = "localhost/python:3.11", "localhost/vllm-steer-cpu", "localhost/vllm-steer-gpu-on-cpu"
BASE_RECIPE = """\
FROM scratch
ADD base.tar /
RUN apt-get update && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \\
    && apt-get clean && rm -rf /var/lib/apt/lists/*
"""
SERVE = ["/models/target", "--speculative-config", '{"model": "/models/steered", "num_speculative_tokens": 5}']
SERVE += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.3"]
SERVER_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Builder:
    """buildah with its storage inside one directory: nothing on the machine is shared or left behind."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.prefix = ["buildah", "--root", str(work / "storage"), "--runroot", str(work / "run")]
        self.env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(work), "HOME": str(work)}

    def __call__(self, *args: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run `buildah ARGS`. Raises CalledProcessError when it fails."""
        return subprocess.run([*self.prefix, *args], env=self.env, check=True, text=True, **options)

    def start(self, *args: str, **options: object) -> subprocess.Popen[bytes]:
        """Run `buildah ARGS` beside this process, in a session of its own."""
        return subprocess.Popen([*self.prefix, *args], env=self.env, start_new_session=True, **options)

    def build(self, recipe: Path, tag: str, context: Path, *args: str) -> None:
        """Build `recipe`. The docker format, because OCI's has no health check."""
        common = ["--format", "docker", "--isolation", "chroot", "--layers=false", "-f", str(recipe), "-t", tag]
        self("bud", *common, *args, str(context))

    def config(self, image: str) -> dict:
        """The image's configuration as docker shows it: User, Env, Entrypoint, Healthcheck, Volumes."""
        shown = self("inspect", "--type", "image", image, stdout=subprocess.PIPE).stdout
        return json.loads(shown)["Docker"]["config"]


def step(text: str) -> None:
    print(f"\n== {time.strftime('%H:%M:%S')} {text}", flush=True)


def make_base(builder: Builder) -> None:
    """A plain Python 3.11 image out of Debian's packages."""
    root = builder.work / "base"
    mirror = subprocess.run(["apt-cache", "policy"], text=True, stdout=subprocess.PIPE, check=True).stdout
    mirror = re.search(rf"(http\S+) {SUITE}/main", mirror)  # whichever this machine uses
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, str(root)]
    subprocess.run(command + ([mirror.group(1)] if mirror else []), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["tar", "-C", str(root), "-cf", str(builder.work / "base.tar"), "."], check=True)
    shutil.rmtree(root)
    (builder.work / "Dockerfile.base").write_text(BASE_RECIPE)
    builder.build(builder.work / "Dockerfile.base", BASE, builder.work)
    (builder.work / "base.tar").unlink()


def lend_pip(work: Path) -> tuple[list[str], set[str]]:
    """Options of `buildah bud` that give the build this machine's pip configuration, and the strings to look for after.

    What the configuration names on this machine (a certificate, a folder of wheels) is mounted read-only.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout
    pairs = [line.partition("=") for line in listed.splitlines()]
    values: dict[str, str] = {}
    for name, _, value in sorted(pairs, key=lambda pair: pair[0].startswith(":env:")):  # the environment wins
        values[name.rpartition(".")[2]] = str(ast.literal_eval(value)).strip()
    options: list[str] = []
    traces: set[str] = set()
    for key, value in values.items():
        for url, path in re.findall(r"(?:^|(?<=\s))(file://)?(/\S+)", value):
            if not Path(path).exists() or path in traces:
                continue
            traces.add(path)
            lent = Path(path).parent if url else Path(path)  # an index refers to files beside itself
            inside = f"/run/lent/{len(traces)}"
            options += ["--volume", f"{lent}:{inside}:ro"]
            inside += f"/{Path(path).name}" if url else ""
            values[key] = re.sub(rf"{re.escape(path)}(?=$|\s)", inside, values[key])
        traces |= set(re.findall(r"https?://\S+", value))
    parser = configparser.RawConfigParser()
    parser["global"] = {key: value.replace("\n", "\n ") for key, value in values.items()}
    with (work / "pip.conf").open("w") as file:
        parser.write(file)
    return [*options, "--secret", f"id=pip.conf,src={work / 'pip.conf'}"], traces


def check_image(builder: Builder, image: str, traces: set[str]) -> None:
    """Not root, a health check, a volume for caches, `vllm serve`, and nothing of the pip configuration."""
    config = builder.config(image)
    print(json.dumps({key: config.get(key) for key in ("User", "Entrypoint", "Healthcheck", "Volumes", "Env")}))
    assert config["User"] not in ("", "0", "root"), f"{image} runs as {config['User']!r}"
    assert config["Entrypoint"] == ["vllm", "serve"], config["Entrypoint"]
    assert "/health" in config["Healthcheck"]["Test"][-1] and "/home/vllm/.cache" in config["Volumes"]
    assert not [e for e in config["Env"] if re.search(r"TOKEN|PIP_|SECRET|PASSWORD", e)], config["Env"]
    history = builder("inspect", "--type", "image", image, stdout=subprocess.PIPE).stdout
    assert not [trace for trace in traces if trace in history], f"the pip configuration is in {image}"
    container = builder("from", image, stdout=subprocess.PIPE).stdout.strip()
    mounted = Path(builder("mount", container, stdout=subprocess.PIPE).stdout.strip())
    try:
        suspects = [mounted / p for p in ("etc/pip.conf", "root/.config/pip", "root/.cache/pip", "opt/venv/pip.log")]
        suspects += (mounted / "run" / "lent").rglob("*")  # empty mount points stay
        left = [p for p in suspects if (p.stat().st_size if p.is_file() else p.is_dir() and any(p.iterdir()))]
        assert not left, f"left of the pip configuration: {left}"
        print("size of the file system:", subprocess.check_output(["du", "-sh", str(mounted)], text=True).split()[0])
    finally:
        builder("umount", container, stdout=subprocess.DEVNULL)
        builder("rm", container, stdout=subprocess.DEVNULL)


def smoke(builder: Builder, image: str) -> None:
    """Serve the tiny pair inside `image`, ask it from inside, and look for the line that says it steers."""
    container = builder("from", image, stdout=subprocess.PIPE).stdout.strip()
    mounts = [f"{ROOT / 'examples' / 'tiny_pair'}:/models:ro", f"{ROOT / 'docker' / 'smoke.py'}:/smoke.py:ro"]
    run = ["run", "--isolation", "chroot", *[word for mount in mounts for word in ("--volume", mount)]]
    run += [word for item in SERVER_ENV.items() for word in ("--env", "=".join(item))]
    log = builder.work / "server.log"
    with log.open("wb") as out:
        server = builder.start(*run, container, "--", "vllm", "serve", *SERVE, stdout=out, stderr=out)
    client = builder.start(*run, container, "--", "python3", "/smoke.py")
    try:
        while client.poll() is None and server.poll() is None:
            time.sleep(1)
        text = log.read_text(errors="replace")
        assert server.poll() is None, f"the server ended with {server.returncode}:\n{text[-3000:]}"
        assert client.returncode == 0, f"docker/smoke.py ended with {client.returncode}"
        test = builder.config(image)["Healthcheck"]["Test"]
        builder(*run, container, "--", *test[1:])  # the health check, as an engine would run it
        builder(*run, container, "--", "id")
    finally:
        for process in (client, server):  # buildah and all that it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    proof = re.search(r"steering is on: .*", text)
    assert proof, f"the server never said that steering is on: {log}"
    print(proof.group(0))
    builder("rm", container, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for everything this makes; must not exist")
    parser.add_argument("--keep", action="store_true", help="leave DIR, with the images, where it is")
    args = parser.parse_args()
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not found: apt-get install {' '.join(missing)}")
    args.work.mkdir(parents=True)
    builder = Builder(args.work.resolve())
    try:
        step("base image from Debian's packages")
        make_base(builder)
        lent, traces = lend_pip(builder.work)
        step("docker/Dockerfile.cpu")
        builder.build(ROOT / "docker" / "Dockerfile.cpu", IMAGE, ROOT, "--build-arg", f"BASE_IMAGE={BASE}", *lent)
        check_image(builder, IMAGE, traces)
        step("one request, answered from inside the image")
        smoke(builder, IMAGE)
        step("docker/Dockerfile, on the CPU image in place of vLLM's")
        builder.build(ROOT / "docker" / "Dockerfile", GPU_IMAGE, ROOT, "--build-arg", f"BASE_IMAGE={IMAGE}", *lent)
        check_image(builder, GPU_IMAGE, traces)
    finally:
        if not args.keep:
            builder("rm", "--all", stdout=subprocess.DEVNULL)
            shutil.rmtree(args.work)
    step("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
