"""`skipkv plan`: how many requests fit on a GPU with and without a policy, from a model's configuration alone."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..capacity import (
    FULL,
    Capacity,
    ModelShape,
    Pool,
    StateSizes,
    block_size_of,
    blocks_with_policy,
    capacity,
    groups_of,
    has_latents,
    kinds_of,
    kv_of,
    others_of,
    reserved_rows,
    shape_of,
    unsupported,
)
from ..config import KVPolicyConfig, RequestOptions
from ..core.errors import KVPolicyError
from ..core.limits import STORED_PAGE
from ..ops.paging import FP8_CACHES

GIB = 2**30
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
SERVER_DEFAULTS = {160: (1024, 16384), 70: (1024, 8192), 0: (256, 2048)}
"""GiB of GPU memory -> default of vLLM's API server for requests at once and tokens per step, from there on."""


@dataclass(frozen=True)
class Machine:
    """The hardware and the settings of the server.

    Attributes:
        gpu_memory: GiB of one GPU.
        utilization: share of it that vLLM may use.
        ranks: tensor-parallel GPUs.
        stages: pipeline stages, each of `ranks` GPUs.
        drafts: tokens drafted for a step of speculative decoding.
        dtype: of weights and KV cache; "auto" for the model's own.
        kv_dtype: of the KV cache; "auto" for the same.
        state_dtype: of the states of layers that keep one; "auto" as vLLM chooses it.
        block_size: tokens per block, at least; vLLM makes it as large as such a state.
        max_model_len: longest request; None for the model's limit.
        max_num_seqs: requests at once; None for the default of vLLM's API server.
        max_tokens: tokens per step; None likewise.
        weights: GiB of weights on all ranks together; None to count the parameters.
        activations: GiB on one rank; None to estimate.
        overhead: GiB on one rank for the CUDA context, communication buffers and CUDA graphs.
        kv_memory: GiB for KV cache and the policy's state on one rank, as a server logs it; None to compute it.
    """

    gpu_memory: float | None
    utilization: float = 0.92
    ranks: int = 1
    stages: int = 1
    drafts: int = 0
    dtype: str = "auto"
    kv_dtype: str = "auto"
    state_dtype: str = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_tokens: int | None = None
    weights: float | None = None
    activations: float | None = None
    overhead: float = 1.0
    kv_memory: float | None = None


FLAGS = {
    "gpu_memory": "--gpu-memory",
    "utilization": "--gpu-memory-utilization",
    "ranks": "--tensor-parallel-size",
    "stages": "--pipeline-parallel-size",
    "drafts": "--num-speculative-tokens",
    "block_size": "--block-size",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_tokens": "--max-num-batched-tokens",
    "weights": "--weight-memory",
    "activations": "--activation-memory",
    "overhead": "--overhead-memory",
    "kv_memory": "--kv-memory",
}
MAY_BE_ZERO = {"activations", "overhead", "drafts"}
"""Fields of `Machine` for which 0 is a valid amount."""


@dataclass(frozen=True)
class Plan:
    """Result of `plan`: memory of one rank in bytes, and the capacity of the part for the KV cache."""

    model: str
    dtype: str
    gpus: int
    memory: dict[str, int]
    state: int
    capacity: Capacity
    max_num_seqs: int
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        gpus = f", each of {self.gpus} GPUs" if self.gpus > 1 else ""
        rows = [f"  {name:40}{size / GIB:9.2f} GiB" for name, size in self.memory.items()]
        rows.insert(-1, f"  {f'{self.capacity.state} of {self.max_num_seqs} requests':40}{-self.state / GIB:9.2f} GiB")
        return [
            f"{self.model}, {self.dtype}{gpus}",
            *rows,
            "",
            *self.capacity.lines(),
            *(f"note: {note}" for note in self.notes),
        ]

    def json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=1)


def plan(model: str, config: KVPolicyConfig, machine: Machine, *, length: int | None, prompt: int) -> Plan:
    """Compute how many requests fit.

    Args:
        model: folder or hub name; only its configuration is read.
        config: an active policy.
        machine: memory and vLLM's settings.
        length: tokens of a finished request; None for the longest allowed.
        prompt: tokens of its prompt.

    Raises:
        KVPolicyError: a model that policies do not support, values out of range, or too little memory.
    """
    text = _load(model)
    notes: list[str] = []
    _check(text, config, machine)
    dtype = _dtype(text, machine.dtype)
    shape = shape_of(
        text,
        ranks=machine.ranks,
        stages=machine.stages,
        element_size=DTYPES[dtype],
        kv_element_size=_kv_element_size(machine.kv_dtype),
    )
    max_length = _max_length(model, text, machine)
    length = _length(max_length, length, prompt)
    max_num_seqs, max_tokens = _batch_limits(machine, notes)
    if machine.kv_memory is not None:
        available, memory = int(machine.kv_memory * GIB), {}
    else:
        memory = _memory(model, text, shape, machine, max_num_seqs, max_tokens, notes)
        available = sum(memory.values())
    if config.recalls:
        pages = shape.stored_pages(config, kinds_of(text).count(FULL), machine.ranks)
        memory["sketches of evicted tokens"] = -shape.sketch_bytes(pages)
        available -= shape.sketch_bytes(pages)
        notes.append(_recall_note(config, pages * STORED_PAGE, length))
    pool = _empty_pool(text, shape, machine, max_num_seqs, max_length, max_tokens)
    rows = reserved_rows(config, shape, available, pool)
    state = shape.state_bytes(config, rows, pool)
    memory["for KV, with positions"] = available - state
    blocks = blocks_with_policy(config, shape, available, pool)
    request = RequestOptions.parse(None, config, max_length).resolve(config, 0)
    demand = request.demand(max_length, pool.block_size, pool.others, pool.draft_slots)
    needed = demand.most_blocks(pool.block_size)
    if blocks < needed:
        raise KVPolicyError(
            f"{max(blocks, 0)} blocks of {pool.block_size} tokens are left for KV, and one request at its bound "
            f"needs {needed}. Memory of a rank in GiB: "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
            + f", state of {rows} requests {-state / GIB:.2f}. Lower the budget or --max-num-seqs, or use "
            "more GPUs (--tensor-parallel-size, --pipeline-parallel-size)"
        )
    found = capacity(config, shape, replace(pool, num_blocks=blocks), length=length, prompt=prompt)
    notes += _notes(found, blocks, length, prompt)
    if machine.drafts:
        notes.append("the weights and the KV of a drafter are not counted")
    return Plan(model, dtype, machine.ranks * machine.stages, memory, state, found, rows, notes)


def _recall_note(config: KVPolicyConfig, num_stored: int, length: int) -> str:
    return (
        f"{config.kv_recall_memory:g} GiB of host memory hold {num_stored:,} evicted tokens of all requests, those of "
        f"about {num_stored // length:,} requests of this length"
    )


def _empty_pool(
    text: Any, shape: ModelShape, machine: Machine, max_num_seqs: int, max_length: int, max_tokens: int
) -> Pool:
    """Return the pool without its number of blocks."""
    # With asynchronous scheduling, vLLM's default, one step more than there are stages is in flight.
    num_steps = machine.stages + 1
    sums = _state_element_size(text, machine.state_dtype, shape.element_size)
    kv_size = shape.kv_element_size or shape.element_size
    sizes = StateSizes(machine.ranks, last_tokens=shape.element_size, sums=sums, kv=kv_size)
    block_size = block_size_of(text, machine.block_size, sizes)
    others = others_of(text, block_size, num_steps * max_tokens, num_steps, machine.ranks)
    block_size = groups_of(text, block_size, machine.ranks).block_size
    # Those of the steps in flight, and as many as a step's that a drafter writes ahead of them.
    num_draft_slots = num_steps * (1 + machine.drafts) - 1 + machine.drafts if machine.drafts else 0
    return Pool(0, block_size, max_num_seqs, max_length, max_tokens, others, num_draft_slots)


def _max_length(model: str, text: Any, machine: Machine) -> int:
    """Return the longest request that the server accepts."""
    limit = getattr(text, "max_position_embeddings", None)
    max_length = machine.max_model_len or limit
    if max_length is None:
        raise KVPolicyError(f"{model} has no max_position_embeddings; give --max-model-len")
    if limit is not None and max_length > limit:
        raise KVPolicyError(f"--max-model-len {max_length} is out of range; allowed for {model}: up to {limit}")
    return int(max_length)


def _length(max_length: int, length: int | None, prompt: int) -> int:
    """Check the sizes of a request, and return its length."""
    length = max_length if length is None else length
    if not 1 <= length <= max_length:
        raise KVPolicyError(
            f"a request's length of {length} tokens is out of range; allowed: 1 to {max_length} (--max-model-len)"
        )
    if not 0 <= prompt <= length:
        raise KVPolicyError(f"--prompt {prompt} is out of range; allowed: 0 to {length} (--length)")
    return length


def _batch_limits(machine: Machine, notes: list[str]) -> tuple[int, int]:
    """Return the requests at once and the tokens per step, with a note about assumed ones."""
    seqs, tokens = next(each for low, each in SERVER_DEFAULTS.items() if (machine.gpu_memory or 0) >= low)
    limits = {"max_num_seqs": machine.max_num_seqs or seqs, "max_tokens": machine.max_tokens or tokens}
    if assumed := [f"{FLAGS[name]} {value}" for name, value in limits.items() if getattr(machine, name) is None]:
        notes.append(
            f"assumed {' and '.join(assumed)}, the default of vLLM's server on such a GPU (on an A100 of 80 GiB: 256 "
            "and 2048)"
        )
    return limits["max_num_seqs"], limits["max_tokens"]


def _notes(found: Capacity, blocks: int, length: int, prompt: int) -> list[str]:
    """Return what a reader of the plan should know about it."""
    notes = []
    if found.request_blocks > blocks:
        notes.append(f"no request of {length} tokens with a prompt of {prompt} fits; it would be refused")
    if found.bound >= length:
        notes.append(f"a request of {length} tokens never reaches the bound of {found.bound}, so nothing is evicted")
    if found.request_blocks_full > blocks:
        notes.append(f"without the policy no request of {length} tokens fits")
    if length < found.break_even:
        notes.append(f"a request of {length} tokens needs more memory with the policy than without")
    return notes


@functools.cache
def _load(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise KVPolicyError(
            f"--model {model}: its configuration cannot be read ({str(error).splitlines()[0]}); give a folder with a "
            "config.json or a name on the Hugging Face hub"
        ) from None


def _check(text: Any, config: KVPolicyConfig, machine: Machine) -> None:
    if not config.evicts:
        raise KVPolicyError("--kv-policy full evicts nothing, so there is nothing to plan; choose another method")
    if found := unsupported(text):
        raise KVPolicyError(
            f"{text.model_type} models are not supported: a policy needs layers with full attention, beside which some "
            f"may have a sliding window or a gated delta net; found {found}"
        )
    if has_latents(text) and config.recalls:
        raise KVPolicyError("--kv-recall-memory: a server refuses it for latents (MLA); leave it out")
    if has_latents(text) and machine.kv_dtype in FP8_CACHES:
        raise KVPolicyError(
            f"--kv-cache-dtype {machine.kv_dtype}: a server refuses latents (MLA) of 8 bits; use auto or bfloat16"
        )
    if machine.gpu_memory is None and machine.kv_memory is None:
        raise KVPolicyError("give --gpu-memory, e.g. 80, or --kv-memory as logged by a server")
    for name, flag in FLAGS.items():
        value = getattr(machine, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in MAY_BE_ZERO))):
            allowed = "0 or more" if name in MAY_BE_ZERO else "above 0"
            raise KVPolicyError(f"{flag} {value:g} is out of range; allowed: {allowed}")
    if machine.utilization > 1:
        raise KVPolicyError(f"--gpu-memory-utilization {machine.utilization} is out of range; allowed: up to 1")
    if text.num_attention_heads % machine.ranks:
        raise KVPolicyError(
            f"--tensor-parallel-size {machine.ranks} does not divide the {text.num_attention_heads} query heads"
        )
    kv_heads, _ = kv_of(text)
    if kv_heads % machine.ranks and machine.ranks % kv_heads:
        raise KVPolicyError(
            f"--tensor-parallel-size {machine.ranks} neither divides nor is a multiple of the {kv_heads} kv heads"
        )
    if config.gates is not None:
        config.gates.check_fits(hidden_size=text.hidden_size, num_layers=text.num_hidden_layers, num_kv_heads=kv_heads)
    if machine.stages > text.num_hidden_layers:
        raise KVPolicyError(
            f"--pipeline-parallel-size {machine.stages} is more than the {text.num_hidden_layers} layers"
        )
    if machine.drafts and (machine.stages > 1 or groups_of(text, 1).num_others):
        raise KVPolicyError(
            f"--num-speculative-tokens {machine.drafts}: a server refuses drafts in a pipeline, and of a model with a "
            "sliding window or a state in some layers; leave them out"
        )
    if machine.stages > 1 and groups_of(text, 1).num_others:
        raise KVPolicyError(
            f"--pipeline-parallel-size {machine.stages}: a server refuses stages of a model with a sliding window or "
            "a state in some layers; use --tensor-parallel-size"
        )


def _dtype(text: Any, requested: str) -> str:
    if requested not in ("auto", *DTYPES):
        raise KVPolicyError(f"--dtype {requested} is unknown; choose from auto, {', '.join(DTYPES)}")
    own = str(getattr(text, "dtype", None) or torch.bfloat16).removeprefix("torch.")
    if requested != "auto":
        return requested
    # As in vLLM on GPUs.
    return "bfloat16" if own == "float32" else own


def _kv_element_size(requested: str) -> int | None:
    known = {"auto": None} | DTYPES | {name: dtype.itemsize for name, dtype in FP8_CACHES.items()}
    if requested not in known:
        raise KVPolicyError(f"--kv-cache-dtype {requested} is unknown; choose from {', '.join(known)}")
    return known[requested]


def _state_element_size(text: Any, requested: str, own: int) -> int:
    if requested not in ("auto", *DTYPES):
        raise KVPolicyError(f"--mamba-ssm-cache-dtype {requested} is unknown; choose from auto, {', '.join(DTYPES)}")
    if requested == "auto":
        requested = getattr(text, "mamba_ssm_dtype", None) or "auto"
    return DTYPES.get(requested, own)


def _memory(
    model: str, text: Any, shape: ModelShape, machine: Machine, max_num_seqs: int, max_tokens: int, notes: list[str]
) -> dict[str, int]:
    """Return the memory of one rank by use; memory that is taken is negative."""
    assert machine.gpu_memory is not None
    given = machine.weights
    weights = _num_parameters(model) * shape.element_size if given is None else int(given * GIB)
    if machine.stages > 1:
        # The first and the last stage also hold token embeddings.
        embeddings = shape.vocab_size * shape.hidden_size * shape.element_size
        layers = weights - embeddings * (1 if getattr(text, "tie_word_embeddings", False) else 2)
        weights = max(layers, 0) * shape.num_layers // text.num_hidden_layers + embeddings
        notes.append(
            "the figures are for a stage with the most layers, embeddings and sentences; no real stage has all three"
        )
    if machine.activations is not None:
        activations = int(machine.activations * GIB)
    else:
        wide = 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size) // machine.ranks
        logits = max_num_seqs * shape.vocab_size * (shape.element_size + 8)
        activations = max_tokens * (2 * text.hidden_size + wide) * shape.element_size + logits
        notes.append("activations are estimated; set --activation-memory to the figure in a server's log")
    return {
        f"{machine.utilization:.0%} of {machine.gpu_memory:g} GiB": int(machine.gpu_memory * machine.utilization * GIB),
        "weights": -(weights // machine.ranks),
        "activations": -activations,
        "CUDA, communication, graphs": -int(machine.overhead * GIB),
    }


@functools.cache
def _num_parameters(model: str) -> int:
    from transformers import AutoModelForCausalLM

    text = _load(model)
    if getattr(text, "quantization_config", None):
        raise KVPolicyError(
            "this model is quantised, so its size cannot be computed from its parameters; give --weight-memory"
        )
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(text).parameters())
