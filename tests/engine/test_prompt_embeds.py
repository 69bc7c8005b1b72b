"""Prompt embeddings under a drafter are refused when the engine is built, by either runner, steered or plain."""

from __future__ import annotations

from typing import Any

import pytest
from repository import ROOT

TRAINED = ROOT / "examples" / "tiny_pair"


@pytest.mark.parametrize("drafter", ["drafter", "steered"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_engine_is_not_built(runner: str, drafter: str, runners: Any) -> None:
    spec = {"model": str(TRAINED / drafter), "num_speculative_tokens": 3}
    found = runners(runner).run(TRAINED / "target", spec, [], enable_prompt_embeds=True)
    assert "prompt embeddings (--enable-prompt-embeds) do not work with the drafter of this server" in found["error"]
    assert "drop --enable-prompt-embeds, or serve without --speculative-config" in found["error"]
