"""`vllm-steer push`: a model card made from the checkpoint's records, and the upload to the hub.

A card says what a checkpoint's own provenance says, and of acceptance only what was measured: the prediction made at
training, under that name, and tables of `vllm-steer bench` whose steering weights are these.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import logging
from dataclasses import MISSING, dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from vllm_steer.bench import report, summary
from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import CONFIG_FILES, TOKENIZER_FILES, difference, fingerprint
from vllm_steer.common.options import option
from vllm_steer.common.redaction import redact
from vllm_steer.drafters.block import checkpoint as block_checkpoint
from vllm_steer.drafters.block import ngram
from vllm_steer.drafters.block.config import is_block_drafter
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.ops import block
from vllm_steer.serving.kill_switch import KILL_SWITCH

log = logging.getLogger(__name__)

CARD = "README.md"
ROLES = ("target", "drafter")
FILES = (  # patterns of the files of a checkpoint; nothing else is uploaded
    *("README.md", "config.json", "preprocessor_config.json", "processor_config.json"),
    *(
        f"{name}{end}"
        for name in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
        for end in ("", ".txt", ".md")
    ),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    *(name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if "/" not in name and not name.endswith(".py")),
    *("acceptance.json", "training.json", "training.png"),
)
FOLDERS = {
    checkpoint.FOLDER: tuple(f"{checkpoint.FOLDER}/{name}" for name in checkpoint.FILES),
    block_checkpoint.RECORD: (
        f"{block_checkpoint.RECORD}/config.json",
        f"{block_checkpoint.RECORD}/golden.safetensors",
    ),
    ngram.FOLDER: (f"{ngram.FOLDER}/config.json", f"{ngram.FOLDER}/model.safetensors"),
    "additional_chat_templates": ("additional_chat_templates/*.jinja",),
}
OURS = "<!-- written by vllm-steer push -->"  # a card without this line was written by hand and is kept


@dataclass(frozen=True)
class PushConfig:
    """One upload; the command line is made from these fields."""

    directory: str = option(MISSING, "steered drafter, adapter or block drafter to share")
    repo: str = option(MISSING, "hub repository, OWNER/NAME; made if it does not exist")
    bench: tuple[str, ...] = option(
        (), "output directories of `vllm-steer bench` whose tables go into the card", nargs="+", type=str
    )
    license: str | None = option(
        None, "licence of the weights, e.g. apache-2.0 (the base drafter's, as a rule)", type=str
    )
    private: bool = option(False, "make the repository private if it is made")
    dry_run: bool = option(False, "write the card into the directory and stop there")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer push`."""
    options.add_arguments(parser, PushConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer push`: write the card, then upload."""
    print(push(options.from_arguments(PushConfig, args)))


def push(config: PushConfig) -> str:
    """Write the card into the directory and upload the directory; returns where it is.

    Raises SteeringError for a checkpoint that does not load, a benchmark of another one, or a hub that refuses.
    """
    directory = Path(config.directory)
    for item in directory.rglob("*"):
        if item.is_symlink():  # an upload follows links, wherever they lead
            checkpoint.own_file(item, directory)
    path = directory / CARD
    if path.exists() and OURS not in path.read_text(encoding="utf-8"):
        print(f"{path} is kept: it was not written by this command")
    else:
        path.write_text(card(directory, config.repo, config.bench, config.license), encoding="utf-8")
    wanted, left_out = belongings(directory)
    if left_out:
        print(f"left out, no part of a checkpoint: {', '.join(left_out)}")
    if config.dry_run:
        return f"wrote {path}; nothing was uploaded"
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(config.repo, private=config.private or None, exist_ok=True)
        done = hub.upload_folder(
            repo_id=config.repo, folder_path=directory, commit_message="Add a steered drafter (vllm-steer)",
            allow_patterns=[glob.escape(name) for name in wanted],
        )  # fmt: skip
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; all mean "not uploaded"
        raise SteeringError(
            f"{config.repo} was not uploaded ({type(error).__name__}: {error}): check the name, the network, and "
            "`hf auth login`; the card is in the directory"
        ) from error
    return f"uploaded {directory} to {config.repo}: {done}"


def belongings(directory: Path) -> tuple[list[str], list[str]]:
    """Names of the files in a directory that make a checkpoint, and of the files and folders that do not."""
    wanted, left_out = [], []
    for item in sorted(directory.iterdir()):
        if item.is_dir() and item.name in FOLDERS:
            files = {file.relative_to(directory).as_posix() for file in item.rglob("*") if file.is_file()}
            allowed = {name for name in files if any(fnmatch(name, pattern) for pattern in FOLDERS[item.name])}
            wanted += sorted(allowed)
            left_out += sorted(files - allowed)
        elif item.is_file() and any(fnmatch(item.name, pattern) for pattern in FILES):
            wanted.append(item.name)
        else:
            left_out.append(item.name + "/" * item.is_dir())
    return wanted, left_out


def card(directory: Path, repo: str, benches: tuple[str, ...] = (), license_name: str | None = None) -> str:
    """The model card of a checkpoint that loads, with the tables of benchmarks of exactly these weights."""
    if is_block_drafter(directory):
        return block.card(directory, repo, license_name, OURS, [_measured(Path(bench), directory) for bench in benches])
    config = checkpoint.load(directory).config
    names = {
        role: dataclasses.replace(getattr(config, role), name=redact(getattr(config, role).name)) for role in ROLES
    }
    config = dataclasses.replace(config, **names)
    adapter = not checkpoint.has_drafter(directory)
    tables = [_measured(Path(bench), directory) for bench in benches]
    parts = [_header(config, license_name), OURS, _what(config, adapter), _serve(config, repo, adapter)]
    parts += [_acceptance(config, tables), _provenance(config)]
    return "\n\n".join(parts) + "\n"


def _header(config: SteeringConfig, license_name: str | None) -> str:
    """The card's metadata, written by the hub's own client so that it is valid YAML for any licence."""
    from huggingface_hub import ModelCardData

    base = config.drafter.name if "/" in config.drafter.name else None
    tags = ["speculative-decoding", "steered-drafter", "vllm-steer"]
    data = ModelCardData(base_model=base, library_name="vllm", license=license_name, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _what(config: SteeringConfig, adapter: bool) -> str:
    kind = f"Steering (an adapter) for the drafter {config.drafter.name}" if adapter else (
        f"A steered drafter, made from {config.drafter.name}")  # fmt: skip
    return (
        f"# {kind}, for the target {config.target.name}\n\n"
        "For speculative decoding in vLLM with the plugin vllm-steer: while it drafts, the drafter is given the "
        "target's hidden states as a steering vector (SD², arXiv 2511.09844). The target's output does not change.\n\n"
        f"States of target layers {', '.join(map(str, config.target_layer_ids))}; {config.num_steered} of "
        f"{config.drafter.num_hidden_layers} drafter layers steered, {config.rank_text}; trained for "
        f"{config.draft_length or 'an unknown number of'} drafts per block."
    )


def _serve(config: SteeringConfig, repo: str, adapter: bool) -> str:
    k = config.draft_length or 5
    model = config.drafter.name if adapter else repo
    speculation = json.dumps({"model": model, "num_speculative_tokens": k, "draft_sample_method": "probabilistic"})
    line = f"vllm serve {config.target.name} --speculative-config '{speculation}'"
    if adapter:
        line += f" --additional-config '{json.dumps({'vllm_steer': {'adapter': repo}})}'"
    return f"{block.SERVE}\n\n    {line}"


def _acceptance(config: SteeringConfig, tables: list[str]) -> str:
    lines = ["## Acceptance"]
    found = config.acceptance.get("trained")
    if found:
        before = config.acceptance["untrained"]["acceptance_length"]
        after = found["acceptance_length"]
        lines.append(
            f"Predicted when it was trained, teacher forced on {found['positions']} held-out positions "
            f"({config.acceptance['data']}), not a measurement of serving: acceptance length {after['sampled']} at "
            f"temperature 1 and {after['greedy']} greedy; before training {before['sampled']} and {before['greedy']}."
        )
    lines += tables or ["Not measured in vLLM: there is no `vllm-steer bench` result with this card."]
    return "\n\n".join(lines)


def _measured(bench: Path, directory: Path) -> str:
    """A benchmark's table. Raises SteeringError if it did not measure the checkpoint in `directory` as it is served."""
    path, of_blocks = bench / "results.json", is_block_drafter(directory)
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        mine = [c for c in results["contenders"] if _same_weights(c["identity"], directory, of_blocks)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteeringError(
            f"{path} is not a benchmark's result ({error}): give an output of vllm-steer bench"
        ) from None
    if not mine:
        raise SteeringError(
            f"{bench} measured other {'' if of_blocks else 'steering '}weights than those of {directory}: a card "
            "claims only what was measured; run vllm-steer bench with this checkpoint"
        )
    if of_blocks:
        _require_refined(mine, bench)
    else:
        for contender in mine:
            _require_steered(contender, results["settings"], bench)
            _require_drafter(contender["identity"].get("drafter_weights"), directory, bench)
    if "conditions" not in results["settings"]:
        log.warning("%s does not say under which environment variables it was measured, nor with which sampling", bench)
    return (
        report.table(redact(summary.with_new_names(results)))
        .replace("\n## ", "\n#### ")
        .replace("# Drafters of", "### Measured in vLLM: drafters of", 1)
    )


def _same_weights(measured: dict[str, Any], directory: Path, of_blocks: bool) -> bool:
    """Whether an identity is that of the steering, or of the block drafter and its bigram, in `directory`."""
    if not of_blocks:
        return not difference(measured["steering_weights"], fingerprint(directory / checkpoint.FOLDER))
    bigram = fingerprint(directory / ngram.FOLDER) if ngram.has_ngram(directory) else None
    return measured.get("ngram_weights") == bigram and not difference(
        measured["drafter_weights"], fingerprint(directory)
    )


def _require_refined(mine: list[dict[str, Any]], bench: Path) -> None:
    """Raises SteeringError for a block drafter that was measured blind only."""
    if all(contender["identity"].get("blind") for contender in mine):
        raise SteeringError(
            f"{bench} measured this checkpoint without its approximator or bigram only ({mine[0]['name']!r}): a card "
            "claims what it does as it is served; run vllm-steer bench without @blind"
        )


def _require_steered(contender: dict[str, Any], settings: dict[str, Any], bench: Path) -> None:
    """Raises SteeringError for numbers of this checkpoint that were measured unsteered, or at another scale."""
    scale = contender.get("scale")
    scale = _asked_scale(settings) if scale is None else scale  # early results have it in the engine's options only
    steered = contender.get("steered") is True
    if not steered or scale != 1:
        how = f"at scale {float(scale):g}" if steered else f"unsteered ({KILL_SWITCH} was set)"
        raise SteeringError(
            f"{bench} measured this checkpoint {how} under the name {contender['name']!r}: a card claims only what it "
            "does as it is served; run vllm-steer bench again without that"
        )


def _asked_scale(settings: dict[str, Any]) -> Any:
    """The scale in a benchmark's engine options; 1 if none is given."""
    found: Any = settings
    for key in ("engine", "additional_config", "vllm_steer", "scale"):
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else 1.0


def _require_drafter(measured: Any, directory: Path, bench: Path) -> None:
    """Raises SteeringError when a whole checkpoint's steering was measured over another drafter than its own."""
    whole = checkpoint.has_drafter(directory)
    if whole and measured is not None and (what := difference(measured, fingerprint(directory))):
        raise SteeringError(
            f"{bench} measured this steering with another drafter than the one in {directory}: {what}; run "
            "vllm-steer bench with this checkpoint"
        )


def _provenance(config: SteeringConfig) -> str:
    if not config.provenance:
        return "## How it was made\n\nNot on record."
    return "## How it was made\n\n```json\n" + json.dumps(redact(config.provenance), indent=2) + "\n```"
