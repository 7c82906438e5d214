"""The library that is tested: the one that was built, or the one that POM_EXT_TEST_LIBRARY names.

The CUDA kernels of that one run on the CPU (test_cuda_on_cpu.py). To be imported before pom_ext.
"""

import importlib.util
import os
import sys

import torch  # noqa: F401 -- whose libraries that one needs

if "POM_EXT_TEST_LIBRARY" in os.environ:
    _spec = importlib.util.spec_from_file_location("pom_ext._C", os.environ["POM_EXT_TEST_LIBRARY"])
    sys.modules["pom_ext._C"] = importlib.util.module_from_spec(_spec)
