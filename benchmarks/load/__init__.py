"""Offered load, engines that answer it and what they cost; for `benchmarks.throughput` and `benchmarks.serving`."""
