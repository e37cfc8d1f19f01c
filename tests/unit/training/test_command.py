"""The command that trains gates."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from skipkv_vllm import bundled_model
from skipkv_vllm.cli import main as skipkv
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.policies.gates import Gates
from skipkv_vllm.training import loop
from tests.unit.training.models import CAPACITY, random_model, set_bias, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a random Llama with the bundled model's tokenizer, and texts."""
    path = tmp_path_factory.mktemp("train-gates")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model())
    random_model(vocab_size=len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "text.txt").write_text(" ".join(f"Let x{i} be {i * i % 97}." for i in range(400)))
    return path


def run(capsys, folder, *changes, texts="text.txt") -> tuple[int, str, str]:
    words = ["--model", folder / "model", "--texts", folder / texts, "--out", folder / "gates.safetensors"]
    words += ["--length", 64, "--steps", 4, "--batch-tokens", 128, "--width", 8, "--device", "cpu", "--lr", 0.1]
    with pytest.raises(SystemExit) as end:
        skipkv([str(word) for word in ["train-gates", *words, *changes]])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_command_trains_and_says_what_it_did(capsys, folder, monkeypatch):
    trained, held_out = [], []
    losses_of = loop.losses

    def spy(student, ids, labels, capacity):
        (trained if torch.is_grad_enabled() else held_out).extend(map(tuple, ids.tolist()))
        return losses_of(student, ids, labels, capacity)

    monkeypatch.setattr(loop, "losses", spy)
    status, out, err = run(capsys, folder, "--seed", 3)
    assert status == 0, err
    assert "held out, before -> after: total " in out
    gates = Gates.load(folder / "gates.safetensors")
    gates.check_fits(hidden_size=16, num_layers=2, num_kv_heads=2)
    told = metadata(folder / "gates.safetensors")
    assert (told["length"], told["capacity"], told["steps_made"], told["seed"]) == ("64", "8", "4", "3")
    assert float(told["held_out_capacity_after"]) < float(told["held_out_capacity_before"])
    count = int(told["num_texts"])
    assert len(held_out) == 2 * math.ceil(count / 8)
    assert trained
    assert not {*trained} & {*held_out}

    written = load_file(folder / "gates.safetensors")
    run(capsys, folder, "--seed", 3)
    again = load_file(folder / "gates.safetensors")
    assert all(torch.equal(written[name], again[name]) for name in written)


def test_ctrl_c_writes_the_gates_as_they_are(capsys, folder, monkeypatch):
    losses_of, calls = loop.losses, []

    def interrupted(*arguments):
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == 3:
            raise KeyboardInterrupt
        return losses_of(*arguments)

    monkeypatch.setattr(loop, "losses", interrupted)
    status, out, err = run(capsys, folder)
    assert status == 130
    assert "gates.safetensors after 2 of 4 steps" in out
    assert "stopped; the next run starts from the beginning" in err
    told = metadata(folder / "gates.safetensors")
    assert told["steps_made"] == "2"
    assert "held_out_total_after" not in told
    Gates.load(folder / "gates.safetensors")


def test_a_training_that_diverges_fails(student):
    set_bias(student, float("nan"))
    with pytest.raises(RunError, match=r"step 0: the losses are .*nan.*; use a smaller --lr"):
        loop.train(student, iter([text()]), steps=1, lr=1e-2, capacity=CAPACITY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--length", 8], r"--length 8 is out of range; allowed: at least 16"),
        (["--length", 513], r"--length 513 is out of range; this model takes at most 512 tokens"),
        (["--length", 100_000], r"text\.txt: has \d+ tokens, which is less than one text of --length 100000"),
        (["--capacity", 64], r"--capacity 64 is out of range; allowed: 1 to 63"),
        (["--capacity", 0], r"--capacity 0 is out of range"),
        (["--steps", 0], r"--steps 0 is out of range; allowed: at least 1"),
        (["--lr", "nan"], r"--lr nan is out of range; allowed: above 0, up to 1"),
        (["--lr", "1e38"], r"--lr 1e\+38 is out of range"),
        (["--seed", 2**63], r"--seed 9223372036854775808 is out of range"),
        (["--out", "/tmp"], r"--out /tmp: is a folder; name a file"),
        (
            ["--out", "gates.pth"],
            r"--out gates\.pth: this suffix is reserved for PyTorch files; use \.safetensors",
        ),
        (["--out", "/nowhere/gates.safetensors"], r"--out /nowhere/gates\.safetensors: its folder does not exist"),
        (["--model", "/nowhere"], r"--model /nowhere: there is no such folder"),
        (["--texts", "/nowhere.txt"], r"--texts /nowhere\.txt: there is no such file"),
        (["--device", "nonsense"], r"--device nonsense: the model cannot be moved there"),
    ],
)
def test_bad_input_is_named(capsys, folder, changes, message):
    status, _, err = run(capsys, folder, *changes)
    assert status == 2
    assert re.search(message, err), err


def test_a_damaged_checkpoint_is_named(capsys, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"x" * 100)
    status, _, err = run(capsys, folder, "--model", tmp_path / "model")
    assert status == 2
    assert "cannot be loaded (Error while deserializing header" in err


def test_a_file_is_given_once(capsys, folder):
    status, _, err = run(capsys, folder, "--texts", folder / "text.txt", folder / "text.txt")
    assert status == 2
    assert "is given twice" in err


def test_one_text_is_not_enough(capsys, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    (folder / "short.txt").write_text(tokenizer.decode(tokenizer((folder / "text.txt").read_text()).input_ids[:100]))
    status, _, err = run(capsys, folder, texts="short.txt")
    assert status == 2
    assert "there is only one text of --length 64, and one must be held out; give more text" in err
