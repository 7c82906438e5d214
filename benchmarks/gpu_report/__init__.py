"""One command for a machine with a GPU, `python -m benchmarks.gpu_report FOLDER`: build, check, measure, report.

plan.py: what runs, in which order, and how long. run.py runs it and stops processes that overrun. read.py reads their
output. report.py writes the results after every step. guard.py cleans up after a killed report. smoke.py and
profiled.py are programs that steps run, failures.py is a plugin for pytest. pretend.py and stubs.py stand in for a GPU
and its tools.
"""
