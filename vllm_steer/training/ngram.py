"""`vllm-steer ngram`: count which token follows which in training data, tune its weight, put it beside a block drafter.

The weight alpha is tuned on held-out rows, as training measures acceptance: once for greedy drafts, once for drafts at
temperature 1.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError, require_at_least
from vllm_steer.common.files import refuse_used
from vllm_steer.common.identity import fingerprint
from vllm_steer.common.options import option
from vllm_steer.common.provenance import origin, public_name
from vllm_steer.data import split
from vllm_steer.data.dataset import collate, sha256
from vllm_steer.drafters.block import checkpoint, dspark, ngram
from vllm_steer.drafters.block.config import BlockConfig
from vllm_steer.drafters.block.ngram import Ngram, NgramConfig
from vllm_steer.drafters.models import load_model
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training.batches import read_data
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.losses import forward_kl
from vllm_steer.training.pair import read_target

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)


@dataclass(frozen=True)
class CountConfig:
    """One count; the command line is made from these fields."""

    target: str = option(MISSING, "target model: hub id or directory")
    drafter: str = option(MISSING, "block drafter to refine, DFlash or Medusa: a directory")
    data: tuple[str, ...] = option(
        MISSING, "JSONL files of prompts and responses, as for `vllm-steer train`", nargs="+"
    )
    output: str | None = option(None, "directory to write ngram/ into (default: the drafter's own)", type=str)
    successors: int = option(32, "successors kept of each token: the most frequent")
    batch_size: int = option(8, "rows per forward")
    max_length: int = option(1024, "tokens per row")
    chat_template_kwargs: str = option("{}", "variables of the chat template, as JSON: as the drafter was trained")
    log_model: str | None = option(
        None, "the target's name in the log of a gateway, as for `vllm-steer train` (default: --target)", type=str
    )
    dspark: str | None = option(
        None, "also write a DSpark drafter there, which vLLM's V2 runner serves without this plugin", type=str
    )
    dspark_rank: int | None = option(
        None, "rank of its Markov head (default: exact up to 2,048 tokens, then 256)", type=int
    )

    def __post_init__(self) -> None:
        for name in ("successors", "batch_size"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        require_at_least("--max-length", self.max_length, 2)
        require_at_least("--dspark-rank", 1 if self.dspark_rank is None else self.dspark_rank, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer ngram`."""
    options.add_arguments(parser, CountConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer ngram`: count, tune, write, and print what the weight does."""
    config = options.from_arguments(CountConfig, args)
    found = count(config)
    print(f"wrote {Path(config.output or config.drafter) / ngram.FOLDER}")
    print("alpha   greedy  T=1     predicted acceptance length on held-out rows")
    for row in found.config.provenance["tuned"]:
        print(f"{row['alpha']:<7g} {row['greedy']:<7.3f} {row['sampled']:<7.3f}")
    print(f"chosen: {found.config.alpha:g} greedy, {found.config.alpha_sampled:g} at T=1")


def count(config: CountConfig) -> Ngram:
    """Count, tune and write. Raises SteeringError for a drafter that is not blind, or a folder that is there."""
    output = Path(config.output or config.drafter)
    if ngram.has_ngram(output):
        raise SteeringError(f"{output / ngram.FOLDER} is there already: remove it, or give another --output")
    if config.dspark is not None:
        refuse_used(Path(config.dspark))
    if (kind := BlockConfig.read(config.drafter).kind) == "treeflash":
        raise SteeringError(
            f"{config.drafter} is a {kind} drafter, which knows the token before: a bigram is for others"
        )
    tokenizer = load_tokenizer(config.target, config.target)
    read = ("target", "data", "max_length", "chat_template_kwargs", "log_model")
    asked = TrainConfig(output=str(output), kind=kind, **{name: getattr(config, name) for name in read})
    rows, held_out = read_data(asked, tokenizer)
    drafter = checkpoint.load_for(config.drafter, config.target)
    size = drafter.config.vocab_size
    target = load_model(config.target, torch.float32).requires_grad_(False).eval()
    made = NgramConfig(size, min(config.successors, size), 0.0, 0.0, fingerprint(config.target))
    table = ngram.count((row.ids for row in rows), made)
    pair = BlockPair(drafter, target, forward_kl, drafter.config.draft_length, 1).eval()
    batches = [collate(held_out[i : i + config.batch_size]) for i in range(0, len(held_out), config.batch_size)]
    batches = [batch | read_target(target, batch, drafter.config.states) for batch in batches]
    tuned = []
    for alpha in tqdm(GRID, desc="tuning alpha"):
        pair.refine(table, alpha)
        tuned.append({"alpha": alpha} | pair.measure(batches, pair.k)["acceptance_length"])
    best = {how: max(tuned, key=lambda row: row[how])["alpha"] for how in ("greedy", "sampled")}
    how = _provenance(config, rows, held_out, tuned)
    final = dataclasses.replace(made, alpha=best["greedy"], alpha_sampled=best["sampled"], provenance=how)
    found = dataclasses.replace(table, config=final)
    found.save(output)
    if config.dspark is not None:
        dspark.export(Path(config.drafter), found, Path(config.dspark), config.dspark_rank)
    return found


def _provenance(config: CountConfig, rows: Any, held_out: Any, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    given = dataclasses.asdict(config)
    given |= {key: public_name(given[key]) for key in ("target", "drafter", "output", "dspark") if given[key]}
    given["data"] = [public_name(path) for path in config.data]
    return {
        "command": options.command("ngram", given),
        "data_sha256": {public_name(path): sha256(path) for path in config.data},
        "data": split.describe(rows, held_out, Path(config.data[0]).name),
        "tokens": sum(len(row.ids) for row in rows),
        "tuned": tuned,
    } | origin("torch", "transformers")
