"""Drafters for the bundled model, which propose right tokens about as often as wrong ones.

One linear map from a token's embedding and the hidden state before it to the next hidden state is fitted to texts of
the model. It is the `fc` of an EAGLE head, and the projection of a module for multi-token prediction (MTP). A decoder
layer of small random weights follows, so that the drafter reads and writes KV of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.load.drafts import NGRAM
from tests.harness import demo_prompts
from tests.harness.settings import MODEL

NUM_TEXTS, LENGTH = 10, 250
RIDGE = 1e-3
NOISE = 0.6


def eagle() -> dict[str, Any]:
    """Return the engine arguments of the bundled model with an EAGLE head."""
    return {"speculative_config": {"method": "eagle", "model": _folder(_write_eagle), "num_speculative_tokens": 3}}


def eagle3() -> dict[str, Any]:
    """Return those of the bundled model with an EAGLE-3 head of random weights, which is wrong nearly always."""
    return {"speculative_config": {"method": "eagle3", "model": _folder(_write_eagle3), "num_speculative_tokens": 3}}


def mtp() -> dict[str, Any]:
    """Return those of the bundled model with a module for multi-token prediction, as MiMo has one."""
    return {"model": _folder(_write_mtp), "speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}


def ngram() -> dict[str, Any]:
    """Return those of the bundled model with a search for the last tokens in the text."""
    return {"speculative_config": NGRAM}


def ngram_gpu() -> dict[str, Any]:
    """Return those of the bundled model with that search in kernels, which Model Runner V2 has.

    It proposes tokens also where nothing was found, which are wrong mostly.
    """
    return {"speculative_config": NGRAM | {"method": "ngram_gpu", "num_speculative_tokens": 2}}


def suffix() -> dict[str, Any]:
    """Return those of the bundled model with a search in trees of all texts, which needs another package."""
    return {"speculative_config": {"method": "suffix", "num_speculative_tokens": 8}}


def draft_model() -> dict[str, Any]:
    """Return those of the bundled model with a copy of it, whose weights are changed a little."""
    speculation = {"method": "draft_model", "model": _folder(_write_noisy), "num_speculative_tokens": 3}
    return {"speculative_config": speculation}


class Scripted:
    """Proposes the right tokens, or wrong ones where a rule says so, for vLLM's `custom_class`.

    Attributes:
        texts: prompt and answer of every request.
        is_wrong: rule, by the place of a draft in its text.
    """

    texts: ClassVar[list[list[int]]] = []
    is_wrong: ClassVar[Callable[[int], bool]] = staticmethod(lambda _: False)

    def __init__(self, vllm_config: Any) -> None:
        self._number = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, *_: Any, **__: Any) -> None:
        """Load nothing."""

    def propose(
        self, sampled_token_ids: Any, num_tokens_no_spec: Any, token_ids_cpu: Any, *_: Any, **__: Any
    ) -> list[list[int]]:
        """Return the drafts of each request."""
        found = []
        for row, sampled in enumerate(sampled_token_ids):
            end = int(num_tokens_no_spec[row])
            text = token_ids_cpu[row, :end].tolist()
            # A text may end with a token that is left out of the answer.
            following = next((each[end : end + self._number] for each in self.texts if each[:end] == text), [])
            drafts = [token ^ type(self).is_wrong(end + i) for i, token in enumerate(following)]
            found.append(drafts if len(sampled) else [])
        return found


def scripted() -> dict[str, Any]:
    """Return the engine arguments of the bundled model with `Scripted` drafts."""
    name = f"{Scripted.__module__}.{Scripted.__qualname__}"
    return {"speculative_config": {"method": "custom_class", "model": name, "num_speculative_tokens": 3}}


DRAFTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "ngram": ngram,
    "ngram_gpu": ngram_gpu,
    "suffix": suffix,
    "eagle": eagle,
    "eagle3": eagle3,
    "mtp": mtp,
    "draft_model": draft_model,
}


@functools.cache
def _folder(write: Callable[[Path], None]) -> str:
    folder = Path(tempfile.mkdtemp(prefix="skipkv-drafter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in Path(MODEL).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    write(folder)
    return str(folder)


def _config() -> dict[str, Any]:
    return json.loads(Path(MODEL, "config.json").read_text())


def _save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: each.contiguous() for name, each in weights.items()}, folder / "model.safetensors")


def _llama() -> dict[str, Any]:
    """Return the configuration of a Llama layer with the sizes of the bundled model."""
    own = _config()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "head_dim": own["hidden_size"] // own["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
    }
    shared = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return config | {name: own[name] for name in (*shared, "max_position_embeddings", "eos_token_id", "dtype")}


def _write_eagle(folder: Path) -> None:
    """Write an EAGLE head: a Llama layer without its first norm, behind the map of embedding and hidden state."""
    config, texts = _llama(), _read_texts()
    embedded, hidden = texts["embedded"], texts["normed"]
    weights = _layer("layers.0.") | {"layers.0.post_attention_layernorm.weight": torch.ones(config["hidden_size"])}
    _save(folder, config, weights | {"fc.weight": _fit(embedded, hidden, hidden)})


def _write_eagle3(folder: Path) -> None:
    """Write an EAGLE-3 head, whose attention reads embeddings beside the hidden states of three layers."""
    config, prefix = _llama(), "midlayer."
    size = config["hidden_size"]
    layers = {"draft_vocab_size": config["vocab_size"], "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    weights = _layer(prefix, width=2 * size)
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    weights |= {f"{prefix}{name}.weight": torch.ones(size) for name in norms}
    weights |= {
        "norm.weight": torch.ones(size),
        "fc.weight": 0.1 * torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(0)),
    }
    weights["lm_head.weight"] = load_file(next(Path(MODEL).glob("*.safetensors")))["lm_head.weight"].clone()
    # The base class of vLLM's configurations of drafters reads the layers from here.
    _save(folder, config | layers | {"eagle_config": layers}, weights)


def _write_mtp(folder: Path) -> None:
    """Write the bundled model with an MTP module of MiMo's layout, which takes hidden states before the last norm."""
    own = _config()
    texts, ones = _read_texts(), torch.ones(own["hidden_size"])
    prefix = "model.mtp_layers.0."
    norms = ("input_layernorm", "post_attention_layernorm", "token_layernorm", "hidden_layernorm")
    model = load_file(next(Path(MODEL).glob("*.safetensors")))
    module = _layer(prefix) | {f"{prefix}{name}.weight": ones.clone() for name in norms}
    for name in "qkv":
        rows = len(module[f"{prefix}self_attn.{name}_proj.weight"])
        module[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(rows)
    module[f"{prefix}final_layernorm.weight"] = model["model.norm.weight"].clone()
    previous, embedded = _normed(texts["raw"]), _normed(texts["embedded"])
    # It takes the hidden state first.
    module[f"{prefix}input_proj.weight"] = _fit(embedded, previous, texts["raw"], hidden_first=True)
    _save(folder, own | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}, model | module)


def _write_noisy(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = load_file(next(Path(MODEL).glob("*.safetensors")))
    for name, each in weights.items():
        if each.dim() == 2:
            weights[name] = each + NOISE * each.std() * torch.randn(each.shape, generator=generator)
    _save(folder, _config(), weights)


def _layer(prefix: str, width: int | None = None) -> dict[str, Tensor]:
    """Return a decoder layer, whose attention reads `width` features, and which changes its input a little."""
    own, generator = _config(), torch.Generator().manual_seed(0)
    size, wide = own["hidden_size"], own["intermediate_size"]
    width = width or size
    kv_size = size // own["num_attention_heads"] * own["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (size, width, 0.1),
        "self_attn.k_proj": (kv_size, width, 0.1),
        "self_attn.v_proj": (kv_size, width, 0.1),
        "self_attn.o_proj": (size, size, 0.02),
        "mlp.gate_proj": (wide, size, 0.02),
        "mlp.up_proj": (wide, size, 0.02),
        "mlp.down_proj": (size, wide, 0.005),
    }
    return {
        f"{prefix}{name}.weight": scale * torch.randn(rows, columns, generator=generator)
        for name, (rows, columns, scale) in shapes.items()
    }


def _normed(states: Tensor) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@functools.cache
def _read_texts() -> dict[str, Tensor]:
    """Return the embeddings of some answers and their hidden states before and after the last norm, `[texts, T, E]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        answers = [
            model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)[
                0, -LENGTH:
            ]
            for prompt in demo_prompts(NUM_TEXTS)
        ]
    ids = torch.stack(answers)
    raw: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    with torch.inference_mode():
        normed = model.model(ids).last_hidden_state
        hook.remove()
        return {"embedded": model.model.embed_tokens(ids), "raw": raw[0], "normed": normed}


def _fit(embedded: Tensor, previous: Tensor, states: Tensor, hidden_first: bool = False) -> Tensor:
    """Fit the map of a token's embedding and the state before it to the token's own state, `[E, 2 E]`."""
    inputs = [embedded[:, 1:].flatten(0, 1), previous[:, :-1].flatten(0, 1)]
    x, y = torch.cat(inputs[::-1] if hidden_first else inputs, dim=-1), states[:, 1:].flatten(0, 1)
    return torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y).T
