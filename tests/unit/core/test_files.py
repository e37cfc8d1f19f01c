"""Files are written in one piece, and a path that cannot be written is refused early."""

from __future__ import annotations

import os

import pytest
import torch

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.files import atomic_replace, check_writable
from skipkv_vllm.policies.gates import Gate, Gates
from skipkv_vllm.steering import SteeringVector


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with atomic_replace(path) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_text("old")

    def write() -> None:
        with atomic_replace(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def gates() -> Gates:
    return Gates([Gate(torch.ones(3, 4), torch.ones(3), torch.ones(2, 3), torch.ones(2))])


def vector() -> SteeringVector:
    return SteeringVector(values=torch.ones(4), layer=0, num_layers=2, base_model="m", method="by hand")


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (lambda path: gates().save(path, {}), "gates.safetensors"),
        (lambda path: vector().save(path), "vector.safetensors"),
    ],
)
def test_gates_and_vectors_are_replaced_in_one_piece(tmp_path, monkeypatch, save, name):
    path = tmp_path / name
    save(path)
    before, write = path.read_bytes(), type(path).write_bytes

    def fail_halfway(target, data):
        write(target, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", fail_halfway)
    with pytest.raises((OSError, KVPolicyError), match="disk full"):
        save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused_by_its_flag(tmp_path, monkeypatch):
    check_writable("--out", tmp_path / "new")
    with pytest.raises(KVPolicyError, match=r"^--out .*/none/a: its folder does not exist; create it"):
        check_writable("--out", tmp_path / "none" / "a")
    with pytest.raises(KVPolicyError, match=r": is a folder; name a file in it$"):
        check_writable("--out", tmp_path)
    (tmp_path / "old").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "old")
    check_writable("--out", tmp_path / "new")
    with pytest.raises(KVPolicyError, match=r"old: cannot be written; change its permissions"):
        check_writable("--out", tmp_path / "old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(KVPolicyError, match=r"--save-traces .*new: cannot be written"):
        check_writable("--save-traces", tmp_path / "new")
