"""The Python of the README and the docs runs as it stands, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_blocks(page):
    """The names that the Python blocks of a page define, run one after the other."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    return namespace


def test_the_readme_runs():
    names = run_blocks(ROOT / "README.md")
    assert names["y"].shape == names["x"].shape and names["noise"].shape == names["images"].shape
    assert names["frame"].shape == names["other"].shape and names["stream"].frame == 1


def test_the_page_on_streaming_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "docs" / "streaming.md")
    assert names["stream"].frame == 2 and [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
