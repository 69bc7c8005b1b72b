"""Make the tiny pair: a target, a weak drafter, and its steering, from text every Python carries.

The text is the standard library's own sources, split by file into train, validation and test. In order:

    text       tokenise the sources (byte-level BPE, trained here); cut held-out prompts from the test files, and the
               prompts of the README's walk-through from the training files
    target     pretrain the target, store it in bfloat16; everything later sees the stored weights
    drafter    pretrain the drafter on the same text
    responses  the target continues prompts cut from the training files (sampled at temperature 1), plus as many
               real continuations: what the steering is trained on
    adapter    `vllm-steer train --mode steer`:   steering alone, the drafter stays as it is
    steered    `vllm-steer train --mode joint`:   steering and drafter
    distilled  `vllm-steer train --mode distill`: drafter alone, the fair control for `steered`
    compare    predicted acceptance of all four on the test files, written to acceptance.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "encodings"}
SKIP |= {"pydoc_data", "ensurepip", "__pycache__", "msilib", "config"}
VOCAB, LENGTH, DRAFT = 512, 384, 5
END = "<|endoftext|>"
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # no roles: it only continues text
TARGET = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
DRAFTER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2}
STATES = (1, 2, 3)  # inputs of the target's second, third and last layer
STAGES = ("text", "target", "drafter", "responses", "adapter", "steered", "distilled", "compare")


def source_files() -> dict[str, list[Path]]:
    """Standard library sources by split, in an order that depends on their names only."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts[:-1])]
    files = sorted((p for p in files if not p.name.startswith("_sysconfigdata")), key=lambda p: p.relative_to(root))
    random.Random(0).shuffle(files)
    tenth = len(files) // 10
    return {"test": files[:tenth], "validation": files[tenth : 2 * tenth], "train": files[2 * tenth :]}


def make_text(work: Path, out: Path) -> None:
    """`work/tokenizer`, one int16 tensor of tokens per split, `out/heldout.jsonl` and `out/prompts.jsonl`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = {split: [p.read_text("utf-8", "replace") for p in files] for split, files in source_files().items()}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts["train"], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=1024)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(work / "tokenizer")
    for split, parts in texts.items():
        ids = [i for part in parts for i in [*tokenizer(part)["input_ids"], tokenizer.eos_token_id]]
        torch.save(torch.tensor(ids, dtype=torch.int16), work / f"{split}.pt")
        print(f"{split}: {len(parts)} files, {sum(map(len, parts)):,} characters, {len(ids):,} tokens")
    heldout = [*cut(work, "test", 48, 1, 64, 256), *cut(work, "test", 336, 4, 64, 256)]  # the first 48 are for tests
    for name, prompts in (("heldout", heldout), ("prompts", cut(work, "train", 1536, 3, 32, 128))):
        rows = [json.dumps({"prompt": tokenizer.decode(prompt)}) for prompt in prompts]
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def cut(work: Path, split: str, count: int, seed: int, shortest: int, longest: int) -> list[Tensor]:
    """`count` stretches of a split at random places, `shortest` to `longest` tokens each."""
    tokens, rng = torch.load(work / f"{split}.pt").long(), random.Random(seed)
    sizes = [rng.randint(shortest, longest) for _ in range(count)]
    return [tokens[start : start + size] for size in sizes for start in [rng.randrange(len(tokens) - size)]]


def pretrain(work: Path, directory: Path, sizes: dict[str, int], steps: int, seed: int) -> None:
    """Train a Qwen3 on the training split with plain next-token loss and save it in bfloat16."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    end = tokenizer.eos_token_id
    config = Qwen3Config(
        **sizes,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=64,  # vLLM's CPU attention takes 32 and 64, not every size
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen3ForCausalLM(config)
    tokens = torch.load(work / "train.pt").long()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    ramps = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: ramp(s, steps)) for o in optimizers]
    bar = tqdm(range(steps), desc=directory.name, mininterval=5)
    for _ in bar:
        starts = torch.randint(0, len(tokens) - LENGTH, (8,))
        batch = torch.stack([tokens[s : s + LENGTH] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, ramps, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    print(
        f"{directory.name}: {model.num_parameters():,} parameters, loss {held_out_loss(model, work):.3f} (validation)"
    )
    model.generation_config.eos_token_id = end
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def ramp(step: int, steps: int) -> float:
    """Learning rate factor: up over the first 5 %, flat, linearly to zero over the second half."""
    return min(1.0, (step + 1) / max(1, steps // 20), 2 * max(0.0, 1 - step / steps))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, work: Path) -> float:
    """Mean next-token loss (nats) on a fixed piece of the validation split."""
    tokens = torch.load(work / "validation.pt").long()[: 32 * LENGTH].view(-1, LENGTH)
    return sum(model(input_ids=b, labels=b).loss.item() for b in tokens.split(8)) / (len(tokens) // 8)


@torch.no_grad()
def make_responses(work: Path, target: Path, count: int, seed: int) -> None:
    """`work/responses.jsonl`: prompts from the training files, half continued by the target, half by the source."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    rows, rng = [], random.Random(seed)
    for batch in tqdm(range(0, count // 2, 128), desc="responses"):
        size = rng.randint(32, 160)  # one length a batch: no padding
        prompts = torch.stack(cut(work, "train", min(128, count // 2 - batch), seed + batch, size, size))
        full = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=192, do_sample=True, top_k=0
        )
        for ids in full.tolist():
            response = ids[size:]
            if 0 in response:
                response = response[: response.index(0) + 1]
            rows.append({"prompt_ids": ids[:size], "response_ids": response})
    for ids in cut(work, "train", count - len(rows), seed + count, 224, 352):
        size = rng.randint(32, 160)
        rows.append({"prompt_ids": ids[:size].tolist(), "response_ids": ids[size:].tolist()})
    rng.shuffle(rows)
    (work / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_steering(work: Path, out: Path, name: str, mode: str, steps: int, args: argparse.Namespace) -> None:
    """One `vllm-steer train` run into `out/name`."""
    from vllm_steer.training.config import TrainConfig
    from vllm_steer.training.trainer import train

    shutil.rmtree(out / name, ignore_errors=True)
    train(
        TrainConfig(
            target=str(out / "target"),
            drafter=str(out / "drafter"),
            data=(str(work / "responses.jsonl"),),
            output=str(out / name),
            mode=mode,
            loss="kl",
            k=DRAFT,
            steps=steps,
            batch_size=8,
            lr=args.lr,
            drafter_lr=args.drafter_lr,
            target_layers=STATES,
            max_length=352,
            cache=str(work / "cache"),
            precision="bfloat16",
            seed=args.seed,
        )
    )


def compare(work: Path, out: Path) -> None:
    """Predicted acceptance on stretches of the test files, for every drafter made here, in `acceptance.json`."""
    from vllm_steer.training.acceptance import measure_directory

    rows = [
        {"prompt_ids": ids[:64].tolist(), "response_ids": ids[64:].tolist()}
        for ids in cut(work, "test", 96, 2, 256, 320)
    ]
    (work / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = {}
    for name in ("drafter", "distilled", "adapter", "steered"):
        base = out / ("drafter" if name == "adapter" else name)
        found[name] = measure_directory(out / "target", base, out / name, work / "test.jsonl", k=DRAFT)
        print(name, json.dumps(found[name]))
    (out / "acceptance.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the chosen stages, printing how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="where the model directories go (default: beside me)")
    scratch = Path(tempfile.gettempdir()) / "tiny_pair"
    parser.add_argument("--work", type=Path, default=scratch, help=f"tokens and responses (default: {scratch})")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every step count: 0.05 is a quick try")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and sampled responses")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the steering")
    parser.add_argument("--drafter-lr", type=float, default=3e-3, help="learning rate of the drafter when it trains")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="run only these, in order")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    work, out, steps = args.work, args.out, lambda n: max(1, round(n * args.scale))
    run = {
        "text": lambda: make_text(work, out),
        "target": lambda: pretrain(work, out / "target", TARGET, steps(900), args.seed),
        "drafter": lambda: pretrain(work, out / "drafter", DRAFTER, steps(600), args.seed + 1),
        "responses": lambda: make_responses(work, out / "target", steps(3072), args.seed),
        "adapter": lambda: train_steering(work, out, "adapter", "steer", steps(1000), args),
        "steered": lambda: train_steering(work, out, "steered", "joint", steps(1000), args),
        "distilled": lambda: train_steering(work, out, "distilled", "distill", steps(1000), args),
        "compare": lambda: compare(work, out),
    }
    for stage in [s for s in STAGES if s in args.stages]:
        began = time.monotonic()
        run[stage]()
        print(f"-- {stage}: {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
