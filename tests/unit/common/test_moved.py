"""Names of 0.1.0 still work for one release, with a note, and are the very modules of today."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from vllm_steer.common import moved

HEAVY = ("serving.speculator", "serving.proposer", "serving.kernel")  # need vLLM's V2 or a GPU's Triton to import


@pytest.mark.parametrize("name", [name for name in moved.MOVED if name not in HEAVY])
def test_an_old_name_is_the_module_of_today(name: str) -> None:
    code = (
        f"import warnings\nwith warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('always')\n"
        f"    import vllm_steer.{name} as old\nimport vllm_steer.{moved.MOVED[name]} as new\n"
        f"assert old is new and new.__spec__.name == new.__name__ == 'vllm_steer.{moved.MOVED[name]}'\n"
        f"print([str(w.message) for w in said if 'vllm_steer' in str(w.message)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"vllm_steer.{name} is now vllm_steer.{moved.MOVED[name]}; the old name goes" in done.stdout


@pytest.mark.parametrize(
    "line",
    ["config import SteeringError, read_model_config, require_one_of", "pair import load_tokenizer, measure",
     "response_file import write_json, ResponseFile", "data import read_rows, split_rows, without_prompts",
     "prompts import read_prompts, encode_prompt", "checkpoint import load, refuse_used"],
)  # fmt: skip
def test_old_imports(line: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"from vllm_steer.{line}"], check=True)


@pytest.mark.parametrize("name", ["Row", "split_rows", "collate", "read_rows", "without_prompts", "sha256"])
def test_functions_of_the_old_data_module(name: str) -> None:
    with pytest.warns(FutureWarning, match=f"vllm_steer.data.{name} is now"):
        assert callable(getattr(import_module("vllm_steer.data"), name))


def test_the_old_class_of_the_live_switch() -> None:
    with pytest.warns(FutureWarning, match="is now vllm_steer.serving.scale"):
        sys.modules.pop("vllm_steer.serving.switch", None)
        assert import_module("vllm_steer.serving.switch").Switch is import_module("vllm_steer.serving.scale").Switch
