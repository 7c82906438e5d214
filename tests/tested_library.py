"""The library that is tested: the one that was built, or the one that POM_EXT_TEST_LIBRARY names.

The CUDA kernels of that one run on the CPU (test_cuda_on_cpu.py). To be imported before pom_ext.
"""

import os
import sys
from pathlib import Path

import torch  # noqa: F401 -- whose libraries that one needs

if "POM_EXT_TEST_LIBRARY" in os.environ:
    sys.path.append(str(Path(__file__).parents[1]))
    from tools import stand_in

    stand_in.load(os.environ[stand_in.VARIABLE])
