"""Benchmarks: `python -m benchmarks SUITE`. They are not installed with the package."""
