"""What the cases of the device benchmark launch and move: `python -m benchmarks.resources --launches --help`.

Needs no GPU: the CUDA kernels run as C++ on the CPU (tools/stand_in.py), where every load and store of global memory is
counted, by the model in tests/cpp/count_on_cpu.cpp: sectors of 32 bytes, each once for a block that finds it again
among the last 64 KiB that it touched, and no cache that blocks share. Values are computed, so counts are those of real
calls.

Of a layer only `project_state` and its gradients are counted, for projections that are made again: by
`pom_ext._blocks`, as on a GPU. The products of matrices are launches that are counted and not computed, for torch's are
not ours to count the bytes of; torch's other operators are counted as a launch each.
"""

import dataclasses
import fnmatch
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools import stand_in

from .resources import shortened

LIBRARY = Path(__file__).parent.parent / "build/stand_in_counted"
MULTIPROCESSORS = "132"  # an H100's: so many blocks share the work
PRODUCTS = ("pom_ext::linear", *(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")))
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_")


def has_kernel(operator):
    """Whether one of torch's operators runs code on the device: not one that gives a view, or memory as it is."""
    schema = operator._schema
    gives_view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
    return not gives_view and schema.name.removeprefix("aten::") not in WITHOUT_KERNEL


class Operators(TorchDispatchMode):
    """Names of torch's own operators with a kernel, as they are called; and products of matrices, not computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name, options = operator._schema.name, options or {}
        if name in PRODUCTS:
            self.found.append(name)
            return product_of_zeros(operator, arguments, options)
        if operator.namespace != "pom_ext" and has_kernel(operator):
            self.found.append(name)
        return operator(*arguments, **options)


def product_of_zeros(operator, arguments, options):
    """What a product gives, as to shape and dtype."""
    if operator._schema.name.endswith("_"):
        return arguments[0]
    if "out" in options:
        return options["out"].zero_()
    if operator.namespace == "pom_ext":
        x, weight = arguments[:2]
        return x.new_zeros(x.shape[0], weight.shape[0])
    shape = operator(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments), **options)
    return torch.zeros(shape.shape, dtype=shape.dtype)


@dataclass(frozen=True)
class Counted:
    """One call: its launches of ours, in order, and torch's operators."""

    launches: list
    operators: list

    def row(self, fewest):
        """For JSON. fewest: bytes that such a call cannot do without, or None."""
        loaded, stored = (sum(getattr(launch, name) for launch in self.launches) for name in ("loaded", "stored"))
        return {
            "launches": len(self.launches) + len(self.operators),
            "bytes": loaded + stored,
            "fewest_bytes": fewest,
            "ratio": (loaded + stored) / fewest if fewest else None,
            "bytes_loaded": loaded,
            "bytes_stored": stored,
            "kernels": [dataclasses.asdict(launch) | {"kernel": shortened(launch.kernel)} for launch in self.launches],
            "operators": dict(Counter(self.operators)),
        }


class Meter:
    """Counts calls in this process, whose pom_ext is not loaded yet."""

    def __init__(self, folder=LIBRARY):
        library = stand_in.build_library(folder, counted=True)
        os.environ["CUDA_ON_CPU_MULTIPROCESSORS"] = MULTIPROCESSORS
        stand_in.load(library)
        self._counts = stand_in.Counts(library)

    def of(self, call):
        self._counts.reset()
        # Values of weights are looked at on a CPU alone, and not of traced tensors either.
        with Operators() as operators, mock.patch("torch.compiler.is_compiling", lambda: True):
            call()
        return Counted(self._counts.launches(), operators.found)

    def of_case(self, case):
        """The row of an OpCase or a Projected: of its second call, for the first update makes its State a ticket."""
        torch.manual_seed(0)
        with torch.inference_mode(not case.differentiates):
            contender = case.contender(case.ours, [case.tensors()])
            prepared = contender.prepare()
            if getattr(case, "op", None) == "update":
                contender.run(*prepared)
            return self.of(lambda: contender.run(*prepared)).row(case.bytes_moved)


def all_cases():
    """{name: case} on the CPU, where clocks make no difference."""
    from . import device_cases
    from .ops import OpCase

    found = {}
    for case in device_cases.CASES.values():
        if isinstance(case, OpCase):
            case = dataclasses.replace(case, device="cpu", clock="host")
        elif case.memory == "recompute" or not case.train:
            case = projected(case)
        else:
            continue
        found[case.name] = case
    return found


def projected(layer):
    """The state of a LayerCase: (batch, tokens, dim) to the sums of its projected tokens."""
    from pom_ext.ops import _blocks
    from pom_ext.ops.checks import FORMS

    from .measure import forward
    from .ops import short

    @dataclass(frozen=True)
    class Projected:
        name: str
        differentiates: bool = False  # by autograd
        bytes_moved: int | None = None

        def tensors(self):
            width = layer.dim * layer.expand * (layer.degree if layer.form == "product" else 1)
            return {
                "x": torch.randn(layer.batch, layer.tokens, layer.dim).to(layer.dtype),
                "weight": torch.randn(width, layer.dim).to(layer.dtype),
                "bias": torch.randn(width).to(layer.dtype) if layer.form == "product" else None,
                "coeff": torch.randn(width, layer.degree) if layer.form == "power" else None,
                "grad": torch.randn(layer.batch, 1, width),
            }

        def contender(self, function, sets):
            return forward(function, sets)

        def ours(self, x, weight, bias, coeff, grad):
            groups, rest = (None, None, False), (None, None, 0, FORMS.index(layer.form), layer.degree)
            if layer.train:
                return _blocks.project_state_backward(grad, x, weight, bias, coeff, *groups, *rest, None, True, True)
            return _blocks.project_state(x, weight, bias, coeff, *groups, None, None, None, *rest)

    batch = f"-B{layer.batch}" if layer.batch > 1 else ""
    what = f"project_state{'_backward' * layer.train}-{layer.form}{layer.degree}{batch}"
    return Projected(f"{what}-N{layer.tokens}-D{layer.dim}-{short(layer.dtype)}")


MODEL = " ".join(__doc__.split("\n\n")[1].split())
HEADS = ("launches", "MB", "fewest", "ratio")


def line(name, row):
    fewest = [f"{row['fewest_bytes'] / 1e6:.2f}", f"{row['ratio']:.3f}"] if row["fewest_bytes"] else ["", ""]
    cells = [str(row["launches"]), f"{row['bytes'] / 1e6:.2f}", *fewest]
    names = Counter(kernel["kernel"].split("<")[0] for kernel in row["kernels"]) + Counter(row["operators"])
    parts = (f"{name.removeprefix('aten::')}{f' x{count}' if count > 1 else ''}" for name, count in names.items())
    return f"{name:<60}" + "".join(f"{cell:>10}" for cell in cells) + "   " + ", ".join(parts)


def report(patterns, json_file=None):
    """Count the cases whose names match, print a line each, and write a JSON file. Returns the exit status."""
    meter = Meter()
    chosen = {
        name: case for name, case in all_cases().items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise LookupError(f"--case: no case matches {' '.join(patterns)}")
    print(f"{'case':<60}" + "".join(f"{head:>10}" for head in HEADS) + "   what is launched", flush=True)
    rows = {}
    for name, case in chosen.items():
        rows[name] = meter.of_case(case)
        print(line(name, rows[name]), flush=True)
        if json_file:
            Path(json_file).write_text(json.dumps({"model": MODEL, "cases": rows}, indent=1) + "\n")
    return 0
