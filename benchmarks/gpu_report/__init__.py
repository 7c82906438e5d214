"""One command for a machine with a GPU, `python -m benchmarks.gpu_report FOLDER`: build, check, measure, report.

plan.py says what runs, in which order, and how long; run.py runs it and stops what overruns; read.py finds in what it
prints what is worth telling; report.py writes that down after every step, and guard.py cleans up after a report that
was killed. smoke.py and profiled.py are programs that steps run, failures.py a plugin of the tests. pretend.py takes
the place of the GPU and of its tools.
"""
