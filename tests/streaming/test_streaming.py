"""Streams: frame after frame equals all at once, files and forks are exact, errors leave the stream as it was."""

import os
from inspect import signature
from pathlib import Path

import pytest
import torch
from stream_cases import CONTEXT, GUIDANCE, SOLVER, conditions, draw, same
from video_cases import CONDITION, CONDITIONS, MIXER, small

from pom_ext import State, polynomial_state, polynomial_update
from pom_ext.diffusion import FlowMatching, NoisePrediction
from pom_ext.sampling import sample_frames
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN, REMEMBERED


@MIXER
@CONDITION
@SOLVER
@GUIDANCE
def test_shared_noise_frame_after_frame_equals_all_at_once(mixer, condition, solver, guidance):
    if condition == "none":
        guidance = 1.0
    model = small(mixer=mixer, **CONDITIONS[condition])
    options = {"context": "shared", "steps": 3, "solver": solver, "guidance": guidance, "seed": 5, **conditions(model)}
    expected = VideoStream(model, **options).next(frames=4)
    for chunks in ((1, 1, 1, 1), (2, 2), (1, 3)):
        stream = VideoStream(model, **options)
        frames = [stream.next(frames=chunk) for chunk in chunks]
        assert [f.shape[2] for f in frames] == [2 * chunk for chunk in chunks] and stream.frame == 4
        torch.testing.assert_close(torch.cat(frames, dim=2), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_all_at_once_is_plain_denoising_of_the_clip():
    """Guidance, noise and solver spelled out, on the model as it is trained: all frames in one call, at one time."""
    model = small(n_classes=4)
    labels, guidance = torch.tensor([2, 0]), 1.7
    stream = VideoStream(model, labels, context="shared", steps=4, guidance=guidance, objective=FlowMatching(3.0))
    noise = stream._noise(5, DRAWN)

    def predict(x, time):
        time = torch.full((2,), time, dtype=torch.float64)
        wanted, free = (model(x, time, labels=y, frame_causal=True) for y in (labels, torch.tensor([4, 4])))
        return free + guidance * (wanted - free)

    expected = FlowMatching(3.0).denoise(predict, noise, 4)
    torch.testing.assert_close(stream.next(frames=5), expected, rtol=1e-10, atol=1e-10)


@MIXER
@CONDITION
@GUIDANCE
@torch.no_grad()
def test_clean_context_draws_each_frame_among_the_finished_ones(mixer, condition, guidance):
    """Every frame is what denoising it gives when the finished frames before it are shown again from the start."""
    if condition == "none":
        guidance = 1.0
    model = small(mixer=mixer, **CONDITIONS[condition])
    given = conditions(model)
    stream = VideoStream(model, steps=3, solver="heun", guidance=guidance, **given)
    noise, drawn = VideoStream(model, context="shared", batch=2)._noise(4, DRAWN), draw(stream, 4)
    del given["batch"]
    free = {name: torch.full_like(t, model.n_classes) for name, t in given.items() if name == "labels"}
    if model.text_dim:
        free |= {"text": given["text"], "text_weight": torch.zeros_like(given["text_weight"])}
    for frame in range(4):
        part = slice(2 * frame, 2 * frame + 2)

        def predict(x, time, part=part):
            video, time = noise[:, :, : part.stop].clone(), torch.full((2,), time, dtype=torch.float64)
            video[:, :, part] = x
            finished = drawn[:, :, : part.stop]
            wanted, empty = (
                model(video, time, **kind, frame_causal=True, finished=finished)[:, :, part] for kind in (given, free)
            )
            return empty + guidance * (wanted - empty)

        expected = FlowMatching().denoise(predict, noise[:, :, part], 3, "heun")
        torch.testing.assert_close(drawn[:, :, part], expected, rtol=1e-9, atol=1e-9)


@CONTEXT
def test_noise_prediction_streams_too(context):
    model = small(positions="space")
    objective = NoisePrediction()
    options = {"context": context, "steps": 4, "objective": objective, "batch": 2}
    drawn = draw(VideoStream(model, **options), 3)
    assert drawn.isfinite().all()
    if context == "shared":
        torch.testing.assert_close(VideoStream(model, **options).next(frames=3), drawn, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_context_noise_remembers_frames_as_the_training_showed_them():
    """Each finished frame enters the past at that time, with noise of its own, the same in every run."""
    model = small(n_classes=4, positions="space")
    stream = VideoStream(model, [1, 2], steps=2, context_noise=0.4, seed=7)
    drawn = draw(stream, 3)
    noise, past = VideoStream(model, batch=2, context="shared", seed=7)._noise(3, REMEMBERED), None
    shown = 0.6 * drawn + 0.4 * noise
    time = torch.full((2,), 400.0, dtype=torch.float64)
    _, past = model(shown, time, labels=torch.tensor([1, 2]), frame_causal=True, return_past=True)
    for held, expected in zip(stream.caches[0].state_dict().values(), past.state_dict().values(), strict=True):
        torch.testing.assert_close(held, expected, rtol=1e-9, atol=1e-9)
    again = VideoStream(model, [1, 2], steps=2, context_noise=0.4, seed=7)
    assert torch.equal(draw(again, 3), drawn)
    plain = draw(VideoStream(model, [1, 2], steps=2, seed=7), 3)
    assert torch.equal(plain[:, :, :2], drawn[:, :, :2]) and not torch.isclose(plain[:, :, 2:], drawn[:, :, 2:]).all()
    watching = VideoStream(model, [1, 2], steps=2, context_noise=0.4, seed=7)
    watching.prefill(drawn)
    torch.testing.assert_close(watching.next(), stream.next(), rtol=1e-9, atol=1e-9)


# What a stream is


@CONTEXT
def test_a_frame_depends_on_the_seed_its_number_and_its_video_alone(context):
    model = small(n_classes=4, positions="space")
    options = {"context": context, "steps": 2}
    whole = draw(VideoStream(model, [0, 1, 2], seed=4, **options), 3)
    assert torch.equal(draw(VideoStream(model, [0, 1, 2], seed=4, **options), 3), whole)
    torch.testing.assert_close(
        draw(VideoStream(model, [0, 1], seed=4, **options), 3), whole[:2], rtol=1e-10, atol=1e-10
    )
    other = draw(VideoStream(model, [0, 1, 2], seed=5, **options), 3)
    assert not torch.isclose(other, whole).any()
    same_label = draw(VideoStream(model, [1, 1], seed=4, **options), 2)
    assert not torch.isclose(same_label[0], same_label[1]).any()
    assert not torch.isclose(same_label[:, :, :2], same_label[:, :, 2:]).any()


@MIXER
@CONTEXT
def test_a_saved_stream_goes_on_bit_for_bit(mixer, context, tmp_path):
    model = small(mixer=mixer, positions="space", **CONDITIONS["text"] | CONDITIONS["class"])
    given = conditions(model)
    options = {"context": context, "steps": 2, "solver": "heun", "guidance": 1.5, "seed": 9, "window": 3}
    options |= {"context_noise": 0.3} if context == "clean" else {}
    stream = VideoStream(model, objective=FlowMatching(2.0), **options, **given)
    draw(stream, 4)
    stream.save(tmp_path / "stream.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]
    restored = VideoStream.load(tmp_path / "stream.safetensors", model)
    assert same(stream, restored)
    assert torch.equal(draw(stream, 3), draw(restored, 3)) and same(stream, restored)


@CONTEXT
@pytest.mark.parametrize("watched", [False, True])
def test_a_stream_can_be_saved_before_its_first_frame(context, watched, tmp_path):
    model = small(n_classes=4)
    stream = VideoStream(model, [0, 1], context=context, steps=2)
    if watched:
        stream.prefill(torch.zeros(2, 3, 4, 4, 6))
    stream.save(tmp_path / "stream")
    restored = VideoStream.load(tmp_path / "stream", model)
    assert same(stream, restored) and torch.equal(stream.next(), restored.next())


@CONTEXT
def test_forks_part_and_rewinding_goes_back(context):
    model = small(n_classes=4, positions="space")
    stream = VideoStream(model, [0, 1], context=context, steps=2)
    first = draw(stream, 2)
    kept, fork, reseeded = stream.fork(), stream.fork(), stream.fork(seed=1)
    going_on = draw(stream, 2)
    assert torch.equal(draw(fork, 2), going_on) and same(fork, stream)
    assert not torch.isclose(draw(reseeded, 2), going_on).any()
    turned = kept.fork().next(labels=[3, 3])
    assert not torch.equal(turned, going_on[:, :, :2])
    stream.restore(kept)
    assert stream.frame == 2 and same(stream, kept)
    assert torch.equal(draw(stream, 2), going_on)
    assert torch.equal(draw(VideoStream(model, [0, 1], context=context, steps=2), 2), first)


def test_the_old_names_of_prefill_and_restore_still_work():
    stream, other = (VideoStream(small(positions="space"), steps=1) for _ in range(2))
    snapshot, video = stream.fork(), torch.randn(1, 3, 4, 4, 6, dtype=torch.float64)
    stream.watch(video)
    other.prefill(video)
    assert same(stream, other)
    stream.rewind(snapshot)
    assert stream.frame == 0 and same(stream, snapshot)


@CONTEXT
@GUIDANCE
def test_what_a_stream_remembers_is_what_the_docs_say(context, guidance):
    """docs/streaming.md: bytes = videos x evaluations x layers x ((2 C a + 8) + 2 S D b), for ever."""
    model = small(mixer="power", n_classes=3, positions="space").float()
    stream = VideoStream(model, [0, 1], context=context, steps=3, solver="heun", guidance=guidance)
    videos, seen = 2 * (1 if guidance == 1 else 2), 6 if context == "shared" else 1
    width, patches = 2 * 16, 2 * 3
    expected = videos * seen * 2 * ((2 * width * 4 + 8) + 2 * patches * 16 * 4)
    for _ in range(3):
        stream.next()
        assert stream.nbytes == expected


@MIXER
@CONTEXT
@torch.no_grad()
def test_watched_frames_are_continued(mixer, context):
    model = small(mixer=mixer, n_classes=4, positions="space")
    video = torch.randn(2, 3, 6, 4, 6, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
    stream = VideoStream(model, [1, 2], context=context, steps=2)
    stream.prefill(video, labels)
    pieces = VideoStream(model, [1, 2], context=context, steps=2)
    for frame in range(3):
        pieces.prefill(video[:, :, 2 * frame : 2 * frame + 2], labels[:, frame])
    assert stream.frame == pieces.frame == 3
    torch.testing.assert_close(stream.next(), pieces.next(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(stream.next(), VideoStream(model, [1, 2], context=context, steps=2).next())
    _, past = model(video, torch.zeros(2), labels=labels, frame_causal=True, return_past=True)
    again = VideoStream(model, [1, 2], context=context, steps=2)
    again.prefill(video, labels)
    for held in again.caches:
        torch.testing.assert_close(list(held.state_dict().values()), list(past.state_dict().values()))


def test_sample_frames_yields_the_frames_of_a_stream():
    model = small(n_classes=4, positions="space")
    expected = draw(VideoStream(model, [1, 3], steps=2, seed=2), 3)
    frames = list(sample_frames(model, 3, [1, 3], steps=2, seed=2))
    assert len(frames) == 3 and torch.equal(torch.cat(frames, dim=2), expected)
    endless = sample_frames(model, labels=[1, 3], steps=2, seed=2)
    assert torch.equal(torch.cat([next(endless) for _ in range(3)], dim=2), expected)
    actions = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    given = expected[:, :, :2]
    stream = VideoStream(model, batch=2, steps=2)
    stream.prefill(given, actions[:, :1])
    turned = torch.cat([stream.next(actions[:, f]) for f in (1, 2, 3)], dim=2)
    frames = list(sample_frames(model, labels=actions, given=given, steps=2))
    assert torch.equal(torch.cat(frames, dim=2), turned)
    with pytest.raises(ValueError, match="labels: expected 6 for each video, 1 given frames and 5 to draw, got 4"):
        next(sample_frames(model, 5, actions, given=given, steps=2))


def test_forgetting_and_resolution_reach_the_model():
    model = small(positions="space")
    plain, other = VideoStream(model, steps=2), VideoStream(model, steps=2, window=2)
    assert torch.equal(draw(plain, 2), draw(other, 2))
    assert not torch.isclose(plain.next(), other.next()).all()
    assert VideoStream(model, steps=1, decay=0.5).caches[0].context_window == (0, 0.5)
    assert VideoStream(model, steps=1, size=(8, 4)).next().shape == (1, 3, 2, 8, 4)


def resident_bytes():
    """Memory that the process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("form", ["product", "power"])
@torch.no_grad()
def test_100_000_frames_take_the_memory_of_a_few_and_lose_nothing(form):
    """Updates of one layer in float32: resident memory stays, and the mean is that of float64 to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(50, 1, 4, 64, generator=generator)
    gate, coeff = torch.zeros(1, 1, 64), torch.tensor([[0.5, -0.25]]).expand(64, 2).contiguous()
    coeff, state = coeff if form == "power" else None, State.empty(1, 64)
    for number in range(100_000):
        polynomial_update(frames[number % 50], gate, state, coeff, form=form, degree=2)
        if number == 10_000:
            before = resident_bytes()
    assert resident_bytes() - before < 2**20
    exact = polynomial_state(
        frames.double().flatten(0, 2)[None], None if coeff is None else coeff.double(), form=form, degree=2
    )
    assert state.count.item() == 400_000
    torch.testing.assert_close(
        state.mean().double(), exact.mean(), rtol=1e-6, atol=1e-6 * exact.mean().abs().max().item()
    )


@pytest.mark.parametrize("context", ["clean", "shared"])
def test_a_long_stream_takes_the_memory_of_a_short_one(context):
    model = small(n_layers=1, positions="space", patch=(1, 2, 2)).float()
    stream = VideoStream(model, steps=1, context=context)
    sizes = {}
    for number in range(1, 1201):
        stream.next()
        if number in (200, 1200):
            sizes[number] = resident_bytes(), stream.nbytes
    assert sizes[1200][1] == sizes[200][1]
    assert sizes[1200][0] - sizes[200][0] < 2**20


# Errors


def test_settings_are_in_the_signature_and_on_the_stream():
    model = small(positions="space", n_classes=0)
    stream = VideoStream(model, steps=3, guidance=1.0, seed=5)
    assert (stream.steps, stream.seed, stream.context) == (3, 5, "clean") and stream.pasts is stream.caches
    assert {"context", "context_noise", "steps", "solver", "guidance", "seed"} <= set(signature(VideoStream).parameters)
    fork = stream.fork(seed=6)
    stream.rewind(kept=fork)  # its name in 0.1
    assert stream.seed == 6
    with pytest.raises(TypeError, match="VideoStream.*unexpected keyword argument 'speed'"):
        VideoStream(model, speed=2)
    with pytest.raises(TypeError, match="objective: expected an Objective such as"):
        VideoStream(model, objective="flow")
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        stream.speed  # noqa: B018
