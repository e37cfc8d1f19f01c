"""Backends and inputs for the tests of the operators."""
