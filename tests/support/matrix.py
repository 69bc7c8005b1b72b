"""Turn the tests' results into the feature matrix of docs/feature_matrix.md.

    pytest -m "" --junitxml matrix.xml tests/{engine,server} \\
        -k "features or parity or lossless or switch or trees or lenience"
    python tests/support/matrix.py matrix.xml                                 prints the table
    python tests/support/matrix.py matrix.xml --write docs/feature_matrix.md  puts it into the page

A cell is the worst of its tests' results for that model runner: a failure, then "not testable here" (a test that
skipped itself with that reason), then a pass. A cell whose tests did not run is an error: the table never claims
what was not run.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

BEGIN, END = "<!-- matrix: written by tests/support/matrix.py -->", "<!-- end of the matrix -->"
HERE = "not testable here: "
RUNNERS = ("v1", "v2")

# Feature: its tests, as file::function, or file::function[part of the parameters]. A tuple instead of a list: refused.
# {"v1": ..., "v2": ...} where the runners differ.
MATRIX: dict[str, object] = {
    "chunked prefill": ["test_features::test_chunked_prefill", "test_parity::test_drafts_are_those_of_the_reference"],
    "prefix caching: cold, warm, full hit": [
        "test_features::test_prefix_caching",
        "test_parity::test_a_warm_prefix_cache_changes_no_output",
    ],
    "prefix caching of answers (next turn)": ["test_features::test_prefix_caching_of_answers"],
    "preemption and recompute": ["test_parity::test_preempted_requests_keep_their_own_guides"],
    "sequences that fill the context": ["test_parity::test_sequences_may_fill_the_context"],
    "async scheduling": ["test_features::test_async_scheduling"],
    "structured output: JSON schema": ["test_features::test_structured_json"],
    "structured output: regex": ["test_features::test_structured_regex"],
    "structured output: grammar": ["test_features::test_structured_grammar"],
    "logprobs, prompt logprobs": ["test_features::test_logprobs_and_prompt_logprobs"],
    "stop strings": ["test_features::test_stop_strings"],
    "min_tokens": ["test_features::test_min_tokens"],
    "repetition, presence, frequency penalties": ["test_features::test_penalties"],
    "logit bias": (
        "test_features::test_logit_bias_is_refused_by_vllm",
        "vLLM refuses the request, with any drafter",
    ),
    "n > 1, seeds": [
        "test_features::test_seeds_and_n",
        "test_features_engines::test_seeds_and_n_keep_the_distribution",
    ],
    "sampling": ["test_lossless::test_sampled_output_is_the_targets"],
    "probabilistic drafts": [
        "test_features_engines::test_probabilistic_drafts_greedy_request",
        "test_lossless::test_sampled_output_is_the_targets[probabilistic]",
    ],
    "block verification": {
        "v1": ("test_features::test_refused_at_start_up", "V1 has none"),
        "v2": ["test_features_engines::test_block_verification"],
    },
    "steering switched off and on while serving": [
        "test_switch::test_off_and_on_again_in_the_middle_of_requests",
    ],
    "another adapter while serving": ["test_switch::test_another_adapter_in_the_middle_of_requests"],
    "lenience (not lossless)": [
        "test_lenience::test_greedy_text_and_blocks_are_the_oracles",
        "test_lenience::test_sampled_tokens_have_the_closed_form",
    ],
    "draft length by batch size": ["test_features_engines::test_draft_length_by_batch_size"],
    "LoRA on the target": ["test_features_engines::test_lora_on_the_target"],
    "quantized target (W8A8 int8)": ["test_features_engines::test_quantized[target]"],
    "quantized drafter (W8A8 int8)": ["test_features_engines::test_quantized[drafter]"],
    "drafter with a shorter context": {
        "v1": ["test_features_engines::test_drafter_with_a_shorter_context"],
        "v2": ("test_features::test_refused_at_start_up", "V2 would draft past its end"),
    },
    "abort in the middle of a block": ["test_features::test_abort_mid_block"],
    "streaming, clients that disconnect": ["test_features_serve::test_streaming_with_disconnects"],
    "compiled (inductor on V1, eager backend on V2)": ["test_parity::test_compiled_drafts_are_the_same"],
}

_ALONE = ["test_trees::test_features_come_out_as_from_the_target_alone"]
_SMALL = ["test_trees::test_a_small_kv_cache_and_the_end_of_the_context"]
TREES: dict[str, object] = {  # the same features with draft trees; a feature that is not here is not tested with them
    "chunked prefill": ["test_trees::test_trees_and_chains_in_one_batch"],
    **dict.fromkeys(
        ("prefix caching: cold, warm, full hit", "preemption and recompute", "sequences that fill the context"), _SMALL
    ),
    **dict.fromkeys(
        (
            *(f"structured output: {kind}" for kind in ("JSON schema", "regex", "grammar")),
            *("logprobs, prompt logprobs", "stop strings", "min_tokens"),
            "repetition, presence, frequency penalties",
        ),
        _ALONE,
    ),
    "n > 1, seeds": {"v1": ["test_trees::test_seeds"], "v2": ["test_trees::test_seeded_output_is_the_targets_own"]},
    "sampling": {
        "v1": ["test_trees::test_sampled_output_is_the_targets"],
        "v2": ["test_trees::test_recursive_rejection"],
    },
    "probabilistic drafts": {
        "v1": ["test_trees::test_sampled_output_is_the_targets[coupled]"],
        "v2": ["test_trees::test_seeded_output_is_the_targets_own[coupled]"],
    },
    "lenience (not lossless)": ("test_lenience::test_what_it_does_not_go_with", "not with trees"),
    "LoRA on the target": ["test_trees::test_lora_on_the_target"],
    "compiled (inductor on V1, eager backend on V2)": ["test_trees::test_compiled_rows_are_the_same"],
}


def read(path: Path) -> dict[str, list[tuple[str, str]]]:
    """A junit file as {"file::function": [(parameters, "" or why it skipped, or "FAILED")]}."""
    found: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name, _, parameters = case.get("name", "").partition("[")
        result = ""
        for child in case:
            if child.tag == "skipped":
                result = child.get("message", "")
            elif child.tag in ("failure", "error"):
                result = "FAILED"
        found.setdefault(f"{case.get('classname', '').rpartition('.')[2]}::{name}", []).append((parameters, result))
    return found


def cell(wanted: object, runner: str, results: dict[str, list[tuple[str, str]]]) -> str:
    """The text of one cell. Raises SystemExit if one of its tests has no result for this runner."""
    if isinstance(wanted, dict):
        wanted = wanted[runner]
    tests, refused = (list(wanted[:1]), wanted[1]) if isinstance(wanted, tuple) else (wanted, None)
    outcomes = []
    for test in tests:
        name, _, part = test.partition("[")
        words = {runner, part.rstrip("]")} - {""}
        mine = [r for parameters, r in results.get(name, []) if words <= set(parameters.rstrip("]").split("-"))]
        if not mine:
            sys.exit(f"{test} has no result for {runner}: run it (pytest ... -m '' --junitxml ...)")
        outcomes += mine
    if "FAILED" in outcomes:
        return "**fails**"
    if skipped := [r for r in outcomes if r]:
        if not all(r.startswith(HERE) for r in skipped):
            sys.exit(f"{tests} was skipped on {runner} for another reason: {skipped}")
        return f"not testable here: {skipped[0].removeprefix(HERE)}"
    return f"refused: {refused}" if refused else "works"


def table(results: dict[str, list[tuple[str, str]]]) -> str:
    lines = ["| feature | V1 | V2 | V1, trees | V2, trees | tests |", "|---|---|---|---|---|---|"]
    for feature, wanted in MATRIX.items():
        trees = [cell(TREES[feature], r, results) if feature in TREES else "not tested" for r in RUNNERS]
        groups = wanted.values() if isinstance(wanted, dict) else [wanted]
        tests = [t for group in groups for t in (group[:1] if isinstance(group, tuple) else group)]
        files = ", ".join(sorted({f"`{t.partition('::')[0].removeprefix('test_')}`" for t in tests}))
        files += ", `trees`" if feature in TREES else ""
        cells = [cell(wanted, r, results) for r in RUNNERS] + trees
        lines.append(f"| {feature} | {' | '.join(cells)} | {files} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of pytest --junitxml; all are read")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"Markdown file with the lines {BEGIN} and {END}")
    args = parser.parse_args()
    results: dict[str, list[tuple[str, str]]] = {}
    for path in args.results:
        for test, outcomes in read(path).items():
            results.setdefault(test, []).extend(outcomes)
    text = table(results)
    if args.write is None:
        print(text)
        return
    old = args.write.read_text(encoding="utf-8")
    new, count = re.subn(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{args.write} must have the line {BEGIN} once, and {END} after it; it has {count}")
    args.write.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
