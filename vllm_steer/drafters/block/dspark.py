"""A DFlash drafter and its bigram as a DSpark drafter, which vLLM's V2 runner serves without this plugin.

DSpark adds to each position's logits w1[previous] @ w2.T, its Markov head: with alpha times the bigram's
log-probabilities, factored, that is draft refinement. One weight serves greedy and sampled requests there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import write_json
from vllm_steer.drafters.block import checkpoint
from vllm_steer.drafters.block.ngram import Ngram
from vllm_steer.drafters.steered.checkpoint import filling

EXACT_UP_TO, RANK = 2048, 256  # tokens of a vocabulary that is factored whole; else this many factors


def export(source: Path, ngram: Ngram, output: Path, rank: int | None = None) -> Path:
    """Write the drafter at `source` with the bigram as Markov head to the new directory `output`.

    Raises SteeringError for anything but a DFlash drafter.
    """
    drafter = checkpoint.load(source)
    config = drafter.config
    if config.kind != "dflash":
        raise SteeringError(f"{source} is a {config.kind} drafter: a DSpark drafter is made of DFlash's layers")
    size = config.vocab_size
    rank = min(rank or (size if size <= EXACT_UP_TO else RANK), size)
    w1, w2 = factors(ngram, rank)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dflash = raw.pop("dflash_config")
    raw |= {
        "architectures": ["Qwen3DSparkModel"],
        "markov_rank": rank,
        "mask_token_id": dflash["mask_token_id"],
        "target_layer_ids": dflash["target_layer_ids"],
        "dflash_config": {"mask_token_id": dflash["mask_token_id"]},
        "sample_from_anchor": False,
        "dspark_bonus_anchor": True,
    }
    weights = {name: x.contiguous() for name, x in checkpoint.file_tensors(drafter).items()}
    weights |= {"markov_head.markov_w1.weight": w1, "markov_head.markov_w2.weight": w2}
    with filling(output):
        save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
        write_json(output / "config.json", raw | {"dtype": "float32"})
        (output / "model.safetensors").chmod(0o644)
    return output


def factors(ngram: Ngram, rank: int) -> tuple[Tensor, Tensor]:
    """w1, w2 [V, rank] with w1 @ w2.T near alpha times the log-probabilities, up to a constant of each row.

    Above EXACT_UP_TO tokens the table is factored as it is stored: what each successor has above its row's floor.
    """
    size, alpha = ngram.config.vocab_size, ngram.config.alpha
    if size <= EXACT_UP_TO:
        u, s, v = torch.linalg.svd(alpha * ngram.dense().double())
        return (u * s)[:, :rank].float().contiguous(), v.T[:, :rank].float().contiguous()
    there = ngram.boosts != 0
    rows = torch.arange(size)[:, None].expand_as(ngram.successors)[there]
    places = torch.stack([rows, ngram.successors[there]])
    table = torch.sparse_coo_tensor(places, alpha * ngram.boosts[there], (size, size))
    u, s, v = torch.svd_lowrank(table.coalesce(), q=rank, niter=4)
    return (u * s).contiguous(), v.contiguous()
