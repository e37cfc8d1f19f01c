"""Command line of `skipkv plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _option(help_text: str, metavar: str) -> Any:
    return typer.Option(help=help_text, metavar=metavar)


Model = Annotated[str, _option("Folder with a config.json, or name on the Hugging Face hub.", "MODEL")]
GpuMemory = Annotated[float | None, _option("Memory of one GPU.", "GIB")]
Policy = Annotated[str, _option("Eviction method.", "NAME")]
Budget = Annotated[int, _option("Tokens that a request is compacted to.", "N")]
Buffer = Annotated[int, _option("Tokens that a request may grow beyond the budget.", "N")]
Window = Annotated[int, _option("Newest tokens that are always kept.", "N")]
Granularity = Annotated[str, _option("Evict tokens of each KV head separately, or whole sentences.", "head|sentence")]
ProtectPrompt = Annotated[bool, typer.Option(help="Never evict the prompt.")]
PolicyConfig = Annotated[str, _option("Parameters of the method.", "JSON")]
RecallMemory = Annotated[float, _option("Host memory for evicted tokens, which may come back.", "GIB")]
Length = Annotated[int | None, _option("Prompt and output tokens of a request. Default: the longest allowed.", "N")]
Prompt = Annotated[int, _option("Prompt tokens of a request.", "N")]
MaxModelLen = Annotated[int | None, _option("Longest request. Default: the model's limit.", "N")]
MaxNumSeqs = Annotated[int | None, _option("Most requests that run at once. Default: vLLM's.", "N")]
MaxBatchedTokens = Annotated[int | None, _option("Most tokens of a step. Default: vLLM's.", "N")]
BlockSize = Annotated[int, _option("Tokens per block; beside states vLLM makes blocks larger.", "N")]
TensorParallel = Annotated[int, _option("GPUs that share each layer.", "N")]
DraftTokens = Annotated[int, _option("Drafts of a step of speculative decoding; 0 for none.", "N")]
PipelineParallel = Annotated[int, _option("Pipeline stages that share the layers.", "N")]
Dtype = Annotated[str, typer.Option(help="Data type of weights and KV cache: auto, bfloat16, float16 or float32.")]
CacheDtype = Annotated[str, typer.Option(help="Data type of the KV cache: auto (as the weights), fp8, fp8_e5m2, ...")]
StateDtype = Annotated[
    str, typer.Option(help="Data type of the states of a gated delta net: auto (as the model says), float32, ...")
]
Utilization = Annotated[float, _option("Share of the memory that vLLM may use.", "SHARE")]
WeightMemory = Annotated[
    float | None, _option("Weights on all ranks together. Default: parameters x element size.", "GIB")
]
ActivationMemory = Annotated[float | None, _option("Activations on one rank. Default: an estimate.", "GIB")]
OverheadMemory = Annotated[float, _option("CUDA context, communication buffers and CUDA graphs on one rank.", "GIB")]
KVMemory = Annotated[float | None, _option("KV cache and the policy's state on one rank. Default: computed.", "GIB")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plan(
    model: Model,
    gpu_memory: GpuMemory = None,
    kv_policy: Policy = "skipkv",
    kv_budget: Budget = 1024,
    kv_buffer: Buffer = 128,
    kv_window: Window = 8,
    kv_granularity: Granularity = "head",
    kv_protect_prompt: ProtectPrompt = True,
    kv_recall_memory: RecallMemory = 0.0,
    kv_policy_config: PolicyConfig = "{}",
    length: Length = None,
    prompt: Prompt = 0,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    block_size: BlockSize = 16,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    num_speculative_tokens: DraftTokens = 0,
    dtype: Dtype = "auto",
    kv_cache_dtype: CacheDtype = "auto",
    mamba_ssm_cache_dtype: StateDtype = "auto",
    gpu_memory_utilization: Utilization = 0.92,
    weight_memory: WeightMemory = None,
    activation_memory: ActivationMemory = None,
    overhead_memory: OverheadMemory = 1.0,
    kv_memory: KVMemory = None,
    as_json: Json = False,
) -> None:
    """Show how many requests fit on a GPU with and without a policy; reads only the model's configuration."""
    from ..config import KVPolicyConfig, parse_json_object
    from . import plan as planning

    policy = {"kv_policy": kv_policy, "kv_granularity": kv_granularity, "kv_protect_prompt": kv_protect_prompt}
    sizes = {"kv_budget": kv_budget, "kv_buffer": kv_buffer, "kv_window": kv_window}
    parameters = parse_json_object("--kv-policy-config", kv_policy_config)
    options = policy | sizes | {"kv_recall_memory": kv_recall_memory, "kv_policy_config": parameters}
    machine = planning.Machine(
        gpu_memory=gpu_memory,
        utilization=gpu_memory_utilization,
        ranks=tensor_parallel_size,
        stages=pipeline_parallel_size,
        drafts=num_speculative_tokens,
        dtype=dtype,
        kv_dtype=kv_cache_dtype,
        state_dtype=mamba_ssm_cache_dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_batched_tokens,
        weights=weight_memory,
        activations=activation_memory,
        overhead=overhead_memory,
        kv_memory=kv_memory,
    )
    found = planning.plan(model, KVPolicyConfig.parse(options), machine, length=length, prompt=prompt)
    typer.echo(found.json() if as_json else "\n".join(found.lines()))
