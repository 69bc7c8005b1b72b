"""The tests that `make test` leaves to `make test-ci`, which CI runs: each takes half a minute or so on two cores. Of
most, the same is shown, on the other runner or with another model, by a test that stays.

How long tests take: `make test-ci ARGS='--durations=60'`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

LONG = {  # in tests/: a test's name stands for all its parameters
    "engine/test_acceptance.py": ("test_the_steered_drafter_is_accepted_more[v1-1.0]",),
    "engine/test_block_drafters.py": (
        "test_sampled_output_is_the_targets[dflash-v1-96]",
        "test_sampled_output_is_the_targets[treeflash-v2-24]",
        "test_seeded_rows_say_what_the_target_alone_says",
        "test_chunked_prompts_cached_prefixes_and_a_small_kv_cache[v2]",
        "test_more_is_accepted[v2]",
        "test_drafts_are_those_of_the_reference[another weight-v2]",
    ),
    "engine/test_draft_filters.py": ("test_the_output_is_the_targets[v2]",),
    "engine/test_draft_graphs.py": ("test_a_buffer_bound_anew_shows",),
    "engine/test_families.py": (
        "test_drafts_are_those_of_the_reference[glm4]",
        "test_drafts_are_those_of_the_reference[olmo2]",
    ),
    "engine/test_kv_cache_groups.py": (
        "test_a_gpt_oss_target[plain]",
        "test_a_gemma_target",
        "test_up_to_the_end_of_the_context",
        "test_one_window_for_a_whole_model[v2-drafter]",
        "test_one_window_for_a_whole_model[v1-target]",
    ),
    "engine/test_lenience.py": (
        "test_sampled_tokens_have_the_closed_form[v2-linear-probabilistic]",
        "test_sampled_tokens_have_the_closed_form[v2-square-probabilistic]",
        "test_sampled_tokens_have_the_closed_form[v2-linear-greedy]",
        "test_epsilon_one_is_no_lenience[v2]",
    ),
    "engine/test_lossless.py": ("test_sampled_output_is_the_targets[v2-temperatures1-greedy]",),
    "engine/test_parity.py": (
        "test_steering_off_is_stock[llama-v2]",
        "test_other_draft_lengths[7-v2]",
        "test_other_draft_lengths[1-v2]",
        "test_zero_projection_is_stock_and_adapters_attach[llama-v1]",
        "test_drafts_are_those_of_the_reference[granite-v1]",
        "test_drafts_are_those_of_the_reference[granite-v2]",
        "test_drafts_are_those_of_the_reference[qwen2-v1]",
        "test_drafts_are_those_of_the_reference[qwen2-v2]",
    ),
    "engine/test_trees.py": (
        "test_compiled_rows_are_the_same[v1-inductor]",
        "test_coupled_drafts_cut_to_chains_are_the_targets_too",
        "test_features_come_out_as_from_the_target_alone[v2]",
        "test_lora_on_the_target[v2]",
        "test_seeded_output_is_the_targets_own[greedy-v2]",
    ),
    "robustness/test_block_files.py": (
        "test_configs_fuzzed[treeflash-config.json]",
        "test_configs_fuzzed[medusa-config.json]",
    ),
    "server/test_devices.py": (
        "test_a_block_drafter_tensor_parallel[v1]",
        "test_trees_tensor_parallel[v1]",
        "test_ray[v2]",
        "test_an_unknown_vllm",
    ),
    "unit/bench/test_conditions.py": (
        "test_bench_samples_neutrally_or_as_served",
        "test_generate_samples_neutrally_or_as_served",
    ),
    "unit/bench/test_quality.py": ("test_a_lenient_benchmark_is_shown_apart",),
    "unit/bench/test_tune.py": ("test_a_real_tuning", "test_on_v2_each_length_has_an_engine"),
    "unit/bench/test_evaluate.py": ("test_blocks_are_those_of_the_engine",),
    "unit/data/test_responses.py": ("test_interrupted_thrice_is_as_good_as_never",),
    "unit/project/test_gpu_session.py": ("test_every_command_of_the_session_is_one",),
}


def find(names: Iterable[str], whole_files: bool) -> set[str]:
    """Of the collected tests, "tests/FOLDER/FILE.py::NAME", those that are long.

    Raises LookupError when `whole_files` were collected and one of the table's tests was not among them.
    """
    collected = defaultdict(set)
    for name in names:
        path, _, test = name.partition("::")
        collected[path.removeprefix("tests/")].add(test)
    found = set()
    for path, tests in LONG.items():
        for test in tests:
            matches = {name for name in collected[path] if test in (name, name.partition("[")[0])}
            if whole_files and collected[path] and not matches:
                raise LookupError(f"tests/support/long_tests.py names {test}, which tests/{path} does not have")
            found |= {f"tests/{path}::{name}" for name in matches}
    return found
