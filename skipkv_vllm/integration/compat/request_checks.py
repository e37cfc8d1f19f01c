"""Refuse bad requests: the body before its response begins, and the complete request before it reaches the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...config import RequestOptions
from .endpoints import PYTHON, as_bad_request, beam_search_error, check_body, names_of
from .flags import has_policy, policy_config
from .pool import check_fits_alone
from .seams import is_public
from .wrap import wrap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def install_request_checks() -> None:
    """Install the checks of this module in this process. Idempotent."""
    _install_body_check()
    _install_beam_search_check()
    _install_request_check()


def _install_request_check() -> None:
    """Check each request once vLLM has settled its prompt, `max_tokens` and whether it is resumable."""
    from vllm.v1.engine.input_processor import InputProcessor

    if is_public("request check"):
        if check_request not in InputProcessor.request_validators:
            InputProcessor.request_validators.append(check_request)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            check_request(self.vllm_config, request)
            return request

        return process

    wrap(InputProcessor, "process_inputs", around)


def check_request(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a request with bad options of ours, or one that could never finish.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed; HTTP 400 on a server.
    """
    params = request.sampling_params
    if params is None or not has_policy(vllm_config):
        return
    config = policy_config(vllm_config)
    with as_bad_request(names_of(request.request_id)):
        options = RequestOptions.parse(params.extra_args, config, vllm_config.model_config.max_model_len)
        if request.resumable:
            options.check_streaming()
        check_fits_alone(vllm_config, config, request, options)


def _install_body_check() -> None:
    """Check each request body before its response begins.

    vLLM builds the engine's request only afterwards; a streamed response has then already begun as HTTP 200.
    """
    from vllm.entrypoints.serve.engine.serving import BaseServing

    if is_public("check before a response"):
        if check_served not in BaseServing.request_validators:
            BaseServing.request_validators.append(check_served)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        async def check_model(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm.exceptions import VLLMValidationError

            try:
                check_served(self, request)
            except VLLMValidationError as error:
                return self.create_error_response(error)
            return await original(self, request, *args, **kwargs)

        return check_model

    wrap(BaseServing, "_check_model", around)


def check_served(serving: Any, body: Any) -> None:
    """Refuse a bad body on a server with a policy.

    Args:
        serving: the handler of an endpoint.
        body: the request body.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed.
    """
    # A handler without an engine converts between text and tokens, or takes a body without undeclared fields.
    vllm_config = getattr(getattr(serving, "engine_client", None), "vllm_config", None)
    if vllm_config is not None and has_policy(vllm_config):
        check_body(body, policy_config(vllm_config), vllm_config.model_config.max_model_len)


def _install_beam_search_check() -> None:
    """Refuse beam search offline; `check_body` refuses it on a server."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin

    if is_public("check before a response"):
        if check_beam_search not in BeamSearchOfflineMixin.beam_search_validators:
            BeamSearchOfflineMixin.beam_search_validators.append(check_beam_search)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_beam_search(self.llm_engine.vllm_config)
            return original(self, *args, **kwargs)

        return beam_search

    wrap(BeamSearchOfflineMixin, "beam_search", around)


def check_beam_search(vllm_config: VllmConfig) -> None:
    """Refuse beam search on an engine with a policy.

    Raises:
        VLLMValidationError: with the reason and the remedies.
    """
    if has_policy(vllm_config):
        with as_bad_request(PYTHON):
            raise beam_search_error(policy_config(vllm_config), "LLM.beam_search", "LLM.generate takes the options")
