"""Measurements that are not installed with the package: `python -m benchmarks SUITE`."""
