"""Real vLLM engines for tests: a process per model runner builds them, runs prompts and records drafts.

The two runners are chosen by environment variables that vLLM reads when it is imported, so each lives in a process of
its own, started once per test session and fed one JSON job per line. V2 runs without a GPU on Triton's interpreter:
`make triton` puts Triton where only that process sees it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from repository import SUPPORT

PATIENCE = 900  # seconds for one job, far beyond the longest: a test that hangs must end
DELTAS = 8  # numbers of a delta that tests look at
GPU = Path("/dev/nvidia0").exists()
TRITON = Path(sys.prefix) / "share" / "triton-interpreter"
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "TOKENIZERS_PARALLELISM": "false",
}
LLM_KEYS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "block_size": 32,
    "seed": 0,
}


def runner_env(runner: str) -> dict[str, str]:
    """The environment under which vLLM uses model runner "v1" or "v2", on a GPU where there is one."""
    if runner == "v1" or GPU:
        return {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    assert (TRITON / "triton").is_dir(), f"Triton is not in {TRITON}: run `make triton` (V2 needs its interpreter here)"
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "STEER_TEST_TRITON": str(TRITON)}


# In every process of a server, before vLLM is imported.
INTERPRETER = "import os, interpreter\ninterpreter.pretend_triton_has_a_cpu_backend(os.environ['STEER_TEST_TRITON'])\n"


def server_env(runner: str, directory: Path) -> dict[str, str]:
    """What a `vllm serve` of this runner needs: for V2 here, an interpreter's start (in `directory`) that prepares
    Triton in each of its processes."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | runner_env(runner)
    if "STEER_TEST_TRITON" in env:
        (directory / "sitecustomize.py").write_text(INTERPRETER)
        paths = [str(directory), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return env


class Runner:
    """Client of one engine process; `script` is what runs there."""

    def __init__(self, runner: str, script: str = str(SUPPORT / "engine_process.py"), **env: str):
        self.name = runner
        self._done: dict[str, dict[str, Any]] = {}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, script],
            env=os.environ | ENV | runner_env(runner) | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(
        self,
        target: Path,
        spec: dict[str, Any] | None,
        calls: list[dict[str, Any]],
        env: dict[str, str] | None = None,
        **llm: Any,
    ) -> dict[str, Any]:
        """Build one engine, run `calls` ({"prompts": [[ids]], "sampling": {...}}), close it; once per distinct job.

        "sampling" may be a list, one for each prompt, and so may "lora" (a directory or None); with "abort":
        {"after": steps, "prompts": [indices]} those prompts are aborted after that many engine steps, with "steer":
        {"after": steps, "scale": number, "adapter": name}, either or both, or "refine": {"after": steps, "on": bool}
        the switch is thrown then (its answers: "switched"), with "kill": {"after": steps, "rank": number} that worker
        is killed, where workers are Ray's actors. A call marked "refused" may be refused by vLLM; its result is then
        {"refused": vLLM's sentence}.
        "continues": i puts the prompts and answers of call i before the one prompt of this call.

        Returns {"calls": [{"tokens": [[ids]], "blocks": [[[position, [drafts]], ...] per prompt]}], "log": text,
        "error": None or the exception's text, "metrics": vLLM's counters}. A block's position is that of the newest
        token it continues; "deltas" [[position, the first DELTAS numbers of the delta it was drafted under], ...] go
        with the blocks. `describe` of engine_process.py and `watch_steering` of recording.py say what else is in it.
        """
        job = {"target": str(target), "spec": spec, "calls": calls, "env": env or {}, "llm": LLM_KEYS | llm}
        if (key := json.dumps(job, sort_keys=True)) in self._done:
            return self._done[key]
        mark = os.fstat(self._log.fileno()).st_size
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        hung = threading.Timer(PATIENCE, self._process.kill)  # its end is an empty line
        hung.start()
        line = self._process.stdout.readline()
        hung.cancel()
        self._log.seek(mark)
        log = self._log.read().decode(errors="replace")
        assert line, f"the {self.name} engine process died:\n{log[-4000:]}"
        self._done[key] = json.loads(line) | {"log": log}
        return self._done[key]

    def generate(self, target: Path, spec: dict[str, Any] | None, prompts: list[list[int]], **keys: Any) -> dict:
        """`run` for one call; sampling options max_tokens, temperature, ... and engine options by name."""
        names = ("max_tokens", "temperature", "seed", "top_p", "n", "logprobs")
        sampling = {k: keys.pop(k) for k in names if k in keys}
        out = self.run(target, spec, [{"prompts": prompts, "sampling": sampling}], **keys)
        assert out["error"] is None, f"{out['error']}\n{out['log'][-6000:]}"
        return out["calls"][0] | {"log": out["log"], "metrics": out["metrics"]}

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def assert_steered(call: dict[str, Any], lengths: set[int]) -> None:
    """Assert of one call's result that every proposal made as many passes as `lengths` says, and that steering changed
    at least a row for each request past its prompt in the first pass, and every request's row in the others."""
    assert sum(r["decoding"] for r in call["rounds"]) > 0, "nothing was drafted"
    for r in call["rounds"]:
        assert len(r["rows"]) in lengths and r["rows"][0] >= r["decoding"], r
        assert r["rows"][1:] == [r["requests"]] * (len(r["rows"]) - 1), r


@functools.cache
def _in_hugging_face(target: Path, steered: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_steer.drafters.steered import checkpoint

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval(), checkpoint.load(steered)


def assert_own_guides(call: dict[str, Any], target: Path, steered: Path, prompts: list[list[int]]) -> None:
    """Assert of one call's result that every proposal for every prompt was made under that prompt's own guide: the
    target's states, by Hugging Face, at the last position before the newest token of what this request really said."""
    import torch

    model, steering = _in_hugging_face(target, steered)
    compared = 0
    for prompt, answer, found in zip(prompts, call["tokens"], call["deltas"], strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
            want = steering(torch.cat([states[i][0] for i in steering.config.target_layer_ids], -1))[:, 0, :DELTAS]
        known = [(position - 1, delta) for position, delta in found if position <= len(want)]  # or a stop cut it off
        assert known, f"nothing was drafted for the prompt of {len(prompt)} tokens"
        got, want = torch.tensor([delta for _, delta in known]), want[[position for position, _ in known]]
        assert want.std(0).max() > 0.1 or len(known) == 1, "deltas alike would not tell one guide from another"
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        compared += len(known)
    assert compared > len(prompts)
