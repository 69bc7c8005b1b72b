"""Make the cut pair: a pretrained target small enough to train against on two cores, and a far smaller drafter.

The target is Qwen2.5-Coder-0.5B-Instruct with its vocabulary cut to what Python's standard library uses most:
the same 24 layers, but a head that fits beside them on a CPU. In order:

    target    cut tokenizer and embedding to the tokens of `tokens.json`, so that it is the same target everywhere
    drafter   pretrain two small layers on the training files with the target's tokenizer
    text      rows of real text from training files (`train.jsonl`) and prompts from test files (`heldout.jsonl`)

    python examples/cut_pair/make.py --model ~/.cache/vllm-steer/qwen_pair/drafter --out cut_pair

What is trained then, and what came of it, is in README.md beside this file. With `--vocabulary N` the target stage
counts tokens over the training files and keeps the N most frequent in place of those of `tokens.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
KEPT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STAGES = ("target", "drafter", "text")
TOKENS = HERE / "tokens.json"  # what the committed drafters were trained with
DRAFTER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_pair() -> ModuleType:
    """The tiny pair's script: the same text, the same way to pretrain."""
    spec = importlib.util.spec_from_file_location("tiny_pair_make", HERE.parent / "tiny_pair" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return make


def most_frequent(full: dict[str, Any], counts: Counter[int], size: int) -> list[int]:
    """About `size` tokens to keep, as ids of the full tokenizer.json: single bytes, the most frequent tokens, and every
    piece these are merged from; last come `KEPT`."""
    vocab = full["model"]["vocab"]
    made_from: dict[str, tuple[str, str]] = {}
    for left, right in full["model"]["merges"]:
        made_from.setdefault(left + right, (left, right))
    special = {token["content"]: token["id"] for token in full["added_tokens"]}
    names = {i: token for token, i in vocab.items() if token not in special}
    kept = {token for token in names.values() if len(token) == 1}
    frequent = (names[i] for i, _ in counts.most_common() if i in names)
    while len(kept) < size and (token := next(frequent, None)) is not None:
        pieces = [token]
        while pieces:
            piece = pieces.pop()
            if piece not in kept:
                kept.add(piece)
                pieces += made_from.get(piece, ())
    return sorted(vocab[token] for token in kept) + [special[name] for name in KEPT]


def cut_tokenizer(full: dict[str, Any], old: list[int]) -> dict[str, Any]:
    """tokenizer.json with the tokens of these ids only, numbered in this order."""
    vocab, new = full["model"]["vocab"], {i: n for n, i in enumerate(old)}
    kept = {token for token, i in vocab.items() if i in new and token not in KEPT}
    cut = json.loads(json.dumps(full))
    cut["model"]["vocab"] = {token: new[vocab[token]] for token in sorted(kept, key=vocab.get)}
    cut["model"]["merges"] = [m for m in full["model"]["merges"] if {m[0], m[1], m[0] + m[1]} <= kept]
    cut["added_tokens"] = [t | {"id": new[t["id"]]} for t in full["added_tokens"] if t["content"] in KEPT]
    return cut


def make_target(model: Path, out: Path, size: int | None) -> None:
    """Write `out`/target, cut from the model in `model`; `size`: count the tokens to keep anew."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    full, old = json.loads((model / "tokenizer.json").read_text("utf-8")), json.loads(TOKENS.read_text("utf-8"))
    if size is not None:
        counts: Counter[int] = Counter()
        for path in tqdm(tiny_pair().source_files()["train"], desc="counting tokens"):
            counts.update(tokenizer(path.read_text("utf-8", "replace"))["input_ids"])
        old = most_frequent(full, counts, size)
    cut = cut_tokenizer(full, old)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    whole.config.vocab_size = len(old)
    end = len(old) - len(KEPT)  # KEPT come last, <|endoftext|> first of them
    for config in (whole.config, whole.generation_config):
        config.bos_token_id = config.pad_token_id = config.eos_token_id = end
    small = AutoModelForCausalLM.from_config(whole.config, dtype=torch.bfloat16)
    weights = whole.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][old].clone()
    small.load_state_dict(weights)
    draft = out / "target.making"  # until it is whole
    shutil.rmtree(draft, ignore_errors=True)
    small.save_pretrained(draft)
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        settings.pop(key, None)
    settings |= {"eos_token": KEPT[0], "pad_token": KEPT[0], "bos_token": None}
    settings["local_files_only"] = True  # transformers records whether it was offline, and identities cover this file
    for name, content in (("tokenizer.json", cut), ("tokenizer_config.json", settings)):
        (draft / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    new = AutoTokenizer.from_pretrained(draft)
    text = (HERE / "make.py").read_text("utf-8")
    assert new.decode(new(text)["input_ids"]) == text and len(new) == len(old)
    shutil.rmtree(out / "target", ignore_errors=True)
    draft.rename(out / "target")
    print(f"target: {small.num_parameters():,} parameters, vocabulary {len(old)}; this file is "
          f"{len(new(text)['input_ids'])} tokens, {len(tokenizer(text)['input_ids'])} before")  # fmt: skip


def tokenised(out: Path) -> dict[str, list[list[int]]]:
    """Token ids of every source file, by split, with the cut tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "target")
    files = tiny_pair().source_files()
    return {s: [tokenizer(p.read_text("utf-8", "replace"))["input_ids"] for p in files[s]] for s in files}


def make_drafter(out: Path, steps: int, seed: int) -> None:
    from transformers import AutoTokenizer

    tokenizer, work = AutoTokenizer.from_pretrained(out / "target"), out / "work"
    tokenizer.save_pretrained(work / "tokenizer")
    for split, documents in tokenised(out).items():
        ids = [i for document in documents for i in [*document, tokenizer.eos_token_id]]
        torch.save(torch.tensor(ids, dtype=torch.int16), work / f"{split}.pt")
        print(f"{split}: {len(ids):,} tokens")
    tiny_pair().pretrain(work, out / "drafter", DRAFTER, steps, seed)


def make_text(out: Path, rows: int, length: int) -> None:
    """Rows of `length` tokens at random places of the training files, 32 of them a prompt; 160 held-out prompts."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(out / "target"), random.Random(0)
    ids = tokenised(out)

    def cut(split: str, size: int) -> list[int]:
        document = rng.choices(ids[split], [len(d) for d in ids[split]])[0]
        start = rng.randrange(max(1, len(document) - size))
        return document[start : start + size]

    pieces = [cut("train", length) for _ in range(rows)]
    lines = [json.dumps({"prompt_ids": piece[:32], "response_ids": piece[32:]}) for piece in pieces]
    (out / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts = [json.dumps({"prompt": tokenizer.decode(cut("test", 128))}) for _ in range(160)]
    (out / "heldout.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"text: {rows} rows, {len(prompts)} held-out prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="where target/, drafter/ and the text go")
    parser.add_argument("--vocabulary", type=int, help="count tokens and keep so many")
    parser.add_argument("--steps", type=int, default=800, help="pretraining steps of the drafter")
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--length", type=int, default=288, help="tokens per row")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="run only these, in order")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = {
        "target": lambda: make_target(args.model, args.out, args.vocabulary),
        "drafter": lambda: make_drafter(args.out, args.steps, seed=1),
        "text": lambda: make_text(args.out, args.rows, args.length),
    }
    for stage in [s for s in STAGES if s in args.stages]:
        run[stage]()


if __name__ == "__main__":
    main()
