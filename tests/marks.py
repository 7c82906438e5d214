"""Marks a test by what it needs: `build`, `browser`, `gpu`; and as `slow` those that take most of the time."""

import pytest

PLACES = {
    "build": ("tests/build/", "tests/export/"),
    "browser": ("tests/play/test_play_browser.py",),
    "gpu": ("tests/ops/test_cuda_graphs.py",),
    "slow": (  # most of the time of the tests that compile nothing
        "tests/benchmarks/",
        "tests/cli/test_cli.py::test_demo_writes_all_its_files",
        "tests/cli/test_cli.py::test_images_in_one_step",
        "tests/cli/test_cli_video.py",
        "tests/data/test_video_data.py",
        "tests/demo/test_measures.py",
        "tests/diffusion/test_meanflow_video.py::test_the_loss_frame_by_frame",
        "tests/layers/test_projected.py::test_derivatives",
        "tests/layers/test_projected.py::test_transforms_of_a_direction",
        "tests/layers/test_split_read.py::test_along",
        "tests/layers/test_split_read.py::test_compiled_whole",
        "tests/layers/test_split_read.py::test_gradcheck",
        "tests/layers/test_split_read.py::test_half_precision",
        "tests/models/test_frame_by_frame.py",
        "tests/models/test_video_memory.py::test_compiled_whole",
        "tests/ops/test_autocast.py::test_models_train",
        "tests/ops/test_compile.py",
        "tests/ops/test_derivatives.py",
        "tests/ops/test_determinism.py::test_memory_does_not_grow_with_the_tokens",
        "tests/ops/test_dispatch.py::test_decisions_are_logged",
        "tests/ops/test_fuzz.py",
        "tests/ops/test_instruction_sets.py",
        "tests/ops/test_layouts.py",
        "tests/ops/test_mix.py::test_gradcheck",
        "tests/ops/test_odd.py",
        "tests/ops/test_state_object.py::test_100_000_merges_stay_accurate",
        "tests/ops/test_torch.py::test_calls_leave_nothing_behind",
        "tests/ops/test_torch.py::test_opcheck",
        "tests/streaming/test_streaming.py::test_100_000_frames",
        "tests/streaming/test_streaming.py::test_a_long_stream",
        "tests/streaming/test_streaming.py::test_clean_context_draws",
        "tests/streaming/test_streaming.py::test_shared_noise_frame_after_frame",
        "tests/test_forward_mode.py::test_compiled",
        "tests/training/test_distillation.py::test_a_student_draws",
        "tests/training/test_distillation.py::test_the_loss_frame_by_frame",
    ),
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
