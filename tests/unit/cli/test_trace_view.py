"""`skipkv trace view`: the page shows exactly the content of the trace."""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from skipkv_vllm import KVPolicyError, bundled_model
from skipkv_vllm.cli import main, trace_view
from skipkv_vllm.trace.files import Trace

LAYERS, HEADS, BUDGET, BUFFER = 2, 3, 16, 8
NASTY = "</script><script>alert(1)</script><b>b</b> &amp; <!-- {{DATA}} {{TITLE}} \u2028 é😀\n\t\\ \" '"


@functools.cache
def tokenizer():
    return trace_view.load_tokenizer(bundled_model())


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def make_trace(lives=((0, 4),), *, text: str = "", extra: int = 3, **parameters) -> Trace:
    """A trace of random survivors.

    Args:
        lives: number of each life and its compactions; each life begins with a longer text than the previous one.
        text: beginning of the output.
        extra: tokens written after the last compaction, the last sampled one not counted.
        parameters: besides the model and the request.
    """
    generator = torch.Generator().manual_seed(5)
    kept: list[Tensor] = []
    logical: list[int] = []
    before: list[int] = []
    life: list[int] = []
    for number, count in lives:
        length = logical[-1] + 2 if logical else BUDGET + BUFFER
        held = torch.arange(length).expand(LAYERS, HEADS, -1)
        for _ in range(count):
            score = torch.rand(held.shape, generator=generator)
            rows = held.gather(2, score.topk(BUDGET, dim=2).indices).sort(2).values
            kept.append(rows.int())
            logical.append(length)
            before.append(held.shape[2])
            life.append(number)
            new = torch.arange(length, length + BUFFER).expand(LAYERS, HEADS, -1)
            held, length = torch.cat([rows, new], dim=2), length + BUFFER
    output = encode(text)
    total = max([*logical, len(output) + 6, BUDGET + BUFFER]) + extra + 1
    filler = encode("Step 1: so that is it.") * total
    ids = [*filler[:6], *output, *filler][:total]
    return Trace(
        prompt_token_ids=torch.tensor(ids[:6]),
        output_token_ids=torch.tensor(ids[6:]),
        logical_length=torch.tensor(logical, dtype=torch.int64),
        resident_before=torch.tensor(before, dtype=torch.int64),
        kept=kept,
        life=torch.tensor(life, dtype=torch.int64),
        sentences=torch.tensor([[6, 10], [10, 15], [15, 18]]),
        similar_pairs=torch.tensor([[0, 2], [1, 2]]),
        similarity=torch.tensor([0.875, 0.75]),
        parameters={"model": bundled_model(), "request_id": "r", "request_policy": "skipkv", **parameters},
    )


class Parsed(HTMLParser):
    """The page as a browser parses it: its title, its scripts and the other tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(page)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside][-1] += data


def view(folder: Path, trace: Trace, *arguments: str) -> Parsed:
    """Return the page that the command writes for a trace."""
    file = folder / "a.safetensors"
    trace.save(file)
    with pytest.raises(SystemExit) as stop:
        main(["trace", "view", str(file), *arguments])
    assert stop.value.code == 0
    return Parsed(file.with_suffix(".html").read_text(encoding="utf-8"))


def error_of(capsys, *arguments: object) -> str:
    """Return the message of a failing command."""
    with pytest.raises(SystemExit) as stop:
        main(["trace", "view", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def held_sets(life: dict, layers: int, heads: int) -> list[list[list[set[int]]]]:
    """Return the positions held after each compaction, by layer and head, from the page's numbers."""
    numbers = np.frombuffer(base64.b64decode(life["lost"]), {1: "u1", 4: "<i4"}[life["lost_bytes"]])
    lost = numbers.reshape(layers, heads, life["logical"][-1])
    return [
        [
            [{i for i in range(logical) if not 0 < lost[layer, head, i] <= number} for head in range(heads)]
            for layer in range(layers)
        ]
        for number, logical in enumerate(life["logical"], 1)
    ]


# ---- the page says what the trace says


@pytest.mark.parametrize("lives", [((0, 1),), ((0, 5),), ((0, 3), (1, 2), (3, 4)), ((1, 260),)])
def test_the_survivors_can_be_read_from_the_page(tmp_path, lives):
    trace = make_trace(lives)
    data = view(tmp_path, trace).data
    assert (data["layers"], data["heads"]) == (LAYERS, HEADS)
    assert [(life["life"], len(life["logical"])) for life in data["lives"]] == list(lives)
    found = [rows for life in data["lives"] for rows in held_sets(life, LAYERS, HEADS)]
    assert found == [[[set(head) for head in layer] for layer in kept.tolist()] for kept in trace.kept]
    for key, expected in (("logical", trace.logical_length), ("before", trace.resident_before)):
        assert [n for life in data["lives"] for n in life[key]] == expected.tolist()
    assert [n for life in data["lives"] for n in life["after"]] == [BUDGET] * len(trace.kept)


def test_survivor_counts_may_differ_between_compactions(tmp_path):
    first = torch.arange(6).expand(1, 1, 6).int()
    second = torch.tensor([[[0, 7]]], dtype=torch.int32)
    trace = make_trace()._replace(
        kept=[first, second],
        logical_length=torch.tensor([7, 9]),
        resident_before=torch.tensor([7, 8]),
        life=torch.tensor([0, 0]),
    )
    data = view(tmp_path, trace).data
    assert data["lives"][0]["after"] == [6, 2]
    assert held_sets(data["lives"][0], 1, 1) == [[[set(range(6))]], [[{0, 7}]]]


def test_text_sentences_pairs_and_parameters(tmp_path):
    trace = make_trace(kv_budget=16, kv_policy_config={"similarity_threshold": 0.75}, huge=float("inf"))
    data = view(tmp_path, trace).data
    ids = [*trace.prompt_token_ids.tolist(), *trace.output_token_ids.tolist()]
    assert data["ids"] == ids
    assert data["prompt"] == 6
    assert data["tokens"] == len(data["texts"]) == len(ids)
    assert "".join(data["texts"]) == tokenizer().decode(ids)
    assert data["sentences"] == [[6, 10], [10, 15], [15, 18]]
    assert data["pairs"] == [[0, 2, 0.875], [1, 2, 0.75]]
    assert data["parameters"]["kv_budget"] == "16"
    assert data["parameters"]["kv_policy_config"] == '{"similarity_threshold": 0.75}'
    assert data["parameters"]["huge"] == "Infinity"
    assert data["notes"] == []
    assert data["end"] == len(ids) - 1, "the last sampled token is never computed"


def test_what_a_requests_steering_came_to(tmp_path):
    told = {"vector": "math", "alpha0": 1.25, "gamma": 0.02, "steered_tokens": 12}
    counts = {"execution": 30, "reflection": 5, "transition": 2}
    shown = view(tmp_path, make_trace(request_steering=told | counts)).data["steering"]
    assert shown == {
        "steering": "math, alpha 1.25 + 0.02 per non-execution thought",
        "steered tokens": "12",
        "thoughts": "30 execution, 5 reflection, 2 transition",
    }
    for unsteered in (None, "math", 3):
        assert view(tmp_path, make_trace(request_steering=unsteered)).data["steering"] == {}
    assert view(tmp_path, make_trace(request_steering={"vector": NASTY})).data["steering"]["steered tokens"] == "?"


def test_a_request_that_was_never_compacted(tmp_path):
    trace = make_trace(())
    data = view(tmp_path, trace).data
    assert data["lives"] == []
    assert (data["layers"], data["heads"]) == (0, 0)
    assert data["end"] == data["tokens"] - 1


def test_a_request_that_was_aborted_before_it_answered(tmp_path):
    trace = make_trace(())._replace(
        output_token_ids=torch.zeros(0, dtype=torch.int64), sentences=torch.zeros(0, 2, dtype=torch.int64)
    )
    data = view(tmp_path, trace).data
    assert data["end"] == data["tokens"] == data["prompt"] == 6
    assert len(data["notes"]) == 1, "pairs of missing sentences are left out with a note"
    assert data["pairs"] == []


def test_a_compaction_may_run_ahead_of_the_text(tmp_path):
    trace = make_trace(extra=0)
    trace = trace._replace(output_token_ids=trace.output_token_ids[:-2])
    data = view(tmp_path, trace).data
    assert data["tokens"] == int(trace.logical_length[-1]) == len(data["texts"]) + 1
    assert data["end"] == data["tokens"]
    assert "beyond the end" in data["notes"][0]


# ---- text


def test_characters_of_several_tokens_belong_to_the_last_of_them():
    ids = encode("a 😀é日本\n")
    texts = trace_view.token_texts(tokenizer(), ids)
    assert "".join(texts) == "a 😀é日本\n"
    assert len(texts) == len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_bytes_that_are_no_character_are_shown_and_harm_nothing_else():
    emoji = encode("😀")
    assert len(emoji) > 1, "this character is a single token; choose another one"
    for broken in (emoji[:-1], emoji[1:], emoji[1:] * 5, emoji[:1] * 9):
        texts = trace_view.token_texts(tokenizer(), [*encode("so"), *broken, *encode("that is it")])
        assert len(texts) == len(encode("so")) + len(broken) + len(encode("that is it"))
        assert "".join(texts).startswith("so\N{REPLACEMENT CHARACTER}")
        assert "".join(texts).endswith("that is it")
    assert trace_view.token_texts(tokenizer(), emoji[:1]) == ["\N{REPLACEMENT CHARACTER}"]


def test_tokens_unknown_to_the_tokenizer_are_numbers(tmp_path):
    trace = make_trace()
    trace.output_token_ids[2] = 10**6
    data = view(tmp_path, trace).data
    assert data["texts"][8] == "⟨1000000⟩"
    assert "tokens not in the tokenizer: 1" in data["notes"][0]
    assert data["texts"][9:] == view(tmp_path, make_trace()).data["texts"][9:]


# ---- nothing in a trace is markup


def test_markup_in_text_and_parameters_stays_text(tmp_path):
    harmless = view(tmp_path, make_trace(text="so"))
    page = view(tmp_path, make_trace(text=NASTY, request_id=NASTY, **{NASTY: {"a": NASTY}}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.texts["script"][1:] == harmless.texts["script"][1:], "text of the trace became part of the program"
    assert NASTY in "".join(page.data["texts"])
    assert page.data["parameters"]["request_id"] == NASTY
    assert json.loads(page.data["parameters"][NASTY]) == {"a": NASTY}
    assert page.texts["title"] == [f"KV trace {NASTY}"]


def test_the_page_needs_no_other_file(tmp_path):
    page = view(tmp_path, make_trace())
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} {name}"
    rules = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert len(rules) == 1
    assert rules[0].startswith("default-src 'none';")
    assert "http" not in rules[0]
    program = page.texts["script"][1] + page.texts["style"][0]
    assert set(re.findall(r"https?://[^'\"]*", program)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in program


# ---- what can go wrong


def test_the_page_goes_next_to_the_trace_or_to_out(tmp_path, capsys):
    view(tmp_path, make_trace())
    assert f"wrote {tmp_path / 'a.html'} (" in capsys.readouterr().out
    out = tmp_path / "b.html"
    out.write_text("old")
    view(tmp_path, make_trace(), "--out", str(out))
    assert out.read_text() == (tmp_path / "a.html").read_text()


def test_the_page_is_opened_when_asked(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or False)
    view(tmp_path, make_trace())
    assert opened == []
    view(tmp_path, make_trace(), "--open")
    assert opened == [(tmp_path / "a.html").as_uri()]
    assert "no browser could be started" in capsys.readouterr().err


def test_a_missing_file(tmp_path, capsys):
    message = error_of(capsys, tmp_path / "no.safetensors")
    assert message.startswith(f"skipkv: error: FILE={tmp_path / 'no.safetensors'} does not exist; ")
    assert "is a folder; name one of" in error_of(capsys, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_file(tmp_path, capsys, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    assert "is not a SkipKV trace (" in error_of(capsys, file)
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"parameters": "{}"}])
def test_a_checkpoint_is_no_trace(tmp_path, capsys, metadata):
    file = tmp_path / "a.safetensors"
    save_file({"lm_head.weight": torch.zeros(2)}, file, metadata)
    message = error_of(capsys, file)
    assert "is not a SkipKV trace (it has no '" in message
    assert "--kv-trace-dir" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {"life": t.life[1:]}, "but not as many lengths"),
        (lambda t: {"kept": [*t.kept[:-1], t.kept[-1][:1]]}, "different numbers of layers or heads"),
        (lambda t: {"kept": [t.kept[0] + 20, *t.kept[1:]]}, "compaction 1 keeps tokens beyond"),
        (lambda t: {"kept": [t.kept[0] - 99, *t.kept[1:]]}, "compaction 1 keeps tokens beyond"),
        (lambda t: {"sentences": t.sentences + 10**4}, "sentences beyond"),
        (lambda t: {"similarity": t.similarity[1:]}, "numbers of pairs and similarities differ"),
        (lambda t: {"similarity": t.similarity * float("nan")}, "similarities that are not finite"),
        (lambda t: {"kept": [t.kept[0], t.kept[0] * 0 + torch.arange(BUDGET), *t.kept[2:]]}, "was evicted before"),
        (lambda t: {"kept": [kept[0] for kept in t.kept]}, "its 'kept/0' has the shape"),
        (lambda t: {"prompt_token_ids": t.prompt_token_ids[None]}, "its 'prompt_token_ids' has the shape"),
        (lambda t: {"prompt_token_ids": t.prompt_token_ids / 2}, "its 'prompt_token_ids' is of torch.float32"),
        (lambda t: {"output_token_ids": t.output_token_ids - 10**6}, "negative token ids"),
        (lambda t: {"similar_pairs": t.similar_pairs[:, :1]}, "its 'similar_pairs' has the shape"),
        (lambda t: {"logical_length": t.logical_length.flip(0), "kept": [k[..., :1] * 0 for k in t.kept]}, "in order"),
        (lambda t: {"parameters": ["model"]}, "its parameters are not an object"),
    ],
)
def test_a_damaged_trace(tmp_path, capsys, change, reason):
    file = tmp_path / "a.safetensors"
    trace = make_trace()
    trace._replace(**change(trace)).save(file)
    assert reason in error_of(capsys, file)
    assert not (tmp_path / "a.html").exists()


def test_a_trace_that_names_no_model(tmp_path, capsys):
    trace = make_trace()
    del trace.parameters["model"]
    trace.save(tmp_path / "a.safetensors")
    message = error_of(capsys, tmp_path / "a.safetensors")
    assert "does not name its model; give the model's tokenizer with --tokenizer" in message
    view(tmp_path, trace, "--tokenizer", bundled_model())


@pytest.mark.parametrize("broken", ["nothing", "no JSON", "no tokenizer"])
def test_a_tokenizer_that_cannot_be_loaded(tmp_path, capsys, broken):
    folder = tmp_path / "model"
    if broken != "nothing":
        shutil.copytree(bundled_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "tokenizer.json").write_text("{" if broken == "no JSON" else "{}")
    make_trace(model=str(folder)).save(tmp_path / "a.safetensors")
    message = error_of(capsys, tmp_path / "a.safetensors")
    assert f"tokenizer {str(folder)!r} cannot be loaded (" in message
    assert "with --tokenizer NAME_OR_FOLDER" in message
    assert not (tmp_path / "a.html").exists()
    view(tmp_path, make_trace(model=str(folder)), "--tokenizer", bundled_model())


def test_an_out_path_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    make_trace().save(file)
    content = file.read_bytes()
    assert "cannot be written (No such file" in error_of(capsys, file, "--out", tmp_path / "no" / "a.html")
    assert "cannot be written (Is a directory)" in error_of(capsys, file, "--out", tmp_path)
    assert "is the trace itself" in error_of(capsys, file, "--out", tmp_path / "." / "a.safetensors")
    assert file.read_bytes() == content


def test_errors_are_kv_policy_errors_for_those_who_call_the_function(tmp_path):
    with pytest.raises(KVPolicyError, match="does not exist"):
        trace_view.view(tmp_path / "no.safetensors")


# ---- the command


def test_the_command_is_installed_with_its_template():
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert EntryPoint("skipkv", project["project"]["scripts"]["skipkv"], "console_scripts").load() is main
    shipped = project["tool"]["setuptools"]["package-data"]["skipkv_vllm"]
    package = root / "skipkv_vllm"
    assert package / "cli" / "trace_view.html" in {path for glob in shipped for path in package.glob(glob)}


def test_help_is_quick(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "trace" in capsys.readouterr().out
    code = "import sys, skipkv_vllm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, (
        "the command must not import torch"
    )
