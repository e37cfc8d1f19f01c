"""Bugs of other projects."""

from __future__ import annotations

from tests.regression.register.row import E, G, R, Row, U

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
            f"{U}worker/test_methods.py::test_interleaved_requests_keep_what_the_method_says",
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
            f"{U}worker/test_methods.py::test_interleaved_requests_keep_what_the_method_says",
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
            f"{U}worker/signals/test_sentence_text.py::test_buffers_are_accounted_for",
            f"{U}worker/test_cache.py::test_pages_leave_room_for_state_positions_and_sums",
        ),
    ),
    "wrong-defaults": Row(
        "R-KV on vLLM",
        "importance has the weight 0.07 instead of 0.1: -2.5 points",
        (
            f"{R}peer_bugs.py::test_defaults_differ_from_the_papers",
            f"{U}policies/test_parameters.py::test_defaults_are_the_papers",
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
