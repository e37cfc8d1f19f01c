"""Triton kernels of the operators, portable to GPUs of any vendor.

A row is one (request, layer, kv head), numbered in this order. Grids follow from host shapes alone: programs past a
request's length return early. Importing these modules needs Triton and decides whether they are compiled or
interpreted, so only `triton_backend` imports them, when an operator is first called.
"""
