"""What eviction or steering costs a decode step: `python -m benchmarks.overhead`."""
