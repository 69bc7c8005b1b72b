"""What the sources of the package may not do: run data, or listen on a port."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_steer

SOURCES = sorted(Path(vllm_steer.__file__).parent.rglob("*.py"))
NO_IMPORT = {  # readers that run what they read, and servers
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"),
    *("socket", "_socket", "socketserver", "http.server", "xmlrpc", "wsgiref", "asyncio", "uvicorn", "hypercorn"),
    *("gunicorn", "aiohttp", "flask", "tornado", "websockets", "zmq", "grpc", "multiprocessing.connection"),
}
NO_BUILTIN = {"eval", "exec", "compile", "__import__"}
NO_METHOD = {"system", "popen", "bind", "listen", "serve_forever", "start_server", "create_server", "load_pickle"}


READS_STATE_DICTS = ("import_sd2.py", "tensor_hashes.py", "record.py")  # with weights_only=True, as `offences` checks


def offences(source: str) -> list[str]:
    """What a source does that no file of this package may: run data as code, load pickles, listen."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if {name, name.split(".")[0]} & NO_IMPORT or name == "torch.load"]
        if not isinstance(node, ast.Call):
            continue
        keys = {key.arg: getattr(key.value, "value", key.value) for key in node.keywords}
        called = ast.unparse(node.func)
        if called in NO_BUILTIN or (isinstance(node.func, ast.Attribute) and node.func.attr in NO_METHOD):
            found.append(called)
        if called == "torch.load" and keys.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        found += [f"{k}={keys[k]}" for k in ("trust_remote_code", "shell", "allow_pickle") if keys.get(k, False)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_sources_run_no_data_and_listen_nowhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not offences(text)
    assert "torch.load(" not in text or path.name in READS_STATE_DICTS, "state dicts are read in these places only"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from http.server import HTTPServer",
        "import http.server as s",
        "from http import server",
        "from asyncio import start_server",
        "from torch import load",
        "def f(): import socket",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "eval(x)",
        "__import__('pick' + 'le')",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "s.listen(1)",
    ],
)
def test_the_source_check_finds(source: str) -> None:
    assert offences(source)
    assert not offences("import torch\nmodel.eval()\ntorch.load(p, weights_only=True)\nsubprocess.run(['git'])")
