"""Every benchmark case at a small size: its own check passes, its contenders run, and the JSON file says it all."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cases, run  # noqa: E402
from benchmarks.layers import LayerCase  # noqa: E402
from benchmarks.measure import CheckFailed  # noqa: E402
from benchmarks.ops import MemoryCase, OpCase  # noqa: E402
from benchmarks.timing import HostClock, Settings  # noqa: E402

FEW = Settings(seconds=0.0, least_rounds=2, most_rounds=2)


def small(case):
    """The same case on few tokens, without the baseline that takes seconds to compile."""
    if isinstance(case, MemoryCase):
        return case
    against = tuple(name for name in case.against if name != "compiled")
    width = {"width": 48} if isinstance(case, OpCase) else {"dim": 64}
    return dataclasses.replace(case, tokens=40, against=against, targets=(), **width)


SMALL = {small(case).name: small(case) for case in cases.CASES.values() if not isinstance(case, MemoryCase)}


@pytest.fixture(scope="module")
def clock():
    return HostClock()


@pytest.mark.parametrize("name", SMALL)
def test_every_case_runs_and_is_right(name, clock):
    case = SMALL[name]
    result = run.report(case, case.measure(clock, FEW))
    assert not result["failed"]
    assert set(result["contenders"]) == {"pom_ext", *case.against}
    assert set(result["ratios"]) == set(case.against)
    assert all(row["median_ms"] > 0 and row["rounds"] == 2 for row in result["contenders"].values())
    assert json.loads(json.dumps(result)) == result
    assert run.table(case.name, result)


def test_a_wrong_result_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(OpCase, "ours", lambda self, u, coeff=None: 1.01 * self.plain(u, coeff))
    with pytest.raises(CheckFailed, match="state-power3"):
        OpCase("state", "power", 3, tokens=40, width=48).measure(clock, FEW)


def test_targets_of_the_registry_name_measured_baselines():
    for case in cases.CASES.values():
        names = {"state", "u"} if isinstance(case, MemoryCase) else set(case.against)
        assert {target.of for target in case.targets} <= names, case.name
    assert sum(len(case.targets) for case in cases.CASES.values()) >= 15


def test_command_line_writes_a_file(tmp_path, monkeypatch, capsys):
    case = dataclasses.replace(small(LayerCase("power", 3, 40)), against=("attention",))
    monkeypatch.setattr(run, "CASES", {"tiny": case})
    threads = torch.get_num_threads()
    assert run.main(["--case", "tiny", "--json", str(tmp_path / "results.json")]) == 0
    assert torch.get_num_threads() == threads
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"machine", "settings", "cases", "wrong"}
    assert content["machine"]["torch"] == torch.__version__
    assert [case["name"] for case in content["cases"]] == [case.name]
    assert case.name in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing"):
        run.main(["--case", "nothing"])
