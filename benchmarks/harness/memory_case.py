"""A case of peak memory on the CPU."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from .layer_case import LayerCase
from .measure import OURS, Target, check
from .op_case import OpCase

PROCESSES = 5  # the result is their median: the free memory of an allocator differs between processes


def status(field):
    """A size of this process from /proc, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(case, name, threads):
    """Peak bytes of resident memory that one call adds."""
    torch.set_num_threads(threads)
    with torch.inference_mode(not case.differentiates):
        small = dataclasses.replace(case, tokens=64).setup().contenders[name]()
        small.call()  # starts the threads
        contender = case.setup().contenders[name]()
        arguments = contender.prepare()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        contender.run(*arguments)
        return max(0, status("VmHWM") - before)


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory that one call of another case adds to its inputs, each contender in processes of its own."""

    op: OpCase | LayerCase
    against: tuple[str, ...] = ("plain",)
    targets: tuple[Target, ...] = ()
    clock = "host"

    @property
    def name(self):
        return f"memory-{self.op.name}"

    @property
    def dtype(self):
        return self.op.dtype

    def measure(self, clock, settings, bandwidth=None):
        torch.manual_seed(0)
        with torch.inference_mode(not self.op.differentiates):
            setup = self.op.setup()
            ours = setup.contenders[OURS]()
            checked = check(self, ours.call(), setup.expected())
            sizes = self.op.sizes(setup.tensors)
        extra = {}
        for name in (OURS, *self.against):
            extra[name] = median(self.in_a_process(name) for _ in range(PROCESSES))
        ratios = {name: extra[OURS] / size for name, size in sizes.items()}
        return {
            "kind": "memory",
            "shapes": {name: list(tensor.shape) for name, tensor in setup.tensors.items()},
            "check": checked,
            "bytes": sizes,
            "contenders": {name: {"extra_bytes": size} for name, size in extra.items()},
            "ratios": ratios,
            "targets": [target.judged(ratios) for target in self.targets],
        }

    def in_a_process(self, name):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            return child.submit(peak_growth, self.op, name, torch.get_num_threads()).result()
