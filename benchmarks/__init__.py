"""Measurements: `python -m benchmarks.run SUITE`, and `python -m benchmarks.gpu_report` for a machine with a GPU."""
