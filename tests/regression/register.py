"""Known bugs and weaknesses of other KV-eviction projects, and the tests that show that this project has none of them.

Tests have pytest's names, without parameters. `pytest $(python -m tests.regression.register W7)` runs those of
a row, `python -m tests.regression.register` lists the rows.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

U, E, R, G = "tests/unit/", "tests/engine/test_", "tests/regression/test_", "tests/gpu/test_"


class Row(NamedTuple):
    """One bug or weakness.

    Attributes:
        source: whose it is, with the number of the issue where there is one.
        title: what goes wrong.
        tests: where it is tested; those of `tests/gpu` need a GPU.
    """

    source: str
    title: str
    tests: tuple[str, ...]


BUGS = {
    "stale-count": Row(
        "R-KV on vLLM",
        "an asynchronous step uses the count of evicted tokens of two steps ago and overwrites live KV; about 100 "
        "concurrent requests show it",
        (
            f"{R}peer_bugs.py::test_a_stale_count_is_not_carried_out",
            f"{R}load.py::test_1_40_and_100_concurrent_requests_give_the_same_answers",
            f"{U}worker/test_runtime.py::test_a_wrong_order_is_refused",
            f"{E}combinations.py::test_every_combination_equals_the_reference",
        ),
    ),
    "shared-prefix-rewritten": Row(
        "R-KV on vLLM",
        "pages of a shared prefix are rewritten, and other requests' text bleeds in",
        (
            f"{R}peer_bugs.py::test_shared_prefix_page_overwritten",
            f"{R}load.py::test_1_40_and_100_concurrent_requests_give_the_same_answers",
            f"{E}exactness.py::test_shared_pages_are_not_overwritten",
            f"{E}exactness.py::test_unprotected_shared_prompt",
            f"{U}integration/test_block_manager.py::test_two_requests_share_a_prompt_and_both_evict_it",
        ),
    ),
    "evicted-during-chunked-prefill": Row(
        "R-KV on vLLM",
        "a request is evicted while its prompt is computed in chunks, and its lengths become negative",
        (
            f"{E}exactness.py::test_long_unprotected_prompt",
            f"{E}exactness.py::test_unprotected_prompt",
            f"{U}scheduler/test_planner.py::test_a_request_is_compacted_at_the_same_tokens_however_its_text_is_cut",
        ),
    ),
    "cold-window": Row(
        "R-KV on vLLM",
        "the trigger is the absolute length, so the first compaction scores the prompt with a window nobody observed",
        (
            f"{R}peer_bugs.py::test_evicted_before_a_window_was_observed",
            f"{U}scheduler/test_planner.py::test_a_request_takes_no_more_from_the_prefix_cache_than_leaves_a_window_to_compute",
            f"{U}scheduler/test_planner.py::test_a_request_is_due_from_its_earliest_length_on_and_its_queries_are_there",
        ),
    ),
    "empty-window-in-mixed-steps": Row(
        "R-KV on vLLM",
        "the window stays empty in steps that read a prompt and decode",
        (
            f"{R}peer_bugs.py::test_window_empty_on_mixed_batches",
            f"{U}worker/signals/test_queries.py::test_random_traffic",
            f"{U}worker/test_runtime.py::test_interleaved_requests_keep_what_the_method_says",
        ),
    ),
    "preempted-keeps-its-counter": Row(
        "R-KV on vLLM",
        "a preempted request keeps its counter of evicted tokens, and its positions become negative",
        (
            f"{R}peer_bugs.py::test_a_preempted_request_keeps_its_counter",
            f"{U}worker/test_runtime.py::test_a_preempted_request_starts_over_with_a_clean_state",
            f"{E}serving.py::test_a_preempted_request_resumes_within_its_bound",
        ),
    ),
    "state-left-behind": Row(
        "R-KV, pull request 25",
        "state of a request is not moved with its row of the batch, or survives the request",
        (
            f"{R}peer_bugs.py::test_a_row_of_the_batch_that_moved",
            f"{R}peer_bugs.py::test_counters_not_reset_between_requests",
            f"{U}worker/test_runtime.py::test_slots_are_reused_without_leaking_state",
            f"{R}load.py::test_a_soak_loses_no_page_and_violates_nothing",
        ),
    ),
    "pages-never-freed": Row(
        "R-KV on vLLM",
        "attention gets shorter and memory does not: no page is given back",
        (
            f"{R}peer_bugs.py::test_pages_are_held_although_their_tokens_are_gone",
            f"{E}exactness.py::test_engine_equals_reference",
            f"{E}server.py::test_metrics_count_real_compactions_and_the_trace_agrees",
        ),
    ),
    "slot-map-overflow": Row(
        "R-KV on vLLM",
        "the map of slots overflows where the batch holds more tokens than a step may have",
        (
            f"{R}peer_bugs.py::test_more_tokens_held_than_a_step_may_have",
            f"{E}exactness.py::test_engine_equals_reference",
        ),
    ),
    "cache-not-contiguous": Row(
        "R-KV on vLLM",
        "a view of a cache that is not contiguous is a copy",
        (
            f"{R}peer_bugs.py::test_a_cache_view_that_is_not_contiguous",
            f"{U}ops/test_paging.py::test_the_views_share_memory_with_the_cache",
            f"{U}worker/test_runtime.py::test_interleaved_requests_keep_what_the_method_says",
        ),
    ),
    "silent-no-op-in-a-graph-or-runner-v2": Row(
        "R-KV on vLLM",
        "with FULL CUDA graphs or Model Runner V2 nothing is evicted, without a word",
        (
            f"{E}exactness.py::test_engine_equals_reference",
            f"{E}steering.py::test_engine_equals_reference",
            f"{U}benchmarks/accuracy/test_run.py::test_a_run_that_did_not_compact_fails",
            f"{G}ops_cuda.py::test_observing_and_steering_in_a_cuda_graph",
        ),
    ),
    "oversized-query-ring": Row(
        "R-KV on SGLang",
        "the ring of queries has room for 4096 requests, 6.13 GiB, which the server's memory does not account for",
        (
            f"{R}load.py::test_the_ring_of_queries_is_as_large_as_the_requests_that_can_run",
            f"{U}worker/signals/test_queries.py::test_ring_memory",
            f"{U}sentences/test_sentences.py::test_buffers_are_accounted_for",
            f"{U}ops/test_paging.py::test_pages_leave_room_for_positions_and_for_the_attention_mass",
        ),
    ),
    "wrong-defaults": Row(
        "R-KV on vLLM",
        "importance has the weight 0.07 instead of 0.1: -2.5 points",
        (
            f"{R}peer_bugs.py::test_defaults_differ_from_the_papers",
            f"{U}config/test_config.py::test_defaults_are_the_papers",
        ),
    ),
    "ranks-disagree": Row(
        "R-KV on vLLM",
        "ranks of tensor parallelism keep different tokens",
        (
            f"{U}worker/test_ranks.py::test_ranks_keep_what_one_worker_keeps",
            f"{E}parallel.py::test_tensor_parallelism",
            f"{E}parallel.py::test_tensor_parallelism_on_runner_v2",
        ),
    ),
    "slot-as-position": Row(
        "hipfire, issue 565",
        "a slot is used as RoPE position when a graph is replayed, and the model loops",
        (
            f"{R}peer_bugs.py::test_physical_slots_used_as_rope_positions",
            f"{E}steering.py::test_engine_equals_reference",
            f"{E}server.py::test_a_request_can_opt_out_and_then_gets_the_stock_answer",
        ),
    ),
    "causal-mask-after-eviction": Row(
        "VeloxQuant-MLX, issue 370",
        "a shortcut that takes the mask for causal is taken after an eviction: garbage",
        (
            f"{E}exactness.py::test_engine_equals_reference",
            f"{E}exactness.py::test_unprotected_prompt",
        ),
    ),
    "stale-grades": Row(
        "R-KV, issues 23 and 26",
        "the evaluation reads a field of an earlier run; GSM8K stands still at 40 %",
        (
            f"{R}peer_bugs.py::test_an_evaluation_reads_only_the_answer_at_hand",
            f"{U}benchmarks/accuracy/test_run.py::test_a_resumed_run_must_be_the_same_run",
            f"{U}benchmarks/accuracy/test_grading.py::test_wrong_and_missing_answers",
        ),
    ),
    "stale-readme": Row(
        "kvpress, issue 249",
        "arguments in the README that the code no longer takes",
        (
            f"{R}documented_commands.py::test_commands_are_accepted",
            f"{R}documented_commands.py::test_programs_run",
            f"{U}repository/test_readme.py::test_the_flags_table_is_the_generated_one",
            f"{U}repository/test_contributing.py::test_the_policy_of_the_guide_scores_and_is_selectable",
        ),
    ),
    "compacted-page-published": Row(
        "vllm-ascend, issue 10296",
        "a compressed page is found as a prefix by another session, which leaks a request's text",
        (
            f"{U}integration/test_block_manager.py::test_a_compacted_request_publishes_nothing_more",
            f"{U}integration/test_block_manager.py::test_check_integrity_can_fail",
            f"{E}serving.py::test_a_conversation_hits_the_prefix_cache_after_its_first_turn_was_evicted",
        ),
    ),
    "changed-where-nothing-is-evicted": Row(
        "R-KV",
        "an answer changes although the budget is never reached",
        (
            f"{E}full_equals_stock.py::test_equals_stock",
            f"{E}server.py::test_a_request_can_opt_out_and_then_gets_the_stock_answer",
        ),
    ),
    "slots-out-of-order": Row(
        "R-KV",
        "after a compaction slots are out of order, and pooling takes neighbours in memory for neighbours in the text",
        (f"{R}peer_bugs.py::test_selection_order_after_the_first_compaction",),
    ),
    "column-0": Row(
        "R-KV",
        "a rewrite leaves out that the published code spares token 0 where nothing is similar",
        (
            f"{R}peer_bugs.py::test_mask_of_token_0_where_nothing_is_similar",
            f"{U}ops/test_functional.py::test_redundancy_zeroes_column_0_where_nothing_is_similar",
        ),
    ),
}
"""Bugs of other projects."""

WEAKNESSES = {
    "W1": Row(
        "R-KV on vLLM",
        "eviction switches itself off for long requests, where a matrix exceeds 512 MiB",
        (
            f"{R}peer_bugs.py::test_silent_no_op_above_a_size_cap",
            f"{R}weaknesses.py::test_w5_scores_take_memory_by_the_token_not_by_the_pair",
            f"{G}ops_cuda.py::test_scores_of_long_requests",
        ),
    ),
    "W2": Row(
        "R-KV on vLLM",
        "pages are given back only on request, and without an agreement of scheduler and worker",
        (
            f"{R}peer_bugs.py::test_pages_are_held_although_their_tokens_are_gone",
            f"{R}peer_bugs.py::test_a_stale_count_is_not_carried_out",
            f"{U}worker/test_runtime.py::test_a_repeated_order_is_refused",
            f"{U}worker/test_runtime.py::test_an_order_of_a_life_before_is_refused",
        ),
    ),
    "W3": Row(
        "R-KV on vLLM",
        "a compaction rewrites all survivors",
        (
            f"{R}weaknesses.py::test_w3_only_what_fills_a_hole_is_moved",
            f"{U}ops/test_functional.py::test_moves_fill_exactly_the_first_slots",
        ),
    ),
    "W4": Row(
        "R-KV on vLLM",
        "kernel launches by the layer",
        (f"{R}weaknesses.py::test_w4_launches_do_not_grow_with_layers",),
    ),
    "W5": Row(
        "R-KV on vLLM",
        "matrices of all pairs of tokens go through memory",
        (f"{R}weaknesses.py::test_w5_scores_take_memory_by_the_token_not_by_the_pair",),
    ),
    "W6": Row(
        "R-KV on vLLM",
        "steps wait for the device",
        (
            f"{R}weaknesses.py::test_w6_no_step_waits_for_the_device",
            f"{G}ops_cuda.py::test_no_operator_waits_for_the_gpu",
        ),
    ),
    "W7": Row(
        "R-KV on vLLM",
        "when one request is compacted, a map of all requests' slots is built and sent",
        (f"{R}weaknesses.py::test_w7_a_compaction_sends_nothing_about_other_requests",),
    ),
    "W8": Row(
        "R-KV on vLLM",
        "only requests of the very same length are compacted together",
        (f"{R}weaknesses.py::test_w8_requests_of_unequal_length_are_compacted_together",),
    ),
    "W9": Row(
        "R-KV on vLLM",
        "queries are recorded in every step, with work by the request and layer",
        (
            f"{R}weaknesses.py::test_w9_queries_are_recorded_only_where_a_compaction_can_read_them",
            f"{U}scheduler/test_planner.py::test_a_request_is_due_from_its_earliest_length_on_and_its_queries_are_there",
        ),
    ),
    "W10": Row(
        "R-KV on vLLM",
        "FULL CUDA graphs are switched off",
        (
            f"{E}server.py::test_the_banner_says_what_the_server_does",
            f"{E}steering.py::test_engine_equals_reference",
            f"{U}worker/signals/test_queries.py::test_a_dummy_pass_records_nothing",
            f"{G}ops_cuda.py::test_observing_and_steering_in_a_cuda_graph",
        ),
    ),
    "W11": Row(
        "R-KV on vLLM",
        "the prefix cache is switched off",
        (
            f"{E}server.py::test_the_banner_says_what_the_server_does",
            f"{E}serving.py::test_a_conversation_hits_the_prefix_cache_after_its_first_turn_was_evicted",
            f"{E}exactness.py::test_engine_equals_reference",
        ),
    ),
    "W12": Row(
        "R-KV on vLLM",
        "Model Runner V1 of a patched vLLM that is built from source",
        (
            f"{E}exactness.py::test_engine_equals_reference",
            f"{E}exactness.py::test_triton_attention_and_pages_of_gpus_equal_the_reference",
            f"{U}integration/compat/test_version.py::test_the_installed_vllm_passes",
            f"{U}integration/compat/test_version.py::test_changed_code_is_refused",
            f"{U}repository/test_patches.py::test_the_stock_vllm_has_no_seam",
        ),
    ),
    "W13": Row(
        "R-KV on vLLM",
        "a preempted request comes back at its full length",
        (
            f"{E}serving.py::test_a_preempted_request_resumes_within_its_bound",
            f"{E}serving.py::test_bounded_admission_never_preempts_where_stock_vllm_does",
        ),
    ),
    "W14": Row(
        "R-KV on vLLM",
        "admission and the check of max_model_len assume that everything is kept",
        (
            f"{U}scheduler/test_admission.py::test_a_pool_smaller_than_the_longest_sequence_is_accepted_if_the_bound_fits",
            f"{U}scheduler/test_admission.py::test_as_many_requests_start_as_have_room_at_their_bound",
            f"{E}serving.py::test_every_request_counts_with_what_it_may_hold",
        ),
    ),
    "W15": Row(
        "R-KV",
        "the prompt is evicted like any other text",
        (
            f"{R}peer_bugs.py::test_silent_no_op_above_a_size_cap",
            f"{U}scheduler/test_planner.py::test_a_protected_prompt_longer_than_the_budget_raises_the_bound",
            f"{U}worker/test_runtime.py::test_check_integrity_finds_a_lost_prompt_token_and_window",
            f"{U}integration/test_block_manager.py::test_a_protected_shared_prompt_is_never_replaced",
        ),
    ),
    "W16": Row(
        "R-KV on vLLM",
        "one set of tokens for all layers and heads",
        (
            f"{U}worker/test_runtime.py::test_different_heads_and_layers_keep_different_tokens_by_head_and_the_same_by_sentence",
            f"{U}policies/test_selection.py::test_every_head_keeps_its_own_best_tokens",
        ),
    ),
    "W17": Row(
        "R-KV on vLLM",
        "a request that is longer than expected raises, which kills the engine",
        (
            f"{R}weaknesses.py::test_w17_a_request_past_its_bound_waits_for_its_compaction",
            f"{U}scheduler/test_planner.py::test_a_request_beyond_its_bound_is_compacted_to_the_budget_all_the_same",
            f"{E}serving.py::test_a_request_that_slips_through_ends_where_the_pool_does",
            f"{E}combinations.py::test_a_compaction_that_finds_no_page_for_a_shared_one_preempts",
        ),
    ),
    "W18": Row(
        "R-KV on vLLM",
        "few published numbers, none of latency, and nothing that tests kernels where there is no GPU",
        (
            f"{U}benchmarks/test_results.py::test_the_pages_are_the_generated_ones",
            f"{U}benchmarks/accuracy/test_report.py::test_published_tables_are_whole_and_their_commands_parse",
            f"{U}ops/test_cuda_emulated.py::test_compact_pages",
            f"{U}ops/test_cuda_emulated.py::test_score_tokens",
        ),
    ),
}
"""Weaknesses of other projects by design: slower, larger or missing."""

DEMANDS = {
    "concurrency": Row(
        "ours",
        "an answer depends on how many requests run",
        (f"{R}load.py::test_1_40_and_100_concurrent_requests_give_the_same_answers",),
    ),
    "aborts": Row(
        "ours",
        "an aborted request, or a client that leaves, keeps pages",
        (
            f"{R}load.py::test_random_aborts_lose_no_page",
            f"{R}crash.py::test_a_killed_process_is_an_error_for_clients_and_a_restarted_server_works",
            f"{E}server.py::test_aborted_requests_give_everything_back",
            f"{E}exactness.py::test_abort",
        ),
    ),
    "killed-process": Row(
        "ours",
        "clients wait forever for a process that was killed",
        (f"{R}crash.py::test_a_killed_process_is_an_error_for_clients_and_a_restarted_server_works",),
    ),
    "sleep": Row(
        "ours",
        "a server that slept has lost what its policy collects, or a request goes on with KV that is gone",
        (
            f"{E}sleep.py::test_answers_after_level_2_are_those_from_before",
            f"{E}sleep.py::test_all_state_survives_whatever_is_woken_first",
            f"{E}sleep.py::test_requests_lose_their_kv_and_nothing_else",
            f"{E}sleep.py::test_requests_in_flight_lose_their_kv_too",
            f"{G}engine_cuda.py::test_an_engine_that_slept_answers_as_before",
        ),
    ),
    "misleading-warning": Row(
        "ours",
        "the log warns that a feature of vLLM is off which is on",
        (
            f"{U}config/test_steering.py::test_the_banner_says_how_steps_are_scheduled",
            f"{E}server.py::test_the_banner_says_what_the_server_does",
        ),
    ),
    "entry-points": Row(
        "ours",
        "a way into vLLM goes past the check of a request's options, so that an opt-out is evicted all the same",
        (
            f"{U}integration/compat/test_request_checks.py::test_every_route_of_vllm_is_in_the_table",
            f"{U}integration/compat/test_request_checks.py::test_a_bad_option_is_refused_before_the_response_begins",
            f"{U}integration/compat/test_request_checks.py::test_vllms_front_end_in_rust_is_refused",
            f"{E}server.py::test_beam_search_is_http_400",
            f"{E}serving.py::test_beam_search_offline_is_refused",
        ),
    ),
    "option-names": Row(
        "ours",
        "an option whose name is nearly right is ignored",
        (
            f"{U}config/test_config.py::test_a_name_that_is_nearly_ours_is_refused",
            f"{U}config/test_config.py::test_names_that_vllm_and_its_connectors_read_are_never_refused",
            f"{U}integration/compat/test_request_checks.py::test_an_option_beside_vllm_xargs_is_refused",
        ),
    ),
    "error-fields": Row(
        "ours",
        "an error names a field that its caller never wrote",
        (
            f"{U}integration/compat/test_request_checks.py::test_an_error_names_what_its_caller_wrote",
            f"{E}serving.py::test_errors_offline_name_what_the_caller_wrote",
            f"{E}server.py::test_a_request_that_could_outgrow_the_pool_is_http_400",
        ),
    ),
    "soak": Row(
        "ours",
        "something small is lost with every thousandth request",
        (
            f"{R}load.py::test_a_soak_loses_no_page_and_violates_nothing",
            f"{U}integration/test_block_manager.py::test_random_traffic_keeps_every_page_right",
        ),
    ),
    "installed-and-unused": Row(
        "ours",
        "work at load time assumes a vLLM, and a server of another version dies although nobody asked for a policy",
        (
            f"{E}other_vllm.py::test_a_server_without_a_policy_answers_as_stock_vllm_does",
            f"{E}other_vllm.py::test_a_policy_is_refused_there_by_the_version",
            f"{U}test_plugin.py::test_a_vllm_without_what_we_touch_is_left_alone",
            f"{U}test_plugin.py::test_a_pool_check_of_another_kind_is_left_alone",
            f"{U}test_plugin.py::test_a_flag_that_vllm_has_itself_is_vllms",
            f"{U}test_plugin.py::test_metrics_of_another_vllm_do_nothing_without_a_policy",
        ),
    ),
    "client-input-as-file-name": Row(
        "ours",
        "a client's text of any length becomes a file name, and the server ends",
        (
            f"{E}traces.py::test_a_long_request_id_is_answered_and_traced",
            f"{U}trace/test_trace.py::test_an_id_of_any_length_and_alphabet_has_a_file",
            f"{U}trace/test_trace.py::test_no_two_ids_share_a_file",
            f"{U}trace/test_trace.py::test_request_ids_cannot_leave_the_folder",
        ),
    ),
    "auxiliary-output": Row(
        "ours",
        "a trace, a metric or a log line that cannot be written stops or delays the server",
        (
            f"{E}traces.py::test_requests_are_answered_while_no_trace_can_be_written",
            f"{U}trace/test_trace.py::test_a_part_that_cannot_be_written_drops_the_trace_at_once",
            f"{U}trace/test_trace.py::test_a_trace_that_cannot_be_written_is_dropped_and_leaves_nothing",
            f"{U}trace/test_trace.py::test_a_folder_that_became_a_file_stops_nobody",
            f"{U}trace/test_trace.py::test_storage_that_hangs_delays_nobody_and_holds_little_memory",
            f"{U}integration/test_metrics.py::test_a_report_that_nobody_knows_costs_nothing_else",
            f"{U}integration/compat/test_responses.py::test_a_stream_survives_an_event_that_cannot_be_stamped",
        ),
    ),
    "report-of-a-part": Row(
        "ours",
        "a response of several choices, prompts or turns reports one of them; a stream, or an answer that a stop string"
        " ended, reports nothing",
        (
            f"{E}server.py::test_every_answer_reports_all_that_was_evicted_for_it",
            f"{E}serving.py::test_several_choices_are_summed",
            f"{E}serving.py::test_a_stop_string_hides_nothing",
            f"{U}integration/compat/test_responses.py::test_an_answer_has_the_sum_of_its_choices",
            f"{U}integration/compat/test_responses.py::test_a_stream_has_the_sum_in_its_last_output",
            f"{U}integration/compat/test_responses.py::test_the_turns_of_a_response_are_summed",
        ),
    ),
    "report-of-lost-work": Row(
        "ours",
        "a request that was preempted or cleared reports the compactions of all its lives as those of its answer",
        (
            f"{E}serving.py::test_a_preempted_request_resumes_within_its_bound",
            f"{E}serving.py::test_a_request_that_was_cleared_reports_its_last_life",
        ),
    ),
}
"""Demands on any server."""

ROWS = BUGS | WEAKNESSES | DEMANDS


def main(names: list[str]) -> int:
    """Print the tests of rows, or all rows."""
    if not names:
        print("\n".join(f"{name}: {row.title} ({row.source}; tests: {len(row.tests)})" for name, row in ROWS.items()))
        return 0
    if unknown := [name for name in names if name not in ROWS]:
        print(f"no such row: {', '.join(unknown)}", file=sys.stderr)
        return 2
    print("\n".join(test for name in names for test in ROWS[name].tests))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
