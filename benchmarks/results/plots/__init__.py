"""Figures of the pages, in the style of `skipkv_vllm.evaluation.figures`."""
