"""Time the operators of `skipkv_vllm.ops` on this machine: `python -m benchmarks.kernels`."""
