"""Learned gates: their file and its errors, their outputs, where those are stored, and their cost."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skipkv_vllm import bundled_gates
from skipkv_vllm.capacity import ModelShape, Pool, capacity
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.needs import Need
from skipkv_vllm.integration import compat
from skipkv_vllm.ops.paging import Layout, PagedCache
from skipkv_vllm.policies import View, make_policy
from skipkv_vllm.policies.gates import PREFIX, Gates
from skipkv_vllm.worker.batch import BatchRows, RowTable, StepBatch
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.signals.base import Step
from skipkv_vllm.worker.signals.gates import TokenGates, attention_blocks
from tests.reference import formulas
from tests.simulation import CPU, HIDDEN, KV_HEADS, LAYERS, FakeBlock, gates, gates_file
from tests.unit.config.test_steering import model_for

FIRST = PREFIX.format(0)


def cache(heads: int) -> KVCache:
    return KVCache(PagedCache.of([torch.zeros(5, heads, 4, 2)] * LAYERS, Layout.ROWS), 4)


def token_gates(**changes) -> TokenGates:
    given = {"first_head": 0, "num_heads": KV_HEADS, "activation": "silu", "max_tokens": 16, "dtype": torch.float32}
    return TokenGates(gates().layers, **(given | {"device": CPU} | changes))


# ---- the file


def test_a_file_comes_back_as_it_was(tmp_path):
    gates().save(tmp_path / "gates.safetensors", {"made_by": "a test"})
    tensors = load_file(tmp_path / "gates.safetensors")
    # Like published checkpoints: a PyTorch file in bfloat16.
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "trimkv_weights.pth")
    for name, dtype in (("gates.safetensors", torch.float32), ("trimkv_weights.pth", torch.bfloat16)):
        found = Gates.load(tmp_path / name)
        assert (found.width, found.hidden_size, found.num_kv_heads, len(found.layers)) == (5, HIDDEN, KV_HEADS, LAYERS)
        for mine, other in zip(gates().layers, found.layers, strict=True):
            assert all(torch.equal(a.to(dtype), b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{FIRST}linear1.bias"),
            r"retention_gate\.linear1\.bias is missing; the file",
        ),
        (lambda t: [t.pop(name) for name in list(t) if FIRST in name], r"layers\.0\..*linear1\.weight is missing"),
        (
            lambda t: t.clear() or t.update(x=torch.ones(1)),
            r"'x' is not a tensor of a gate with two layers; a gate has",
        ),
        (lambda t: t.update({f"{FIRST}linear3.weight": torch.ones(1)}), r"linear3\.weight' is not a tensor of a gate"),
        (lambda t: t.clear(), r"holds no gates; give a file with tensors model\.layers\.0"),
        (
            lambda t: t.update({f"{FIRST}bias": torch.ones(KV_HEADS, 1)}),
            r"shape \[2, 1\], but the other tensors need \[2\];",
        ),
        (
            lambda t: t.update({f"{FIRST}linear2.weight": torch.ones(KV_HEADS, 4)}),
            r"shape \[2, 4\], but the other tensors need \[2, 5\]",
        ),
        (
            lambda t: t.update({f"{FIRST}bias": torch.ones(KV_HEADS).double()}),
            r"is float64; allowed: float32",
        ),
        (lambda t: t.update({f"{FIRST}bias": torch.full((KV_HEADS,), torch.nan)}), r"is not finite everywhere; train"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, change, message):
    tensors = load_file(gates_file())
    change(tensors)
    save_file(tensors, path := tmp_path / "other.safetensors")
    with pytest.raises(KVPolicyError, match=message) as error:
        Gates.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["gates.safetensors", "gates.pth"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(KVPolicyError, match=r"there is no such file; give the path of the model's gates"):
        Gates.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"not tensors")
    with pytest.raises(KVPolicyError, match=r"cannot be read \(.+\); give a safetensors file, or a PyTorch file"):
        Gates.load(tmp_path / name)


def test_a_pytorch_file_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Harmful()}, tmp_path / "gates.pth")
    with pytest.raises(KVPolicyError, match="cannot be read"):
        Gates.load(tmp_path / "gates.pth")
    assert not (tmp_path / "written").exists()
    torch.save({"model.layers.0.self_attn.retention_gate.bias": 3}, tmp_path / "gates.pth")
    with pytest.raises(KVPolicyError, match=r"cannot be read \('model.layers.0.+ is not a tensor\)"):
        Gates.load(tmp_path / "gates.pth")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 7}, r"whose hidden size is 6, but this model's is 7"),
        ({"num_layers": 3}, r"whose number of layers is 2, but this model's is 3"),
        (
            {"num_kv_heads": 4},
            r"whose number of kv heads is 2, but this model's is 4; give gates",
        ),
    ],
)
def test_gates_of_another_model(shape, message):
    fits = {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_kv_heads": KV_HEADS}
    gates().check_fits(**fits)
    with pytest.raises(KVPolicyError, match=message):
        gates().check_fits(**(fits | shape))


def test_the_bundled_gates_fit_the_bundled_model():
    Gates.load(bundled_gates()).check_fits(hidden_size=128, num_layers=4, num_kv_heads=2)


# ---- the configuration


def test_a_server_needs_a_file():
    with pytest.raises(KVPolicyError, match=r"kv_policy='trimkv' needs the gates of the model.*--kv-policy-config"):
        KVPolicyConfig.parse({"kv_policy": "trimkv"})
    # A method chosen by a request has its default parameters, which name no file.
    with pytest.raises(KVPolicyError, match=r"start the server with --kv-policy trimkv"):
        KVPolicyConfig.parse({"kv_policy": "rkv", "kv_request_policies": ["trimkv"]})
    with pytest.raises(KVPolicyError, match=r"start the server with --kv-policy trimkv"):
        RequestOptions.parse({"kv_policy": "trimkv"}, KVPolicyConfig(kv_policy="rkv"), 4096)
    config = KVPolicyConfig.parse({"kv_policy": "trimkv", "kv_policy_config": {"gates": gates_file()}})
    assert RequestOptions.parse({"kv_policy": "trimkv"}, config, 4096).resolve_policy(config) is config.policy
    assert config.gates.width == 5


@pytest.mark.parametrize("policy", ["full", "skipkv", "h2o"])
def test_other_methods_have_none(policy):
    config = KVPolicyConfig(kv_policy=policy)
    assert config.gates is None
    assert not config.needs & Need.GATES


def arch(num_kv_heads: int) -> list[SimpleNamespace]:
    """vLLM's description of each layer."""
    return [SimpleNamespace(total_num_kv_heads=num_kv_heads)] * LAYERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config__get_hidden_size": lambda: 8}, "hidden size is 6, but this model's is 8"),
        ({"model_config__model_arch_config": arch(4)}, "number of kv heads is 2, but this model's is 4"),
        ({"parallel_config__enable_hc_sp": True}, "--kv-policy trimkv does not support sequence parallelism"),
    ],
)
def test_a_server_that_cannot_use_them_does_not_start(changes, message):
    fits = {"get_total_num_hidden_layers": lambda: LAYERS, "model_arch_config": arch(KV_HEADS)}
    changed = {f"model_config__{name}": value for name, value in fits.items()}
    policy = KVPolicyConfig(kv_policy="trimkv", kv_policy_config={"gates": gates_file()})
    compat.check_config(model_for("", **changed)[0], policy)
    with pytest.raises(KVPolicyError, match=message):
        compat.check_config(model_for("", **(changed | changes))[0], policy)


# ---- their outputs


def test_the_score_is_what_is_left_of_a_token():
    positions = torch.tensor([[0, 3, 4, 9], [1, 2, 8, 9]], dtype=torch.int32)
    betas = torch.tensor([[-0.1, -2.0, 0.0, -0.5], [-1e-6, -0.3, -0.2, -5.0]])
    found = make_policy("trimkv").score(View(positions=positions, window=1, gates=betas))
    for head in range(2):
        wanted = formulas.trimkv(betas[head].tolist(), positions[head].tolist())
        torch.testing.assert_close(found[head], torch.tensor(wanted))
        # The formula is written with the weight of the token for the query at position 10.
        for beta, position, score in zip(betas[head].exp(), positions[head], found[head], strict=True):
            assert score.exp() == pytest.approx(float(beta) ** (10 - int(position)), rel=1e-5)


@pytest.mark.parametrize("first_head", [0, 1])
def test_a_hook_computes_the_formula_for_the_heads_of_a_rank(first_head):
    found = token_gates(first_head=first_head, num_heads=1)
    blocks = [FakeBlock() for _ in range(LAYERS)]
    found.attach(blocks)
    hidden = torch.randn(LAYERS, 9, HIDDEN, generator=torch.Generator().manual_seed(3))
    for i, block in enumerate(blocks):
        # Both ways in which models call it, and more rows than tokens, because of padding.
        block(None, hidden_states=hidden[i]) if i else block(None, hidden[i])
    found.bind_cache(cache(heads=1))
    slots = torch.tensor([4, 5, 6, 7, 12, 13, 14])
    batch = StepBatch(["a"], np.array([len(slots)]), np.array([0]), len(slots))
    found.prepare(Step(batch, BatchRows(["a"], np.array([0]), RowTable(1), CPU), False))
    found.store(slots)
    outputs = found.by_slot(torch.tensor([[1, 3]]), 7)[0]
    for i, gate in enumerate(gates().layers):
        wanted = [formulas.log_beta(gate, hidden[i, t])[first_head] for t in range(7)]
        torch.testing.assert_close(outputs[i, 0], torch.tensor(wanted))


def test_compiled_code_writes_what_a_step_says():
    found, block = token_gates(), FakeBlock()
    found.attach([block, FakeBlock()])
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(4))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for rows in (3, 6):
        found._outputs[0].zero_()
        assert torch.equal(compiled(None, hidden[:rows]), hidden[:rows])
        wanted = [formulas.log_beta(gates().layers[0], hidden[t]) for t in range(rows)]
        torch.testing.assert_close(found._outputs[0][:rows], torch.tensor(wanted))
        assert not found._outputs[0][rows:].any()


def test_blocks_are_found_by_the_attention_layers_in_them():
    class Attention(nn.Module):
        pass

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

        def forward(self, positions, hidden_states):
            return hidden_states

    model = nn.ModuleList(Block() for _ in range(2))
    layers = {f"layers.{i}.attn": block.attn for i, block in enumerate(model)}
    assert attention_blocks(model, layers) == list(model)
    with pytest.raises(KVPolicyError, match=r"layers\.9\.attn of ModuleList is part of no module"):
        attention_blocks(model, {"layers.9.attn": Attention()})

    class Other(Block):
        def forward(self, x):
            return x

    other = Other()
    with pytest.raises(KVPolicyError, match=r"part of a Other, which does not take hidden_states; use a --kv-policy"):
        attention_blocks(other, {"attn": other.attn})


def test_an_unknown_activation_is_refused():
    with pytest.raises(KVPolicyError, match=r"'swish\+' is not supported \(supported: silu, gelu"):
        token_gates(activation="swish+")


# ---- their cost


def test_what_was_counted_is_what_they_take():
    shape = ModelShape(LAYERS, 4, KV_HEADS, 8, HIDDEN, 16, 4)
    assert shape.gate_bytes(gates().width, 16) == token_gates().nbytes
    found = token_gates()
    found.bind_cache(cache(KV_HEADS))
    per_token = shape.sidecar_bytes(Need.GATES) - shape.sidecar_bytes(Need.NOTHING)
    assert found._entries.nbytes == 5 * 4 * per_token
    config = KVPolicyConfig(kv_policy="trimkv", kv_policy_config={"gates": gates_file()})
    pool = Pool(100, 4, 8, 1000, 16)
    told = capacity(config, shape, pool)
    assert re.search(r"\+ 32 for its position and gate,", told.lines()[0])
    assert shape.state_bytes(config, 8, pool) == found.nbytes
