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
        vector: float32 FLOP/s without tensor cores.
        link: bytes/s to its peers, one way.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    vector: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 80, 3.35e12, 989e12, 67e12, 450e9),
        GPU("H200", 141, 4.8e12, 989e12, 67e12, 450e9),
        GPU("A100", 80, 2.04e12, 312e12, 19.5e12, 300e9),
        GPU("L40S", 48, 0.864e12, 362e12, 91.6e12, 32e9),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """The shares of a GPU's figures that an engine reaches.

    The defaults are assumptions, which `--calibration` replaces. `search` and `sums` follow from the inner loops of the
    CUDA operators: half of what their loads from shared memory, one a cycle and multiprocessor, leave of the peak.

    Attributes:
        weights: share of the bandwidth while weights are read.
        attention: share of the bandwidth while KV is read.
        flops: share of the FLOP/s in the model's matrix products.
        search: share of the FLOP/s in the products of keys with keys. For 128 products of tensor cores, which take 128
            cycles at the peak, `find_similar` has 32 loads of matrices of 4 cycles, 16 other loads and 8 copies of 4
            cycles: at most 0.73.
        sums: share of the float32 FLOP/s in the sums over queries. `measure_attention` has 12 cycles of loads for 8 of
            products: at most 0.67.
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
    sums: float = 0.33
    host: float = 1e-3
    per_request: float = 2e-6
    latency: float = 1e-5
    launch: float = 2.5e-6
    eager: float = 5e-6
    compaction: float = 1.0
