"""The guides and pages for contributors: their Python runs as it stands, and the paths that they name are there."""

import re
from pathlib import Path

import pytest
from test_readme import run_blocks  # noqa: F401 -- a fixture

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "docs" / "design.md", *GUIDES]
FOLDERS = ("benchmarks", "cmake", "csrc", "docs", "examples", "pom_ext", "tests", "tools")
LEFT_OUT = ("NAME", "X.py", "*")  # placeholders


def named_paths(page):
    """Words in backquotes that begin with a folder of the repository, such as `tests/cases.py`."""
    for word in re.findall(r"`([\w./*-]+)`", page.read_text(encoding="utf-8")):
        if word.split("/")[0] in FOLDERS and "/" in word and not any(part in word for part in LEFT_OUT):
            yield word


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if page.stem != "add-an-objective"], ids=lambda page: page.stem
)
def test_a_guide_runs(page, run_blocks):  # noqa: F811
    """test_readme.py runs the page on objectives, and looks at what it trains."""
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page):
    missing = [path for path in named_paths(page) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_licence_is_named_everywhere_alike():
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for file in ("LICENSE", "NOTICE"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert "Apache License" in text and "The pom_ext authors" in text
