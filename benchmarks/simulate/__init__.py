"""Predict throughput where it cannot be measured: `python -m benchmarks.simulate`."""
