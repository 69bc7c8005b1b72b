"""What a draft tree asks of a GPU beyond the models' passes, counted in real engines of both runners, without one.

Every operator of torch that trees run is recorded. None may wait for the device, and their number may depend on the
shape of the tree alone: not on requests, layers or accepted tokens. Run as a script this file is an engine process that
returns what it recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import engine_process
import engines
import pytest
from operators import Recorder
from pairs import DRAFTER, TARGET, Size, make_pair, random_prompt
from repository import ROOT, SUPPORT

K, SHAPES = 3, {"fixed": {"tree": [2, 2, 1]}, "adaptive": {"tree_rows": 4}}


def recorded(found: list[dict[str, Any]], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, appending the operators of each call."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Recorder() as recorder:
            out = method(*args, **kwargs)
        found.append({"launches": recorder.launches, "waits": sorted(recorder.waits)})
        return out

    return call


def unrecorded(method: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """`method`, of which a GPU has another form: its calls are counted, its operators are not."""
    from torch.utils._python_dispatch import _disable_current_modes

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        with _disable_current_modes():
            return method(*args, **kwargs)

    return call


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """As engine_process.serve_job, and by method what its calls launched; "copies": launches of the pages' kernel."""
    from vllm_steer.serving.trees import drafting, layout, pages

    found: dict[str, list[dict[str, Any]]] = {}
    copies = [0]
    own = [
        *((layout.Rows, name) for name in ("__init__", "place", "find_pages", "forks", "choose", "commits", "shown")),
        *((layout.Rows, name) for name in ("kept", "count_winners", "following")),
        *((kind, name) for kind in (drafting.Growth, drafting.AdaptiveGrowth) for name in ("grow", "nodes")),
        (drafting.Growth, "step"),
    ]
    before = [(kind, name, getattr(kind, name)) for kind, name in [*own, (pages.Pages, "copy")]]
    for kind, name in own:
        setattr(kind, name, recorded(found.setdefault(name, []), getattr(kind, name)))
    pages.Pages.copy = unrecorded(pages.Pages.copy, copies)
    try:
        with engine_process.opened(job) as llm:
            tokens = [[list(o.outputs[0].token_ids) for o in engine_process.run_call(llm, c)] for c in job["calls"]]
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)
    return {"calls": [{"tokens": tokens, "found": found, "copies": copies[0]}], "error": None, "metrics": {}}


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("v1", "fixed"),
        ("v2", "adaptive"),
        pytest.param("v1", "adaptive", marks=pytest.mark.slow),
        pytest.param("v2", "fixed", marks=pytest.mark.slow),
    ],
)
def test_what_a_tree_launches_depends_on_its_shape_alone(name: str, of: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", str(ROOT))])
    runner = engines.Runner(name, __file__, PYTHONPATH=path)
    deep = Size(TARGET.hidden, 2 * TARGET.layers, TARGET.ffn, TARGET.kv_heads), Size(DRAFTER.hidden, 4, DRAFTER.ffn)
    pairs = (make_pair(tmp_path / "a"), 1), (make_pair(tmp_path / "b", target=deep[0], drafter=deep[1]), 3)
    kinds: list[dict[str, set[int]]] = []
    for pair, requests in pairs:
        calls = [{"prompts": [random_prompt(9, seed=i) for i in range(requests)], "sampling": {"max_tokens": 16}}]
        spec = {"model": str(pair.steered), "num_speculative_tokens": K}
        out = runner.run(pair.target, spec, calls, additional_config={"vllm_steer": SHAPES[of]})
        assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
        (call,) = out["calls"]
        found = call["found"]
        passes, rounds = len(found["choose"]), len(found["step"]) // (K - 1)
        assert passes > 3 and rounds >= passes
        assert call["copies"] == 2 * passes + rounds, "one launch to fork, one to commit, one for the drafter's rows"
        assert not [each for calls in found.values() for each in calls if each["waits"]]
        kinds.append({method: {each["launches"] for each in calls} for method, calls in found.items()})
    assert kinds[0] == kinds[1]
    assert bool(kinds[0].pop("following")) == (name == "v2"), "V1 has the drafts in its own metadata"
    assert all(len(launches) == 1 for method, launches in kinds[0].items() if method not in ("grow", "nodes"))
    runner.close()


if __name__ == "__main__":
    engine_process.main(serve_job)
