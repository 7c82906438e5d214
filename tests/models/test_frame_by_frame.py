"""Frame after frame equals the whole clip, and so does a clip among clean frames (teacher forcing)."""

import pytest
import torch
from video_cases import (
    CHUNKINGS,
    CONDITION,
    CONDITIONS,
    CONV,
    FRAMES,
    HYBRID,
    MIXER,
    SMALL,
    ZEROS,
    cut,
    inputs,
    small,
    stream,
    tensors,
)

from pom_ext.models import VideoDiT

# Frame after frame


@MIXER
@CONV
@CONDITION
@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per-frame"])
@torch.no_grad()
def test_any_chunks_equal_the_whole_clip(mixer, local_conv, condition, per_frame):
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS[condition])
    given = inputs(model, per_frame=per_frame)
    whole = model(**given, frame_causal=True)
    pasts = []
    for chunks in CHUNKINGS:
        out, past = stream(model, given, chunks)
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
        pasts.append(past)
    for past in pasts:
        assert (past.frames, past.height, past.width) == (FRAMES, 2, 3)
        torch.testing.assert_close(list(tensors(past)), list(tensors(pasts[0])), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions, mixer", [("space", "product"), ("rotary", "power"), ("rotary", HYBRID)])
@torch.no_grad()
def test_positions_without_end(positions, mixer):
    """Longer than `length`, and still the same in any chunks."""
    model = small(mixer=mixer, positions=positions, length=4, dim=24, n_heads=6)
    given = inputs(model)
    whole = model(**given, frame_causal=True)
    for chunks in CHUNKINGS:
        torch.testing.assert_close(stream(model, given, chunks)[0], whole, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(**given), whole)


@MIXER
@CONV
@torch.no_grad()
def test_frame_causal_never_sees_later_frames(mixer, local_conv):
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS["text"])
    given = inputs(model, per_frame=True)
    changed = dict(given, video=given["video"].clone(), time=given["time"].clone())
    changed["video"][:, :, 6:] = 100 * torch.randn_like(changed["video"][:, :, 6:])
    changed["time"][:, 3:] = 7
    before, after = (model(**g, frame_causal=True) for g in (given, changed))
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert (before[:, :, 6:] != after[:, :, 6:]).all()
    assert (model(**given)[:, :, :6] != model(**changed)[:, :, :6]).all()  # joint


@MIXER
@torch.no_grad()
def test_every_frame_sees_the_first(mixer):
    model = small(mixer=mixer, local_conv=False)
    given = inputs(model)
    changed = dict(given, video=given["video"].clone())
    changed["video"][:, :, 0] += 1
    for causal in (True, False):
        before, after = (model(**g, frame_causal=causal) for g in (given, changed))
        assert (before[:, :, -1] != after[:, :, -1]).all()


@MIXER
def test_gradients_of_a_stream_are_those_of_the_whole_clip(mixer):
    model = small(mixer=mixer, **CONDITIONS["text"])
    given = inputs(model)
    gradients = []
    for run in (lambda: model(**given, frame_causal=True), lambda: stream(model, given, (2, 1, 3))[0]):
        for tensor in (given["video"].requires_grad_(), given["text"].requires_grad_(), *model.parameters()):
            tensor.grad = None
        run().square().sum().backward()
        gradients.append([t.grad for t in (given["video"], given["text"], *model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_the_stream_ends_where_its_positions_do_and_goes_on_after_an_error():
    model = small()
    given = inputs(model)
    expected = model(**given, frame_causal=True)
    _, past = stream(model, given, (5,))
    with pytest.raises(ValueError, match="end at length=12, 6 frames of tokens, got frames 5 to 6"):
        model(**cut(model, given, 4, 6), frame_causal=True, past=past)
    out, _ = stream(model, given, (1,), past, first=5)
    torch.testing.assert_close(out, expected[:, :, 10:], rtol=1e-10, atol=1e-10)


# All frames at once among finished ones (teacher forcing)


@MIXER
@CONV
@CONDITION
@pytest.mark.parametrize("marks", ["shared", "per-frame"])
@pytest.mark.parametrize("finished_time", [None, "shared", "per-frame"])
def test_among_finished_frames_all_at_once_equals_one_by_one(mixer, local_conv, condition, marks, finished_time):
    """Outputs, the past, and the gradients of the summed loss: what training in parallel rests on."""
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS[condition])
    given = inputs(model, per_frame=marks == "per-frame")
    finished = torch.randn_like(given["video"])
    times = {
        None: torch.zeros(3),
        "shared": torch.tensor([0.0, 300, 7]),
        "per-frame": 50 * torch.arange(18.0).view(3, 6),
    }
    clean = given | {"video": finished, "time": times[finished_time].double()}
    past, outs = None, []
    for frame in range(FRAMES):
        outs.append(model(**cut(model, given, frame, frame + 1), frame_causal=True, past=past))
        _, past = model(**cut(model, clean, frame, frame + 1), frame_causal=True, past=past, return_past=True)
    expected = torch.cat(outs, dim=2)
    options = {} if finished_time is None else {"finished_time": clean["time"]}
    out, after = model(**given, frame_causal=True, finished=finished, return_past=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(list(tensors(after)), list(tensors(past)), rtol=1e-10, atol=1e-10)
    one_by_one, at_once = (
        torch.autograd.grad((result - 1).square().sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        for result in (expected, out)
    )
    for name, a, b in zip(dict(model.named_parameters()), one_by_one, at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@MIXER
@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_finished_frames_come_in_chunks_too(mixer, window):
    model = small(mixer=mixer, positions="space")
    given = inputs(model)
    finished, past = torch.randn_like(given["video"]), model.start(3, window=window)
    whole = model(**given, frame_causal=True, finished=finished, past=past)
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        part = cut(model, given, first, last)
        held = {"finished": finished[:, :, 2 * first : 2 * last], "past": past}
        out, past = model(**part, frame_causal=True, return_past=True, **held)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-10)


@MIXER
@torch.no_grad()
def test_a_noisy_frame_changes_no_other(mixer):
    model = small(mixer=mixer)
    given, finished = inputs(model), torch.randn(3, 3, 2 * FRAMES, 4, 6, dtype=torch.float64)
    changed = given["video"].clone()
    changed[:, :, 4:6] += 1
    before, after = (
        model(**(given | {"video": video}), frame_causal=True, finished=finished) for video in (given["video"], changed)
    )
    same = torch.ones(2 * FRAMES, dtype=torch.bool)
    same[4:6] = False
    torch.testing.assert_close(after[:, :, same], before[:, :, same], rtol=1e-12, atol=1e-12)
    assert (after[:, :, 4:6] != before[:, :, 4:6]).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"finished": ZEROS["video"]}, "frame_causal: expected True with finished frames"),
        (
            {"finished": ZEROS["video"][:, :, :2], "frame_causal": True},
            r"finished: expected \(2, 3, 4, 4, 6\) .* as the video, got \(2, 3, 2, 4, 6\)",
        ),
        ({"finished": ZEROS["video"].double(), "frame_causal": True}, "finished: expected .*float32.* got .*float64"),
        ({"finished_time": torch.zeros(2)}, "finished_time: expected None where no finished frames are given"),
        (
            {"finished": ZEROS["video"], "finished_time": torch.zeros(3), "frame_causal": True},
            r"finished_time: expected shape \(2,\), one per video, or \(2, 2\), one per frame .* got \(3,\)",
        ),
        ({"finished": ZEROS["video"].to("meta"), "frame_causal": True}, "finished: expected on cpu .* got meta"),
    ],
)
def test_finished_frames_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        VideoDiT(**SMALL)(**ZEROS, **options)
