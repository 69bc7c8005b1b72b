"""Module names of version 0.1.0: importing one gives the module of today, with a note. They go in the next release.

`vllm_steer.generate` and `vllm_steer.train`, which were modules, are functions now.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

STEERED = "drafters.steered"
MOVED = {
    **{"config": f"{STEERED}.config", "steering": f"{STEERED}.module", "drafter": f"{STEERED}.hf"},
    **{"checkpoint": f"{STEERED}.checkpoint", "published": f"{STEERED}.import_sd2"},
    **{"options": "common.options", "provenance": "common.provenance"},
    **{"prompts": "data.prompts", "response_file": "data.response_file", "responses": "data.generate"},
    **{"engine": "data.vllm_engine", "losses": "training.losses", "pair": "training.pair", "cache": "training.cache"},
    **{"batches": "training.batches", "plots": "training.plots", "counting": "bench.block_counting"},
    **{"contender": "bench.candidate", "evaluate": "bench.run", "endpoint": "bench.remote", "report": "bench.report"},
    **{"card": "ops.hub", "serve": "ops.launch", "doctor": "ops.doctor.run", "checks": "ops.doctor.checks"},
    **{"findings": "ops.doctor.findings", "server_checks": "ops.doctor.server"},
    **{"serving.seams": "serving.patches", "serving.model": "serving.injection", "serving.switch": "serving.scale"},
    **{"serving.proposer": "serving.spec_decode.v1", "serving.speculator": "serving.spec_decode.v2"},
    **{"serving.blocks": "serving.telemetry.block_counter", "serving.gauges": "serving.telemetry.metrics"},
    **{"serving.watch": "serving.telemetry.watchdog", "serving.kernel": "serving.kernels"},
    **{"serving.survey": "serving.introspection"},
}
NAMES: dict[str, dict[str, tuple[str, ...]]] = {  # that have left the module which took over an old name
    "config": {"drafters.models": ("text_config", "read_model_config"),
               "common.errors": ("require_at_least", "require_one_of")},
    "pair": {"drafters.tokenizer": ("load_tokenizer",), "drafters.models": ("load_model", "load_models"),
             "training.acceptance": ("measure", "walk", "measure_directory", "fixed_sources")},
    "response_file": {"common.files": ("write_json",)},
}  # fmt: skip
PACKAGE = "vllm_steer."


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(PACKAGE) or fullname.removeprefix(PACKAGE) not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = PACKAGE + MOVED[spec.name.removeprefix(PACKAGE)]
        warnings.warn(f"{spec.name} is now {new}; the old name goes in the next release", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        for place, names in NAMES.get(spec.name.removeprefix(PACKAGE), {}).items():
            for name in names:
                setattr(module, name, getattr(importlib.import_module(PACKAGE + place), name))
        spec.loader_state = module.__spec__  # which the import system is about to replace
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let old names be imported. Repeatable; imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
