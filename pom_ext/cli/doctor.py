"""What is installed, how the library was built, and whether it fits this machine."""

import importlib
import importlib.util
import platform
import re
import shutil
import sysconfig
from pathlib import Path

TRAINING = ("accelerate", "ale_py", "av", "diffusers", "matplotlib", "mlxtend", "PIL", "tqdm")
PLAYING = ("pygame", "starlette", "uvicorn", "websockets")


def diagnose():
    """Yield the lines of the report. Raises what `_library.load` raises if the library cannot be loaded."""
    import torch

    from .. import __version__
    from ..ops._library import BUILD, build_note, load

    package = Path(__file__).resolve().parents[1]
    yield f"pom_ext    {__version__}, {package}"
    yield f"python     {platform.python_version()}, {platform.system()} {platform.machine()}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"torch      {torch.__version__}, {torch.get_num_threads()} threads, CPU {capability}"
    yield f"cuda       {_describe_cuda(torch)}"
    for purpose, extra, wanted in (("training", "train", TRAINING), ("playing", "play", PLAYING)):
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        remedy = f"lacks {', '.join(missing)}: pip install 'pom_ext[{extra}]'"
        yield f"{purpose:10} {remedy if missing else 'ready'}"
    yield from _describe_build(build_note(), __version__, sysconfig.get_platform(), BUILD)
    yield from _describe_changes(package, BUILD)
    yield f"engine     {_describe_engine()}"
    importlib.import_module("pom_ext.ops")  # after this import, load reports a library that lacks an operation
    load()
    library = Path(importlib.util.find_spec("pom_ext._C").origin)
    yield f"library    loaded, {library}"
    if library.resolve().parent != package:
        yield f"mismatch   that is the library of another pom_ext. Build the one of {package}, in its folder: {BUILD}"
    yield f"kernels    {_describe_kernels(torch, BUILD)}"
    yield from _describe_driver(torch.ops.pom_ext.cuda_versions(), torch.version.cuda, BUILD)
    yield f"cpu        runs the kernels for {torch.ops.pom_ext.instruction_set()}; {_describe_products(torch)}"


def _describe_products(torch):
    """Which 16-bit matrix products this processor computes natively."""
    native = torch.ops.pom_ext.native_products().split()
    wide = [name for name in ("bfloat16", "float16") if name not in native]
    parts = [f"has matrix products in {' and '.join(native)}"] * bool(native)
    parts += [f"takes those in {' and '.join(wide)} in float32: half the memory, no more speed"] * bool(wide)
    return ", ".join(parts)


def _describe_cuda(torch):
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if not torch.version.cuda:
            return "none: this torch is built for the CPU" + ("; the GPU here needs one for CUDA" if driver else "")
        if driver:
            return f"none that this torch for CUDA {torch.version.cuda} can use: nvidia-smi tells if the driver is old"
        return "no GPU here"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _describe_build(note, version, here, remedy):
    """How the library was built, and mismatches with this package or this machine."""
    if not note:
        yield f"built      unknown: no note of a build; {remedy}"
        return
    cuda = f"CUDA {note['cuda']} for {', '.join(note['architectures'])}" if note["cuda"] else "no CUDA"
    why = f" ({note['chosen']})" if note.get("chosen") else ""
    yield f"built      {note['version']} for {note['platform']}, {note['libc']}, by {note['compiler']}; {cuda}{why}"
    yield f"against    torch {note['torch']}, Python {note['python']}; serves torch {note['minimum_torch']} and later"
    if note["version"] != version:
        yield f"mismatch   the library is of {note['version']}, the package of {version}: {remedy}"
    if note["platform"] != here:
        yield f"mismatch   built for {note['platform']}, and this is {here}: a wheel for this one, or {remedy}"


def _describe_changes(package, remedy):
    """In a source folder: a mismatch if a source is newer than the library."""
    note = package / "_build.json"
    sources = [path for path in (package.parent / "csrc").rglob("*") if path.is_file()]
    if note.exists() and sources:
        latest = max(sources, key=lambda path: path.stat().st_mtime)
        if latest.stat().st_mtime > note.stat().st_mtime:
            yield f"mismatch   {latest.relative_to(package.parent)} is newer than the library: {remedy}"


def _describe_engine():
    """Whether the engine, a separate library for a single Python version, can be loaded."""
    from ..engine import _compiled

    try:
        _compiled()
    except ImportError as error:
        return f"not for this Python: {error}"
    return f"loaded, {importlib.util.find_spec('pom_ext._engine').origin}"


def _describe_kernels(torch, remedy):
    """The GPUs that the library was built for, and whether it runs on those of this machine."""
    built = torch.ops.pom_ext.cuda_architectures()
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    here = sorted({torch.cuda.get_device_capability(i) for i in here})
    if not built and here:
        gpus = ", ".join(map("{0[0]}.{0[1]}".format, here))
        return f"CPU only, NOT the GPU here ({gpus}); for it, with nvcc on the path: POM_EXT_CUDA=1 {remedy}"
    if not built:
        one = f"TORCH_CUDA_ARCH_LIST=9.0 {remedy}"
        return f"CPU only; with nvcc on the path, for one kind of GPU: {one}, for all: POM_EXT_CUDA=1 {remedy}"
    text = f"CPU, CUDA {built.replace(';', ', ')}"
    if not here:
        return text
    lacking = ["{}.{}".format(*gpu) for gpu in here if not any(_serves(name, gpu) for name in built.split(";"))]
    if not lacking:
        return f"{text}, which serves every GPU here"
    return f"{text}, NOT the GPU here: TORCH_CUDA_ARCH_LIST='{';'.join(lacking)}' {remedy}"


def _describe_driver(versions, of_torch, remedy):
    """Whether the driver supports the CUDA runtime of the library. Yields no line for a library without CUDA.

    A driver supports every runtime of its own and of earlier major versions.
    """
    if not versions:
        return
    runtime, driver = versions.split()
    if driver == "0.0":
        yield f"driver     none; the library is linked to CUDA {runtime}"
        return
    yield f"driver     serves CUDA {driver}; the library is linked to CUDA {runtime}"
    if int(driver.split(".")[0]) < int(runtime.split(".")[0]):
        yield (
            f"mismatch   the driver is too old for CUDA {runtime}: install a later one, or build with the toolkit of "
            f"CUDA {of_torch or driver}: CUDA_HOME=its folder {remedy}"
        )


def _serves(name, capability):
    """Whether code for an architecture, such as "8.0", "9.0a" or "12.0+PTX", runs on a GPU.

    capability: (major, minor) of the GPU. Machine code also runs on later minor versions, PTX on all later versions.
    The suffix "a" restricts both to one capability, "f" to one family.
    """
    number, suffix, ptx = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", name).groups()
    major, minor = map(int, number.split("."))
    if suffix == "a":
        return capability == (major, minor)
    if ptx and not suffix:
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor
