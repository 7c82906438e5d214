"""The Python of the README and the docs runs as it stands, and what they link to is there."""

import re
import runpy
from pathlib import Path
from unittest.mock import patch

import pytest

from pom_ext.diffusion import OBJECTIVES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def run_blocks(tmp_path, monkeypatch):
    """A function of a page: the names that its Python blocks define, run one after the other in an empty folder."""

    def run(page):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        program = tmp_path / "program.py"
        program.write_text("\n".join(blocks), encoding="utf-8")
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path / "folder")
        return runpy.run_path(str(program))

    return run


def test_the_readme_runs(run_blocks):
    names = run_blocks(ROOT / "README.md")
    assert names["y"].shape == names["x"].shape and names["noise"].shape == names["images"].shape
    assert names["frame"].shape == names["other"].shape and names["stream"].frame == 1


def test_the_page_on_streaming_runs(run_blocks):
    names = run_blocks(ROOT / "docs" / "streaming.md")
    assert names["stream"].frame == 2 and [path.name for path in Path().iterdir()] == ["stream.safetensors"]


def test_the_page_on_the_engine_runs(run_blocks):
    run_blocks(ROOT / "docs" / "engine.md")
    assert [path.name for path in Path().iterdir()] == ["stream.pom"]


def test_the_page_on_objectives_runs(run_blocks):
    with patch.dict(OBJECTIVES):  # what the page registers is for this test alone
        names = run_blocks(ROOT / "docs" / "how-to" / "add-an-objective.md")
    losses, images = names["result"].losses, names["images"]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    above, below = (images[:, :, part].mean((1, 2, 3)) for part in (slice(4), slice(4, None)))
    assert above[0] > below[0] and above[1] < below[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
