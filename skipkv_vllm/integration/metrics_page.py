"""The metrics as a Markdown page: `python -m skipkv_vllm.integration.metrics_page > docs/reference/metrics.md`."""

from __future__ import annotations

from ..steering.controller import KINDS
from ..trace.collector import DROP_REASONS
from .metrics import METRICS

SKIP_REASONS = {
    "prompt_exceeds_budget": "the bound of the request was raised to prompt + window + buffer",
    "cached_prompt_sentences": "an unprotected prompt was computed although the prefix cache had it, because its "
    "sentences are compared and cached tokens are not read",
    "streaming_input": "a session that grows its prompt keeps everything and is not steered; options of ours in such a "
    "request are refused",
    "no_pages_for_probe": "with optimistic admission no blocks were free for lookahead, so the newest queries decided "
    "instead",
}
"""Value of `reason` of `skipkv_skipped_total` -> what happened."""

TEXT = """# Metrics

Generated from the code by `python -m skipkv_vllm.integration.metrics_page`; a test compares.

`/metrics` has these series besides vLLM's own. All have the label `engine`, the data-parallel rank. Public names call
vLLM's blocks pages and lookahead probes; they stay so that dashboards keep working.

| metric | type | meaning |
|---|---|---|
SERIES

All series are there from the start of the engine, so a dashboard can tell "none" from "absent". Only
`skipkv_skipped_total` appears with the first of each reason.

## Labels

| metric | label | values |
|---|---|---|
| `skipkv_thoughts_total` | `kind` | KINDS |
| `skipkv_traces_dropped_total` | `reason` | DROPPED; see [TracesDropped](../operations/alerts.md#tracesdropped) |
| `skipkv_skipped_total` | `reason` | see below |

| `reason` of `skipkv_skipped_total` | meaning |
|---|---|
REASONS

## What to watch

| question | answer |
|---|---|
| Does it work? | `skipkv_resident_tokens / skipkv_logical_tokens` falls below 1 when chains of thought are long |
| Does it help? | `vllm:num_requests_running` rises, and `vllm:num_preemptions_total` stays flat |
| Is there room? | `vllm:kv_cache_usage_perc` stays below 1 |
| What does it cost? | the 99th percentile of `vllm:inter_token_latency_seconds` |

`deploy/grafana/dashboards/skipkv.json` shows them, and [Alerts](../operations/alerts.md) says what to do when
one of them is off.
"""


def document() -> str:
    """All of `docs/reference/metrics.md`."""
    series = [
        f"| `skipkv_{name}{'_total' if metric.kind == 'counter' else ''}` | {metric.kind} | {metric.text} |"
        for name, metric in METRICS.items()
    ]
    reasons = [f"| `{reason}` | {text} |" for reason, text in SKIP_REASONS.items()]
    text = TEXT.replace("SERIES", "\n".join(series)).replace("REASONS", "\n".join(reasons))
    kinds, dropped = (", ".join(f"`{value}`" for value in values) for values in (KINDS, DROP_REASONS))
    return text.replace("KINDS", kinds).replace("DROPPED", dropped)


if __name__ == "__main__":
    print(document(), end="")
