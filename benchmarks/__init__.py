"""Measurements of the package; `python -m benchmarks.run` is the only entry point."""
