"""Report evictions in every response: summed over its choices, and in the last events of a stream.

The scheduler reports on each of its requests when the request ends. vLLM creates one request per choice and prompt,
puts the report of only one of them into a response, and drops it from a stream.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from typing import Any

from ...config import CONFIG_KEY
from ...core.auxiliary import auxiliary, report_failure
from .seams import PLUGIN
from .version import located
from .watched import MESSAGE_STREAM
from .wrap import wrap

FIELD = '"kv_transfer_params":'
TASK = "report evictions to a client"
"""For the log, see `report_failure`."""


class Reports:
    """Sum of the reports on the requests behind one response.

    Integers are counts and are summed, including those of steering. Text and fractions are settings, which all requests
    of a response share.

    Args:
        num_requests: number of requests. A sum over several includes how many it covers.
        unit: name of a request in the response.

    Attributes:
        total: the sum so far; None before the first report.
        num_running: requests that have not ended; updated by `see`.
    """

    def __init__(self, num_requests: int = 1, unit: str = "choices") -> None:
        self.total: dict[str, Any] | None = None
        self.num_running = num_requests
        self._is_sum = num_requests > 1
        self._unit = unit
        self._reports: dict[Hashable, dict[str, Any]] = {}
        self._sum: dict[str, Any] = {}

    @classmethod
    def of(cls, owner: Any, *args: Any, **kwargs: Any) -> Reports:
        """Return the reports attached to an object of vLLM; attach new ones the first time."""
        if not hasattr(owner, PLUGIN):
            setattr(owner, PLUGIN, cls(*args, **kwargs))
        return getattr(owner, PLUGIN)

    def add(self, request: Hashable, params: dict[str, Any] | None) -> None:
        """Add the report in the `kv_transfer_params` of a request; it replaces an earlier one of the same request."""
        if not params or CONFIG_KEY not in params:
            return
        with auxiliary(TASK):
            report, before = params[CONFIG_KEY], self._reports.get(request)
            if report == before:
                return
            self._reports[request] = report
            if before is None and self._sum:
                self._sum = _sum(self._sum, self._counted(report))
            else:
                self._sum = functools.reduce(_sum, map(self._counted, self._reports.values()))
            self.total = self._sum if self._is_sum or len(self._reports) > 1 else report

    def _counted(self, report: dict[str, Any]) -> dict[str, Any]:
        return report | {self._unit: report.get(self._unit, 1)}

    def see(self, request: Hashable, output: Any) -> None:
        """Add the report of a `RequestOutput`, and count it if its request has ended."""
        self.add(request, output.kv_transfer_params)
        self.num_running -= output.finished

    def attach(self, params: dict[str, Any] | None) -> dict[str, Any] | None:
        """Put the sum into `kv_transfer_params`; other entries stay."""
        return params if self.total is None else (params or {}) | {CONFIG_KEY: self.total}

    def stamp(self, event: str) -> str:
        """Put the sum into a server-sent event, if it is one of the last and all requests have ended.

        The last events are chunks with a finish reason or the usage of the whole response, and Anthropic's
        `message_delta`.
        """
        if self.total is None:
            return event
        if self.num_running > 0:
            return _without_report(event)
        start = event.find("{")
        if start < 0:
            return event
        data = json.loads(event[start:])
        choices = data.get("choices")
        is_last = data.get("type") == "message_delta" if choices is None else all(map(_is_finished, choices))
        if not is_last:
            return event
        # Insert text, so that every other byte stays as vLLM wrote it.
        if "kv_transfer_params" in data:
            return _change_field(event, self.attach)
        end = event.rindex("}")
        return f"{event[:end]},{FIELD}{_dump(self.attach(None))}{event[end:]}"


def _without_report(event: str) -> str:
    """Remove the report of a choice that has ended before others."""
    if f'"{CONFIG_KEY}"' not in event.partition(FIELD)[2]:
        return event
    return _change_field(event, lambda sent: {key: sent[key] for key in sent or () if key != CONFIG_KEY} or None)


def _change_field(event: str, change: Callable[[Any], dict[str, Any] | None]) -> str:
    """Change the `kv_transfer_params` that vLLM 0.33 sends by itself, and no other byte of an event."""
    # Not found in a chunk's text, whose quotes are escaped.
    start = event.index(FIELD) + len(FIELD)
    sent, end = json.JSONDecoder().raw_decode(event, start)
    return f"{event[:start]}{_dump(change(sent))}{event[end:]}"


def _dump(params: dict[str, Any] | None) -> str:
    return json.dumps(params, separators=(",", ":"))


def _is_finished(choice: dict[str, Any]) -> bool:
    return choice.get("finish_reason") is not None


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return one | {key: _sum(one[key], value) if key in one else value for key, value in other.items()}
    return one + other if isinstance(one, int) else one


class Tap(AsyncGenerator[Any, None]):
    """Asynchronous generator that passes each item of a source through a function.

    Items are not delayed. An item for which the function fails is passed on unchanged. Closing this generator closes
    the source.

    Args:
        source: the generator.
        through: the function.
        reports: the reports that the function updates, for a further `Tap` on this generator.
    """

    def __init__(self, source: AsyncIterator[Any], through: Callable[[Any], Any], reports: Reports) -> None:
        self.reports = reports
        self._source: Any = source
        self._through = through

    async def asend(self, _: None) -> Any:
        return self._pass(await anext(self._source))

    async def athrow(self, *error: Any) -> Any:
        return self._pass(await self._source.athrow(*error))

    async def aclose(self) -> None:
        await self._source.aclose()

    def _pass(self, item: Any) -> Any:
        try:
            return self._through(item)
        except Exception as error:
            report_failure(TASK, error)
            return item


def _watch(source: AsyncIterator[Any], reports: Reports, request: Hashable = 0, is_merged: bool = False) -> Tap:
    """Add a request's outputs to `reports`; a merged stream yields pairs (number, output)."""

    def through(item: Any) -> Any:
        reports.see(*item if is_merged else (request, item))
        return item

    return Tap(source, through, reports)


def install_reports() -> None:
    """Sum reports in the responses of this process, which runs an engine with a policy or is its client. Idempotent."""
    from vllm.v1.engine.output_processor import RequestState

    wrap(RequestState, "make_request_output", _sum_choices)
    if "vllm.v1.engine.async_llm" in sys.modules:
        # This process may be a server.
        _install_in_servers()


def _install_in_servers() -> None:
    serving = {
        "openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator": _stamp_stream,
        "scale_out.token_in_token_out.serving:ServingTokens.serve_tokens_stream_generator": _stamp_stream,
        "openai.completion.serving:OpenAIServingCompletion.completion_stream_generator": _stamp_stream_of_prompts,
        "openai.completion.serving:OpenAIServingCompletion.request_output_to_completion_response": _sum_prompts,
        "openai.chat_completion.batch_serving:OpenAIServingChatBatch.chat_completion_full_generator_batch": (
            _sum_conversations
        ),
        "openai.responses.context:ParsableContext.append_output": _sum_turns,
    }
    # Since vLLM 0.33 this class has a generator of its own, which writes the client's events.
    messages = located(MESSAGE_STREAM)
    stamp = _stamp_converted_stream if messages == MESSAGE_STREAM["0.32"] else _stamp_stream
    serving[messages.removeprefix("vllm.entrypoints.")] = stamp
    for symbol, around in serving.items():
        module, _, path = symbol.partition(":")
        owner, _, name = path.partition(".")
        with auxiliary(TASK):
            wrap(getattr(importlib.import_module(f"vllm.entrypoints.{module}"), owner), name, around)


def _sum_choices(original: Callable[..., Any]) -> Callable[..., Any]:
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.parent_req is not None:
            reports = Reports.of(self.parent_req, self.parent_req.n)
            reports.add(self.request_id, kv_transfer_params)
            # To every later output: vLLM sends the client the last output's parameters, whichever choice produced it.
            kv_transfer_params = reports.attach(kv_transfer_params)
        return original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
        )

    return make_request_output


def _stamp_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def stream(self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any) -> Tap:
        reports = Reports()
        events = original(self, request, _watch(result_generator, reports), *args, **kwargs)
        return Tap(events, reports.stamp, reports)

    return stream


def _stamp_stream_of_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def stream(self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any) -> Tap:
        reports = Reports(len(engine_inputs))
        results = _watch(result_generator, reports, is_merged=True)
        return Tap(original(self, request, engine_inputs, results, *args, **kwargs), reports.stamp, reports)

    return stream


def _stamp_converted_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(self: Any, generator: Any) -> Any:
        events = original(self, generator)
        return Tap(events, generator.reports.stamp, generator.reports) if isinstance(generator, Tap) else events

    return convert


def _sum_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def respond(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, final_res_batch, *args, **kwargs)
        reports = Reports(len(final_res_batch))
        for number, output in enumerate(final_res_batch):
            reports.add(number, output.kv_transfer_params)
        response.kv_transfer_params = reports.attach(response.kv_transfer_params)
        return response

    return respond


def _sum_conversations(original: Callable[..., Any]) -> Callable[..., Any]:
    async def respond(self: Any, request: Any, generators: Any, *args: Any, **kwargs: Any) -> Any:
        reports = Reports(len(generators))
        tapped = [_watch(each, reports, number) for number, each in enumerate(generators)]
        response = await original(self, request, tapped, *args, **kwargs)
        if hasattr(response, "kv_transfer_params"):
            # Error responses have none.
            response.kv_transfer_params = reports.attach(response.kv_transfer_params)
        return response

    return respond


def _sum_turns(original: Callable[..., Any]) -> Callable[..., Any]:
    def append_output(self: Any, output: Any) -> None:
        original(self, output)
        reports = Reports.of(self, unit="turns")
        reports.add(output.request_id, output.kv_transfer_params)
        self.kv_transfer_params = reports.attach(self.kv_transfer_params)

    return append_output
