"""What nvcc makes of the CUDA kernels: no spills, wide loads. Takes what the build compiled for the library here.

A library that was built without CUDA is not tested, unless CUDA was asked for: then that is an error.
"""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # neither the build nor the benchmarks are part of the installed package

from benchmarks import resources
from benchmarks.resources import Kernel
from pom_ext.ops import _library
from tools.build import cuda as build_cuda
from tools.build.objects import compile_stale

TOOLKIT, REFUSED = build_cuda.find_toolkit()
ARCHITECTURES = tuple(_library.CUDA.split(";")) if _library.CUDA else ()
WITHOUT_KERNELS = (
    "the library was built without CUDA kernels: POM_EXT_CUDA=1 make test builds and tests them for all GPUs, "
    "TORCH_CUDA_ARCH_LIST=9.0 make test for one kind"
)
needs_kernels = pytest.mark.skipif(
    not (TOOLKIT and ARCHITECTURES), reason=WITHOUT_KERNELS if TOOLKIT else f"no CUDA toolkit ({'; '.join(REFUSED)})"
)


@pytest.mark.skipif(os.environ.get("POM_EXT_CUDA") != "1", reason="CUDA kernels are not demanded by POM_EXT_CUDA=1")
def test_the_library_holds_what_was_asked_for():
    """So that where the kernels are demanded, as for every change, none of these tests is left out."""
    assert ";".join(build_cuda.choose().names) == _library.CUDA, "build again with the same settings"
    assert ARCHITECTURES and TOOLKIT


@pytest.fixture(scope="module")
def kernels():
    before = os.getcwd()
    os.chdir(ROOT)  # as setup.py, so that what it compiled is not compiled again
    try:
        compile_stale(build_cuda.jobs(TOOLKIT, ARCHITECTURES, resources.BUILD.relative_to(ROOT)))
    finally:
        os.chdir(before)
    return resources.read_build()


@needs_kernels
def test_every_kernel_is_in_the_report_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    found = {(kernel.name, kernel.arch) for kernel in kernels}
    assert found == {(name, arch.removesuffix("+PTX")) for name in names for arch in ARCHITECTURES}
    stems = {name.split("<")[0] for name in names}
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    assert len(stems) == sources.count("__global__")
    assert all(kernel.registers and kernel.threads for kernel in kernels)


@needs_kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hot_kernels_keep_to_the_registers(arch, kernels):
    """Only the instances for any degree, which index an array of powers at run time, may use a stack."""
    hot = [kernel for kernel in kernels if kernel.arch == arch.removesuffix("+PTX") and not kernel.is_general]
    assert sum(kernel.vector_bits > 0 for kernel in hot) >= 100
    spilled = [kernel for kernel in hot if kernel.spills]
    assert not spilled, "\n".join(["these spill or use a stack:", *resources.table(spilled)])


@needs_kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vectorised_kernels_load_whole_vectors(arch, kernels):
    """A vector is one access, and there are several: of 16 bytes, or in half precision of 8, for addresses that are
    multiples of no more, and where pairs of channels turn or there are tangents."""
    vectorised = [kernel for kernel in kernels if kernel.arch == arch.removesuffix("+PTX") and not kernel.is_general]
    vectorised = [kernel for kernel in vectorised if kernel.vector_bits]
    assert {kernel.vector_bits for kernel in vectorised} == {64, 128}
    names = {kernel.name for kernel in vectorised}
    assert {kernel.name for kernel in vectorised if kernel.vector_bits == 64} == {
        name for name in names if "f16, 4, " in name
    }
    for eight in (name for name in names if "f16, 8, " in name):
        assert eight.endswith("f16, 8, false>") and eight.replace("f16, 8, ", "f16, 4, ") in names
    for four in (name for name in names if "f16, 4, " in name):
        assert re.search(r"f16, 4, true|Along<", four) or four.replace("f16, 4, ", "f16, 8, ") in names
    narrow = [kernel for kernel in vectorised if kernel.loads.get(kernel.vector_bits, 0) < 2]
    assert not narrow, "\n".join(["these load less at once:", *resources.table(narrow)])


@needs_kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_are_in_flight_together(arch, kernels):
    """A warp that multiplies what it loads has many loads on their way before the first product waits for one."""
    number = arch.removesuffix("+PTX")
    products = [kernel for kernel in kernels if kernel.arch == number and kernel.ahead is not None]
    assert len(products) == (16 if float(number) >= 8 else 0), "one for each gate, type and sixteen of heads"
    few = [f"{kernel.name}: {kernel.ahead}" for kernel in products if kernel.ahead < 16]
    assert not few, f"these have fewer than 16 loads ahead of their first product: {few}"


LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
ptxas info    : Function properties for _Z5firstv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _Z6calledv
    32 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 1.204 ms
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_100a'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_the_compilers_report_is_read():
    kernels = resources.parse_log(LOG)
    assert list(kernels) == [("_Z5firstv", "8.0"), ("_Z6secondv", "10.0")]
    first, second = kernels.values()
    assert (first.registers, first.stack, first.spill_stores, first.spill_loads, first.shared) == (40, 48, 8, 16, 1024)
    assert first.spills and not second.spills and second.registers == 12


def test_ptx_is_read():
    text = """
.version 9.0
.target sm_90a
.visible .entry _Z1av(
	.param .u64 _Z1av_param_0
)
.maxntid 256, 1, 1
.minnctapersm 2
{
	ld.param.u64 	%rd1, [_Z1av_param_0];
	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd1];
	ld.global.nc.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	ld.global.v2.b64 	{%rd2, %rd3}, [%rd1];
	ld.global.L1::no_allocate.u16 	%rs1, [%rd1];
	st.global.v4.f32 	[%rd1], {%f1, %f2, %f3, %f4};
	ld.shared.v4.f32 	{%f1, %f2, %f3, %f4}, [%r7];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6};
	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd1];
}
.entry _Z1bv()
{
	ret;
}
"""
    assert resources.parse_ptx(text) == ("9.0", {"_Z1av": (256, {128: 4, 16: 1}, 2), "_Z1bv": (0, {}, None)})


def test_machine_code_is_read():
    text = """
	code for sm_90
		Function : _Z1av
        /*3330*/               @P4 LDG.E.128 R24, desc[UR26][R50.64] ;
        /*3340*/                   LDG.E.128.CONSTANT R24, [R50.64+0x10] ;
        /*3350*/                   LDG.E R24, desc[UR26][R50.64] ;
        /*3360*/                   LDG.E.U16 R24, desc[UR26][R50.64] ;
        /*3370*/                   STG.E.128 desc[UR26][R50.64], R24 ;
        /*3380*/                   LDL.128 R24, [R1] ;
        /*3390*/                   HMMA.16816.F32.BF16 R4, R8, R20, R4 ;
        /*33a0*/                   LDG.E.128 R24, desc[UR26][R50.64] ;
	code for sm_80
		Function : _Z1av
        /*0000*/                   LDG.E.64 R24, [R50.64] ;
"""
    assert resources.parse_sass(text) == {("_Z1av", "9.0"): {128: 3, 32: 1, 16: 1}, ("_Z1av", "8.0"): {64: 1}}
    assert resources.parse_sass_ahead(text) == {("_Z1av", "9.0"): 2}


def test_names_are_short():
    mangled = "_ZN3pom4cuda44_GLOBAL__N__5272068c_7_rows_cu_23d1b3cd_417315join_coeff_rowsIdEEvPKT_lllPS3_"
    instance = (
        "_ZN3pom4cuda40_GLOBAL__N__f0225677_8_state_cu_8e1425d06slopesINS0_8InstanceINS_5PowerILi4EEENS_3f16ELi8ELb0EEEEE"
        "vNS1_8BackwardINT_3AccEEE"
    )
    names = resources.demangled([mangled, instance])
    assert names == {mangled: "join_coeff_rows<double>", instance: "slopes<Power<4>, f16, 8, false>"}


def test_an_instance_is_known_by_its_name():
    general, vector, other = (
        Kernel(f"slopes<{arguments}>", "9.0")
        for arguments in ("Power<0>, bf16, 1, false", "Power<3>, bf16, 8, false", "double")
    )
    assert general.is_general and not vector.is_general and not other.is_general
    assert (general.vector_bits, vector.vector_bits, other.vector_bits) == (16, 128, 0)


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [(32, 256, 0, 8), (128, 256, 0, 2), (129, 256, 0, 1), (72, 256, 0, 3), (16, 32, 0, 32), (32, 256, 100 * 1024, 2)],
)
def test_occupancy(registers, threads, shared, blocks):
    """By threads, by registers, by registers in whole lumps, by warps that do not fill, by blocks, by shared memory."""
    kernel = Kernel("a", "9.0", registers=registers, threads=threads, shared=shared)
    assert kernel.blocks() == blocks
    row = kernel.row()
    assert row["occupancy"] == blocks * threads / 2048
    most = row["shared_room"]
    assert blocks * (shared + most + 1024) <= 228 * 1024 < (blocks + 1) * (shared + most + 1024)
    assert Kernel("a", "8.9", registers=32, threads=256).blocks() is None


def test_the_tool_prints_and_writes(tmp_path, capsys):
    (tmp_path / "a.log").write_text(LOG)
    with pytest.raises(SystemExit):
        resources.main(["--build", str(tmp_path / "none")])
    assert "build the library with nvcc" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resources.main(["--build", str(tmp_path), "--arch", "7.5"])
    assert "['10.0', '8.0'], got ['7.5']" in capsys.readouterr().err
    assert resources.main(["--build", str(tmp_path), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "first()" not in printed and "first " in printed and "second" not in printed, "10.0 was not asked for"
    assert '"spill_stores": 8' in (tmp_path / "a.json").read_text()
