"""Benchmarks, and the check of a GPU."""
