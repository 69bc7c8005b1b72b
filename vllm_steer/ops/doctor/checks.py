"""What `vllm-steer doctor` looks at before a server runs: this environment, a checkpoint, its target.

Each check is a function that yields what it found, and stores in the `Case` what later checks need. It may raise
SteeringError where the message already exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_steer.common.engine_options import for_trees
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import difference, fingerprint
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.drafters.block import checkpoint as block_checkpoint
from vllm_steer.drafters.block.config import BlockConfig, is_block_drafter
from vllm_steer.drafters.models import text_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.drafters.tokenizer import compare_tokenizers, require_embeddings
from vllm_steer.ops import block
from vllm_steer.ops.doctor.findings import FAIL, OK, SKIPPED, WARNING, Case, Finding
from vllm_steer.ops.launch import UnknownModel, drafter_of, speculative, target_of
from vllm_steer.serving import introspection, patching
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled
from vllm_steer.serving.plan import tree_of

PLUGINS, STAT_LOGGERS = "vllm.general_plugins", "vllm.stat_logger_plugins"
TESTED_QUANTIZATION = "compressed-tensors"  # of drafters
MIB = 2**20
WIDE_BLOCK = 32  # tokens in a block of the KV cache, above which the rows of a tree reserve too many
MEMORY_SHARE = 0.1  # share of a device's memory above which to warn
INSTALL = f"install vLLM {patching.WORKS_WITH}: pip install 'vllm-steer[gpu]', or [cpu]"


# --- this environment ------------------------------------------------------------------------------------------------


def vllm_version(case: Case) -> Iterable[Finding]:
    """vLLM is installed, in a release that the seams support."""
    try:
        case.vllm = introspection.version()
    except ImportError as error:
        yield Finding("vllm", FAIL, f"cannot be imported ({error})", INSTALL)
        return
    known = patching.known(case.vllm)
    yield Finding("vllm", OK if known else FAIL, case.vllm, "" if known else INSTALL)


def plugin(case: Case) -> Iterable[Finding]:
    """vLLM would find both entry points, of the plugin and of its metrics, and load them."""
    allowed = os.environ.get("VLLM_PLUGINS")
    for name, group, bad in (("plugin", PLUGINS, FAIL), ("metrics", STAT_LOGGERS, WARNING)):
        here = [entry.name for entry in entry_points(group=group) if entry.value.startswith("vllm_steer.")]
        if not here:
            remedy = "pip install vllm-steer into this environment, again if it was changed; PYTHONPATH is not enough"
            yield Finding(name, bad, f"not registered in the group {group}", remedy)
        elif allowed is not None and here[0] not in allowed.split(","):
            seen = f"VLLM_PLUGINS is {allowed!r}, the only plugins vLLM loads"
            yield Finding(name, bad, seen, f"add {here[0]} to it, or unset it")
        else:
            yield Finding(name, OK, f"{here[0]} in the group {group}")


def kill_switch(case: Case) -> Iterable[Finding]:
    """The kill switch is not on."""
    if disabled():
        seen = f"{KILL_SWITCH} is {os.environ[KILL_SWITCH]!r}: every drafter runs unsteered"
        yield Finding("kill switch", WARNING, seen, f"unset {KILL_SWITCH}")
    else:
        value = os.environ.get(KILL_SWITCH)
        yield Finding("kill switch", OK, f"{KILL_SWITCH} is {f'{value!r}: off' if value else 'not set'}")


def seam_places(case: Case) -> Iterable[Finding]:
    """Every place in vLLM that the plugin replaces or joins."""
    runners = introspection.runners()
    for seam, way in introspection.seam_ways():
        name = f"seam {seam.module.rpartition('.')[2]}.{seam.name}"  # two modules may hold one name
        if way in ("replaced", "upstream"):
            yield Finding(name, OK, "in place" if way == "replaced" else "vLLM has a way of its own for it")
        elif seam.runner not in ("both", *runners):
            yield Finding(name, SKIPPED, f"for vLLM's {seam.runner.upper()} runner, which cannot run here ({way})")
        else:
            yield Finding(name, FAIL if seam.required else WARNING, f"{way}; it is there to {seam.why}", INSTALL)


# --- the checkpoint --------------------------------------------------------------------------------------------------


def steering_weights(case: Case) -> Iterable[Finding]:
    """Files, shapes, finite values, golden deltas: everything the server will check when it loads it."""
    if is_block_drafter(folder := block.resolve(case.checkpoint)):
        yield from _block_drafter(case, folder)
        return
    config = checkpoint.load_steering(case.checkpoint).config
    case.config = config
    steered = f"{config.num_steered} of {config.drafter.num_hidden_layers} drafter layers"
    yield Finding("checkpoint", OK, f"weights and golden deltas agree; {config.rank_text}, for {steered}")


def _block_drafter(case: Case, folder: Path) -> Iterable[Finding]:
    """A block drafter: its files, its target, and whether vLLM and the plugin accept both."""
    yield Finding(
        "checkpoint", OK, block.describe(folder, None).splitlines()[0] + "; weights agree with what is on record"
    )
    try:
        case.target, case.target_config = block.target_of(folder, case.target)
    except SteeringError as error:
        yield Finding("target", SKIPPED, str(error))
        return
    config = BlockConfig.read(folder)
    config.check_target(case.target_config)
    record = block_checkpoint.read_record(folder)
    if record is not None and (what := difference(record.fingerprint, fingerprint(case.target))):
        yield Finding("target", WARNING, f"{case.target} is not the model that the drafter was trained with: {what}")
    else:
        yield Finding("target", OK, f"{case.target} fits")
    engine = {name: getattr(case, name) for name in ("tensor_parallel_size", "max_num_seqs", "max_model_len")}
    found = introspection.rehearse(case.target, block.speculative(folder, config), {}, **engine)
    runner = "V2" if found.use_v2_model_runner else "V1"
    yield Finding("front end", OK, f"vLLM accepts the pair, on its {runner} runner; {introspection.repairs(found)}")


def drafter(case: Case) -> Iterable[Finding]:
    """The drafter: in the checkpoint, given, or the one an adapter records; of the shape that was trained."""
    folder = checkpoint.resolve(case.checkpoint)
    try:
        case.drafter, found = drafter_of(case.checkpoint, folder, case.config, case.drafter)
    except UnknownModel as error:
        yield Finding("drafter", SKIPPED, str(error))
        return
    check_pair(case.config, None, found)
    case.drafter_config = found
    shape = case.config.drafter
    seen = f"{case.drafter}: hidden size {shape.hidden_size}, FFN width {shape.intermediate_size}, as trained"
    yield Finding("drafter", OK, seen)


# --- checkpoint and target -------------------------------------------------------------------------------------------


def target(case: Case) -> Iterable[Finding]:
    """The target has the shape, and so the layers, the steering was trained for."""
    try:
        case.target, found = target_of(case.config, case.target)
    except UnknownModel as error:
        yield Finding("target", SKIPPED, str(error))
        return
    check_pair(case.config, found, None)
    case.target_config = found
    ids = ", ".join(map(str, case.config.target_layer_ids))
    seen = f"{case.target}: states from layers {ids} of {case.config.target.num_hidden_layers}, as trained"
    yield Finding("target", OK, seen)


def vocabulary(case: Case) -> Iterable[Finding]:
    """One tokenizer, and embedding tables of one size: vLLM accepts no others."""
    tokenizer, differences = compare_tokenizers(case.target, case.drafter)
    used = len(tokenizer)
    seen = f"{used} tokens, the same in both"
    if differences:
        remedy = "the target's is used, in training as in serving"
        yield Finding("tokenizer", WARNING, "; ".join([seen, *differences]), remedy)
    else:
        yield Finding("tokenizer", OK, seen)
    big, small = (text_config(config).vocab_size for config in (case.target_config, case.drafter_config))
    for model, size in ((case.target, big), (case.drafter, small)):
        require_embeddings(tokenizer, str(model), size)
    if big != small:
        seen = f"tables of {big} (target) and {small} (drafter) for these {used} tokens; vLLM wants one size"
        remedy = "pad the smaller model's embeddings (transformers: resize_token_embeddings) and train with it"
        yield Finding("vocabulary", FAIL, seen, remedy)
    else:
        padding = f", {big - used} of them padding" if big > used else ""
        yield Finding("vocabulary", OK, f"{big} rows in both{padding}")


def context_length(case: Case) -> Iterable[Finding]:
    """The drafter's context is as long as the server's."""
    longest = introspection.model_config(case.drafter).max_model_len
    length = case.max_model_len or introspection.model_config(case.target).max_model_len
    if longest >= length:
        yield Finding("context", OK, f"server {length} tokens, drafter {longest}")
        return
    v2_only = introspection.runners() == {"v2"}
    seen = f"server {length} tokens, drafter {longest}: V1 stops drafting there, V2 would crash and is refused"
    yield Finding("context", FAIL if v2_only else WARNING, seen, f"give --max-model-len {longest} or less")


def dtypes(case: Case) -> Iterable[Finding]:
    """Both are stored in one dtype: vLLM runs the drafter in the target's."""
    found = [getattr(text_config(config), "dtype", None) for config in (case.target_config, case.drafter_config)]
    stored = [str(dtype).removeprefix("torch.") for dtype in found]
    if None in found:
        yield Finding("dtype", OK, "not stated by both")
    elif len(set(stored)) == 1:
        yield Finding("dtype", OK, f"{stored[0]} in both")
    else:
        seen = f"target {stored[0]}, drafter {stored[1]}: vLLM runs both in the target's"
        yield Finding("dtype", WARNING, seen, f"give --dtype {stored[1]}, or measure acceptance as it is")


def quantization(case: Case) -> Iterable[Finding]:
    """How both are quantized; steering is added behind a drafter's quantized layers, whatever they are."""
    found = [quantization_method(config) for config in (case.target_config, case.drafter_config)]
    seen = f"target {found[0] or 'none'}, drafter {found[1] or 'none'}"
    if found[1] in (None, TESTED_QUANTIZATION):
        yield Finding("quantization", OK, seen)
    else:
        remedy = f"compare its acceptance with the unquantized drafter's; tested is {TESTED_QUANTIZATION}"
        yield Finding("quantization", WARNING, seen, remedy)


def quantization_method(hf_config: Any) -> str | None:
    """The method's name in a transformers config."""
    raw = getattr(hf_config, "quantization_config", None) or getattr(
        text_config(hf_config), "quantization_config", None
    )
    return (raw if isinstance(raw, dict) else raw.to_dict()).get("quant_method", "unknown") if raw else None


def tensor_parallel(case: Case) -> Iterable[Finding]:
    """Every rank gets an equal share of the drafter's FFN."""
    width, size = case.config.drafter.intermediate_size, case.tensor_parallel_size
    if width % size:
        shares = ", ".join(str(n) for n in range(2, 17) if width % n == 0) or "no number up to 16"
        seen = f"size {size} does not divide the drafter's FFN width {width}"
        yield Finding("tensor parallel", FAIL, seen, f"{shares} would")
    else:
        yield Finding("tensor parallel", OK, f"size {size}: FFN width {width} in shares of {width // size}")


def hidden_states(case: Case) -> Iterable[Finding]:
    """vLLM's class for the target hands out hidden states of its layers."""
    yield Finding("hidden states", OK, f"vLLM's {introspection.require_states(case.target)} hands them out")


def front_end(case: Case) -> Iterable[Finding]:
    """vLLM and the plugin accept the whole configuration, as they would be asked by `vllm-steer serve`."""
    speculation, ours = speculative(case.config, case.drafter), {}
    if case.drafter != case.checkpoint:
        ours["adapter"] = case.checkpoint
    more: dict[str, Any] = {}
    widths = None if case.tree is None else TreeShape.parse(case.tree).widths
    if (shape := TreeShape.asked(widths, case.tree_rows, speculation["num_speculative_tokens"])) is not None:
        ours |= {"tree_rows": shape.leaves} if shape.adaptive else {"tree": list(shape.widths)}
        speculation["num_speculative_tokens"], more = shape.depth, for_trees()
    case.engine = introspection.rehearse(
        case.target,
        speculation,
        ours,
        **more,
        tensor_parallel_size=case.tensor_parallel_size,
        max_num_seqs=case.max_num_seqs,
        max_model_len=case.max_model_len,
    )
    runner = "V2" if case.engine.use_v2_model_runner else "V1"
    if introspection.steered(case.engine):
        yield Finding("front end", OK, f"vLLM accepts the pair, on its {runner} runner, and it is steered")
    elif disabled():
        yield Finding("front end", OK, f"vLLM accepts the pair, on its {runner} runner; unsteered: {KILL_SWITCH}")
    else:
        yield Finding("front end", FAIL, "vLLM accepts the pair and does not steer it", "see plugin and seams above")


def draft_tree(case: Case) -> Iterable[Finding]:
    """What the rows of a draft tree take, if one was asked for; what refuses it is the front end's to say."""
    shape, block = tree_of(case.engine), case.engine.cache_config.block_size
    if shape is None:
        return
    slots, length = shape.lookahead(block), case.engine.model_config.max_model_len
    seen = f"{shape.leaves} rows of {shape.depth + 1} tokens to verify for each request, {slots} slots of its KV cache "
    seen += f"beyond its tokens, at a block size of {block}"
    if block > WIDE_BLOCK:
        yield Finding("draft tree", WARNING, seen, f"--block-size {WIDE_BLOCK} or 16 reserves less")
    elif slots > length / 4:
        remedy = "give a smaller tree, or a longer --max-model-len: near its end a chain is drafted"
        yield Finding("draft tree", WARNING, f"{seen}, of a context of {length}", remedy)
    else:
        yield Finding("draft tree", OK, seen)


def draft_launches(case: Case) -> Iterable[Finding]:
    """On a GPU, V2 launches the drafter's kernels one by one, which can cost more than drafting gains."""
    if case.engine.use_v2_model_runner and case.engine.device_config.device_type == "cuda":
        seen = "V2 runs the drafter's passes without CUDA graphs: at small batches that can cost more than it gains"
        remedy = "compare with V1 (VLLM_USE_V2_MODEL_RUNNER=0), or try draft_graphs (docs/operating.md)"
        yield Finding("draft launches", WARNING, seen, remedy)


def memory(case: Case) -> Iterable[Finding]:
    """What steering adds on each rank: weights, and buffers for `max_num_seqs` requests."""
    requests = case.max_num_seqs or case.engine.scheduler_config.max_num_seqs
    dtype = case.engine.model_config.dtype
    rows = introspection.max_rows(case.engine)
    added = added_bytes(case.config, requests, rows, dtype.itemsize, case.tensor_parallel_size)
    seen = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in added.items())
    seen += f" a rank, in {str(dtype).removeprefix('torch.')}, for {requests} requests"
    total = introspection.device_memory()
    if total is not None:
        seen += f", {sum(added.values()) / total:.1%} of the device"
    if total is not None and sum(added.values()) > MEMORY_SHARE * total:
        yield Finding("memory", WARNING, seen, "lower --max-num-seqs, or train with --rank")
    else:
        yield Finding("memory", OK, seen)


def added_bytes(config: SteeringConfig, requests: int, rows: int, item: int, ranks: int = 1) -> dict[str, int]:
    """{"weights", "buffers"} of one of `ranks` workers, laid out as in serving/injection.py, `item` bytes a number."""
    steering, hidden = Steering(config, device="meta"), config.target.hidden_size
    whole, shared = sum(p.numel() for p in steering.parameters()), steering.output.weight.numel()
    deltas = (requests + 1) * config.projection_size // ranks * item
    guides = requests * 5 * hidden * item  # three states, the guide, its LayerNorm
    return {"weights": (whole - shared + shared // ranks) * item, "buffers": deltas + guides + 4 * rows}
