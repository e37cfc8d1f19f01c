"""A tiny model that hears: the bundled model behind a Qwen2-Audio encoder with random weights."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.harness.settings import MODEL

RATE = 16_000
"""samples of a second"""
MARKS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
QUESTION = f"What is {MARKS[1]}{MARKS[0]}{MARKS[2]} 3 + 4?"


def sound(seconds: float, pitch: float) -> np.ndarray:
    """Return a tone, float32 samples."""
    return np.sin(np.arange(int(seconds * RATE)) * pitch).astype(np.float32)


@functools.cache
def _text_model() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    text.resize_token_embeddings(len(_tokenizer()), mean_resizing=False)
    # The new tokens are never likely: their rows are zeros.
    for weights in (text.get_input_embeddings().weight, text.get_output_embeddings().weight):
        weights.data[len(AutoTokenizer.from_pretrained(MODEL)) :] = 0
    return text


@functools.cache
def _model() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    text, tokenizer = _text_model(), _tokenizer()
    encoder = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    config = Qwen2AudioConfig(
        text_config=text.config.to_dict(),
        audio_config=encoder | {"num_mel_bins": 128, "max_source_positions": 1500},
        audio_token_index=tokenizer.convert_tokens_to_ids(MARKS[0]),
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).float().eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return tokenizer


def _processor() -> Any:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), _tokenizer())


def _name(name: str) -> str:
    """Return the name that vLLM knows a weight by."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


def _folder() -> str:
    """Return a new folder, which is removed at exit."""
    folder = tempfile.mkdtemp(prefix="skipkv-audio-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def text_model() -> str:
    """Return the folder of the model without its encoder, for the oracle."""
    folder = _folder()
    _text_model().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def audio_model() -> str:
    """Return the model's folder."""
    folder = _folder()
    _model().config.architectures = [type(_model()).__name__]
    _model().config.save_pretrained(folder)
    _processor().save_pretrained(folder)
    weights = {_name(name): each.contiguous().clone() for name, each in _model().state_dict().items()}
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder


def heard(samples: np.ndarray) -> tuple[list[int], Tensor]:
    """Return the question about a sound, and what enters the first layer at its audio tokens, `[n, E]`."""
    inputs = _processor()(text=QUESTION, audio=[samples], sampling_rate=RATE, return_tensors="pt")
    entering: list[Tensor] = []
    language_model = _model().model.language_model

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        entering.append(kwargs["inputs_embeds"][0])

    hook = language_model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        _model()(**inputs)
    hook.remove()
    ids = inputs["input_ids"][0]
    return ids.tolist(), entering[0][ids == _tokenizer().convert_tokens_to_ids(MARKS[0])]
