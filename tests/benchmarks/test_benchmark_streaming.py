"""The benchmark of streams: what is compared computes the same, and what is reported follows from what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pom_ext.models.video_blocks import FrameAttention
from pom_ext.streaming import VideoStream

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks import streaming

TINY = {"in_channels": 1, "size": (8, 8), "patch": (1, 4, 4), "dim": 16, "n_layers": 2, "n_heads": 2}


def test_the_cache_that_grows_in_place_is_attention():
    fast = streaming.stream_of(TINY, streaming.ATTENTION, steps=2)
    slow = VideoStream(streaming.stream_of(TINY, streaming.ATTENTION, steps=2).model, [0], steps=2)
    for block in slow.model.blocks:
        block.mixer.__class__ = FrameAttention
    for stream in (fast, slow):
        torch.manual_seed(1)
        streaming.watch(stream, 5, chunk=2)
    for _ in range(3):
        kept = fast.fork()
        first = fast.next()
        fast.rewind(kept)  # what was written behind the cache is written over
        assert torch.equal(fast.next(), first) and torch.equal(first, slow.next())
    held = fast.pasts[0].memories[0].keys
    assert held._base is not None and held._base.shape[1] > held.shape[1] == 8 * 4
    assert fast.nbytes == slow.nbytes


def rows(power, attention):
    return [{"frame": 10 * i, "ms": {"power": a, "attention": b}} for i, (a, b) in enumerate(zip(power, attention))]


@pytest.mark.parametrize(
    "power, attention, expected",
    [
        ([2, 2, 2], [1, 3, 4], 10),
        ([2, 2, 2], [3, 1, 4], 20),
        ([2, 2, 2], [3, 3, 3], 0),
        ([2, 2, 2], [1, 1, 1], None),
        ([2, 2, 2], [1, 2, 3], 20),
    ],
)
def test_break_even_is_where_it_stays_faster(power, attention, expected):
    assert streaming.break_even(rows(power, attention), "power") == expected


def test_a_run_reports_every_length(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(streaming, "MODELS", {"tiny": (TINY, 8)})
    monkeypatch.setattr(streaming, "LENGTHS", (0, 3, 8, 9))
    monkeypatch.setattr(streaming, "NEAR", 3)
    monkeypatch.setattr(streaming, "FAR", 8)
    file = tmp_path / "streams.json"
    assert streaming.main(["--rounds", "2", "--steps", "1", "--model", "tiny", "--json", str(file)]) == 0
    (model,) = json.loads(file.read_text())["models"]
    assert [row["frame"] for row in model["lengths"]] == [0, 3, 8]
    for mixer in streaming.MIXERS:
        sizes = [row["bytes"][mixer] for row in model["lengths"]]
        assert (sizes[0] == sizes[1] == sizes[2]) == (mixer != "attention")
        assert all(row["ms"][mixer] > 0 for row in model["lengths"]) and model["far_over_near"][mixer] > 0
    assert set(model["break_even"]) == {"power", "product"}
    assert "frame 8 takes" in capsys.readouterr().out


def test_a_missing_folder_is_said_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        streaming.main(["--json", "nowhere/streams.json"])
    assert "there is no folder nowhere" in capsys.readouterr().err
