"""A worker without vLLM, and dense requests that are compacted a second time, from the methods' formulas."""

from .simulation import CPU, DOT, HIDDEN, KV_HEADS, LAYERS, FakeBlock, Simulation, gates, gates_file

__all__ = ["CPU", "DOT", "HIDDEN", "KV_HEADS", "LAYERS", "FakeBlock", "Simulation", "gates", "gates_file"]
