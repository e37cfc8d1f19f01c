"""No way into vLLM goes past the check of a request's options."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest
import vllm.envs
from vllm import LLM, SamplingParams
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import request_checks
from tests import entry_points
from tests.entry_points import COMMANDS, ENDPOINTS, MAKERS, OTHER_ROUTES
from tests.unit.integration.compat.vllm_configs import make_vllm_config

POLICY = {"kv_policy": "skipkv", "kv_budget": 96}
STEERING = {"kv_steering_vectors": {"a": "/nowhere"}}


def vllm_config(policy: dict | None) -> SimpleNamespace:
    additional = {} if policy is None else {"skipkv": policy}
    return SimpleNamespace(additional_config=additional, model_config=SimpleNamespace(max_model_len=2048))


def answer(body: object, policy: dict | None = POLICY) -> SimpleNamespace | None:
    """The error of the check before a response, None where it passes."""
    request_checks._install_body_check()
    serving = BaseServing.__new__(BaseServing)
    serving.engine_client = SimpleNamespace(vllm_config=vllm_config(policy))
    serving.models = SimpleNamespace(is_base_model=lambda name: True)
    serving.request_logger = None
    found = asyncio.run(serving._check_model(body))
    return None if found is None else found.error


def body_of(path: str, given: dict | None = None, **more: object) -> object:
    """A body of an endpoint, as vLLM's own checks would let it through."""
    endpoint = ENDPOINTS[path]
    if endpoint.options.startswith("sampling_params"):
        return endpoint.load().model_construct(sampling_params=SamplingParams(extra_args=given), **more)
    given = {} if given is None else {"vllm_xargs": given}
    return endpoint.load().model_construct(model="tiny", **given, **more)


# ---- the table is whole


def test_every_route_of_vllm_is_in_the_table():
    others = [path for paths in OTHER_ROUTES.values() for path in paths]
    assert entry_points.routes() == {*ENDPOINTS, *others}
    assert len(others) == len({*others, *ENDPOINTS}) - len(ENDPOINTS)


def test_every_file_that_makes_sampling_parameters_is_in_the_table():
    made = entry_points.makers()
    assert made["SamplingParams"] | made["BeamSearchParams"] == set(MAKERS)


def test_every_command_of_vllm_is_in_the_table():
    assert entry_points.commands() == set(COMMANDS)


def test_requests_of_an_engine_are_made_where_they_are_checked():
    # The second one only tells a KV connector that a request was refused.
    assert entry_points.makers()["EngineCoreRequest"] == {"v1/engine/input_processor.py", "v1/engine/async_llm.py"}


# ---- each endpoint


@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if endpoint.options])
def test_a_bad_option_is_refused_before_the_response_begins(path):
    assert answer(body_of(path)) is None
    assert answer(body_of(path, {"kv_budget": 64, "mine": 1})) is None
    assert answer(body_of(path, {"kv_budget": 3}), policy=None) is None
    for given, part in (
        ({"kv_budget": 3}, "kv_budget=3 is out of range; allowed: 9 to 2048"),
        ({"KV_BUDGET": 64}, "did you mean 'kv_budget'"),
    ):
        error = answer(body_of(path, given))
        assert (error.code, error.param) == (400, ENDPOINTS[path].options)
        assert part in error.message


@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if not endpoint.options])
def test_options_where_nobody_reads_them_are_refused(path):
    assert answer(body_of(path)) is None
    assert answer(body_of(path, {"session_id": "a"})) is None
    error = answer(body_of(path, {"kv_policy": "full"}))
    assert (error.code, error.param) == (400, "vllm_xargs")
    assert "kv_policy cannot be set for a request to this endpoint" in error.message


@pytest.mark.parametrize(
    "handler", [SpeechToTextBaseServing._create_speech_to_text, ServingStructuredDecisions.create_decision]
)
def test_handlers_that_the_toy_model_cannot_serve_check_the_body_first(handler):
    source = inspect.getsource(handler)
    assert source.index("self._check_model(request)") < min(
        source.index(made)
        for made in ("self.beam_search(", "engine_client.generate(", "strategy.read")
        if made in source
    )


@pytest.mark.parametrize(("policy", "flag"), [(POLICY, "--kv-policy"), (STEERING, "--kv-steering-vectors")])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/audio/transcriptions"])
def test_beam_search_is_refused(path, policy, flag):
    assert answer(body_of(path, use_beam_search=True), policy=None) is None
    error = answer(body_of(path, use_beam_search=True), policy)
    assert (error.code, error.param) == (400, "use_beam_search")
    assert f"{flag} does not support beam search" in error.message
    assert "Leave use_beam_search out" in error.message


def test_bodies_that_can_ask_for_beam_search_are_those():
    fields = {path for path, endpoint in ENDPOINTS.items() if "use_beam_search" in endpoint.load().model_fields}
    batch = "/v1/chat/completions/batch"  # refused by vLLM itself
    assert fields - {batch} == {f"/v1/{name}" for name in ("completions", "chat/completions")} | {
        f"/v1/audio/{name}" for name in ("transcriptions", "translations")
    }


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("kv_budget", 'write it into vllm_xargs: {"vllm_xargs": {"kv_budget": ...}}'),
        ("steering", "'steering' is ignored at the top level"),
        ("kvBudget", "did you mean 'kv_budget'"),
        ("kv_window", "--kv-window"),
        ("skipkv", "write each option under its own name"),
    ],
)
def test_an_option_beside_vllm_xargs_is_refused(field, part):
    error = answer(body_of("/v1/completions", **{field: 64}))
    assert error.code == 400
    assert part in error.message
    assert answer(body_of("/v1/completions", **{field: 64}), policy=None) is None
    # Names that others may use as well are left alone there.
    assert answer(body_of("/v1/completions", policy="x", window=3, kv_cache_hint=1)) is None


def test_an_argument_of_a_client_that_became_a_field_is_refused():
    for literal in ({"kv_policy": "full"}, {"vllm_xargs": {"kv_policy": "full"}}):
        error = answer(body_of("/v1/completions", extra_body=literal))
        assert (error.code, error.param) == (400, "extra_body")
        assert "write its fields at the top level" in error.message
    assert answer(body_of("/v1/completions", extra_body={"another": 1})) is None
    for field, literal in {
        "extra_args": {"kv_budget": 64},
        "sampling_params": {"extra_args": {"kv_budget": 64}},
    }.items():
        error = answer(body_of("/v1/completions", **{field: literal}))
        assert (error.code, error.param) == (400, field)
        assert "write kv_budget into vllm_xargs" in error.message
    # What vLLM ignores by itself passes.
    for literal in ({}, {"extra_args": {"a": 1}}, {"extra_args": 3}, 7):
        assert answer(body_of("/v1/completions", sampling_params=literal)) is None


@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if endpoint.options])
def test_vllm_knows_the_field_of_the_options(path):
    fields = ENDPOINTS[path].load().model_fields
    if path == "/v1/chat/completions/batch":
        body = body_of(path, {"kv_budget": 64}).to_chat_completion_request([{"role": "user", "content": "Hi"}])
        assert body.vllm_xargs == {"kv_budget": 64}
    else:
        assert ENDPOINTS[path].options.partition(".")[0] in fields


# ---- offline, and callers in general


@pytest.mark.parametrize(("policy", "flag"), [(POLICY, "--kv-policy"), (STEERING, "--kv-steering-vectors")])
def test_beam_search_offline_is_refused(policy, flag):
    request_checks._install_beam_search_check()
    llm = LLM.__new__(LLM)
    llm.llm_engine = SimpleNamespace(vllm_config=vllm_config(policy))
    with pytest.raises(VLLMValidationError, match=rf"{flag} does not support beam search.*LLM\.generate takes"):
        llm.beam_search(["Hi"], BeamSearchParams(beam_width=2, max_tokens=3))
    llm.llm_engine.vllm_config = vllm_config(None)
    with pytest.raises(AttributeError, match="input_processor"):  # vLLM's own code
        llm.beam_search(["Hi"], BeamSearchParams(beam_width=2, max_tokens=3))


@pytest.mark.parametrize(
    ("request_id", "options", "max_tokens"),
    [
        ("7", "SamplingParams.extra_args", "SamplingParams.max_tokens"),
        ("a name of the caller's", "SamplingParams.extra_args", "SamplingParams.max_tokens"),
        ("chatcmpl-1", "vllm_xargs", "max_tokens"),
        ("cmpl-1-0", "vllm_xargs", "max_tokens"),
        ("resp_1", "vllm_xargs", "max_output_tokens"),
        ("transcribe-1", "vllm_xargs", "max_completion_tokens"),
        ("generate-tokens-1", "sampling_params.extra_args", "sampling_params.max_tokens"),
    ],
)
def test_an_error_names_what_its_caller_wrote(request_id, options, max_tokens):
    config = vllm_config(POLICY)
    config.cache_config = SimpleNamespace(num_gpu_blocks=20, block_size=16)
    config.parallel_config = SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1)
    config.max_in_flight_tokens = 128
    config.max_concurrent_batches, config.speculative_config = 2, None
    config.model_config.hf_text_config = SimpleNamespace()

    def parameter(num_prompt: int, tokens: int, **given: object) -> tuple[str | None, str]:
        params = SamplingParams(max_tokens=tokens, extra_args=given)
        request = SimpleNamespace(
            request_id=request_id,
            sampling_params=params,
            prompt_token_ids=[1] * num_prompt,
            prompt_embeds=None,
            resumable=False,
        )
        with pytest.raises(VLLMValidationError) as refused:
            request_checks.check_request(config, request)
        return refused.value.parameter, str(refused.value)

    assert parameter(20, 20, kv_budget=3)[0] == options
    found, message = parameter(20, 500, kv_policy="full")
    assert found == max_tokens
    assert f"set {max_tokens.rpartition('.')[2]} to at most 284" in message
    assert parameter(500, 1, kv_policy="full")[0] is None  # the prompt is to blame
    assert parameter(20, 500, kv_budget=300)[0] == options


def test_vllms_front_end_in_rust_is_refused(monkeypatch):
    for policy in (POLICY, STEERING):
        config = KVPolicyConfig.parse(policy)
        with monkeypatch.context() as patch:
            patch.setitem(vars(vllm.envs), "VLLM_USE_RUST_FRONTEND", True)
            with pytest.raises(KVPolicyError, match=r"front end in Rust.*Unset VLLM_USE_RUST_FRONTEND"):
                compat.check_config(make_vllm_config(), config)
