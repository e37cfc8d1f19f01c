"""vLLM's endpoints: how callers write our options there, how errors name them, and which bodies are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config import KVPolicyConfig, RequestOptions, has_our_prefix
from ...core.errors import KVPolicyError

if TYPE_CHECKING:
    from vllm.exceptions import VLLMValidationError


class Names(NamedTuple):
    """How callers of an endpoint name the fields that an error may refer to."""

    options: str = "vllm_xargs"
    max_tokens: str = "max_tokens"


PYTHON = Names("SamplingParams.extra_args", "SamplingParams.max_tokens")
TOKENS = Names("sampling_params.extra_args", "sampling_params.max_tokens")
BY_REQUEST_ID = {
    "chatcmpl-": Names(),
    "cmpl-": Names(),
    "resp_": Names(max_tokens="max_output_tokens"),
    "transcribe-": Names(max_tokens="max_completion_tokens"),
    "translate-": Names(max_tokens="max_completion_tokens"),
    "generate-tokens-": TOKENS,
}
"""Prefix that an endpoint gives to its request ids -> names; any other id comes from Python."""

OPTION_FIELDS = {"vllm_xargs", *RequestOptions.model_fields}
"""The field of a request body that holds our options, and the options themselves."""


def names_of(request_id: str) -> Names:
    """Return the names that the caller of a request used, by the request's id."""
    return next((names for prefix, names in BY_REQUEST_ID.items() if request_id.startswith(prefix)), PYTHON)


@contextlib.contextmanager
def as_bad_request(names: Names) -> Iterator[None]:
    """Turn a `KVPolicyError` into the error that vLLM's server answers with HTTP 400."""
    try:
        yield
    except KVPolicyError as error:
        raise _bad_request(error, names) from None


def _bad_request(error: KVPolicyError, names: Names) -> VLLMValidationError:
    from vllm.exceptions import VLLMValidationError

    if error.field == "prompt":
        return VLLMValidationError(str(error))
    if error.field == "max_tokens":
        message = str(error).replace("max_tokens", names.max_tokens.rpartition(".")[2])
        return VLLMValidationError(message, parameter=names.max_tokens)
    return VLLMValidationError(str(error), parameter=error.field or names.options)


def check_body(body: Any, config: KVPolicyConfig, max_model_len: int) -> None:
    """Refuse a bad request body before its response begins.

    Args:
        body: one of vLLM's models of a request body.
        config: of the server.
        max_model_len: of the model.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed.
    """
    # Not a field that the client added to a body that declares none.
    params = getattr(body, "sampling_params", None) if "sampling_params" in type(body).model_fields else None
    with as_bad_request(Names() if params is None else TOKENS):
        if getattr(body, "use_beam_search", False):
            raise beam_search_error(config, "use_beam_search", "n samples several answers")
        undeclared = getattr(body, "model_extra", None) or {}
        for name in undeclared:
            _check_undeclared(name)
        if isinstance(literal := undeclared.get("extra_body"), dict) and literal.keys() & OPTION_FIELDS:
            raise KVPolicyError(
                "'extra_body' is an argument of OpenAI's Python client and is ignored in a request; write its fields "
                "at the top level",
                field="extra_body",
            )
        _check_misplaced("extra_args", undeclared)
        if isinstance(literal := undeclared.get("sampling_params"), dict):
            _check_misplaced("sampling_params", literal)
        given = getattr(body, "vllm_xargs", None) if params is None else params.extra_args
        options = RequestOptions.parse(given if isinstance(given, dict) else None, config, max_model_len)
        # A batch of chats passes undeclared fields on; other endpoints would ignore them.
        is_read = "vllm_xargs" not in undeclared or hasattr(body, "to_chat_completion_request")
        if not is_read and (requested := options.model_dump(exclude_none=True)):
            raise KVPolicyError(
                f"{', '.join(requested)} cannot be set for a request to this endpoint, which does not read vllm_xargs; "
                "leave it out to use the server's settings"
            )


def _check_misplaced(field: str, holder: dict[str, Any]) -> None:
    """Refuse options of ours in `extra_args`, which belong there in Python and in another endpoint."""
    literal = holder.get("extra_args")
    if isinstance(literal, dict) and (found := [key for key in literal if key in RequestOptions.model_fields]):
        raise KVPolicyError(
            f"{field!r} is ignored by this endpoint; write {', '.join(found)} into vllm_xargs", field=field
        )


def _check_undeclared(name: str) -> None:
    """Refuse an option of ours outside `vllm_xargs`, where vLLM ignores it."""
    if name in RequestOptions.model_fields:
        raise KVPolicyError(
            f"{name!r} is ignored at the top level of a request; write it into vllm_xargs: "
            f'{{"vllm_xargs": {{"{name}": ...}}}}',
            field=name,
        )
    if has_our_prefix(name):
        RequestOptions.check_names([name])


def beam_search_error(config: KVPolicyConfig, field: str, alternative: str) -> KVPolicyError:
    """Return the error for beam search on a server with a policy.

    Args:
        config: of the server.
        field: how the caller requested it.
        alternative: what the caller can use with the policy.
    """
    flag = "--kv-policy" if config.evicts else "--kv-steering-vectors"
    return KVPolicyError(
        f"{flag} does not support beam search: vLLM sends each step of a beam as a separate request, without the "
        "options of the original one (kv_policy, kv_budget, steering). "
        f"Leave {field} out ({alternative}), or use a server without {flag}",
        field=field,
    )
