"""Registers, spills, occupancy and widths of loads of every CUDA kernel, read from the build.

Needs neither a GPU nor torch. ptxas logs registers, stack and spills of each kernel and architecture; the PTX beside
the objects has the threads of a block. From these follows how many blocks of a kernel a multiprocessor holds. The
widths of loads from global memory come from the machine code if cuobjdump and nvdisasm are on the path, else from the
PTX.
"""

import dataclasses
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..harness.command import parse, suite_parser

BUILD = Path(__file__).parents[2] / "build/pom/cuda"
REGISTERS = 16384  # of each quarter of a multiprocessor, allocated to its warps in multiples of REGISTER_LUMP
REGISTER_LUMP = 256
SHARED_RESERVED = 1024  # bytes of every block that CUDA uses itself


@dataclass(frozen=True)
class Multiprocessor:
    threads: int
    blocks: int
    shared: int  # bytes


# CUDA C++ programming guide, "Technical specifications per compute capability".
MULTIPROCESSORS = {
    "8.0": Multiprocessor(2048, 32, 164 * 1024),
    "9.0": Multiprocessor(2048, 32, 228 * 1024),
}


@dataclass
class Kernel:
    """One kernel for one architecture. Stack and spills are bytes per thread, `shared` static bytes per block."""

    name: str
    arch: str  # "9.0", also if it is compiled for 9.0a
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    threads: int = 0  # at most in a block; 0 if the PTX was not read
    loads: dict = dataclasses.field(default_factory=dict)  # from global memory: {bits: instructions}
    ahead: int | None = None  # 128-bit loads before the first product of a tensor core; None without a product

    @property
    def vector_bits(self):
        """Bits of one access of an instance, from its template arguments (…, type, Vec, …); 0 for other kernels."""
        match = re.search(r"\b(float|double|bf16|f16), (\d+), (?:true|false)>", self.name)
        return {"float": 32, "double": 64, "bf16": 16, "f16": 16}[match[1]] * int(match[2]) if match else 0

    @property
    def is_general(self):
        """Whether it processes one element at a time, with a degree known only at run time."""
        return re.search(r", 1, (true|false)>$", self.name) is not None

    @property
    def spills(self):
        return self.stack + self.spill_stores + self.spill_loads

    def blocks(self):
        """Blocks that a multiprocessor holds, without dynamic shared memory; None for an unknown architecture."""
        limits = MULTIPROCESSORS.get(self.arch)
        if not limits or not self.threads:
            return None
        warps = -(-self.threads // 32)
        registers_of_warp = -(-self.registers * 32 // REGISTER_LUMP) * REGISTER_LUMP
        by_registers = 4 * (REGISTERS // registers_of_warp) // warps
        by_shared = limits.shared // (SHARED_RESERVED + self.shared)
        return min(limits.threads // (32 * warps), limits.blocks, by_registers, by_shared)

    def row(self):
        """The fields, and the occupancy computed from them, for JSON."""
        row, blocks = dataclasses.asdict(self), self.blocks()
        if blocks:
            limits = MULTIPROCESSORS[self.arch]
            row["blocks_per_multiprocessor"] = blocks
            row["occupancy"] = blocks * self.threads / limits.threads
            # Dynamic shared memory that a block may ask for before fewer of them fit.
            row["shared_room"] = limits.shared // blocks - SHARED_RESERVED - self.shared
        return row


def demangled(names):
    """{mangled: short name}, such as "sum_pieces<Power<3>, bf16, 8, false>"."""
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return dict(zip(names, map(shortened, done.stdout.splitlines()), strict=True))


def shortened(signature):
    """A demangled kernel without namespaces, parameters and the wrapper of its template arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\b(pom|cuda)::|^void ", "", signature).split("(")[0]
    return re.sub(r"<\w*Instance<(.*)> ?>$", r"<\1>", name).replace("> >", ">>")


def parse_log(text):
    """{(mangled name, architecture): Kernel} from the output of `ptxas -v`."""
    kernels, kernel = {}, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)(\d)[af]?'", line):
            name, major, minor = match.groups()
            kernel = kernels[name, f"{major}.{minor}"] = Kernel(name, f"{major}.{minor}")
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack += int(match[1])  # a function that was not inlined has a line of its own
            kernel.spill_stores += int(match[2])
            kernel.spill_loads += int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    return kernels


ACCESS = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s")


def loads_ahead(code, load, product):
    """Number of loads before the first product in the code of a kernel; None if it has no product."""
    before, found, _ = code.partition(product)
    return len(re.findall(load, before)) if found else None


def parse_ptx(text):
    """(architecture, {mangled name: (threads of a block, {bits of a load from global memory: count}, ahead)})."""
    arch = re.search(r"^\.target sm_(\d+)(\d)[af]?", text, re.MULTILINE)
    kernels = {}
    for body in re.split(r"^(?:\.\w+ )*\.entry ", text, flags=re.MULTILINE)[1:]:
        threads, loads = re.search(r"\.(?:max|req)ntid (\d+)", body), {}
        for match in ACCESS.finditer(body):
            bits = int(match[1] or 1) * int(match[2])
            loads[bits] = loads.get(bits, 0) + 1
        ahead = loads_ahead(body, r"\bld\.global\S*\.v4\.[busf]32\s", "mma.sync")
        kernels[re.match(r"\w+", body)[0]] = (int(threads[1]) if threads else 0, loads, ahead)
    return f"{arch[1]}.{arch[2]}", kernels


def parse_sass(text):
    """{(mangled name, architecture): {bits of a load from global memory: count}} from the output of cuobjdump."""
    kernels, arch, loads = {}, None, {}
    for line in text.splitlines():  # hundreds of megabytes
        if "LDG.E" in line:
            wide = re.search(r"LDG\.E\S*?\.[US]?(8|16|64|128|256)\b", line)
            bits = int(wide[1]) if wide else 32
            loads[bits] = loads.get(bits, 0) + 1
        elif "code for sm_" in line:
            arch = re.sub(r".*sm_(\d+)(\d)[af]?", r"\1.\2", line)
        elif "Function : " in line:
            loads = kernels[line.split()[-1], arch] = {}
    return kernels


def parse_sass_ahead(text):
    """{(mangled name, architecture): 128-bit loads before the first product} of kernels with a product."""
    kernels = {}
    if " HMMA." not in text:
        return kernels
    for code in text.split("code for sm_")[1:]:
        arch = re.sub(r"^(\d+)(\d)[af]?\s.*", r"\1.\2", code, flags=re.DOTALL)
        for body in code.split("Function : ")[1:]:
            ahead = loads_ahead(body, r"\sLDG\.E\S*\.128\b", " HMMA.")
            if ahead is not None:
                kernels[re.match(r"\w+", body)[0], arch] = ahead
    return kernels


def disassembled(file):
    """(parse_sass, parse_sass_ahead) of an object file; both empty without cuobjdump and nvdisasm."""
    if not (shutil.which("cuobjdump") and shutil.which("nvdisasm")):
        return {}, {}
    text = subprocess.run(["cuobjdump", "-sass", file], check=True, capture_output=True, text=True).stdout
    return parse_sass(text), parse_sass_ahead(text)


def read_build(folder=BUILD):
    """Kernels of all logs, PTX files and objects of a build, sorted by name. FileNotFoundError if there is no log."""
    logs = sorted(Path(folder).glob("*.log"))
    if not logs:
        raise FileNotFoundError(
            f"{folder} holds no compiler logs: build the library with nvcc on the path first, and with POM_EXT_CUDA=1"
        )
    kernels = {}
    for log in logs:
        kernels |= parse_log(log.read_text())
    for file in sorted(Path(folder).glob("*.ptx")):
        arch, found = parse_ptx(file.read_text())
        for name, (threads, loads, ahead) in found.items():
            if (name, arch) in kernels:
                kernel = kernels[name, arch]
                kernel.threads, kernel.loads, kernel.ahead = threads, loads, ahead
    for log in logs:
        loads_of, ahead_of = disassembled(log.with_suffix(".o"))
        for key, loads in loads_of.items():
            kernels[key].loads = loads
        for key, ahead in ahead_of.items():
            kernels[key].ahead = ahead
    names = demangled(sorted({kernel.name for kernel in kernels.values()}))
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, float(kernel.arch)))


def table(kernels):
    """The printed table, a line for each kernel and architecture."""
    heads = ("arch", "registers", "stack", "spilled", "threads", "blocks/SM", "occupancy", "128-bit loads", "others")
    width = max(len(kernel.name) for kernel in kernels) + 2
    lines = ["kernel".ljust(width) + "".join(head.rjust(len(head) + 2) for head in heads)]
    for kernel in kernels:
        row, wide = kernel.row(), kernel.loads.get(128, 0)
        occupancy = f"{row['occupancy']:.0%}" if "occupancy" in row else ""
        spilled = kernel.spill_stores + kernel.spill_loads
        figures = (
            *(kernel.arch, kernel.registers, kernel.stack, spilled, kernel.threads),
            *(row.get("blocks_per_multiprocessor", ""), occupancy, wide, sum(kernel.loads.values()) - wide),
        )
        cells = (str(figure).rjust(len(head) + 2) for head, figure in zip(heads, figures, strict=True))
        lines.append(kernel.name.ljust(width) + "".join(cells))
    return lines


def save(kernels, path):
    """Write a JSON list with one line per kernel and architecture."""
    rows = ",\n ".join(json.dumps(kernel.row()) for kernel in kernels)
    Path(path).write_text(f"[\n {rows}\n]\n")


def main(arguments=None):
    parser = suite_parser("resources")
    parser.add_argument("--build", default=BUILD, metavar="FOLDER", help="where the objects and logs are")
    parser.add_argument("--arch", nargs="+", default=list(MULTIPROCESSORS), help="architectures to show, or 'all'")
    options = parse(parser, arguments)
    try:
        kernels = read_build(options.build)
    except FileNotFoundError as error:
        parser.error(str(error))
    chosen = [kernel for kernel in kernels if kernel.arch in options.arch or "all" in options.arch]
    if not chosen:
        parser.error(f"--arch: the build has {sorted({kernel.arch for kernel in kernels})}, got {options.arch}")
    print(*table(chosen), sep="\n")
    if options.json:
        save(chosen, options.json)
    return 0
