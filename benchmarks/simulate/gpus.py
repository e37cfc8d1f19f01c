"""Published figures of GPUs, and the shares of them that an engine reaches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Published figures of one GPU.

    Attributes:
        name: as in the name that its driver gives.
        memory: GiB.
        bandwidth: bytes/s of memory.
        flops: dense bf16 FLOP/s.
        link: bytes/s to its peers, one way.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 80, 3.35e12, 989e12, 450e9),
        GPU("H200", 141, 4.8e12, 989e12, 450e9),
        GPU("A100", 80, 2.04e12, 312e12, 300e9),
        GPU("L40S", 48, 0.864e12, 362e12, 32e9),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """The shares of a GPU's figures that an engine reaches.

    The defaults are assumptions, which `--calibration` replaces. `search`, `sums` and `errors` follow from the inner
    loops of the CUDA operators, which `python -m benchmarks.kernels.instructions` counts: half of what their accesses
    to shared memory leave of the peak. At the peak a multiprocessor makes a product of tensor cores a cycle. In a cycle
    it also moves 128 bytes of shared memory, so that a load or a copy of 16 bytes a thread takes 4 cycles.

    Attributes:
        weights: share of the bandwidth while weights are read.
        attention: share of the bandwidth while KV is read.
        flops: share of the FLOP/s in the model's matrix products.
        search: share of the FLOP/s in the products of keys with keys. For 128 products `find_similar` has 32 loads of
            matrices, 16 others and 8 copies: at most 0.73.
        sums: share of the FLOP/s in the sums of attention over queries. For 64 products `attend_heads` has 40 loads of
            matrices, 24 others and 8 copies; `sum_heads` has 16, 20 and 4: at most 0.40.
        errors: the same with outputs, and their products with values. For 192 products `attend_heads` has 72, 24 and
            16, `sum_heads` 48, 20 and 12: at most 0.60.
        host: seconds of a step that no GPU work hides.
        per_request: seconds of a step for each request, sampling included.
        latency: seconds of an all-reduce beside its bytes.
        launch: seconds of a kernel that hardly does anything, in a graph or behind another one.
        eager: seconds of an operation of PyTorch that the GPU waits for.
        compaction: time of a compaction as a multiple of what follows from the other shares.
    """

    weights: float = 0.8
    attention: float = 0.7
    flops: float = 0.6
    search: float = 0.35
    sums: float = 0.2
    errors: float = 0.3
    host: float = 1e-3
    per_request: float = 2e-6
    latency: float = 1e-5
    launch: float = 2.5e-6
    eager: float = 5e-6
    compaction: float = 1.0
