"""How many kernels a call launches on a GPU and how many bytes they move, counted by the stand-in for CUDA.

Bytes are those of calls with 64 MiB of tokens in bfloat16, beside the fewest that such a call can do with: every input
read once, every output written once.
"""

import json
import re
import subprocess
import sys

import counted_calls
import pytest
import torch
from cpp_programs import CPP, ROOT, call, compile_all, link_and_run

from benchmarks import launches
from tools import stand_in


def test_the_counts_themselves(tmp_path):
    """In kernels that move a known number of bytes."""
    plain = ["-std=c++17", "-O2", "-Wall", "-Wextra"]
    jobs = {name: (CPP / f"{name}.cpp", plain) for name in ("count_on_cpu", "cuda_on_cpu")}
    jobs |= {name: (CPP / "test_count_on_cpu.cpp", [*plain, name, *stand_in.COUNTED]) for name in ("-O1", "-O2")}
    objects = compile_all(tmp_path, jobs)
    for name in ("-O1", "-O2"):
        link_and_run(objects[name], objects["count_on_cpu"], objects["cuda_on_cpu"], flags=["-pthread"])


@pytest.fixture(scope="module")
def rows():
    """{name: row} of all calls of counted_calls.py."""
    command = [sys.executable, ROOT / "tests/counted_calls.py"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(calls):
    return [name for name, _ in calls(lambda *arguments, **options: None)]


# A block of the causal mix uses few bytes of each sector of such gates. Backwards, where the bound would be 1.25, it
# also reads u twice, a third of all.
BY_HEADS = {"causal_mix forward power by heads": 1.25, "causal_mix backward power by heads": 1.75}


@pytest.mark.parametrize("name", names(counted_calls.long_calls))
def test_bytes(name, rows):
    bound = BY_HEADS.get(name, 1.25 if "backward" in name else 1.10)
    row = rows[name]
    # Every tensor is touched: less than the fewest bytes would be an error of the counts.
    assert 1 <= row["ratio"] <= bound, launches.line(name, row)


def most_launches(name):
    op, passes, form = name.split()[:3]
    if (op, passes) == ("state", "backward"):
        return 1 if form == "product" else 2  # the gradients of the coefficients are summed up
    return 2 if op == "block" else 1  # a product of matrices, and the state of what it gives


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in names(counted_calls.long_calls) if name.startswith("state")),
        *names(counted_calls.short_calls),
        *("block forward power", "block forward product"),
    ],
)
def test_launches(name, rows):
    row = rows[name]
    assert 1 <= row["launches"] <= most_launches(name), launches.line(name, row)


@pytest.mark.parametrize("name", names(counted_calls.vector_calls))
def test_elements_at_a_time(name, rows):
    instances = [re.search(r"\bbf16, (\d), false>$", kernel["kernel"]) for kernel in rows[name]["kernels"]]
    wanted = {"E16": "8", "E12": "4", "E10": "1"}[name.split()[-1]]
    assert {instance[1] for instance in instances if instance} == {wanted}, rows[name]["kernels"]


@pytest.mark.parametrize("form", ("power", "product"))
def test_adding_to_a_state_costs_no_launch(form, rows):
    alone, added = (rows[f"adding {how} {form}"] for how in ("alone", "with a prior"))
    assert added["launches"] == alone["launches"] >= 1, launches.line("with a prior", added)


def test_operators_of_torch_that_run_on_a_device():
    aten = torch.ops.aten
    for operator in (aten.add.Tensor, aten.add_.Tensor, aten.cat.default, aten.zeros.default, aten.copy_.default):
        assert launches.has_kernel(operator), operator
    for operator in (aten.view.default, aten.transpose.int, aten.slice.Tensor, aten.empty_like.default):
        assert not launches.has_kernel(operator), operator
    with launches.Operators() as operators:
        product = torch.ones(2, 3).to(torch.bfloat16).view(3, 2) @ torch.empty(2, 5, dtype=torch.bfloat16)
    assert product.shape == (3, 5) and product.dtype == torch.bfloat16 and not product.any()
    assert operators.found == ["aten::ones", "aten::_to_copy", "aten::mm"]


def test_the_command(tmp_path):
    command = (sys.executable, "-m", "benchmarks.resources", "--launches", "--json", tmp_path / "counts.json")
    call(*command, "--case", "mix-product2-N256-*-bfloat16", "project_state-*[23]-N256-*", cwd=ROOT)
    found = json.loads((tmp_path / "counts.json").read_text())
    assert "sectors of 32 bytes" in found["model"]
    mix, *projected = found["cases"].values()
    assert [kernel["kernel"] for kernel in mix["kernels"]] == ["mix_slab<Product<2, GeluOf<true>>, bf16, 8, false>"]
    assert mix["bytes"] == mix["bytes_loaded"] + mix["bytes_stored"] and mix["operators"] == {}
    assert len(projected) == 2 and all(row["operators"]["pom_ext::linear"] == 1 for row in projected)
    done = subprocess.run([*command, "--case", "none"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "--case: no case matches none" in done.stderr


def test_a_library_is_loaded_before_the_package():
    with pytest.raises(RuntimeError, match="load this one before it"):
        stand_in.load("other/_C.abi3.so")
