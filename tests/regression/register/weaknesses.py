"""Weaknesses of other projects by design."""

from __future__ import annotations

from tests.regression.register.row import E, G, R, Row, U

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
            f"{U}ops/test_moves.py::test_moves_fill_exactly_the_first_slots",
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
            f"{U}worker/test_methods.py::test_different_heads_and_layers_keep_different_tokens_by_head_and_the_same_by_sentence",
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
