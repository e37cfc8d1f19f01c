"""Vectors of other projects: sign, layer, and everything that must be refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from skipkv_vllm import bundled_model
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering.extraction.checkpoints import open_checkpoint
from skipkv_vllm.steering.extraction.imports import import_vector

SIZE = 128
DIRECTION = torch.arange(SIZE) / SIZE


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(bundled_model())


def save_pt(folder, content, name="layer_2_transition_reflection_steervec.pt"):
    torch.save(content, folder / name)
    return folder / name


def save_gguf(folder, entries, arch="controlvector", dtype=np.float32):
    gguf = pytest.importorskip("gguf", reason="reads and writes GGUF files; pip install gguf")
    writer = gguf.GGUFWriter(folder / "v.gguf", arch)
    writer.add_string("controlvector.model_hint", "qwen2")
    for layer, values in entries.items():
        writer.add_tensor(f"direction.{layer}", values.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "v.gguf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pt_is_turned_round_and_enters_the_layer_of_its_name(tmp_path, checkpoint, dtype):
    vector = import_vector(save_pt(tmp_path, DIRECTION.to(dtype)), checkpoint)
    assert vector.layer == 2
    assert torch.equal(vector.values, -DIRECTION.to(dtype).float())
    assert (vector.num_layers, vector.hidden_size) == (4, SIZE)
    assert vector.tokenizer_sha == checkpoint.tokenizer_sha
    assert "layer_2_transition_reflection_steervec.pt" in vector.method


def test_pt_whose_vector_points_our_way(tmp_path, checkpoint):
    assert torch.equal(import_vector(save_pt(tmp_path, DIRECTION), checkpoint, sign="E-RT").values, DIRECTION)


def test_the_layer_of_a_pt(tmp_path, checkpoint):
    nameless = save_pt(tmp_path, DIRECTION, "vector.pt")
    assert import_vector(nameless, checkpoint, layer=0).layer == 0
    with pytest.raises(KVPolicyError, match="does not contain the layer, like layer_20; give --layer"):
        import_vector(nameless, checkpoint)
    with pytest.raises(KVPolicyError, match="--layer 1 contradicts the file name"):
        import_vector(save_pt(tmp_path, DIRECTION), checkpoint, layer=1)
    with pytest.raises(KVPolicyError, match=r"layer=53 is out of range: .* has 4 layers; allowed: 0 to 3"):
        import_vector(save_pt(tmp_path, DIRECTION, "layer_53.pt"), checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(64), r"holds float32 \[64\], but .* needs floats of shape \[128\]"),
        (torch.zeros(1, SIZE), r"holds float32 \[1, 128\]"),
        (torch.zeros(SIZE, dtype=torch.int64), r"holds int64 \[128\]"),
        ({"dir": DIRECTION}, "holds a dict, not a tensor"),
        (torch.zeros(SIZE), "norm 0.0 has no effect"),
    ],
)
def test_pt_that_is_no_vector_of_this_model(tmp_path, checkpoint, content, message):
    with pytest.raises(KVPolicyError, match=message):
        import_vector(save_pt(tmp_path, content), checkpoint)


class Harmful:
    def __reduce__(self):
        return print, ("this would have run",)


def test_pt_runs_no_code(tmp_path, checkpoint, capsys):
    with pytest.raises(KVPolicyError, match="is not a file of plain tensors"):
        import_vector(save_pt(tmp_path, Harmful()), checkpoint)
    (tmp_path / "layer_1.pt").write_text("hello")
    with pytest.raises(KVPolicyError, match="is not a file of plain tensors"):
        import_vector(tmp_path / "layer_1.pt", checkpoint)
    assert "this would have run" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gguf_directions_enter_the_layer_after_theirs(tmp_path, checkpoint, dtype):
    file = save_gguf(tmp_path, {0: DIRECTION, 1: 2 * DIRECTION, 2: 3 * DIRECTION}, dtype=dtype)
    for layer in (1, 2, 3):
        vector = import_vector(file, checkpoint, layer=layer)
        assert vector.layer == layer
        torch.testing.assert_close(vector.values, layer * DIRECTION, rtol=1e-3, atol=0)
        assert f"direction.{layer - 1}" in vector.method
        assert "qwen2" in vector.method
    assert torch.equal(import_vector(file, checkpoint, layer=1, sign="RT-E").values, -DIRECTION.half().float()) or (
        dtype is np.float32
    )


def test_the_layer_of_a_gguf(tmp_path, checkpoint):
    assert import_vector(save_gguf(tmp_path, {1: DIRECTION}), checkpoint).layer == 2
    file = save_gguf(tmp_path, {0: DIRECTION, 3: DIRECTION})
    with pytest.raises(KVPolicyError, match=r"inputs of layers 1, 4 .*; name one with --layer"):
        import_vector(file, checkpoint)
    with pytest.raises(KVPolicyError, match="--layer 2 is not one of them"):
        import_vector(file, checkpoint, layer=2)
    # The output of the last layer enters no layer.
    with pytest.raises(KVPolicyError, match="layer=4 is out of range"):
        import_vector(file, checkpoint, layer=4)


def test_gguf_of_another_kind(tmp_path, checkpoint):
    with pytest.raises(KVPolicyError, match="is a GGUF file of 'llama', not of 'controlvector'"):
        import_vector(save_gguf(tmp_path, {0: DIRECTION}, arch="llama"), checkpoint)
    (tmp_path / "v.gguf").write_text("hello, this is text and no GGUF file")
    with pytest.raises(KVPolicyError, match="is not a GGUF file"):
        import_vector(tmp_path / "v.gguf", checkpoint)


def test_gguf_without_the_package(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "v.gguf").write_text("GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(KVPolicyError, match=r"pip install 'skipkv-vllm\[gguf\]'"):
        import_vector(tmp_path / "v.gguf", checkpoint)


def test_other_files(tmp_path, checkpoint):
    with pytest.raises(KVPolicyError, match="there is no such file"):
        import_vector(tmp_path / "layer_1.pt", checkpoint)
    (tmp_path / "v.svec").write_text("{}")
    with pytest.raises(KVPolicyError, match=r"ends in '.svec'; supported formats: .pt, .pth, .gguf"):
        import_vector(tmp_path / "v.svec", checkpoint)
