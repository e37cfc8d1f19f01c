"""Triton kernels of the operators, without anything that only one vendor's GPUs have.

A row is one (request, layer, kv head), numbered in this order. Grids follow from host shapes alone: what lies past a
request's length is left early. Importing these modules needs Triton and decides whether they are compiled or
interpreted, so only `triton_backend.py` does it, when an operator is first called.
"""
