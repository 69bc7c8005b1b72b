"""Rows of real code to train on and to measure with: the standard library's own sources in the pair's tokens.

    python examples/qwen_pair/code_rows.py --tokenizer DIR/target --out DIR/text

Writes `train.jsonl` from training files and `held.jsonl` from test files, split as for the tiny pair. A row is 384
consecutive tokens, the first 16 of them its prompt. Pieces do not overlap and come in one shuffled order, so a smaller
`--rows` gives the first rows of a larger one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from pathlib import Path

from tqdm import tqdm

PROMPT = 16


def source_files() -> dict[str, list[Path]]:
    """Standard library sources by split, as the tiny pair's script names them."""
    path = Path(__file__).parent.parent / "tiny_pair" / "make.py"
    spec = importlib.util.spec_from_file_location("tiny_pair_make", path)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return make.source_files()


def pieces(files: list[Path], tokenizer, length: int, split: str) -> list[list[int]]:
    """Every `length` consecutive tokens of these files, shuffled."""
    found = []
    for path in tqdm(files, desc=f"reading {split} files"):
        ids = tokenizer(path.read_text("utf-8", "replace"))["input_ids"]
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    random.Random(0).shuffle(found)
    return found


def main(words: list[str] | None = None) -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="directory of the target")
    parser.add_argument("--out", type=Path, required=True, help="where train.jsonl and held.jsonl go")
    parser.add_argument("--rows", type=int, default=916, help="training rows (default: 916, 351,744 tokens)")
    parser.add_argument("--held", type=int, default=16, help="rows to measure with (default: 16)")
    parser.add_argument("--length", type=int, default=384, help="tokens of a row (default: 384)")
    args = parser.parse_args(words)
    tokenizer, files = AutoTokenizer.from_pretrained(args.tokenizer), source_files()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", "train", args.rows), ("held", "test", args.held)):
        found = pieces(files[split], tokenizer, args.length, split)
        if count > len(found):
            parser.error(f"{count} rows of {args.length} tokens asked for, the {split} files have {len(found)}")
        rows = [json.dumps({"prompt_ids": ids[:PROMPT], "response_ids": ids[PROMPT:]}) for ids in found[:count]]
        (args.out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{name}: {count} rows, {count * args.length:,} tokens, of {len(found)}")


if __name__ == "__main__":
    main()
