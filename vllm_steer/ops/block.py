"""What the verbs say and do about block drafters: `check`, `serve`, `push`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.redaction import redact
from vllm_steer.drafters.block import checkpoint, ngram
from vllm_steer.drafters.block.config import KINDS, METHODS, BlockConfig, is_block_drafter
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint as steered

FILES = (checkpoint.CONFIG, "*.safetensors", "*.safetensors.index.json", f"{ngram.FOLDER}/*", f"{checkpoint.RECORD}/*")
SERVE = "## Serve\n\nWith vllm-steer installed beside vLLM:"  # of a model card


def resolve(source: str | Path) -> Path:
    """Local directory of a steered checkpoint or a block drafter: itself, or what vllm-steer needs of a hub repository.

    Raises SteeringError when there is no such directory or repository, or it cannot be fetched.
    """
    folder = steered.resolve(source)
    if folder == Path(source).expanduser() or steered.has_steering(folder):
        return folder
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        if not is_block_drafter(Path(hf_hub_download(str(source), checkpoint.CONFIG)).parent):
            return folder
        return Path(snapshot_download(str(source), allow_patterns=list(FILES)))
    except EntryNotFoundError:
        return folder
    except Exception as error:  # a dozen unrelated types, as in steered.resolve
        raise SteeringError(
            f"{source}: its files could not be fetched from the hub ({type(error).__name__}: {error}): check the name, "
            "the network, or HF_HUB_OFFLINE"
        ) from error


def describe(directory: Path, target: str | None) -> str:
    """What a block drafter is, in a few lines, once all of it was loaded and compared with the target given.

    Raises SteeringError for damage, or another target's drafter.
    """
    config = BlockConfig.read(directory)
    if target is not None:
        config.check_target(read_model_config(target))
    drafter = checkpoint.load(directory)
    record = checkpoint.read_record(directory)
    count = sum(x.numel() for x in drafter.parameters())
    states = f"reads the inputs of target layers {', '.join(map(str, config.states))}" if config.states else (
        "reads the target's last state")  # fmt: skip
    lines = [
        f"{config.kind} drafter: {KINDS[config.kind]}",
        f"sizes      hidden size {config.hidden_size}, vocabulary {config.vocab_size}, {count:,} parameters; {states}",
        f"drafts     {config.draft_length} per block at most",
        f"made for   target {record.target}; golden states agree" if record else "made for   not on record: published",
    ]
    if ngram.has_ngram(directory):
        found = ngram.load(directory).config
        lines.append(f"bigram     alpha {found.alpha:g} greedy, {found.alpha_sampled:g} sampled")
    if record and record.acceptance:
        lines.append(f"acceptance {record.acceptance}")
    lines.append(f"target     {f'fits {target}' if target else 'not checked: give --target'}")
    return "\n".join(lines)


def target_of(directory: Path, given: str | None) -> tuple[str, Any]:
    """Name and transformers config of the target: the given one, or the recorded one where it can be read.

    Raises SteeringError when there is neither.
    """
    record = checkpoint.read_record(directory)
    name = given or (record.target if record else None)
    if name is None:
        raise SteeringError(f"{directory} does not record its target: give --target")
    try:
        return name, read_model_config(name)
    except SteeringError as error:
        raise SteeringError(f"{error}; or give --target") from None


def speculative(directory: Path, config: BlockConfig) -> dict[str, Any]:
    """vLLM's --speculative-config for a block drafter."""
    found = {"method": METHODS[config.kind], "model": str(directory), "num_speculative_tokens": config.draft_length}
    return found if config.kind == "medusa" else found | {"draft_sample_method": "probabilistic"}


def card(directory: Path, repo: str, license_name: str | None, ours: str, tables: list[str]) -> str:
    """The model card of a block drafter that loads, with the tables of benchmarks of exactly this one; `ours` is the
    line that says that nobody wrote it by hand."""
    from huggingface_hub import ModelCardData

    config, record = BlockConfig.read(directory), checkpoint.read_record(directory)
    checkpoint.load(directory)
    if record is None:
        raise SteeringError(
            f"{directory} has no {checkpoint.RECORD}/: a card is written for drafters that were made here"
        )
    record = checkpoint.Record(**redact(dataclasses.asdict(record)))
    tags = ["speculative-decoding", config.kind, "vllm-steer"]
    head = ModelCardData(library_name="vllm", license=license_name, tags=tags).to_yaml()
    name = repo.rpartition("/")[2]
    fetch, serve = f"hf download {repo} --local-dir {name}", f"vllm-steer serve ./{name} --target {record.target}"
    lines = [
        f"---\n{head}\n---",
        ours,
        f"# A {config.kind} drafter for the target {record.target}",
        f"{KINDS[config.kind].capitalize()}; {config.draft_length} drafts in one pass.",
        f"{SERVE}\n\n    {fetch}\n    {serve}",
        _acceptance(record, ngram.load(directory) if ngram.has_ngram(directory) else None),
        *(tables or ["Not measured in vLLM: there is no `vllm-steer bench` result with this card."]),
        "## How it was made\n\n```json\n" + json.dumps(record.provenance, indent=2) + "\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _acceptance(record: checkpoint.Record, bigram: ngram.Ngram | None) -> str:
    lines = ["## Acceptance"]
    if found := record.acceptance.get("trained"):
        length = found["acceptance_length"]
        lines.append(
            f"Predicted when it was trained, teacher forced on {found['positions']} held-out blocks "
            f"({record.acceptance['data']}), not a measurement of serving: acceptance length {length['sampled']} at "
            f"temperature 1 and {length['greedy']} greedy."
        )
    if bigram is not None:
        at = {row["alpha"]: row for row in bigram.config.provenance.get("tuned", [])}
        greedy, sampled = (at.get(alpha) for alpha in (bigram.config.alpha, bigram.config.alpha_sampled))
        if greedy and sampled:
            lines.append(
                f"With the bigram beside it {sampled['sampled']} at temperature 1 (alpha {sampled['alpha']:g}) and "
                f"{greedy['greedy']} greedy (alpha {greedy['alpha']:g})."
            )
    return "\n\n".join(lines)
