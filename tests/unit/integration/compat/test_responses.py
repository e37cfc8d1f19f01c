"""What a response says was evicted: summed over its choices, and stamped on the last events of a stream."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from skipkv_vllm.core import auxiliary
from skipkv_vllm.integration.compat import install_reports, responses
from skipkv_vllm.integration.compat.responses import Reports, Tap

install_reports()


def params(compactions: int, lives: int = 1, **more) -> dict:
    report = {"policy": "rkv", "compactions": compactions, "evicted_tokens": 32 * compactions, "lives": lives}
    return {"skipkv": report | more}


# ---- sums


def test_counts_are_summed_and_settings_kept():
    strength = {"vector": "math", "alpha0": 1.0, "gamma": 0.02}
    total = Reports(3)
    for number, steered in enumerate((4, 5)):
        total.add(number, params(2, number + 1, steering=strength | {"steered_tokens": steered, "reflection": 1}))
    # One of three was aborted and is not counted.
    steering = strength | {"steered_tokens": 9, "reflection": 2}
    assert total.attach(None) == params(4, 3, steering=steering, choices=2)


def test_a_request_counts_once_with_what_it_said_last():
    total = Reports(2)
    for compactions in (1, 2, 3):
        total.add("a", params(compactions))
    total.add("b", params(5))
    assert total.attach(None) == params(8, 2, choices=2)


def test_sums_of_sums_count_all_choices():
    total = Reports(2)
    total.add(0, params(7, 4, choices=4))
    total.add(1, params(5, 4, choices=4))
    assert total.attach(None) == params(12, 8, choices=8)


def test_one_request_is_reported_as_it_is():
    total = Reports()
    total.add(0, params(2))
    assert total.attach(None) == params(2)


@pytest.mark.parametrize("others", [None, {}, {"do_remote_decode": True}])
def test_what_others_write_stays(others):
    total = Reports(2)
    total.add(0, others)
    assert total.attach(others) is others
    total.add(1, params(2))
    assert total.attach(others) == (others or {}) | params(2, choices=1)


def test_a_report_of_another_form_stops_nobody(monkeypatch, caplog):
    monkeypatch.setattr(auxiliary, "_reported", {})
    total = Reports(2)
    with caplog.at_level(logging.ERROR, "vllm.skipkv"):
        for _ in range(3):
            total.add(0, {"skipkv": "much"})
    assert total.attach(None) is None
    assert len(caplog.records) == 1


# ---- choices


def processor_with_choices(n: int, kind: RequestOutputKind) -> tuple[OutputProcessor, RequestOutputCollector]:
    processor, queue = OutputProcessor(None, log_stats=False), RequestOutputCollector(kind, "a")
    sampling = SamplingParams(n=n, detokenize=False, output_kind=kind)

    def request(request_id: str, params: SamplingParams) -> EngineCoreRequest:
        return EngineCoreRequest(
            request_id=request_id,
            external_req_id="a",
            prompt_token_ids=[1, 2],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    parent = ParentRequest(request("a-1", sampling))
    for index in range(n):
        child, child_params = parent.get_child_info(index)
        processor.add_request(request(child, child_params), None, parent, index, queue)
    return processor, queue


def step(processor: OutputProcessor, **ended: dict | None) -> None:
    """One token for each choice that runs; those named (`c0=params`) end with it."""
    reasons = {f"{name[1:]}_a-1": told for name, told in ended.items()}
    processor.process_outputs(
        [
            EngineCoreOutput(
                request_id,
                [7],
                finish_reason=FinishReason.LENGTH if request_id in reasons else None,
                kv_transfer_params=reasons.get(request_id),
            )
            for request_id in list(processor.request_states)
        ]
    )


def test_an_answer_has_the_sum_of_its_choices():
    processor, queue = processor_with_choices(3, RequestOutputKind.FINAL_ONLY)
    step(processor, c1=params(2))
    step(processor, c0=params(3, 2))
    assert queue.output is None
    step(processor, c2=params(4))
    assert queue.output.finished
    assert queue.output.kv_transfer_params == params(9, 4, choices=3)


@pytest.mark.parametrize("reads_late", [False, True])
def test_a_stream_has_the_sum_in_its_last_output(reads_late):
    processor, queue = processor_with_choices(3, RequestOutputKind.DELTA)
    seen = []
    for ended in ({"c1": params(2)}, {}, {"c0": params(3)}, {"c2": None}):
        step(processor, **ended)
        if not reads_late:
            seen.append(queue.get_nowait())
    last = queue.get_nowait() if reads_late else seen[-1]
    assert last.finished
    # The choice that ended last was aborted and says nothing.
    assert last.kv_transfer_params == params(5, 2, choices=2)


def test_choices_of_an_engine_without_a_policy_are_left_alone():
    processor, queue = processor_with_choices(2, RequestOutputKind.FINAL_ONLY)
    others = {"do_remote_decode": True}
    step(processor, c0=params(2) | others, c1=None)
    assert queue.output.kv_transfer_params == params(2, choices=1)
    processor, queue = processor_with_choices(2, RequestOutputKind.FINAL_ONLY)
    step(processor, c0=None, c1=others)
    assert queue.output.kv_transfer_params is others


# ---- turns


def test_the_turns_of_a_response_are_summed():
    from vllm.entrypoints.openai.responses.context import ParsableContext
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    responses._install_in_servers()
    context = ParsableContext(
        response_messages=[],
        tokenizer=None,
        parser_cls=None,
        request=ResponsesRequest(input="a"),
        available_tools=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    for turn, told in enumerate((params(2), params(3), None)):
        completion = CompletionOutput(0, "a", [7], None, None, finish_reason="stop")
        output = RequestOutput(f"a_{turn}", None, [1], None, [completion], True, kv_transfer_params=told)
        context.append_output(output)
        if turn == 0:
            assert context.kv_transfer_params == told
    assert context.kv_transfer_params == params(5, 2, turns=2)


# ---- streams


def ended(**more) -> Reports:
    total = Reports()
    total.see(0, SimpleNamespace(kv_transfer_params=params(2, **more), finished=True))
    return total


LAST = 'data: {"id":"a", "choices":[{"index":0,"delta":{"content":"}é\\n"},"finish_reason":"stop"}],"x":1.0}\n\n'
USAGE = 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
DELTA = 'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'


@pytest.mark.parametrize("event", [LAST, USAGE, DELTA])
def test_the_last_events_get_the_report_and_keep_every_byte(event):
    stamped = ended().stamp(event)
    added = f',"kv_transfer_params":{json.dumps(params(2), separators=(",", ":"))}'
    assert stamped.replace(added, "") == event
    assert json.loads(stamped.partition("data: ")[2])["kv_transfer_params"] == params(2)


@pytest.mark.parametrize("sent", ["null", '{"é":[1,2],"skipkv":{"gamma":0.00001}}'])
def test_a_field_that_vllm_sends_by_itself_is_completed(sent):
    event = LAST.replace(',"x":1.0', f',"kv_transfer_params":{sent},"x":1.0')
    stamped = ended().stamp(event)
    found = json.loads(stamped.partition("data: ")[2])
    assert found.pop("kv_transfer_params") == (json.loads(sent) or {}) | params(2)
    assert found == json.loads(LAST.partition("data: ")[2])
    assert stamped.count("kv_transfer_params") == 1


@pytest.mark.parametrize(
    "event",
    [
        'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n',
        'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n',
        'data: {"error":{"message":"a"}}\n\n',
        'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        "data: [DONE]\n\n",
        ": keep-alive\n\n",
    ],
)
def test_other_events_stay_as_they_are(event):
    assert ended().stamp(event) is event


def test_the_report_of_one_choice_is_not_sent_before_all_have_ended():
    total, event = Reports(2), LAST.replace(',"x":1.0', ',"kv_transfer_params":%s,"x":1.0')
    total.see(0, SimpleNamespace(kv_transfer_params=params(2), finished=True))
    report = json.dumps(params(2), separators=(",", ":"))
    assert total.stamp(event % report) == event % "null"
    assert total.stamp(event % f'{report[:-1]},"a":1}}') == event % '{"a":1}'
    assert total.stamp(event % '{"a":1}') == event % '{"a":1}'
    # Numbers may be written otherwise than Python writes them.
    assert total.stamp(event % '{"skipkv":{"steering":{"gamma":0.00001}}}') == event % "null"


def test_nothing_is_stamped_before_all_have_ended():
    total = Reports(2)
    total.see(0, SimpleNamespace(kv_transfer_params=params(2), finished=True))
    # Not even read: this is no JSON.
    assert total.stamp("data: {") == "data: {"
    assert total.stamp(LAST) is LAST
    total.see(1, SimpleNamespace(kv_transfer_params=None, finished=True))
    assert total.stamp(LAST) != LAST


def test_a_stream_survives_an_event_that_cannot_be_stamped(monkeypatch, caplog):
    monkeypatch.setattr(auxiliary, "_reported", {})

    async def source():
        for event in ("data: {", "data: {", LAST):
            yield event

    async def run() -> list[str]:
        total = ended()
        return [event async for event in Tap(source(), total.stamp, total)]

    with caplog.at_level(logging.ERROR, "vllm.skipkv"):
        seen = asyncio.run(run())
    assert seen == ["data: {", "data: {", ended().stamp(LAST)]
    assert len(caplog.records) == 1


def test_a_stream_holds_nothing_back_and_ends_its_source():
    log = []

    async def source():
        try:
            for number in range(5):
                log.append(number)
                yield number
        finally:
            log.append("closed")

    async def run() -> None:
        tap = Tap(source(), lambda number: 10 * number, Reports())
        assert await anext(tap) == 0
        assert log == [0]
        assert await anext(tap) == 10
        await tap.aclose()
        assert log == [0, 1, "closed"]
        assert [number async for number in tap] == []
        await tap.aclose()

    asyncio.run(run())


def test_an_error_of_the_engine_reaches_the_client():
    async def source():
        yield 1
        raise ValueError("the engine is dead")

    async def run() -> None:
        tap = Tap(source(), lambda number: number, Reports())
        assert await anext(tap) == 1
        await anext(tap)

    with pytest.raises(ValueError, match="the engine is dead"):
        asyncio.run(run())
