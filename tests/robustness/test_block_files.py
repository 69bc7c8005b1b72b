"""Files of block drafters, cut and fuzzed: each is refused in a sentence, quickly, or loads what it should."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import make_block, make_ngram
from damage import JUNK, NUMBERS, SECONDS, TEXTS, cuts, fewer
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.block import checkpoint, ngram

KINDS = ("dflash", "treeflash", "medusa")
CONFIGS = [
    *((kind, "config.json") for kind in KINDS),
    ("dflash", "record/config.json"),
    ("dflash", "ngram/config.json"),
]


@pytest.fixture(scope="module")
def drafters(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("blocks")
    found = {kind: make_block(folder / kind, pair.target, kind, k=3) for kind in KINDS}
    for directory in found.values():
        make_ngram(directory, 128)
    return found


def load(directory: Path) -> Any:
    return checkpoint.load(directory), ngram.load(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut(drafters: dict[str, Path], kind: str) -> None:
    files = sorted(path for path in drafters[kind].rglob("*") if path.is_file())
    assert len(files) == 6
    for path in files:
        for _ in cuts(path):
            with pytest.raises(SteeringError) as caught:
                load(drafters[kind])
            assert path.name in str(caught.value)
    load(drafters[kind])


@pytest.mark.parametrize(("kind", "name"), CONFIGS)
def test_configs_fuzzed(drafters: dict[str, Path], kind: str, name: str) -> None:
    path = drafters[kind] / name
    whole, seen = path.read_bytes(), Counter[str]()
    raw = json.loads(whole)
    wanted = {key: x.clone() for key, x in checkpoint.load(drafters[kind]).state_dict().items()}
    nested = [key for key, value in raw.items() if isinstance(value, dict)]
    keys = st.sampled_from([(key,) for key in raw] + [(key, inner) for key in nested for inner in raw[key]])

    @fewer
    @given(keys, JUNK | NUMBERS | TEXTS, st.booleans())
    def fuzzed(place: tuple[str, ...], value: Any, gone: bool) -> None:
        changed = json.loads(whole)
        holder = changed if len(place) == 1 else changed[place[0]]
        if gone:
            holder.pop(place[-1])
        else:
            holder[place[-1]] = value
        try:
            path.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
        except (ValueError, OverflowError):  # digits without end: json itself refuses
            return
        begin = time.process_time()
        try:
            found, _ = load(drafters[kind])
        except SteeringError as error:
            assert len(str(error)) < 5000 and "\n" not in str(error)
            seen["refused"] += 1
        else:
            assert all(torch.equal(x, wanted[key]) for key, x in found.state_dict().items())
            seen["loaded"] += 1
        assert time.process_time() - begin < SECONDS

    try:
        fuzzed()
    finally:
        path.write_bytes(whole)
    print(f"{kind} {name}: {dict(seen)}")
    assert seen["refused"] > 20
