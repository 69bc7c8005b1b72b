"""Weights that nobody wrote: each loads with the right values, or ends in a sentence, quickly."""

from __future__ import annotations

import json
import os
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import JUNK, SECONDS, TEXTS, check_loading, fewer, small
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint

LENGTHS = st.sampled_from([0, 1, 7, 10**8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2000)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "X"]
COUNTS = st.integers(-1, 200) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, None, "1"])


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def tensor_files(draw: st.DrawFn, whole: bytes) -> bytes:  # noqa: C901  (a branch for each kind of damage)
    """A safetensors file with its header, header length or data changed."""
    header, data = split(whole)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name] if isinstance(header[name], dict) else {}
        change = draw(st.sampled_from(["dtype", "shape", "offsets", "drop", "rename", "extra", "junk", "data", "same"]))
        if change == "dtype" and "dtype" in entry:
            entry["dtype"] = draw(st.sampled_from(DTYPES) | JUNK)
        elif change == "shape" and "shape" in entry:
            entry["shape"] = draw(st.permutations(entry["shape"]) | st.lists(COUNTS, max_size=3))
        elif change == "offsets" and "data_offsets" in entry:
            entry["data_offsets"] = draw(st.lists(COUNTS, min_size=1, max_size=3))
        elif change == "drop":
            del header[name]
        elif change == "rename":
            header[draw(st.sampled_from(sorted(header)) | TEXTS)] = header.pop(name)
        elif change == "extra":
            header[draw(TEXTS)] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        elif change == "junk":
            header[name] = draw(JUNK)
        elif change == "data":
            value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
            at = 4 * draw(st.integers(0, len(data) // 4 - 1))
            data = data[:at] + struct.pack("<f", value) + data[at + 4 :]
        if not header:
            break
    text = json.dumps(header).encode()
    length = draw(LENGTHS) if draw(st.integers(0, 4)) == 0 else len(text)
    data = data[draw(st.sampled_from([0] * 8 + [1, 4])) :] + b"\0" * draw(st.sampled_from([0] * 8 + [1, 4]))
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize("file", checkpoint.FILES[1:])
def test_fuzzed_tensors(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path, small())
    path, outcomes, expected = tmp_path / "steering" / file, Counter(), checkpoint.load(tmp_path)
    whole = path.read_bytes()

    @fewer
    @given(tensor_files(whole))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[check_loading(tmp_path, expected)] += 1

    run()
    print(f"\n{dict(outcomes)}")
    assert outcomes["loaded"] >= 10 and outcomes["refused"] >= 200


def test_a_header_may_claim_any_size(tmp_path: Path) -> None:
    """A file that is all hole: as large as its header says, and nothing of that is read or allocated."""
    checkpoint.save(tmp_path, small())
    path, size = tmp_path / "steering/model.safetensors", 2**36
    header, _ = split(path.read_bytes())
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in header}
    header["fuse.bias"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    begin = time.process_time()
    with pytest.raises(SteeringError, match="model.safetensors.*(has shape|unable to mmap)"):  # by the machine's size
        checkpoint.load(tmp_path)
    assert time.process_time() - begin < SECONDS


def test_a_file_that_is_written_to_later_changes_no_loaded_weights(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small())
    path, loaded = tmp_path / "steering/model.safetensors", checkpoint.load(tmp_path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(loaded.state_dict()[name], want) for name, want in small().state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
def test_flipped_bits_in_the_weights(tmp_path: Path, dtype: torch.dtype, rank: int | None) -> None:
    """The golden deltas find a flipped bit, or it moves no delta of other states by a thousandth of the largest."""
    checkpoint.save(tmp_path, small(rank).to(dtype))
    path, expected = tmp_path / "steering/model.safetensors", checkpoint.load(tmp_path)
    _header, data = split(path.read_bytes())
    start, width, outcomes = path.stat().st_size - len(data), dtype.itemsize, Counter()
    whole = bytearray(path.read_bytes())
    rng = torch.Generator().manual_seed(0)
    for bit in range(8 * width):
        for weight in torch.randint(len(data) // width, (12,), generator=rng).tolist():
            at = start + weight * width + bit // 8
            whole[at] ^= 1 << bit % 8
            path.write_bytes(whole)
            place = "exponent's top" if bit == 8 * width - 2 else "sign or exponent" if bit >= 8 * width - 9 else "rest"
            outcomes[place, check_loading(tmp_path, expected, tolerance=1e-3)] += 1
            whole[at] ^= 1 << bit % 8
    print(f"\n{dict(outcomes)}")
    assert outcomes["exponent's top", "loaded"] == 0
    assert outcomes["sign or exponent", "refused"] > 4 * outcomes["sign or exponent", "loaded"]


@pytest.mark.parametrize("file", checkpoint.FILES)
def test_flipped_bits_in_every_byte_of_a_header_or_config(tmp_path: Path, file: str) -> None:
    """Free text and the draft length (of which only a warning hangs) may change; sizes, layers and weights may not."""
    checkpoint.save(tmp_path, small())
    path, expected, outcomes = tmp_path / "steering" / file, checkpoint.load(tmp_path), Counter()
    whole = bytearray(path.read_bytes())
    end = len(whole) if file == "config.json" else len(whole) - len(split(bytes(whole))[1])
    for at in range(end):
        for bit in (0, 1 + at % 7):  # the lowest makes another digit of a digit
            whole[at] ^= 1 << bit
            path.write_bytes(whole)
            outcomes[check_loading(tmp_path, expected)] += 1
            whole[at] ^= 1 << bit
    print(f"\n{dict(outcomes)}")
    assert outcomes["refused"] > 5 * outcomes["loaded"]


def test_checkpoints_that_do_not_record_their_layers_load(tmp_path: Path) -> None:
    """Those saved before the golden file had metadata; with it, another layer id in config.json is found."""
    from safetensors.torch import save_file

    checkpoint.save(tmp_path, small())
    config = tmp_path / "steering/config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"target_layer_ids": [1, 4, 7]}))
    with pytest.raises(SteeringError, match=r"layers target \[1, 4, 6\], .* config.json names target \[1, 4, 7\]"):
        checkpoint.load(tmp_path)
    config.write_text(text)
    save_file(load_file(tmp_path / "steering/golden.safetensors"), tmp_path / "steering/golden.safetensors")
    checkpoint.load(tmp_path)
