"""Vector files: they come back unchanged, and a file that does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering import SteeringVector, tokenizer_digest

VALUES = torch.tensor([3.0, 0.0, -4.0, 0.0])
METADATA = {
    "format_version": "1",
    "site": "layer_input",
    "sign": "E-RT",
    "hidden_size": "4",
    "norm": "5.0",
    "layer": "2",
    "num_layers": "3",
    "base_model": "some/model",
    "method": "by hand",
}


def vector(**changes) -> SteeringVector:
    fields = {"values": VALUES, "layer": 2, "num_layers": 3, "base_model": "some/model", "method": "by hand"}
    return SteeringVector(**fields | changes)


def test_a_saved_vector_comes_back_with_everything_known_about_it(tmp_path):
    file = tmp_path / "v.safetensors"
    whole = vector(
        keyword_set="seal", execution=10, reflection=7, transition=0, split_half_cosine=0.99, tokenizer_sha="ab12"
    )
    whole.save(file)
    back = SteeringVector.load(file)
    assert torch.equal(back.values, VALUES)
    assert {k: v for k, v in vars(back).items() if k != "values"} == {
        k: v for k, v in vars(whole).items() if k != "values"
    }
    assert (back.norm, back.hidden_size) == (5.0, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_file_says_where_the_vector_belongs(tmp_path):
    vector().save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata() == METADATA | {"keyword_set": "unknown"}


def test_values_are_not_normalised(tmp_path):
    vector(values=100 * VALUES).save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").norm == pytest.approx(500)


@pytest.mark.parametrize(
    ("metadata", "values", "message"),
    [
        ({"format_version": "2"}, VALUES, r"format_version='2', this package reads '1'"),
        ({"site": "layer_output"}, VALUES, r"site='layer_output'; only 'layer_input'"),
        ({"sign": "RT-E"}, VALUES, r"sign='RT-E'; only 'E-RT'"),
        ({"layer": "3"}, VALUES, r"layer=3 is out of range for a model of 3 layers; allowed: 0 to 2"),
        ({"layer": "two"}, VALUES, r"layer: Input should be a valid integer"),
        ({"layer": None}, VALUES, r"layer: Field required"),
        ({"num_layers": None}, VALUES, r"num_layers: Field required"),
        ({"base_model": None}, VALUES, r"base_model: Field required"),
        ({"execution": "-1"}, VALUES, r"execution"),
        ({"hidden_size": "5"}, VALUES, r"says hidden_size=5, norm=5.0, but its vector has 4"),
        ({"norm": "6"}, VALUES, r"norm=6"),
        ({"norm": None}, VALUES, r"norm=None"),
        ({"norm": "long"}, VALUES, r"norm=long"),
        ({}, VALUES.half(), r"must be float32 of shape \[hidden size\], not float16 \[4\]"),
        ({}, VALUES[None], r"not float32 \[1, 4\]"),
        ({}, VALUES * 0, r"norm 0.0 has no effect"),
        ({}, VALUES * torch.nan, r"norm nan has no effect"),
    ],
)
def test_unusable_files_are_refused(tmp_path, metadata, values, message):
    written = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    save_file({"vector": values}, tmp_path / "v.safetensors", written)
    with pytest.raises(KVPolicyError, match=message) as error:
        SteeringVector.load(tmp_path / "v.safetensors")
    assert "v.safetensors" in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(KVPolicyError, match=r"no such file; make one with `skipkv extract-vector`"):
        SteeringVector.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(KVPolicyError, match="not a safetensors file"):
        SteeringVector.load(tmp_path / "text")
    save_file({"weight": VALUES, "vector": VALUES.clone()}, tmp_path / "model")
    with pytest.raises(KVPolicyError, match="it is not a steering vector"):
        SteeringVector.load(tmp_path / "model")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(KVPolicyError, match=r"cannot write the steering vector .*missing"):
        vector().save(tmp_path / "missing" / "v.safetensors")


def test_a_folder_is_not_a_file_to_write_a_vector_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "."):
        with pytest.raises(KVPolicyError, match="it is a folder"):
            vector().save(folder)
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused():
    whole = vector(tokenizer_sha="ab12")
    whole.check_fits(4, 3)
    whole.check_fits(4, 3, "ab12")
    vector().check_fits(4, 3, "cd34")
    with pytest.raises(KVPolicyError, match=r"made for some/model, whose hidden size is 4, but this model's is 8"):
        whole.check_fits(8, 3)
    with pytest.raises(KVPolicyError, match=r"number of layers is 3, but this model's is 28"):
        whole.check_fits(4, 28)
    with pytest.raises(KVPolicyError, match=r"another tokenizer \(digest ab12, here cd34\)"):
        whole.check_fits(4, 3, "cd34")


def test_other_values_forget_what_was_counted():
    other = vector(execution=10, split_half_cosine=0.9, tokenizer_sha="ab12").with_values(-VALUES, "turned round")
    assert torch.equal(other.values, -VALUES)
    assert (other.method, other.execution, other.split_half_cosine) == ("turned round", None, None)
    assert (other.layer, other.tokenizer_sha) == (2, "ab12")


def test_the_tokenizer_digest_sees_every_token():
    class Vocabulary(dict):
        def get_vocab(self):
            return dict(self)

    digest = tokenizer_digest(Vocabulary(a=0, b=1))
    assert digest == tokenizer_digest(Vocabulary(b=1, a=0))
    assert len({digest, tokenizer_digest(Vocabulary(a=1, b=0)), tokenizer_digest(Vocabulary(a=0, b=1, c=2))}) == 3
