"""Marks a test by what it needs: `build`, `browser`, `gpu`. The mark `slow` is in the test files themselves."""

import pytest

PLACES = {
    "build": ("tests/build/", "tests/export/"),
    "browser": ("tests/play/test_play_browser.py",),
    "gpu": ("tests/ops/test_cuda_graphs.py",),
}
FIXTURES = {"build": "cmake_library"}


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for mark, places in PLACES.items():
            if item.nodeid.startswith(places) or FIXTURES.get(mark) in item.fixturenames:
                item.add_marker(getattr(pytest.mark, mark))
        if parameters.get("device") == "cuda":
            item.add_marker(pytest.mark.gpu)
