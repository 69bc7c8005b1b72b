"""vllm-steer: steered speculative decoding (SD²) for vLLM.

Everything below is imported when it is first used; `import vllm_steer` loads neither torch nor vllm.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    import vllm_steer

    tokenizer = AutoTokenizer.from_pretrained("target")
    target = AutoModelForCausalLM.from_pretrained("target", dtype="float32")
    drafter = AutoModelForCausalLM.from_pretrained("drafter-steered", dtype="float32")
    steering = vllm_steer.load_steering("drafter-steered")
    prompt = tokenizer("def add(a, b):").input_ids
    found = vllm_steer.generate(target, drafter, prompt, steering, k=5, max_new_tokens=64)
    print(tokenizer.decode(found.tokens), found.acceptance_length)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_steer.common import moved

if TYPE_CHECKING:
    from vllm_steer.bench.run import BenchConfig as BenchConfig
    from vllm_steer.bench.run import benchmark as benchmark
    from vllm_steer.common.errors import SteeringError as SteeringError
    from vllm_steer.decoding.chain import Generation as Generation
    from vllm_steer.decoding.chain import generate as generate
    from vllm_steer.drafters.steered.checkpoint import load_steering as load_steering
    from vllm_steer.drafters.steered.config import SteeringConfig as SteeringConfig
    from vllm_steer.drafters.steered.hf import attach as attach
    from vllm_steer.drafters.steered.module import Steering as Steering
    from vllm_steer.training.config import TrainConfig as TrainConfig
    from vllm_steer.training.trainer import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "BenchConfig": "vllm_steer.bench.run",
    "Generation": "vllm_steer.decoding.chain",
    "Steering": "vllm_steer.drafters.steered.module",
    "SteeringConfig": "vllm_steer.drafters.steered.config",
    "SteeringError": "vllm_steer.common.errors",
    "TrainConfig": "vllm_steer.training.trainer",
    "attach": "vllm_steer.drafters.steered.hf",
    "benchmark": "vllm_steer.bench.run",
    "generate": "vllm_steer.decoding.chain",
    "load_steering": "vllm_steer.drafters.steered.checkpoint",
    "train": "vllm_steer.training.trainer",
}
__all__ = ["__version__", *_PUBLIC]  # names, every one a string


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


moved.install()


def __dir__() -> list[str]:
    return sorted(__all__)
