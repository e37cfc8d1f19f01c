"""The methods as a Markdown page: `python -m skipkv_vllm.policies.table > docs/reference/methods.md`."""

from __future__ import annotations

import dataclasses
import re

from ..core.needs import Need
from . import Policy, make_policy, policy_names
from .base import About, refusals

SUMS = "bytes a held token, layer and kv head; 32 queries instead of W"
INPUTS = {
    Need.QUERIES: ("last W queries", "W Hq D elements a layer"),
    Need.KEYS: ("keys", ""),
    Need.VALUES: ("values", ""),
    Need.SENTENCES: ("sentence boundaries", "8 bytes a token"),
    Need.HIDDEN: ("last hidden states", "`max_sentences` embeddings, 4 bytes a token"),
    Need.RECURRENCE: ("token ids", "4 bytes a token"),
    Need.OUTPUT_ERROR: ("output error so far", f"8 {SUMS}"),
    Need.ATTENTION_MASS: ("attention received so far", f"4 {SUMS}"),
    Need.SEGMENTS: ("sparsity of attention at the end of each segment", "12 bytes a segment"),
    Need.GATES: ("gate values", "4 bytes a token, layer and kv head; the gates"),
    Need.LOOKAHEAD: ("queries of lookahead tokens", "lookahead blocks for one step"),
}
"""need -> input of a method, and its memory per request"""

TEXT = """# Methods

Generated from the code by `python -m skipkv_vllm.policies.table`; a test compares.

[Choosing a method](../guides/choosing-a-method.md) says which one to take; this page lists what each reads and costs.

## Rules that all methods share

- **Trigger.** A request that holds budget + buffer tokens is compacted to exactly its budget. With `--kv-defer-prompt`
  a long unprotected prompt is first held whole until W more tokens are written, whose queries choose. Methods about
  the prompt (PROMPT) need `--no-kv-protect-prompt`. They also compact a prompt longer than the budget as
  soon as it is computed, and `--kv-defer-prompt` holds it whole until then.
- **Pinned.** The protected prompt, the newest W tokens (`--kv-window`) and a method's sinks and question always stay.
- **Granularity** (`--kv-granularity`). By `head` every layer and kv head keeps its own tokens. By `sentence` whole
  sentences leave, the same ones for all layers and heads, by the mean score of their tokens.
- **Ties.** The earlier token stays.
- **Grouped queries.** Values per query head are averaged over the heads of a kv head, unless the method's paper says
  otherwise.
- **Training.** Only methods that read gates need any. Gates come with the model that is served, as a file
  (`skipkv_vllm/policies/gates.py` describes it), and so only for the server's own method. `skipkv train-gates` makes
  one ([Gates](../guides/gates.md)). The thresholds of `thinkv` depend on the model; the defaults are the bundled
  one's, by `python -m benchmarks.thinkv`.

## What each reads and costs

Cost is that of one compaction per layer and kv head, with L held tokens, the window W, G query heads a kv head and head
size D. Memory is what a request takes beside its KV blocks. Every method scores all layers and requests of a step at
once, by operators in C++, CUDA and Triton. [Departures from papers](../design/departures-from-papers.md) has those
reasons of the last column that need more than a line.

| method | paper | parameters | trigger | reads | cost | memory | training | departs from the paper |
|---|---|---|---|---|---|---|---|---|
"""


REFUSED = """
## Known and not offered

`--kv-policy` and a request's `kv_policy` refuse these, with the reason.

| method | paper | why not | use |
|---|---|---|---|
"""


def _link(about: About) -> str:
    return f"[{about.paper}](https://arxiv.org/abs/{about.arxiv})" if about.arxiv else about.paper


def _with_links(text: str) -> str:
    """Turn paths of other pages into links, as seen from `docs/reference/`."""
    return re.sub(r"docs/([\w/-]+/([\w-]+)\.md)", r"[\2](../\1)", text)


def row(policy: Policy) -> str:
    """Format the table row of a method."""
    about, reads = policy.about, [INPUTS[need] for need in Need if need in policy.needs]
    paper = _link(about)
    given = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    fields = ", ".join(f"`{name}` ({'required' if value == '' else value})" for name, value in given.items()) or "none"
    inputs, memory = ("; ".join(filter(None, column)) for column in zip(*reads, strict=True)) if reads else ("none", "")
    trigger = "none" if about.cost == "none" else "end of a prompt, bound" if policy.compacts_prompt else "bound"
    return (
        f"| `{policy.name}` | {paper} | {fields} | {trigger} | {inputs} | {about.cost} | {memory or 'none'} "
        f"| {about.training} | {_with_links(about.departs) or ('nowhere that we know' if about.arxiv else '')} |"
    )


def document() -> str:
    """Return the page `docs/reference/methods.md`."""
    refused = [f"| `{r.name}` | {_link(r.about)} | {_with_links(r.reason)} | {r.instead} |" for r in refusals()]
    methods = [make_policy(name) for name in policy_names()]
    about_prompts = ", ".join(f"`{method.name}`" for method in methods if method.compacts_prompt)
    text = TEXT.replace("PROMPT", about_prompts) + "\n".join(map(row, methods)) + "\n"
    return text + REFUSED + "\n".join(refused) + "\n"


if __name__ == "__main__":
    print(document(), end="")
