"""What is installed, what was built and what runs here."""

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
    """Yield a line for each thing there is to know; at the end, raise what `_library.load` raises."""
    import torch

    from .. import __version__
    from ..ops._library import BUILD, build_note, load

    package = Path(__file__).resolve().parents[1]
    yield f"pom_ext    {__version__}, {package}"
    yield f"python     {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch      {torch.__version__}, {torch.get_num_threads()} threads, CPU {torch.backends.cpu.get_cpu_capability()}"
    yield f"cuda       {_describe_cuda(torch)}"
    for purpose, extra, wanted in (("training", "train", TRAINING), ("playing", "play", PLAYING)):
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        remedy = f"lacks {', '.join(missing)}: pip install 'pom_ext[{extra}]'"
        yield f"{purpose:10} {remedy if missing else 'ready'}"
    yield from _describe_build(build_note(), __version__, sysconfig.get_platform(), BUILD)
    yield from _describe_changes(package, BUILD)
    yield f"engine     {_describe_engine()}"
    importlib.import_module(".ops", __package__)  # where the library lacks an operation, load tells from then on
    load()
    library = Path(importlib.util.find_spec("pom_ext._C").origin)
    yield f"library    loaded, {library}"
    if library.resolve().parent != package:
        yield f"mismatch   that is the library of another pom_ext. Build the one of {package}, in its folder: {BUILD}"
    yield f"kernels    {_describe_kernels(torch, BUILD)}"
    yield from _describe_driver(torch.ops.pom_ext.cuda_versions(), torch.version.cuda, BUILD)
    yield f"cpu        runs the kernels for {torch.ops.pom_ext.instruction_set()}; {_describe_products(torch)}"


def _describe_products(torch):
    """What matrix products in 16 bits are worth on this processor."""
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
    """What the library was built with, and where that does not fit this package or this machine."""
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
    """In a source folder: what was changed since its library was built."""
    note = package / "_build.json"
    sources = [path for path in (package.parent / "csrc").rglob("*") if path.is_file()]
    if note.exists() and sources:
        latest = max(sources, key=lambda path: path.stat().st_mtime)
        if latest.stat().st_mtime > note.stat().st_mtime:
            yield f"mismatch   {latest.relative_to(package.parent)} is newer than the library: {remedy}"


def _describe_engine():
    """The streams without torch are a library of their own, for one version of Python."""
    from ..engine import _compiled

    try:
        _compiled()
    except ImportError as error:
        return f"not for this Python: {error}"
    return f"loaded, {importlib.util.find_spec('pom_ext._engine').origin}"


def _describe_kernels(torch, remedy):
    """What the library was built for, and whether that serves the GPUs that are here."""
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
    lacking = ["{}.{}".format(*capability) for capability in here if not _serves(built, capability)]
    if not lacking:
        return f"{text}, which serves every GPU here"
    return f"{text}, NOT the GPU here: TORCH_CUDA_ARCH_LIST='{';'.join(lacking)}' {remedy}"


def _describe_driver(versions, of_torch, remedy):
    """Whether the driver serves the CUDA runtime that the library is linked to; nothing where it was built without.

    A driver serves every runtime of its own major version and of those before.
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


def _serves(built, capability):
    """Whether code for the architectures "8.0;9.0a;12.0+PTX" runs on a GPU of this (major, minor).

    Machine code runs on later minor versions too, PTX on everything later; an "a" binds both to the one GPU, an "f" to
    its family.
    """
    for name in built.split(";"):
        number, suffix, ptx = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", name).groups()
        major, minor = map(int, number.split("."))
        if suffix == "a":
            serves = capability == (major, minor)
        elif ptx and not suffix:
            serves = capability >= (major, minor)
        else:
            serves = capability[0] == major and capability[1] >= minor
        if serves:
            return True
    return False
