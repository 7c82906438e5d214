"""MeanFlow on videos: every frame alone, behind the cache of the finished frames, has the loss of the parallel pass."""

import pytest
import torch
from stream_cases import draw
from video_cases import CONDITION, CONDITIONS, FRAMES, HYBRID, inputs, small

from pom_ext._random import seeded_generator
from pom_ext.diffusion import FlowMatching, MeanFlow
from pom_ext.diffusion.losses import draw_frames, video_loss
from pom_ext.diffusion.meanflow import WEIGHT_FLOOR, meanflow_video_loss
from pom_ext.layers.embeddings import MAX_TIME
from pom_ext.models import VideoDiT
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN

MEMORIES = {
    "product": {"mixer": "product"},
    "power": {"mixer": "power", "local_conv": "frame"},
    "attention": {"mixer": "attention", "local_conv": None},
    "layers": {"mixer": HYBRID, "local_conv": 1},
    "split": {"mixer": "power", "read": "split", "fade": "head", "sink": 2},
    "gated": {"mixer": "product", "read": "split", "fade": "gated"},
    "inside": {"mixer": "attention+power", "read": "split", "fade": "head", "sink": 1},
    "blocks": {"mixer": "power", "size": (4, 8), "read": "split", "space_groups": 2},
    "rotary": {"mixer": "power", "positions": "rotary", "n_heads": 1},
}
MEMORY = pytest.mark.parametrize("memory", MEMORIES)
CASES = [  # guidance, context, context noise, given frames
    (1.0, "clean", 0.0, 0),
    (2.5, "clean", 0.0, 2),
    (2.5, "self", 0.7, 0),
]


def clip(size=(4, 6)):
    return torch.randn(3, 3, 2 * FRAMES, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def one_frame(tensor, frame):
    """The part of a frame of tokens in (B, C, T, H, W), (B, T') or (B,)."""
    if tensor.dim() == 5:
        return tensor[:, :, 2 * frame : 2 * frame + 2]
    return tensor[:, frame] if tensor.dim() == 2 else tensor


@MEMORY
@pytest.mark.parametrize("guidance, context, context_noise, given", CASES)
def test_the_loss_frame_by_frame_by_finite_differences(memory, guidance, context, context_noise, given):
    """Value and gradient. Only the frame itself moves along its path; the cache of finished frames stands still."""
    model, objective = small(two_times=True, n_classes=4, **MEMORIES[memory]), MeanFlow(1.5, guidance)
    video, labels = clip(model.size), torch.tensor([1, 4, 2])
    options = {"context": context, "context_noise": context_noise, "given": given}
    drawn = draw_frames(model, objective, objective.draw_times, video, labels, seeded_generator(1), **options)
    (times, spans), finished = drawn.times, drawn.arguments["finished"]
    finished_time = drawn.arguments.get("finished_time", torch.zeros(3, dtype=torch.float64))
    assert (spans[:, given:] > 0).any() and (spans[:, given:] == 0).any()

    def run(x, time, labels, span, past, **more):
        return model(x, time, None, labels, span, frame_causal=True, past=past, **more)

    past, free_past, errors, step = None, None, [], 1e-5
    no_class = torch.full_like(labels, 4)
    for frame in range(FRAMES):
        x, noise, clean, before = (one_frame(t, frame) for t in (drawn.noisy, drawn.noise, video, finished))
        time, span, velocity = times[:, frame], spans[:, frame], noise - clean
        with torch.no_grad():
            free = run(x, time, no_class, None, free_past)
            guided = guidance * velocity + (1 - guidance) * free
            velocity = torch.where((labels == 4).view(-1, 1, 1, 1, 1), velocity, guided)
            ahead, behind = (
                run(x + s * velocity, time + s * MAX_TIME, labels, span + s * MAX_TIME, past) for s in (step, -step)
            )
            target = velocity - (span / MAX_TIME).view(-1, 1, 1, 1, 1) * (ahead - behind) / (2 * step)
        if frame >= given:
            errors.append((run(x, time, labels, span, past) - target).square().mean((1, 2, 3, 4)))
        _, past = run(before, one_frame(finished_time, frame), labels, None, past, return_past=True)
        _, free_past = run(before, one_frame(finished_time, frame), no_class, None, free_past, return_past=True)
    error = torch.cat(errors)
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    expected = (weight * error).sum() / weight.sum()
    loss = meanflow_video_loss(model, objective, video, labels, seeded_generator(1), **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    grads, expected = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    zeros = [torch.zeros_like(p) for p in parameters]
    grads, expected = ([z if g is None else g for g, z in zip(gs, zeros, strict=True)] for gs in (grads, expected))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-7)


@CONDITION
def test_drawing_in_one_step_equals_the_parallel_pass(condition):
    """All frames of a stream again in one call, from their noise, behind the finished ones."""
    model = small(two_times=True, read="split", fade="head", sink=1, **CONDITIONS[condition])
    given = {name: value for name, value in inputs(model, batch=2).items() if name not in ("video", "time")}
    stream = VideoStream(model, objective=MeanFlow(2.0), steps=1, batch=2, seed=3, **given)
    noise = stream._noise(FRAMES, DRAWN)
    video = draw(stream, FRAMES)
    whole = torch.full((2,), float(MAX_TIME), dtype=torch.float64)
    mean = model(noise, whole, span=whole, frame_causal=True, finished=video, **given)
    torch.testing.assert_close(noise - mean, video, rtol=1e-10, atol=1e-10)


def test_drawing_in_spans_visits_one_after_the_other():
    model, calls = small(two_times=True), []
    stream = VideoStream(model, objective=MeanFlow(2.0), steps=3)
    model.register_forward_pre_hook(lambda _, args, more: calls.append((args[1], more["span"])), with_kwargs=True)
    stream.next()
    *drawn, (time, span) = [(float(t), 0.0 if s is None else float(s)) for t, s in calls]
    assert (time, span) == (0, 0), "the finished frame enters the cache"
    assert [t for t, _ in drawn[1:]] == pytest.approx([t - s for t, s in drawn[:-1]])
    assert drawn[0][0] == MAX_TIME and drawn[-1][0] == pytest.approx(drawn[-1][1])


def test_a_saved_stream_continues(tmp_path):
    model = small(two_times=True, positions="space")
    stream = VideoStream(model, objective=MeanFlow(2.0), steps=1)
    stream.next()
    stream.save(tmp_path / "stream")
    assert torch.equal(VideoStream.load(tmp_path / "stream", model).next(), stream.next())


def test_training_begins_with_velocities():
    model, video, objective = small(two_times=True), clip(), MeanFlow(1.5)
    early = objective.loss(model, video, None, seeded_generator(0), progress=0.1, context_noise=0.5, given=1)
    expected = video_loss(model, FlowMatching(1.5), video, None, seeded_generator(0), context_noise=0.5, given=1)
    assert torch.equal(early, expected)
    late = objective.loss(model, video, None, seeded_generator(0), progress=0.5, context_noise=0.5, given=1)
    expected = meanflow_video_loss(model, objective, video, None, seeded_generator(0), context_noise=0.5, given=1)
    assert torch.equal(late, expected) and not torch.equal(late, early)


@torch.no_grad()
def test_a_new_model_of_two_times_does_not_see_the_span():
    torch.manual_seed(0)
    model = VideoDiT(3, (4, 6), 12, patch=(2, 2, 2), dim=16, n_layers=1, n_heads=2, two_times=True).double()
    torch.nn.init.normal_(model.patch_out.weight)
    given = inputs(model)
    assert torch.equal(model(**given, span=given["time"] / 2), model(**given))


@torch.no_grad()
def test_one_span_per_video_or_per_frame():
    model = small(two_times=True)
    given = inputs(model)
    span, time = given["time"] / 3, given["time"]
    each, times = (t[:, None].expand(-1, FRAMES) for t in (span, time))
    for part in ({"span": each}, {"span": each, "time": times}, {"span": span, "time": times}):
        torch.testing.assert_close(model(**given | part), model(**given, span=span), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(**given, span=span), model(**given))


def test_what_does_not_fit_is_named():
    model, generator = small(two_times=True), seeded_generator(0)
    given = inputs(model)
    with pytest.raises(ValueError, match="span: expected None, .*two_times=True"):
        small()(**given, span=given["time"])
    with pytest.raises(ValueError, match=r"span: expected shape \(3,\), one per video, or \(3, 6\)"):
        model(**given, span=given["time"][:2])
    with pytest.raises(ValueError, match="context: expected clean or self with MeanFlow, got 'shared'"):
        MeanFlow().loss(model, clip(), None, generator, context="shared")
    with pytest.raises(ValueError, match="context: expected clean with MeanFlow, got 'shared'"):
        VideoStream(model, objective=MeanFlow(), context="shared")
    with pytest.raises(ValueError, match="model: objective='meanflow' needs a model with two_times=True"):
        VideoStream(small(), objective=MeanFlow())
    with pytest.raises(ValueError, match="guidance: expected 1, for it is trained into a MeanFlow model"):
        VideoStream(small(two_times=True, n_classes=4), [0], objective=MeanFlow(), guidance=2.0)
    assert MeanFlow(1.0, 2.0).supports(model) == ["guidance: expected 1 for a model without classes, got 2.0"]
    assert MeanFlow(1.0, 2.0).supports(small(two_times=True, n_classes=4)) == []
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="time_frequency: expected a positive number or None"):
            small(time_frequency=wrong)
