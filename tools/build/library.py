"""What the torch-free library is made of: csrc/library.json, which CMakeLists.txt reads too.

`kernels` holds the inner loops: it is compiled once for each of the `instruction_sets`, with the `kernel_flags`. GCC
12 takes the undefined operand inside its own AVX-512 intrinsics for an uninitialised variable, hence two of these. The
last of the `cuda_architectures` is compiled to PTX too, for later GPUs.
"""

import json
from pathlib import Path

LIBRARY = json.loads((Path(__file__).parents[2] / "csrc/library.json").read_text())


def sources(part):
    """The sources of "cpu", "engine" or "cuda", relative to the working folder, without the inner loops."""
    paths = [path for pattern in LIBRARY["sources"][part] for path in sorted(Path().glob(pattern))]
    return [path for path in paths if path != Path(LIBRARY["kernels"])]
