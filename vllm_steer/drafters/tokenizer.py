"""The tokenizer of a pair: the target's, which serves; and whether the drafter's is the same.

"The same" means the same token ids for the same text. Tokenizers are compared by what they do: vocabulary, a fixed set
of varied texts, every token of the vocabulary as a text, and every added token inside one. A difference there is
refused. Names of special tokens and the chat template are settings that only the target's tokenizer is asked for, so a
difference there is a warning.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_steer.common.errors import SteeringError

log = logging.getLogger(__name__)

SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It didn't; they'd've said so, we'll see!",
    "def f(x: int) -> str:\n    return f\"{x:>08.3f}\"  # a comment\n\n\tif (a && b) { c[i++] += 0x1F; }\r\n",
    "  leading, trailing  and   inner    spaces \n\n\n\t\ttabs\u00a0no-break\u3000ideographic ",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-9 2024-02-29 +49 (0)30 50% $9.99 x² ½",
    "https://example.org/a_b/c-d?e=f&g=%20#h user.name+tag@example.org <a href='x'>&amp;</a> \\frac{a}{b}^2",
    "CamelCase snake_case SCREAMING lowercase Ünïcödé naïve café cafe\u0301 ﬁ ﬂ ① Ａ ＡＢＣ ß ẞ İ ı Ω Å",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "你好，世界。漢字とかなカナ ﾊﾝｶｸ 안녕하세요 세계 Xin chào thế giới",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽 ∑∫√≠≤ ←→ “quotes” ‘single’ — – … • ™",
    "\u200bzero\u200dwidth\ufeff \u2028line\u2029paragraph\u0085next \x00\x07\x7f control \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======== -------- ........ ######## \"\"\" ''' ``` <|im_start|> </s> [INST]",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\\n\"}}",
    "",
)  # fmt: skip
PIECES = 20_000  # tokens of the vocabulary that are compared as texts when a tokenizer is a slow one
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(model: str) -> Any:
    """A model's tokenizer. Raises SteeringError when there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a wrong value in one of its files surfaces there as whatever it breaks first
        reason = " ".join(str(error).split())
        raise SteeringError(f"cannot load the tokenizer of {model} ({type(error).__name__}: {reason})") from error


def load_tokenizer(target: str, drafter: str) -> Any:
    """The target's tokenizer, which formats all that is trained, measured and served.

    Raises SteeringError when a tokenizer cannot be read, or the drafter's encodes differently; warns of other
    differences by name.
    """
    tokenizer, differences = compare_tokenizers(target, drafter)
    for difference in differences:
        log.warning("tokenizers of %s and %s: %s", target, drafter, difference)
    return tokenizer


def compare_tokenizers(target: str, drafter: str) -> tuple[Any, list[str]]:
    """The target's tokenizer, and in what the drafter's differs without encoding any text differently.

    Raises SteeringError when a tokenizer cannot be read, or the two encode a text differently.
    """
    ours, theirs = read_tokenizer(target), read_tokenizer(drafter)
    if found := _other_encoding(ours, theirs):
        raise SteeringError(
            f"the tokenizers of {target} and {drafter} differ: {found}; speculation needs one tokenizer, take a "
            "drafter of the target's family"
        )
    return ours, _other_settings(ours, theirs)


def require_embeddings(tokenizer: Any, model: str, vocab_size: int) -> None:
    """Raises SteeringError when the tokenizer has ids for which a model has no embedding."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise SteeringError(
            f"token {token!r} of the tokenizer is id {highest}, and {model} has embeddings for ids up to "
            f"{vocab_size - 1} (vocab_size {vocab_size}): resize its embeddings (transformers: "
            "resize_token_embeddings), or take a tokenizer that fits"
        )


def _other_encoding(ours: Any, theirs: Any) -> str | None:
    """The first text or token that two tokenizers encode differently, in words."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a != b:
        token = min(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
        return f"token {token!r} is {a.get(token)} in one and {b.get(token)} in the other"
    added = sorted(ours.get_added_vocab().keys() | theirs.get_added_vocab().keys())
    texts = [*SAMPLES, *(f"a {token} b{token}\n{token}" for token in added)]
    if found := _first_difference(ours, theirs, texts, False) or _first_difference(ours, theirs, texts, True):
        return found
    if ours.is_fast and theirs.is_fast and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str():
        return None  # the same program, as in most pairs of a family: spare the seconds that a large vocabulary takes
    return _first_difference(ours, theirs, _vocabulary_as_texts(ours, sorted(a.values())), False)


def _first_difference(ours: Any, theirs: Any, texts: list[str], special: bool) -> str | None:
    """The first text that is encoded differently, with or without special tokens around it, in words."""
    for text, x, y in zip(texts, *(_encode(tokenizer, texts, special) for tokenizer in (ours, theirs)), strict=True):
        if x != y:
            around = " with special tokens around it" if special else ""
            return f"{text[:40]!r}{around} is {_ids(x, y)} in one and {_ids(y, x)} in the other"
    return None


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[Any]]:
    """Token ids of each text; of one that a tokenizer has no token for, what it says."""
    try:
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raises a bare Exception
        return [[str(error)]] if len(texts) == 1 else [_encode(tokenizer, [text], special)[0] for text in texts]


def _vocabulary_as_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Every token as the text it stands for: encoding it takes the merges that make it."""
    step = 1 if tokenizer.is_fast else 1 + len(ids) // PIECES
    return tokenizer.batch_decode([[i] for i in ids[::step]], clean_up_tokenization_spaces=False)


def _ids(ids: list[int], other: list[int]) -> str:
    """The first ids of a list, up to a few after the first in which it differs from `other`."""
    same = next((i for i, (x, y) in enumerate(zip(ids, other, strict=False)) if x != y), min(len(ids), len(other)))
    start = max(0, same - 2)
    shown = ", ".join(map(str, ids[start : start + 6]))
    return f"[{'..., ' if start else ''}{shown}{', ...' if len(ids) > start + 6 else ''}]"


def _other_settings(ours: Any, theirs: Any) -> list[str]:
    """Differences that change no encoding, in words."""
    found = []
    for name in SPECIAL:
        x, y = getattr(ours, name), getattr(theirs, name)
        if x != y:
            found.append(f"{name} is {x!r} in the target's and {y!r} in the drafter's")
    x, y = ours.chat_template, theirs.chat_template
    if x and y and x != y:
        found.append("the chat templates differ: the target's is used, in training as in serving")
    elif bool(x) != bool(y):
        found.append(
            "only the target has a chat template, which training and serving use"
            if x
            else "only the drafter has a chat template, which is never used: chats cannot be formatted"
        )
    return found
