"""Every entry point of vLLM, and how a request's options pass it. Tests compare this list with vLLM's files."""

from __future__ import annotations

import ast
import functools
import glob
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from skipkv_vllm.integration.compat.version import minor, vllm_root, vllm_version

IS_032 = minor(vllm_version()) == "0.32"


class Endpoint(NamedTuple):
    """A route that generates.

    Attributes:
        model: vLLM's model of its body.
        body: the smallest valid body without the model's name; empty if the toy model cannot serve it.
        options: field that holds a request's options; empty if there is none.
        max_tokens: field that limits the output.
    """

    model: str
    body: dict[str, Any]
    options: str = "vllm_xargs"
    max_tokens: str = "max_tokens"

    def with_options(self, given: dict[str, Any], max_tokens: int = 2, **more: Any) -> dict[str, Any]:
        """Return a body for the toy server."""
        body = {"model": "tiny"} | self.body | more
        for field, value in ((self.options or "vllm_xargs", given), (self.max_tokens, max_tokens)):
            outer, _, inner = field.rpartition(".")
            body |= {outer: body.get(outer, {}) | {inner: value}} if outer else {inner: value}
        return body

    def load(self) -> Any:
        """Return the class of the body."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ENDPOINTS = {
    "/v1/completions": Endpoint("openai.completion.protocol:CompletionRequest", {"prompt": "Hi"}),
    "/v1/chat/completions": Endpoint("openai.chat_completion.protocol:ChatCompletionRequest", CHAT),
    "/v1/chat/completions/batch": Endpoint(
        # Has no vllm_xargs, but passes undeclared fields to a chat request for each conversation.
        "openai.chat_completion.protocol:BatchChatCompletionRequest",
        {"messages": [CHAT["messages"]]},
    ),
    "/v1/responses": Endpoint(
        "openai.responses.protocol:ResponsesRequest",
        {"input": "Hi"},
        max_tokens="max_output_tokens",
    ),
    "/v1/messages": Endpoint("anthropic.protocol:AnthropicMessagesRequest", CHAT),
    "/inference/v1/generate": Endpoint(
        "scale_out.token_in_token_out.protocol:GenerateRequest",
        {"token_ids": [5, 6, 7]},
        options="sampling_params.extra_args",
        max_tokens="sampling_params.max_tokens",
    ),
    "/v1/audio/transcriptions": Endpoint("speech_to_text.transcription.protocol:TranscriptionRequest", {}),
    "/v1/audio/translations": Endpoint("speech_to_text.translation.protocol:TranslationRequest", {}),
    "/generative_scoring": Endpoint(
        "generate.generative_scoring.serving:GenerativeScoringRequest",
        {"query": "Is", "items": ["a"], "label_token_ids": [5, 6]},
        options="",
    ),
}
"""All call `_check_model` with the body (`/v1/messages` with a chat request made of it) before they respond."""

OTHER_ROUTES = {
    "hands the body to the handler of chat or completions": ["/invocations"],
    "its body has no room for options, vLLM drops what it does not know: the server's settings apply": [
        "/cohere/v2/chat",
        "/v1/realtime",  # a growing input, which keeps everything
    ],
    "makes no request of an engine; what it renders is checked by /inference/v1/generate": [
        *("/v1/chat/completions/render", "/v1/completions/render", "/v1/responses/render", "/v1/messages/render"),
        *("/cohere/v2/chat/render", "/v1/chat/completions/derender", "/v1/completions/derender"),
        *("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
    ],
    "of pooling models, which --kv-policy refuses at start-up": [
        *("/classify", "/pooling", "/v1/embeddings", "/v2/embed"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    ],
    "ends requests": [
        *("/abort_requests", "/inference/v1/abort_requests", "/v1/responses/{response_id}/cancel"),
    ],
    "for operators, takes no requests": [
        *("/collective_rpc", "/fault_tolerance/apply", "/pause", "/ping", "/resume", "/sleep", "/wake_up"),
        *("/release_kv_cache_memory", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache"),
        *("/is_scaling_elastic_ep", "/scale_elastic_ep", "/start_profile", "/stop_profile"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
        *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
        *("/weight_checker", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    ],
}

if IS_032:
    ENDPOINTS["/v1/systemone"] = Endpoint(
        "generate.structured_decisions.protocol:StructuredDecisionRequest", {}, options=""
    )
else:
    OTHER_ROUTES["its body refuses fields that it does not declare"] = ["/v1/systemone", "/v1/decisions"]

MAKERS = {
    "entrypoints/openai/chat_completion/protocol.py": "of vllm_xargs; beam search is refused",
    "entrypoints/openai/completion/protocol.py": "of vllm_xargs; beam search is refused",
    "entrypoints/openai/responses/protocol.py": "of vllm_xargs",
    "entrypoints/speech_to_text/transcription/protocol.py": "of vllm_xargs; beam search is refused",
    "entrypoints/speech_to_text/translation/protocol.py": "of vllm_xargs; beam search is refused",
    "entrypoints/speech_to_text/realtime/connection.py": "an input that grows, which keeps everything",
    "entrypoints/speech_to_text/base/serving.py": "the language of an audio, one token, by the server's settings",
    "entrypoints/generate/beam_search/online.py": "refused by the body",
    "entrypoints/generate/beam_search/offline.py": "refused",
    "entrypoints/generate/generative_scoring/serving.py": "one token, by the server's settings",
    "entrypoints/generate/base/protocol.py": "only to check a grammar",
    "parser/abstract_parser.py": "only to check a grammar",
    "entrypoints/llm.py": "where the caller gives none",
    "plugins/io_processors/interface.py": "where the caller gives none",
    "sampling_params.py": "the class itself",
    "snapshot/server.py": "one token, by the server's settings",
    "v1/engine/async_llm.py": "tells a KV connector that a request was refused; connectors are refused",
    "v1/worker/gpu/warmup.py": "in the worker, before there are requests",
    "benchmarks/latency.py": "LLM.generate; its --use-beam-search is refused",
    "benchmarks/throughput.py": "LLM.generate, AsyncLLM.generate",
    "benchmarks/mm_processor.py": "LLM.chat",
}
if IS_032:
    MAKERS["entrypoints/generate/structured_decisions/strategies.py"] = "one token, by the server's settings"
else:
    MAKERS |= {
        "entrypoints/openai/decisions/strategies.py": "one token, by the server's settings",
        "entrypoints/generate/beam_search/utils.py": "only to check a grammar",
        "benchmarks/forward/batch.py": "steps without a scheduler, in which nothing is evicted",
    }
"""Files that make `SamplingParams` or `BeamSearchParams`, and from what; `InputProcessor.process_inputs` sees all."""

COMMANDS = {
    "serve": "the routes above; also --grpc, whose protocol has no room for options, and which calls AsyncLLM.generate",
    "run-batch": "the handlers of chat completions and speech; a refusal is the error of its row",
    "launch": "render",
    "render": "makes no request of an engine",
    "chat": "a client",
    "complete": "a client",
    "snapshot": "the routes above",
    "preload": "loads weights",
    "bench": "its own commands",
    "latency": "LLM.generate, LLM.beam_search",
    "throughput": "LLM.generate, AsyncLLM.generate",
    "mm-processor": "LLM.chat",
    "startup": "makes no requests",
    "sweep": "runs the others",
    "collect-env": "makes no requests",
    "download-kernels": "makes no requests",
}
if not IS_032:
    COMMANDS["forward"] = "makes no requests of an engine"
"""Commands of `vllm`. Its front end in Rust (`VLLM_USE_RUST_FRONTEND`) is refused at start-up."""

_VERBS = {"post", "put", "patch", "delete", "websocket", "api_route", "add_api_route"}


def sources(folder: str, *words: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of vLLM's files in a folder that contain one of the words."""
    # Unlike Path.rglob it follows links; a patched copy consists of links.
    for file in sorted(glob.glob(f"{folder}**/*.py", root_dir=vllm_root(), recursive=True)):
        text = Path(vllm_root(), file).read_text()
        if any(word in text for word in words):
            yield file, text


def _trees(folder: str, *words: str) -> Iterator[tuple[str, ast.Module]]:
    return ((file, ast.parse(text)) for file, text in sources(folder, *words))


def routes() -> set[str]:
    """Return all paths on which vLLM's servers accept a body, whatever enables them."""
    calls = [
        node
        for _, tree in _trees("entrypoints/", "router", "app")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    named = [call.args[0] for call in calls if getattr(call.func, "attr", "") in _VERBS and call.args]
    texts = [name.value for name in named if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    return {text for text in texts if text.startswith("/")}


@functools.cache
def makers() -> dict[str, set[str]]:
    """Return the files that construct engine inputs (also by `from_optional`), by class name."""
    found: dict[str, set[str]] = {"SamplingParams": set(), "BeamSearchParams": set(), "EngineCoreRequest": set()}
    for file, tree in _trees("", *found):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                made = node.func.value if getattr(node.func, "attr", "") == "from_optional" else node.func
                found.get(getattr(made, "id", ""), set()).add(file)
    return found


def commands() -> set[str]:
    """Return the names of commands and subcommands."""
    found = set()
    for _, tree in _trees("entrypoints/cli/", "Subcommand"):
        for node in (part for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for part in cls.body):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "name":
                found.add(ast.literal_eval(node.value))
    return found
