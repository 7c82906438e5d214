"""Training all frames in one pass is the loss of the frames evaluated one by one."""

import itertools

import pytest
import torch
from stream_cases import conditions
from video_cases import CONDITION, CONDITIONS, MIXER, small

from pom_ext._random import seeded_generator
from pom_ext.diffusion import FlowMatching, NoisePrediction, Objective
from pom_ext.diffusion.losses import video_loss
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN, REMEMBERED


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


def test_context_noise_gives_every_finished_frame_a_time_of_its_own():
    recorded = []

    class Recorder(torch.nn.Module):
        config = small(read="split", sink=2).config

        def forward(self, noisy, time, **arguments):
            recorded.append(arguments)
            return noisy

    video = torch.randn(64, 3, 12, 4, 6, dtype=torch.float64)
    video_loss(Recorder(), FlowMatching(), video, None, torch.Generator().manual_seed(0), context_noise=0.5)
    finished, time = recorded[0]["finished"], recorded[0]["finished_time"]
    assert time.shape == (64, 6)
    assert (time[:, :2] == 0).all(), "a sink is not noised"
    assert torch.equal(finished[:, :, :4], video[:, :, :4])
    quiet = (time == 0).all(dim=1)
    assert 8 <= quiet.sum() <= 24, "a quarter of the clips has no noise at all"
    assert torch.equal(finished[quiet], video[quiet])
    time, share = time[~quiet, 2:], (time[~quiet, 2:] / 1000).view(-1, 1, 4, 1, 1).repeat_interleave(2, dim=2)
    assert len(time.unique()) == time.numel() and 0 < time.min() < 30 and 470 < time.max() < 500
    noise = (finished[~quiet, :, 4:] - (1 - share) * video[~quiet, :, 4:]) / share
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 4 / noise.numel() ** 0.5
    assert not torch.isclose(noise[:, :, 0], noise[:, :, 1]).any()


@pytest.mark.parametrize("objective", [FlowMatching(2.0), NoisePrediction()], ids=["flow", "noise"])
def test_own_frames_are_drawn_behind_own_frames_in_the_place_of_the_true_ones(objective):
    """A perfect model draws the true frames again, whatever the generation and the noise."""
    video, recorded = 2 * torch.rand(8, 3, 12, 4, 6, dtype=torch.float64) - 1, []
    model, options = small(read="split", sink=1), {"context": "self", "context_noise": 0.5}

    class Perfect(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            recorded.append((noisy, time, arguments))
            one, zero = torch.ones(48, dtype=torch.float64), torch.zeros(48, dtype=torch.float64)
            factors = (
                objective.add_noise(one, zero, time.float().flatten()),
                objective.add_noise(zero, one, time.float().flatten()),
            )
            signal, spread = (t.view(8, 1, 6, 1, 1).repeat_interleave(2, dim=2) for t in factors)
            noise = (noisy - signal * video) / spread
            return noise - video if isinstance(objective, FlowMatching) else noise

    calls = []
    for seed in range(40):
        recorded.clear()
        loss = video_loss(Perfect(), objective, video, None, torch.Generator().manual_seed(seed), **options)
        calls.append(len(recorded))
        assert loss < 1e-20
        arguments = recorded[-1][2]
        share = (arguments["finished_time"] == 0).view(8, 1, 6, 1, 1).repeat_interleave(2, dim=2).expand_as(video)
        torch.testing.assert_close(arguments["finished"][share], video[share], rtol=1e-9, atol=1e-9)
    assert set(calls) == {1, 2, 3, 4}, "none to three generations"
    assert 10 <= sum(count == 1 for count in calls) <= 24, "three fifths of the batches, at the end of the training"
    recorded.clear()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        video_loss(Perfect(), objective, video, None, generator, progress=0.0, **options)
    assert len(recorded) == 20, "and none at its beginning"


def test_own_frames_are_those_of_the_model_and_carry_no_gradient():
    """Generation after generation, each sees the one before; the sink stays true."""
    model, objective = small(read="split", fade="head", sink=1), FlowMatching()
    video, recorded = torch.randn(2, 3, 12, 4, 6, dtype=torch.float64), []

    class Recorder(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            prediction = model(noisy, time, **arguments)
            recorded.append((noisy, time, arguments["finished"], prediction))
            return prediction

    seed = next(
        seed
        for seed in range(100)
        if recorded.clear() is None
        and video_loss(Recorder(), objective, video, None, torch.Generator().manual_seed(seed), context="self") > 0
        and len(recorded) == 4
    )
    assert seed >= 0 and torch.equal(recorded[0][2], video)
    for (noisy, time, _, prediction), (_, _, finished, _) in itertools.pairwise(recorded):
        share = (time.float() / 1000).double().view(2, 1, 6, 1, 1).repeat_interleave(2, dim=2)
        assert not prediction.requires_grad and (time >= 150).all() and (time <= 900).all()
        drawn = (noisy - share * prediction).clamp(-1, 1)
        torch.testing.assert_close(finished[:, :, 2:], drawn[:, :, 2:], rtol=1e-12, atol=1e-12)
        assert torch.equal(finished[:, :, :2], video[:, :, :2])
    assert recorded[-1][3].requires_grad


@pytest.mark.parametrize("per_frame", [False, True], ids=["classes", "actions"])
def test_some_own_frames_are_drawn_for_another_label(per_frame):
    """Of classes, which give a video its shape; not of actions, of which another gives another motion."""
    labels, given = torch.arange(64 * 6).view(64, 6) % 4 if per_frame else torch.arange(64) % 4, []

    class Recorder(torch.nn.Module):
        config = small(n_classes=4).config

        def forward(self, noisy, time, **arguments):
            given.append(arguments["labels"])
            return torch.zeros_like(noisy)

    video, changed = torch.zeros(64, 3, 12, 4, 6, dtype=torch.float64), []
    for seed in range(20):
        given.clear()
        generator = torch.Generator().manual_seed(seed)
        video_loss(Recorder(), FlowMatching(), video, labels, generator, context="self", other_label=0.5)
        assert torch.equal(given[-1], labels), "what counts in the loss has its own label"
        changed += [(redrawn != labels).double().mean().item() for redrawn in given[:-1]]
        assert all(redrawn.min() >= 0 and redrawn.max() <= 4 for redrawn in given)
    share = sum(changed) / len(changed)
    assert share == 0 if per_frame else abs(share - 0.5 * 0.8) < 0.05  # one in five is drawn for its own label again


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
    with pytest.raises(ValueError, match="context: expected one of clean, shared, self, got 'both'"):
        video_loss(Recorder(), FlowMatching(), video, None, generator, context="both")


def test_an_objective_without_an_estimate_has_no_own_frames():
    """Told at once: own frames are drawn at random, and rarely at first."""

    class Bare(Objective):
        label = "a bare one"
        draw_time, add_noise = FlowMatching.draw_time, FlowMatching.add_noise
        target, denoise = FlowMatching.target, FlowMatching.denoise

    video, options = torch.randn(1, 3, 4, 4, 6, dtype=torch.float64), {"context": "self", "progress": 0.0}
    with pytest.raises(ValueError, match="context: expected clean or shared with a bare one, got 'self'"):
        video_loss(small(), Bare(), video, None, seeded_generator(0), **options)
