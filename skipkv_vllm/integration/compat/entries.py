"""The ways into a server: what a request may ask on each of them, and how an error names what its caller wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config import KVPolicyConfig, RequestOptions, has_our_prefix
from ...core.errors import KVPolicyError

if TYPE_CHECKING:
    from vllm.exceptions import VLLMValidationError


class Names(NamedTuple):
    """What the callers of an entry point call the parts of a request that can be refused."""

    options: str = "vllm_xargs"
    max_tokens: str = "max_tokens"


PYTHON = Names("SamplingParams.extra_args", "SamplingParams.max_tokens")
TOKENS = Names("sampling_params.extra_args", "sampling_params.max_tokens")
ENTRIES = {
    "chatcmpl-": Names(),
    "cmpl-": Names(),
    "resp_": Names(max_tokens="max_output_tokens"),
    "transcribe-": Names(max_tokens="max_completion_tokens"),
    "translate-": Names(max_tokens="max_completion_tokens"),
    "generate-tokens-": TOKENS,
}
"""How the ids begin that vLLM's endpoints give to requests; any other is that of a caller in Python."""

OPTION_FIELDS = {"vllm_xargs", *RequestOptions.model_fields}
"""Fields of a request body, and names that belong into one of them."""


def names_of(request_id: str) -> Names:
    """What the caller of a request wrote, by its id."""
    return next((names for prefix, names in ENTRIES.items() if request_id.startswith(prefix)), PYTHON)


@contextlib.contextmanager
def as_bad_request(names: Names) -> Iterator[None]:
    """Errors of ours become those that vLLM's server answers with HTTP 400."""
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
    """Refuse what can be refused before a response begins.

    Args:
        body: one of vLLM's models of a request body.
        config: of the server.
        max_model_len: of the model.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed.
    """
    params = getattr(body, "sampling_params", None)
    with as_bad_request(Names() if params is None else TOKENS):
        if getattr(body, "use_beam_search", False):
            raise beam_search_error(config, "use_beam_search", "n samples several answers")
        undeclared = getattr(body, "model_extra", None) or {}
        for name in undeclared:
            _check_field(name)
        if isinstance(literal := undeclared.get("extra_body"), dict) and literal.keys() & OPTION_FIELDS:
            raise KVPolicyError(
                "'extra_body' is an argument of OpenAI's Python client and is ignored in a request; write what it "
                "holds at the top level",
                field="extra_body",
            )
        given = getattr(body, "vllm_xargs", None) if params is None else params.extra_args
        options = RequestOptions.parse(given if isinstance(given, dict) else None, config, max_model_len)
        # A batch of chats passes on what it does not declare; other endpoints would ignore it.
        is_read = "vllm_xargs" not in undeclared or hasattr(body, "to_chat_completion_request")
        if not is_read and (asked := options.model_dump(exclude_none=True)):
            raise KVPolicyError(
                f"{', '.join(asked)} cannot be set for a request to this endpoint, which does not read vllm_xargs; "
                "leave it out, and the server's own settings apply"
            )


def _check_field(name: str) -> None:
    """Refuse an option that was written beside `vllm_xargs`, where vLLM ignores it."""
    if name in RequestOptions.model_fields:
        raise KVPolicyError(
            f"{name!r} is ignored at the top level of a request; write it into vllm_xargs: "
            f'{{"vllm_xargs": {{"{name}": ...}}}}',
            field=name,
        )
    if has_our_prefix(name):
        RequestOptions.check_names([name])


def beam_search_error(config: KVPolicyConfig, field: str, instead: str) -> KVPolicyError:
    """Why there is no beam search on a server with a policy.

    Args:
        config: of the server.
        field: how the caller asked for it.
        instead: the way out that keeps the policy.
    """
    flag = "--kv-policy" if config.evicts else "--kv-steering-vectors"
    return KVPolicyError(
        f"{flag} does not support beam search: each step of a beam is a request of its own, which vLLM sends without "
        "the options of yours (kv_policy, kv_budget, steering). "
        f"Leave {field} out ({instead}), or use a server without {flag}",
        field=field,
    )
