"""Streams: frame after frame equals all at once, files and forks are exact, errors leave the stream as it was."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from video_cases import CONDITION, CONDITIONS, HYBRID, MIXER, small

from pom_ext import State, polynomial_state, polynomial_update
from pom_ext.diffusion import FlowMatching, NoisePrediction
from pom_ext.diffusion.objectives import video_loss
from pom_ext.diffusion.solvers import denoise
from pom_ext.sampling import sample_frames
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN, REMEMBERED

SOLVER = pytest.mark.parametrize("solver", ["euler", "heun"])
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 2.5])
CONTEXT = pytest.mark.parametrize("context", ["clean", "shared"])


def conditions(model, batch=2):
    """Conditions of a stream, for the model."""
    generator = torch.Generator().manual_seed(3)
    given = {"batch": batch}
    if model.text_dim:
        text = torch.randn(batch, 5, model.text_dim, generator=generator, dtype=torch.float64)
        given |= {"text": text, "text_weight": torch.rand(batch, 5, generator=generator, dtype=torch.float64)}
    if model.n_classes:
        given["labels"] = torch.arange(batch) % model.n_classes
    return given


def draw(stream, frames):
    return torch.cat([stream.next() for _ in range(frames)], dim=2)


def same(stream, other):
    """Both remember the same, bit for bit."""
    pairs = zip(stream.pasts, other.pasts, strict=True)
    return stream.frame == other.frame and all(
        torch.equal(a, b)
        for p, q in pairs
        for a, b in zip(p.state_dict().values(), q.state_dict().values(), strict=True)
    )


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

    expected = denoise(predict, noise, FlowMatching(3.0), 4)
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

        expected = denoise(predict, noise[:, :, part], FlowMatching(), 3, "heun")
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
    for held, expected in zip(stream.pasts[0].state_dict().values(), past.state_dict().values(), strict=True):
        torch.testing.assert_close(held, expected, rtol=1e-9, atol=1e-9)
    again = VideoStream(model, [1, 2], steps=2, context_noise=0.4, seed=7)
    assert torch.equal(draw(again, 3), drawn)
    plain = draw(VideoStream(model, [1, 2], steps=2, seed=7), 3)
    assert torch.equal(plain[:, :, :2], drawn[:, :, :2]) and not torch.isclose(plain[:, :, 2:], drawn[:, :, 2:]).all()
    watching = VideoStream(model, [1, 2], steps=2, context_noise=0.4, seed=7)
    watching.watch(drawn)
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
        stream.watch(torch.zeros(2, 3, 4, 4, 6))
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
    stream.rewind(kept)
    assert stream.frame == 2 and same(stream, kept)
    assert torch.equal(draw(stream, 2), going_on)
    assert torch.equal(draw(VideoStream(model, [0, 1], context=context, steps=2), 2), first)


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
    stream.watch(video, labels)
    pieces = VideoStream(model, [1, 2], context=context, steps=2)
    for frame in range(3):
        pieces.watch(video[:, :, 2 * frame : 2 * frame + 2], labels[:, frame])
    assert stream.frame == pieces.frame == 3
    torch.testing.assert_close(stream.next(), pieces.next(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(stream.next(), VideoStream(model, [1, 2], context=context, steps=2).next())
    _, past = model(video, torch.zeros(2), labels=labels, frame_causal=True, return_past=True)
    again = VideoStream(model, [1, 2], context=context, steps=2)
    again.watch(video, labels)
    for held in again.pasts:
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
    stream.watch(given, actions[:, :1])
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
    assert VideoStream(model, steps=1, decay=0.5).pasts[0].forgetting == (0, 0.5)
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


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"context": "noisy"}, ValueError, "context: expected one of clean, shared, got 'noisy'"),
        ({"steps": 0}, ValueError, "steps: expected at least 1"),
        ({"solver": "rk4"}, ValueError, "solver: expected one of"),
        ({"solver": "heun", "objective": NoisePrediction()}, ValueError, "solver: 'heun' is for flow matching"),
        ({"labels": [0.5]}, ValueError, "labels: expected one integer for each of 1 videos, got torch.float32"),
        ({"labels": [0, 1], "batch": 3}, ValueError, r"each of 3 videos, got torch.int64 \(2,\)"),
        ({"size": (4, 5)}, ValueError, "size: expected multiples of the patch"),
        ({"context_noise": 1.0}, ValueError, "context_noise: expected at least 0 and less than 1, .* got 1.0"),
        ({"context_noise": 0.1, "context": "shared"}, ValueError, "context_noise: .* with context='clean', got 0.1"),
        ({"window": -1}, ValueError, "window: expected an integer of at least 0"),
    ],
)
def test_bad_streams_are_named(options, error, message):
    with pytest.raises(error, match=message):
        VideoStream(small(n_classes=4), **{"labels": [0], **options})


def test_what_is_no_video_model_is_named():
    with pytest.raises(TypeError, match="model: expected a VideoDiT, got Linear"):
        VideoStream(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="guidance: a model without classes and text draws with guidance=1 only"):
        VideoStream(small(), guidance=2.0)


@CONTEXT
def test_after_an_error_the_stream_stands_at_its_last_good_frame(context):
    model = small(n_classes=4)  # positions end after six frames
    stream = VideoStream(model, [0, 1], context=context, steps=2)
    drawn = draw(stream, 5)
    kept = stream.fork()
    frame = torch.zeros(2, 3, 2, 4, 6)
    for wrong, error, message in [
        (lambda: stream.next([0, 5]), ValueError, r"labels: expected 0 to 4 \(no class\), got values from 0 to 5"),
        (
            lambda: stream.next([0, 1, 2]),
            ValueError,
            r"labels: expected one integer for each of 2 videos, got .*\(3,\)",
        ),
        (lambda: stream.next(frames=0), ValueError, "frames: expected 1, or more with context='shared', got 0"),
        (
            lambda: stream.watch(frame[:1]),
            ValueError,
            r"video: expected 2 videos \(B, C, T, H, W\), got \(1, 3, 2, 4, 6\)",
        ),
        (lambda: stream.watch([1]), ValueError, "video: expected 2 videos .* got list"),
        (lambda: stream.watch(frame[..., :4]), ValueError, "the stream's frames are 4 x 6, got 4 x 4"),
        (lambda: stream.watch(frame[:, :, :1]), ValueError, "video: expected frames, height and width to be multiples"),
        (lambda: stream.rewind(VideoStream(small())), TypeError, "kept: expected a stream of the same model"),
    ]:
        with pytest.raises(error, match=message):
            wrong()
        assert same(stream, kept)
    last = stream.next()
    with pytest.raises(ValueError, match="positions='sincos' end at length=12"):
        stream.next()
    assert stream.frame == 6
    whole = draw(VideoStream(model, [0, 1], context=context, steps=2), 6)
    assert torch.equal(torch.cat([drawn, last], dim=2), whole)


def test_a_class_model_asks_for_labels():
    with pytest.raises(TypeError, match="labels: this model was built with n_classes=4 and needs them"):
        VideoStream(small(n_classes=4)).next()


@pytest.fixture
def saved(tmp_path):
    stream = VideoStream(small(n_classes=4), [0, 1], steps=2)
    stream.next()
    stream.save(tmp_path / "stream")
    return tmp_path / "stream"


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_files_are_named(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{saved.name} is truncated or is not a safetensors file"):
        VideoStream.load(saved, small(n_classes=4))


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: small(n_classes=4, n_layers=3), "stream of another model: n_layers 2, not 3"),
        (lambda: small(n_classes=4, mixer=HYBRID), "another model: mixer power, not .*; n_layers|another model: mixer"),
        (lambda: small(seed=1, n_classes=4), "a model like this one, but with other weights or of another dtype"),
        (lambda: small(n_classes=4).float(), "a model like this one, but with other weights or of another dtype"),
    ],
)
def test_streams_of_other_models_are_named(saved, model, message):
    with pytest.raises(ValueError, match=message):
        VideoStream.load(saved, model())


def test_files_that_hold_no_stream_are_named(saved, tmp_path):
    from pom_ext.models.checkpoint import load_model, save_checkpoint

    with pytest.raises(FileNotFoundError, match="no file at"):
        VideoStream.load(tmp_path / "nothing", small())
    model = small(n_classes=4)
    save_checkpoint(tmp_path / "model", {"ema": model.state_dict()}, {"model": model.config})
    with pytest.raises(ValueError, match="holds a model, not a stream"):
        VideoStream.load(tmp_path / "model", model)
    with pytest.raises(ValueError, match="holds no model"):
        load_model(saved)


def test_a_past_cut_out_of_the_file_is_noticed(saved):
    """A file whose header is whole, and whose settings ask for more than it holds."""
    raw = saved.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    settings = json.loads(header["__metadata__"]["pom_ext"])
    settings["stream"]["context"] = "shared"
    header["__metadata__"]["pom_ext"] = json.dumps(settings)
    changed = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])
    with pytest.raises(ValueError, match="holds 1 pasts, its settings ask for 2"):
        VideoStream.load(saved, small(n_classes=4))


# Training


@MIXER
@CONDITION
@pytest.mark.parametrize("given", [0, 2])
def test_training_in_parallel_is_frame_by_frame_loss_for_loss(mixer, condition, given):
    """The loss of all frames in one pass is the mean of the losses of each frame after the finished ones before it."""
    model = small(mixer=mixer, **CONDITIONS[condition])
    recorded = []

    class Recorder(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            recorded.append((noisy, time, arguments))
            return model(noisy, time, **arguments)

    conditions_ = conditions(model, batch=3)
    text = {name: conditions_[name] for name in ("text", "text_weight") if name in conditions_}
    video, labels = torch.randn(3, 3, 12, 4, 6, dtype=torch.float64), conditions_.get("labels")
    loss = video_loss(Recorder(), FlowMatching(), video, labels, torch.Generator().manual_seed(0), given=given, **text)
    (noisy, time, arguments), past, losses = recorded[0], None, []
    assert torch.equal(arguments["finished"], video)
    assert (time[:, :given] == 0).all() and torch.equal(noisy[:, :, : 2 * given], video[:, :, : 2 * given])
    assert len(time[:, given:].unique()) == 3 * (6 - given)
    for frame in range(6):
        part = slice(2 * frame, 2 * frame + 2)
        out = model(noisy[:, :, part], time[:, frame], labels=labels, **text, frame_causal=True, past=past)
        t = time[:, frame].view(3, 1, 1, 1, 1) / 1000
        if frame >= given:
            noise = (noisy[:, :, part] - (1 - t) * video[:, :, part]) / t
            losses.append((out - (noise - video[:, :, part])).square().mean())
        finished = video[:, :, part], torch.zeros(3, dtype=torch.float64)
        _, past = model(*finished, labels=labels, **text, frame_causal=True, past=past, return_past=True)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-8, atol=1e-8)


def test_a_frame_is_remembered_with_noise_of_its_own():
    """Not with the noise that it was drawn from, which the training never showed."""
    stream = VideoStream(small(), batch=2, seed=7)
    drawn, remembered = stream._noise(3, DRAWN).flatten(), stream._noise(3, REMEMBERED).flatten()
    assert torch.corrcoef(torch.stack([drawn, remembered]))[0, 1].abs() < 4 / len(drawn) ** 0.5


def test_context_noise_gives_the_finished_frames_a_time_of_their_own():
    recorded = []

    class Recorder(torch.nn.Module):
        config = small().config

        def forward(self, noisy, time, **arguments):
            recorded.append(arguments)
            return noisy

    video = torch.randn(64, 3, 12, 4, 6, dtype=torch.float64)
    video_loss(Recorder(), FlowMatching(), video, None, torch.Generator().manual_seed(0), context_noise=0.5)
    finished, time = recorded[0]["finished"], recorded[0]["finished_time"]
    assert time.shape == (64,) and 0 <= time.min() < 30 and 470 < time.max() < 500
    share = (time / 1000).view(-1, 1, 1, 1, 1)
    noise = (finished - (1 - share) * video) / share
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert not torch.isclose(noise[:, :, 0], noise[:, :, 1]).any()


def test_shared_noise_has_one_time_for_a_video():
    model, recorded = small(), []

    class Recorder(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            recorded.append((noisy, time, arguments))
            return torch.zeros_like(noisy)

    video = torch.randn(4, 3, 12, 4, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    loss = video_loss(Recorder(), FlowMatching(), video, None, generator, context="shared", given=1)
    noisy, time, arguments = recorded[0]
    assert arguments == {"labels": None, "frame_causal": True}
    assert (time[:, 0] == 0).all() and (time[:, 1:] == time[:, 1:2]).all() and len(time[:, 1].unique()) == 4
    assert torch.equal(noisy[:, :, :2], video[:, :, :2])
    assert loss > 1
    for given in (-1, 6):
        with pytest.raises(ValueError, match="given: expected 0 to 5 of 6 frames"):
            video_loss(Recorder(), FlowMatching(), video, None, generator, given=given)
    with pytest.raises(ValueError, match="context: expected one of clean, shared, got 'both'"):
        video_loss(Recorder(), FlowMatching(), video, None, generator, context="both")
