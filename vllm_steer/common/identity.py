"""Which model it is: a versioned identity of its weights, configuration and tokenizer, and what differs between two.

    v2:<weights>:<config>:<tokenizer>

    weights     every tensor's name, dtype, shape and all its bytes, however the tensors are spread over files
    config      config.json without the keys that saving again changes, and the files of quantisation and adapters
    tokenizer   tokenizer files, chat templates, generation_config.json

Each part is 32 hex digits of a SHA-256. Records of version 1 are 64 hex digits of config.json and samples of the weight
files; they are compared by that digest. Hashes of large files are remembered, see tensor_hashes.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.tensor_hashes import tensors_of

log = logging.getLogger(__name__)

VERSION = "v2"
PARTS = ("weights", "config.json", "tokenizer, chat template or generation_config.json")
VOLATILE = ("transformers_version", "_name_or_path")  # keys of config.json that saving a model again changes
SAMPLES, SAMPLE_BYTES = 16, 64 * 1024  # version 1: of each weight file; smaller files were read whole
CONFIG_FILES = ("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
TOKENIZER_FILES = (
    *(
        "tokenizer*.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "*.model",
        "tokenizer.model.*",
        "*.tiktoken",
        "*.spm",
    ),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "tokenization_*.py", "tekken.json", "generation_config.json"),
)
TOKENIZER_VOLATILE = (*VOLATILE, "name_or_path", "_from_model_config", "_commit_hash")
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


class Identity(str):
    """The text of an identity; it knows its model, which a record of version 1 has to be compared with."""

    model: str | None = None
    revision: str | None = None


def fingerprint(model: str | Path, revision: str | None = None, *, tokenizer: bool = True) -> Identity:
    """The identity of a model directory, or of a hub id at `revision`, which is fetched if it is not in the cache yet.

    A weight file that cannot be read as tensors counts as its bytes: refusing it is left to who loads it. Without
    `tokenizer` the last part is left out, for what depends on token ids alone.
    Raises SteeringError when there is no model, or only a LoRA adapter or GGUF files, or a file changes meanwhile.
    """
    directory, files = _locate(str(model), revision)
    parts = [_config_digest(model, directory)]
    if tokenizer:
        parts.append(_files_digest(directory, TOKENIZER_FILES, TOKENIZER_VOLATILE))
    files = [path for path in _with_adapters(directory, files) if path.name not in NOT_WEIGHTS]
    parts.insert(0, _digest(sorted(tensors_of(files, str(model)))))
    found = Identity(":".join([VERSION, *parts]))
    found.model, found.revision = str(model), revision
    return found


def difference(recorded: Any, now: Any) -> str | None:
    """What differs between a recorded identity and a current one, e.g. "the weights differ"; None if nothing does.

    An identity of now (`fingerprint`) is compared with a record of either version; dicts of the same keys are compared
    key by key, and all else as it reads in JSON.
    """
    if isinstance(recorded, dict) and isinstance(now, dict) and recorded.keys() == now.keys():
        found = (difference(recorded[key], now[key]) for key in now)
        return next((what for what in found if what), None)
    if not isinstance(now, Identity) or not isinstance(recorded, str):
        return None if recorded == json.loads(json.dumps(now)) else "the values differ"
    version, *before = recorded.split(":")
    if version == VERSION:
        pairs = zip(PARTS, before, now.split(":")[1:], strict=False)  # one of them may lack the tokenizer
        names = [name for name, old, new in pairs if old != new]
        return f"{_joined(names)} differ" if names else None
    if before:
        return f"the identity was recorded in version {version}, known are 1 and {VERSION}: upgrade vllm-steer"
    if recorded != sampled_fingerprint(now.model or "", now.revision):
        return "the weights or config.json differ"
    log.warning(
        "%s is compared with a record of an older version, which covers samples of the weights and no tokenizer",
        now.model,
    )
    return None


def _joined(names: list[str]) -> str:
    return "the " + " and the ".join(names)


def sampled_fingerprint(model: str | Path, revision: str | None = None) -> str:
    """Version 1 of the identity, for records made by it: 64 hex digits.

    Hashed are config.json without volatile keys, and of every weight file its size and evenly spaced samples, which
    miss changes between the samples.
    """
    directory, weights = _locate(str(model), revision)
    digest = hashlib.sha256(_lasting_config(model, directory).encode())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"\n{size}\n".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _lasting_config(model: str | Path, directory: Path) -> str:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SteeringError(f"cannot read the config.json of {model} ({error}): give a model directory") from None


def _config_digest(model: str | Path, directory: Path) -> str:
    return _digest([_lasting_config(model, directory), _files_digest(directory, CONFIG_FILES, VOLATILE)])


def _files_digest(directory: Path, patterns: tuple[str, ...], volatile: tuple[str, ...]) -> str:
    """Digest of the files' names and contents; JSON counts by its values, since saving again changes its layout."""
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    contents = {path.relative_to(directory).as_posix(): _content_digest(path, volatile) for path in sorted(found)}
    return _digest(contents)


def _content_digest(path: Path, volatile: tuple[str, ...]) -> str:
    raw = path.read_bytes()
    if path.suffix == ".json":
        try:
            content = json.loads(raw)
            if isinstance(content, dict):
                return _digest({key: value for key, value in content.items() if key not in volatile})
        except (ValueError, RecursionError):
            pass  # a damaged file differs in its bytes; loading it fails elsewhere
    return hashlib.sha256(raw).hexdigest()[:32]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _locate(model: str, revision: str | None) -> tuple[Path, list[Path]]:
    """The directory of a model and its weight files, in order: safetensors, else pickles."""
    if Path(model).is_file():
        raise SteeringError(f"{model} is a file, GGUF for one: give the model's directory or hub id, with safetensors")
    for pattern in ("*.safetensors", "*.bin"):
        directory = Path(model) if Path(model).is_dir() else _snapshot(model, revision, pattern)
        if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
            raise SteeringError(f"{model} is a LoRA adapter without its base model: merge it, and give the whole model")
        index = next(iter(sorted(directory.glob(f"{pattern}.index.json"))), None)
        if index is not None:  # a repository may hold other copies beside the files its index names
            return directory, [directory / name for name in _indexed(index)]
        if found := sorted(directory.glob(pattern)):
            return directory, found
    if any(directory.glob("*.gguf")):
        raise SteeringError(f"{model} has its weights as GGUF alone, which has no identity: give it as safetensors")
    if (directory / "steering").is_dir():
        raise SteeringError(f"{model} is a steering adapter without a drafter: give the drafter, or merge the adapter")
    raise SteeringError(f"{model} has no weights (*.safetensors or *.bin): give a model directory or a hub id")


def _with_adapters(directory: Path, files: list[Path]) -> list[Path]:
    """The files, and a LoRA that lies beside them, where transformers applies it: an index does not name it."""
    if not (directory / "adapter_config.json").is_file():
        return files
    return sorted({*files, *directory.glob("adapter_model.safetensors"), *directory.glob("adapter_model.bin")})


def _indexed(index: Path) -> list[str]:
    """The weight files an index names, in order: all of them beside it, whatever it says."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SteeringError(f"cannot read {index} ({type(error).__name__}: {error}): copy it again") from None
    if not names:
        raise SteeringError(f"{index} names no weight file: copy the whole model again")
    if strange:
        raise SteeringError(f"{index} names {strange[0]!r}, which is no file beside it: copy the whole model again")
    return names


def _snapshot(model: str, revision: str | None, pattern: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.index.json", *CONFIG_FILES, *TOKENIZER_FILES, pattern]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; all mean "could not fetch"
        raise SteeringError(
            f"{model}: no such directory, and not a hub id that can be fetched ({type(error).__name__}: {error}): "
            "check the name, the network, or HF_HUB_OFFLINE"
        ) from error
