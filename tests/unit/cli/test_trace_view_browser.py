"""The page of `skipkv trace view` in a real browser: it shows the content of the trace."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from skipkv_vllm.cli import trace_view
from skipkv_vllm.trace.files import Trace
from tests.unit.cli.pages import HEADS, LAYERS, NASTY, make_trace

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on the PATH")

CATCH = "<script>const wrong = []; addEventListener('error', (e) => wrong.push(e.message));</script>"
# Goes through the steps (at most about 12) and filters, then uses the page like a reader.
PROBE = """<script>
const seen = {steps: [], text: '', marks: 0};
const stride = Math.ceil(STEPS.length / 12), last = STEPS.length - 1;
for (let step = 0; step < STEPS.length; step++) {
  if (step % stride && step !== last) continue;
  for (const [l, h] of [[-1, -1], [1, -1], [-1, 2], [0, 1]]) {
    layer = l; head = h; show(step);
    seen.steps.push({step, layer: l, head: h, count: [...count], classes: spans.map((s) => s.className),
      status: byId('status').textContent});
  }
}
layer = head = -1; show(0);
seen.text = spans.map((s) => s.textContent).join('');
seen.marks = document.querySelectorAll('.s').length;
const key = (name) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key: name, bubbles: true}));
key('ArrowRight');
seen.afterRight = now;
spans[7].dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 20, clientY: 20}));
seen.tip = byId('tip').textContent;
seen.on = [...document.querySelectorAll('.s.on')].map((s) => s.dataset.n);
seen.related = [...document.querySelectorAll('.s.related')].map((s) => s.dataset.n);
spans[7].click();
seen.detail = byId('detail').textContent;
seen.cells = document.querySelectorAll('#grid td').length;
seen.wrong = wrong;
count[0] = 1;
seen.faint = classOf(0, 224, 1);
count[0] = 223;
seen.strong = classOf(0, 224, 1);
seen.alerts = document.querySelectorAll('b').length;
document.body.replaceChildren(document.createElement('pre'));
document.querySelector('pre').textContent = 'SEEN' + JSON.stringify(seen) + 'END';
</script>"""


def look(folder: Path, trace: Trace) -> dict:
    """Return what the browser shows of a trace's page."""
    trace.save(folder / "a.safetensors")
    page = trace_view.view(folder / "a.safetensors").path
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # the sandbox does not work for root, and the page is trusted
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, encoding="utf-8", timeout=120, check=True
    )
    found = re.search(r"SEEN(.*)END", unescape(done.stdout), re.DOTALL)
    assert found, f"the page's script stopped: {done.stdout[-2000:]}"
    return json.loads(found[1])


@functools.cache
def steps_of(lives: tuple[tuple[int, int], ...]) -> list[tuple[int | None, int]]:
    """Return by step the index of the compaction (None: before the first of a life) and of the life's last one."""
    steps: list[tuple[int | None, int]] = []
    done = 0
    for _, count in lives:
        steps += [(None, done)] + [(done + k, done) for k in range(count)]
        done += count
    return steps


@pytest.mark.parametrize("memory", [0.0, 0.5])
@pytest.mark.parametrize("lives", [((0, 4),), ((0, 2), (2, 3)), ((0, 257),)])
def test_every_step_and_filter_shows_the_survivors(tmp_path, lives, memory):
    trace = make_trace(lives, text=NASTY, kv_recall_memory=memory)
    seen = look(tmp_path, trace)
    assert seen["wrong"] == []
    assert seen["alerts"] == 0
    steps, tokens = steps_of(lives), trace_view.num_tokens(trace)
    # Beyond compactions and beginnings there is one more step: the end of the request.
    assert {s["step"] for s in seen["steps"]} == {*range(0, len(steps) + 1, len(steps) // 12 + 1), len(steps)}
    for shown in seen["steps"]:
        at_end = shown["step"] == len(steps)
        index, first = steps[-1] if at_end else steps[shown["step"]]
        logical = tokens - 1 if at_end else int(trace.logical_length[first if index is None else index])
        pairs = [
            (layer, head)
            for layer in range(LAYERS)
            for head in range(HEADS)
            if shown["layer"] in (-1, layer) and shown["head"] in (-1, head)
        ]
        expected = [0] * tokens
        for layer, head in pairs:
            held = set(range(logical)) if index is None else set(trace.kept[index][layer, head].tolist())
            if at_end:
                held |= set(range(int(trace.logical_length[-1]), logical))
            for position in held:
                expected[position] += 1
        assert shown["count"] == expected
        for position, (name, heads) in enumerate(zip(shown["classes"], expected, strict=True)):
            if position >= logical:
                assert name == "t later"
            elif heads == 0:
                assert name == "t gone"
            else:
                level = int(name.removeprefix("t h"))
                assert (level == 16) == (heads == len(pairs))
                assert 1 <= level <= 16
        assert f"logical {logical} " in shown["status"]


def test_the_text_is_shown_as_it_is_and_can_be_used(tmp_path):
    trace = make_trace(text=NASTY)
    seen = look(tmp_path, trace)
    assert NASTY in seen["text"]
    assert seen["marks"] == len(trace.sentences)
    assert seen["afterRight"] == 1
    # Sentence 0 (positions 6 to 9) is repeated by sentence 2.
    assert seen["on"] == ["0"]
    assert seen["related"] == ["2"]
    assert "position 7" in seen["tip"]
    assert "repeated by 2 · similarity 0.875" in seen["tip"]
    held = int((trace.kept[0] == 7).sum())
    assert f"held by {held} of {LAYERS * HEADS} heads after compaction 1" in seen["detail"]
    assert seen["cells"] == LAYERS * HEADS
    # With very many heads, a single one beyond none or short of all still shows.
    assert (seen["faint"], seen["strong"]) == ("t h1", "t h15")


def test_a_request_that_was_never_compacted(tmp_path):
    seen = look(tmp_path, make_trace(()))
    assert seen["wrong"] == []
    assert {s["step"] for s in seen["steps"]} == {0}
    assert seen["steps"][0]["classes"][-1] == "t later"
    assert set(seen["steps"][0]["classes"][:-1]) == {"t h16"}
