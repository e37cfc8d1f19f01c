"""Throughput of full KV and of a policy at equal memory: `python -m benchmarks.throughput`."""
