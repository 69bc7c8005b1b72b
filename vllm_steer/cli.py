"""The console script `vllm-steer`: verbs, and the functions they call, imported when used.

What a verb does is in the module that OPTION_VERBS names for it: `serve` in ops/launch.py, `bench` in bench/run.py.

Nothing here imports torch: `vllm-steer --help` answers at once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vllm_steer import __version__
from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import read_model_config, require_loadable
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair

OPTION_VERBS = {  # module with `add_arguments` and `run`, imported when its verb is chosen; help; example
    "generate": (
        "vllm_steer.data.generate",
        "let the target (or the drafter) answer prompts with vLLM: what a drafter trains on",
        "--model Qwen/Qwen3-8B --prompts builtin --split train --output responses.jsonl",
    ),
    "train": (
        "vllm_steer.training.trainer",
        "train a steering, alone or with its drafter, or a block drafter",
        "--target T --drafter D --data responses.jsonl --output ./drafter-steered",
    ),
    "ngram": (
        "vllm_steer.training.ngram",
        "count a bigram from responses and put it beside a block drafter, with the weight that serves best",
        "--target T --drafter ./dflash --data responses.jsonl",
    ),
    "bench": (
        "vllm_steer.bench.run",
        "measure acceptance and speed of several drafters of one target in vLLM",
        "--target T --drafters plain=D steered=./drafter-steered --prompts builtin --split test --output ./bench",
    ),
    "tune": (
        "vllm_steer.bench.tune",
        "find the draft length, or tree, that pays on this machine at each batch size",
        "--target T --drafter ./drafter-steered --prompts builtin --output ./tune",
    ),
    "serve": (
        "vllm_steer.ops.launch",
        "serve a steered checkpoint or adapter: run `vllm serve` with the target and draft length it was trained for",
        "./drafter-steered --port 8000 --max-model-len 8192",
    ),
    "doctor": (
        "vllm_steer.ops.doctor.run",
        "say what would keep a drafter from being steered here, and whether a running server steers",
        "./drafter-steered --target Qwen/Qwen3-8B --url http://localhost:8000",
    ),
    "push": (
        "vllm_steer.ops.hub",
        "write a model card from what is on record, and upload a checkpoint to the hub",
        "--directory ./drafter-steered --repo OWNER/NAME --bench ./bench --license apache-2.0",
    ),
}
BROKEN_PIPE = 128 + 13  # as the shell tells of a process that SIGPIPE ended
PASSES_ON = ("serve",)  # options these verbs do not know are passed on
EPILOG = """\
from a target and a small model of its family to a steered drafter and its table:

  vllm-steer generate --model Qwen/Qwen3-8B --prompts builtin --split train --output responses.jsonl
  vllm-steer train --target Qwen/Qwen3-8B --drafter Qwen/Qwen3-0.6B --data responses.jsonl --output ./drafter-steered
  vllm-steer bench --target Qwen/Qwen3-8B --drafters plain=Qwen/Qwen3-0.6B steered=./drafter-steered \\
      --prompts builtin --split test --output ./bench

a steered drafter is a model directory with a steering/ folder; vLLM serves it as a draft model:

  vllm-steer check ./drafter-steered --target Qwen/Qwen2.5-Coder-1.5B-Instruct
  vllm-steer doctor ./drafter-steered --target Qwen/Qwen2.5-Coder-1.5B-Instruct
  vllm-steer serve ./drafter-steered --target Qwen/Qwen2.5-Coder-1.5B-Instruct --port 8000
  vllm serve Qwen/Qwen2.5-Coder-1.5B-Instruct \\
      --speculative-config '{"model": "./drafter-steered", "num_speculative_tokens": 5}'

`vllm-steer VERB --help` shows the options of a verb and an example.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: its own, or 0, 1 for a mistake with a sentence, 130 for Ctrl-C,
    141 when nobody reads the output any more."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where a closed pipe is not an error
    except SteeringError as error:
        print(f"vllm-steer: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `vllm-steer check X | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("vllm-steer: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest and args.verb not in PASSES_ON:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    with _logging_to_stderr():
        return args.function(args) or 0


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show this package's log from INFO up. What runs inside vLLM logs below its logger, which vLLM configures."""
    ours, handler = logging.getLogger("vllm_steer"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vllm-steer",
        description="Make, check and train steered drafters (SD²) for vLLM.",
        epilog=EPILOG,
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=f"vllm-steer {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int | None], text: str, example: str):
        sub = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=form,
            epilog=f"example:\n  vllm-steer {name} {example}", allow_abbrev=name not in PASSES_ON,
        )  # fmt: skip
        sub.set_defaults(function=function, verb=name)
        return sub

    sub = verb("check", _check, "load a steered checkpoint, adapter or block drafter, validate it and say what it is",
               "./drafter-steered --target Qwen/Qwen3-8B")  # fmt: skip
    sub.add_argument(
        "directory", metavar="DIR", help="directory or hub id with a steering/ folder, or a block drafter's directory"
    )
    sub.add_argument("--target", help="check that it fits this target: directory or hub id")
    sub.add_argument("--drafter", help="check that it fits this drafter (default: the model in DIR, if there is one)")

    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text, example) in OPTION_VERBS.items():
        sub = verb(name, functools.partial(_run, module), text, example)
        if name == chosen:
            importlib.import_module(module).add_arguments(sub)

    sub = verb("merge", _merge, "write an adapter and its base drafter as one steered checkpoint",
               "./adapter --drafter ./qwen-coder-0.5b --output ./drafter-steered")  # fmt: skip
    sub.add_argument("adapter", help="adapter: directory or hub id with a steering/ folder")
    sub.add_argument("--drafter", required=True, help="directory of the base drafter it was trained with")
    sub.add_argument("--output", required=True, help="new directory to write")

    sub = verb("import", _import, "convert a checkpoint in the layout the authors of SD² publish",
               "./sd2-qwen3-8b --drafter ./Qwen3-0.6B --target Qwen/Qwen3-8B --output ./drafter-steered")  # fmt: skip
    sub.add_argument("source", help="directory with the published config.json and pytorch_model.bin")
    sub.add_argument("--drafter", required=True, help="directory of the base drafter, for its config and tokenizer")
    sub.add_argument(
        "--target", required=True, help="target it was trained against, for its sizes: directory or hub id"
    )
    sub.add_argument("--output", required=True, help="new directory to write")
    return parser


def _check(args: argparse.Namespace) -> None:
    from vllm_steer.drafters.block.config import is_block_drafter
    from vllm_steer.drafters.steered import checkpoint
    from vllm_steer.ops import block

    directory = block.resolve(args.directory)
    if is_block_drafter(directory):
        print(block.describe(directory, args.target))
        return
    config = checkpoint.load(directory).config
    whole = checkpoint.has_drafter(directory)
    drafter = args.drafter or (directory if whole else None)
    check_pair(
        config,
        read_model_config(args.target) if args.target else None,
        read_model_config(drafter) if drafter else None,
    )
    if whole:
        require_loadable(directory)  # last: it reads every weight
    print(describe(config, adapter=not whole))
    print(f"target     {'fits ' + args.target if args.target else 'not checked: give --target'}")
    print(f"drafter    {f'fits {drafter}' if drafter else 'not checked: give --drafter'}")


def describe(config: SteeringConfig, adapter: bool) -> str:
    """What a checkpoint is, in a few lines."""
    target, drafter = config.target, config.drafter
    lines = [
        f"{'adapter' if adapter else 'steered checkpoint'}, format {config.format_version}: "
        "weights and golden deltas agree",
        f"made for   target {target.name}: {target.num_hidden_layers} layers, hidden size {target.hidden_size}, "
        f"vocabulary {target.vocab_size}; states from layers {', '.join(map(str, config.target_layer_ids))}",
        f"           drafter {drafter.name}: {drafter.num_hidden_layers} layers, {config.num_steered} of them steered, "
        f"FFN width {drafter.intermediate_size}",
        f"projection {config.rank_text}, {target.hidden_size} to {config.projection_size}",
        f"drafts     {config.draft_length or 'unknown number of'} per block when trained",
    ]
    lines += [f"{name:<10} {value}" for name, value in (("acceptance", config.acceptance),) if value]
    return "\n".join(lines)


def _run(module: str, args: argparse.Namespace) -> int | None:
    return importlib.import_module(module).run(args)


def _merge(args: argparse.Namespace) -> None:
    from vllm_steer.drafters.steered import checkpoint

    print(f"wrote {checkpoint.merge_adapter(args.adapter, args.drafter, args.output)}")


def _import(args: argparse.Namespace) -> None:
    from vllm_steer.drafters.steered import import_sd2

    print(f"wrote {import_sd2.import_published(args.source, args.drafter, args.target, args.output)}")


if __name__ == "__main__":
    sys.exit(main())
