"""Demands on any server."""

from __future__ import annotations

from tests.regression.register.row import E, G, R, Row, U

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
            f"{U}config/test_request.py::test_a_name_that_is_nearly_ours_is_refused",
            f"{U}config/test_request.py::test_names_that_vllm_and_its_connectors_read_are_never_refused",
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
            f"{U}trace/test_files.py::test_an_id_of_any_length_and_alphabet_has_a_file",
            f"{U}trace/test_files.py::test_no_two_ids_share_a_file",
            f"{U}trace/test_files.py::test_request_ids_cannot_leave_the_folder",
        ),
    ),
    "auxiliary-output": Row(
        "ours",
        "a trace, a metric or a log line that cannot be written stops or delays the server",
        (
            f"{E}traces.py::test_requests_are_answered_while_no_trace_can_be_written",
            f"{U}trace/test_storage.py::test_a_part_that_cannot_be_written_drops_the_trace_at_once",
            f"{U}trace/test_storage.py::test_a_trace_that_cannot_be_written_is_dropped_and_leaves_nothing",
            f"{U}trace/test_storage.py::test_a_folder_that_became_a_file_stops_nobody",
            f"{U}trace/test_storage.py::test_storage_that_hangs_delays_nobody_and_holds_little_memory",
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
