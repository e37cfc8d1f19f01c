"""`skipkv trace view`: where the page goes, and messages about bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skipkv_vllm import KVPolicyError, bundled_model
from skipkv_vllm.cli import main, trace_view
from tests.unit.cli.pages import BUDGET, error_of, make_trace, view


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
